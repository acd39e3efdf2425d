// Attention backward on a CPU. With P_ij = exp(s_ij - lse_i), Z the dropout factor and delta_i = dO_i . O_i - dlse_i:
//
//     dV = (Z P)^T dO      dS = P (Z (dO V^T) - delta)      dQ = scale dS K      dK = scale dS^T Q      dbias = dS
//
// With a soft cap dQ and dK take dS times its slope. A bias by relative position gets the sums of dS along diagonals: a
// tile adds to those that it meets, each of them in the order of the tiles along it, for the pipeline below lets a tile
// start after all tiles above it and to the left.
//
// Weights W = Z P that were returned may have a gradient of their own, dW: it adds to dO V^T, and sum_j dW_ij W_ij to
// delta_i.
//
// Phases, each parallel over tasks:
//     0  rows             a tile of queries: delta, and what its weights are taken from (see measure_rows)
//     1  dQ, dK, dV       a span of keys of one (batch, key/value head): five products a tile; under a mask that is a
//                         band a run of queries instead (attention_backward_bands.h)
//     2  dbias            a tile of the bias, over every dimension that it broadcasts, unless phase 1 stored it on its
//     way
//
// A task of phase 1 owns dK and dV of its span and adds to dQ, tile by tile of queries, after the span before it has
// added to the same tile: the spans of a head run behind one another like the stages of a pipeline, so that one long
// sequence uses every core. Every sum has its terms in one order whatever the spans and the threads: the same bits.
#pragma once

#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#endif

#include "attention_backward_rows.h"

namespace efficient_attn {
namespace {

inline void wait_until(const int64_t* counter, int64_t least) {
    for (int64_t turn = 1; __atomic_load_n(counter, __ATOMIC_ACQUIRE) < least; ++turn) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
#if defined(__unix__) || defined(__APPLE__)
        if (turn % 64 == 0) sched_yield();  // the other thread may be waiting for this core
#endif
    }
}

template <class A>
struct BackwardTile {
    A *Qt, *dOt, *Q, *dO, *S, *dP, *pairs, *slope, *folded, *top, *rest, *delta, *K_buffer, *V_buffer, *buffer,
        *scratch, *dK, *dV, *dQt;
    double* sum;
    uint64_t *bits, *keep;
    Pair *Q_columns, *dO_columns, *Q_pairs, *dO_pairs, *K_pairs, *dS_pairs;  // with products of pairs only
    BFloat16* rounded;
    A* scale;
    A *K_place, *V_place;  // of copies, where they are made
    CopiedRows<A> K_copy, V_copy;

    BackwardTile(const AttentionParams& p, char* memory) {
        const int64_t D = whole_vectors<A>(p.D), Dv = whole_vectors<A>(p.Dv), widest = max_of(D, Dv);
        Arena arena{memory};
        Qt = arena.take<A>(p.D * kQueries);
        dOt = arena.take<A>(p.Dv * kQueries);
        Q = arena.take<A>(D * kQueries);
        dO = arena.take<A>(Dv * kQueries);
        S = arena.take<A>(kKeys * kQueries);
        dP = arena.take<A>(kKeys * kQueries);
        pairs = arena.take<A>(has_bias(p) || p.weights.data || p.diagonals.hides ? kKeys * kQueries : 0);
        slope = arena.take<A>(p.softcap > 0 ? kKeys * kQueries : 0);
        folded = arena.take<A>(p.ddiagonals ? fold_elements<A>(kKeys, kQueries) : 0);
        top = arena.take<A>(kQueries);
        rest = arena.take<A>(kQueries);
        delta = arena.take<A>(kQueries);
        K_buffer = arena.take<A>(kKeys * max_of(p.D, pair_depth(p.D)));
        V_buffer = arena.take<A>(kKeys * max_of(p.Dv, pair_depth(p.Dv)));
        buffer = arena.take<A>(kKeys * widest);
        scratch = arena.take<A>(transpose_scratch<A>(max_of(kKeys, widest)));
        const int64_t keys = has_bands(p) ? p.band_keys : key_span<A>(p), copied = p.copies_keys ? keys : 0;
        dK = arena.take<A>(keys * D);
        dV = arena.take<A>(keys * Dv);
        K_place = arena.take<A>(copied * p.D);
        V_place = arena.take<A>(copied * p.Dv);
        dQt = arena.take<A>(has_bands(p) ? p.D * kQueries : 0);
        sum = arena.take<double>(p.dbias.data ? kKeys * kQueries : 0);
        bits = arena.take<uint64_t>(kKeys);
        keep = arena.take<uint64_t>(kKeys);
        if constexpr (kMultipliesPairs) {
            Q_columns = arena.take<Pair>(pair_depth(p.D) * kQueries);
            dO_columns = arena.take<Pair>(pair_depth(p.Dv) * kQueries);
            Q_pairs = arena.take<Pair>(kQueries / 2 * D);
            dO_pairs = arena.take<Pair>(kQueries / 2 * Dv);
            K_pairs = arena.take<Pair>(kKeys / 2 * p.D);
            dS_pairs = arena.take<Pair>(kKeys / 2 * kQueries);
            rounded = arena.take<BFloat16>(kKeys * kQueries);
            scale = arena.take<A>(kQueries);
        }
        end = arena.next;
    }

    static int64_t bytes(const AttentionParams& p) { return BackwardTile(p, kNoMemory).end - kNoMemory; }

  private:
    char* end;
};

// A tile of queries of one (b, h), as the phases walk them.
struct QueryTile {
    int64_t b, h;
    Range rows;
    int64_t block, block_row, count;
};

inline QueryTile query_tile(const AttentionParams& p, const QueryTiling& tiling, int64_t b, int64_t h, int64_t tile) {
    const Range rows = tile_rows(p, tiling, tile);
    const int64_t block_q = p.mask.block_q;
    return {b,
            h,
            rows,
            p.mask.indptr ? rows.begin / block_q : 0,
            p.mask.indptr ? rows.begin % block_q : 0,
            rows.end - rows.begin};
}

template <class T, class A>
inline void load_query_tile(const AttentionParams& p, const QueryTile& q, const BackwardShared<A>& shared, int64_t w,
                            BackwardTile<A>& t) {
    const double factor = score_scale(p);
    if constexpr (kPairProducts<T>) {
        pack_paired_columns<T>(p.query, q.b, q.h, q.rows.begin, q.count, p.D, w, t.scratch, t.Q_columns);
        pack_paired_columns<T>(p.grad_out, q.b, q.h, q.rows.begin, q.count, p.Dv, w, t.scratch, t.dO_columns);
        for (int64_t r = 0; r < w; ++r) t.scale[r] = static_cast<A>(factor);
    } else {
        pack_transposed<T>(p.query, q.b, q.h, q.rows.begin, q.count, p.D, Scaled<A>(factor), w, t.scratch, t.Qt);
        pack_transposed<T>(p.grad_out, q.b, q.h, q.rows.begin, q.count, p.Dv, Unscaled{}, w, t.scratch, t.dOt);
    }
    const int64_t row = (q.b * p.Hq + q.h) * p.Nq + q.rows.begin;
    for (int64_t r = 0; r < w; ++r) {
        const bool exists = r < q.count;
        t.top[r] = exists ? shared.top[row + r] : kInfinity<A>;  // lanes without a row have weight 0
        t.rest[r] = exists ? shared.rest[row + r] : 0;
        t.delta[r] = exists ? shared.delta[row + r] : 0;
    }
}

// S becomes Z P, dP becomes dS.
template <class A, bool kNatural, bool kMasked, bool kDropped>
EA_NOINLINE void weight_gradients(int64_t keys, int64_t w, const BackwardTile<A>& t, A rescale) {
    for (int64_t lane = 0; lane < w; lane += kLanes<A>) {
        const Vec<A> top = load(t.top + lane), rest = load(t.rest + lane), delta = load(t.delta + lane);
        for (int64_t k = 0; k < keys; ++k) {
            A *s = t.S + k * w + lane, *g = t.dP + k * w + lane;
            const Vec<A> P = exponential<kNatural>((load(s) - top) - rest);
            Vec<A> gradient = load(g), weight = P;
            if constexpr (kDropped) {
                const Mask<A> kept = lanes_from_bits<A>(t.keep[k] >> lane);
                gradient = select<A>(kept, gradient * rescale, Vec<A>{});
                weight = select<A>(kept, P * rescale, Vec<A>{});
            }
            gradient = P * (gradient - delta);
            if constexpr (kMasked) {
                const Mask<A> visible = lanes_from_bits<A>(t.bits[k] >> lane);
                gradient = select<A>(visible, gradient, Vec<A>{});
                weight = select<A>(visible, weight, Vec<A>{});
            }
            store(s, weight);
            store(g, gradient);
        }
    }
}

// Fills S with the scores of the tile, and `keep`. Returns whether pairs are masked; then `bits` says which.
template <class T, class A>
inline bool score_pairs(const AttentionParams& p, const QueryTile& q, const Chunk& chunk, const Rows<Operand<T, A>>& K,
                        int64_t w, BackwardTile<A>& t) {
    const Range keys = chunk.keys;
    const int64_t n = keys.end - keys.begin;
    if constexpr (kPairProducts<T>) {
        score_tile(K, n, p.D, t.Q_columns, w, t.scale, t.S);
    } else {
        score_tile(K, n, p.D, t.Qt, w, t.S);
    }
    cap_scores<A>(p, n * w, t.S, t.slope);
    bool masked = visible_bits(p, q.b, q.h, q.rows, q.block_row, chunk, t.bits);
    masked = add_biases<T>(p, q.b, q.h, q.rows, keys, w, t.S, masked, t.bits, t.scratch, t.pairs);
    if (p.dropout_p > 0) kept_bits(p, q.b, q.h, {q.rows.begin, q.rows.begin + q.count}, keys, t.keep);
    return masked;
}

// The gradient of the tile's weights, into `pairs`: an equal share of that of their average, if that is given.
template <class T, class A>
inline void load_weight_gradients(const AttentionParams& p, const QueryTile& q, Range keys, int64_t w,
                                  BackwardTile<A>& t) {
    const bool average = p.weights.heads < p.Hq;
    load_pairs<T>(p.weights.data, p.weights.stride, q.b, average ? 0 : q.h, q.rows, keys, w, t.scratch, t.pairs);
    if (!average) return;
    const A share = static_cast<A>(1.0 / static_cast<double>(p.Hq));
    for (int64_t i = 0; i < (keys.end - keys.begin) * w; i += kLanes<A>)
        store(t.pairs + i, load<A>(t.pairs + i) * share);
}

// Fills S with Z P and dP with dS, both [keys][w]. Returns whether pairs are masked; then `bits` says which.
template <class T, class A>
inline bool score_gradients(const AttentionParams& p, const QueryTile& q, const Chunk& chunk,
                            const Rows<Operand<T, A>>& K, const Rows<Operand<T, A>>& V, int64_t w, BackwardTile<A>& t) {
    const Range keys = chunk.keys;
    const int64_t n = keys.end - keys.begin;
    if constexpr (kPairProducts<T>) {
        score_tile<T, A>(V, n, p.Dv, t.dO_columns, w, nullptr, t.dP);
    } else {
        score_tile(V, n, p.Dv, t.dOt, w, t.dP);
    }
    const bool masked = score_pairs<T>(p, q, chunk, K, w, t), dropped = p.dropout_p > 0;
    if (p.weights.data) {
        load_weight_gradients<T>(p, q, keys, w, t);
        for (int64_t i = 0; i < n * w; i += kLanes<A>) store(t.dP + i, load<A>(t.dP + i) + load(t.pairs + i));
    }
    const A rescale = static_cast<A>(1.0 / (1.0 - p.dropout_p));
    with_bool(is_natural(p), [&](auto natural) {
        with_bool(masked, [&](auto some_masked) {
            with_bool(dropped, [&](auto some_dropped) {
                weight_gradients<A, natural.value, some_masked.value, some_dropped.value>(n, w, t, rescale);
            });
        });
    });
    return masked;
}

// sum_j dW_ij W_ij of the queries of a tile, added to `sum`, for some keys; S holds their scores.
template <class A, bool kNatural>
EA_NOINLINE void add_weight_products(int64_t keys, int64_t w, bool masked, bool dropped, A rescale,
                                     const BackwardTile<A>& t, A* sum) {
    for (int64_t lane = 0; lane < w; lane += kLanes<A>) {
        const Vec<A> top = load(t.top + lane), rest = load(t.rest + lane);
        Vec<A> total = {};
        for (int64_t k = 0; k < keys; ++k) {
            const Vec<A> P = exponential<kNatural>((load(t.S + k * w + lane) - top) - rest);
            Vec<A> product = P * load(t.pairs + k * w + lane);
            if (dropped) product = select<A>(lanes_from_bits<A>(t.keep[k] >> lane), product * rescale, Vec<A>{});
            if (masked) product = select<A>(lanes_from_bits<A>(t.bits[k] >> lane), product, Vec<A>{});
            total += product;
        }
        store(sum + lane, load<A>(sum + lane) + total);
    }
}

// The rest of phase 0, where weights have a gradient: what it adds to delta.
template <class T, class A>
inline void weight_gradients_task(const AttentionParams& p, int64_t task, char* memory,
                                  const BackwardShared<A>& shared) {
    const int64_t tiles = row_tiles(p), head = task / tiles;
    const QueryTile q = query_tile(p, attention_tiling(p), head / p.Hq, head % p.Hq, task % tiles);
    if (q.count <= 0) return;
    const int64_t w = whole_lanes<T, A>(q.count), kv = q.h / (p.Hq / p.Hkv);
    BackwardTile<A> t(p, memory);
    load_query_tile<T>(p, q, shared, w, t);
    const A rescale = static_cast<A>(1.0 / (1.0 - p.dropout_p));
    for_each_chunk(p, q.b, q.h, q.block, q.rows, {0, p.Nk}, [&](const Chunk& chunk) {
        const Range keys = chunk.keys;
        const auto K = load_operand<T>(p.key, q.b, kv, keys, p.D, t.K_buffer);
        const bool masked = score_pairs<T>(p, q, chunk, K, w, t);
        load_weight_gradients<T>(p, q, keys, w, t);
        with_bool(is_natural(p), [&](auto natural) {
            add_weight_products<A, natural.value>(keys.end - keys.begin, w, masked, p.dropout_p > 0, rescale, t,
                                                  t.delta);
        });
    });
    for (int64_t r = 0; r < q.count; ++r) shared.delta[head * p.Nq + q.rows.begin + r] = t.delta[r];
}

// The rows of a tile of queries, as the factors of dK and dV. With products of pairs they are packed in Q_pairs and
// dO_pairs, and under a mask without the rows named here.
template <class T, class A>
struct QueryRows {
    Rows<Operand<T, A>> Q, dO;
    Poison Q_poison, dO_poison;
};

template <class T, class A>
inline QueryRows<T, A> load_query_rows(const AttentionParams& p, const QueryTile& q, const BackwardTile<A>& t) {
    const int64_t first = q.rows.begin;
    if constexpr (kPairProducts<T>) {
        const int64_t D = whole_vectors<A>(p.D), Dv = whole_vectors<A>(p.Dv);
        const bool may_hide = may_hide_pairs(p) || has_bias(p) || p.diagonals.hides;
        Rows<T> Q{}, dO{};
        if (may_hide) {
            Q = gathered_rows<T>(p.query, q.b, q.h, first, q.count, p.D, t.Q);
            dO = gathered_rows<T>(p.grad_out, q.b, q.h, first, q.count, p.Dv, t.dO);
        }
        const Poison Q_poison = may_hide ? find_poison(Q, q.count, p.D) : Poison{},
                     dO_poison = may_hide ? find_poison(dO, q.count, p.Dv) : Poison{};
        pack_paired_rows<T>(p.query, q.b, q.h, first, q.count, p.D, D, t.Q_pairs);
        pack_paired_rows<T>(p.grad_out, q.b, q.h, first, q.count, p.Dv, Dv, t.dO_pairs);
        clear_poison(Q_poison, D, t.Q_pairs);
        clear_poison(dO_poison, Dv, t.dO_pairs);
        return {Q, dO, Q_poison, dO_poison};
    } else {
        return {load_padded_rows<T>(p.query, q.b, q.h, first, q.count, p.D, t.Q),
                load_padded_rows<T>(p.grad_out, q.b, q.h, first, q.count, p.Dv, t.dO),
                {},
                {}};
    }
}

// What a tile of queries adds to dK and dV of `keys`, whose first key is row 0 of both.
template <class T, class A>
inline void add_key_gradients(const AttentionParams& p, const QueryTile& q, int64_t keys, int64_t w, bool masked,
                              const QueryRows<T, A>& rows, const BackwardTile<A>& t, A* dK, A* dV) {
    const int64_t D = whole_vectors<A>(p.D), Dv = whole_vectors<A>(p.Dv);
    if constexpr (kPairProducts<T>) {
        const uint64_t* bits = masked ? t.bits : nullptr;
        round_rows(t.S, keys, w, t.rounded);
        accumulate_rows(t.rounded, keys, w, q.count, t.dO_pairs, Dv, dV);
        add_poison_to_rows(rows.dO, rows.dO_poison, p.Dv, t.S, keys, w, bits, Dv, dV);
        round_rows(t.dP, keys, w, t.rounded);
        accumulate_rows(t.rounded, keys, w, q.count, t.Q_pairs, D, dK);
        add_poison_to_rows(rows.Q, rows.Q_poison, p.D, t.dP, keys, w, bits, D, dK);
    } else if (masked) {
        accumulate_rows_masked(t.S, keys, w, q.count, rows.dO, Dv, t.bits, t.buffer, dV);
        accumulate_rows_masked(t.dP, keys, w, q.count, rows.Q, D, t.bits, t.buffer, dK);
    } else {
        accumulate_rows(t.S, keys, w, q.count, rows.dO, Dv, dV);
        accumulate_rows(t.dP, keys, w, q.count, rows.Q, D, dK);
    }
}

template <class T, class A>
inline void store_key_gradients(const AttentionParams& p, int64_t b, int64_t kv, Range keys, A* dK, A* dV) {
    const int64_t D = whole_vectors<A>(p.D), Dv = whole_vectors<A>(p.Dv);
    const A scale = static_cast<A>(p.scale);
    for (int64_t j = keys.begin; j < keys.end; ++j) {
        A* row = dK + (j - keys.begin) * D;
        for (int64_t d = 0; d < D; ++d) row[d] *= scale;
        store_row(row, p.D, row_pointer<T>(p.dk, b, kv, j), p.continues);
        store_row(dV + (j - keys.begin) * Dv, p.Dv, row_pointer<T>(p.dv, b, kv, j), p.continues);
    }
}

inline void store_bias(const AttentionParams& p, int64_t at, double value) {
    if (p.dbias.dtype == kFloat64) {
        static_cast<double*>(p.dbias.data)[at] = value;
    } else if (p.dbias.dtype == kFloat32) {
        static_cast<float*>(p.dbias.data)[at] = static_cast<float>(value);
    } else if (p.dbias.dtype == kBFloat16) {
        static_cast<BFloat16*>(p.dbias.data)[at] = narrow<BFloat16>(static_cast<float>(value));
    } else {
        static_cast<Float16*>(p.dbias.data)[at] = narrow<Float16>(static_cast<float>(value));
    }
}

// dbias[i][j] = dS[j][i] for a bias that has every pair.
template <class T, class A>
inline void store_bias_tile(const AttentionParams& p, const QueryTile& q, Range keys, int64_t w, BackwardTile<A>& t) {
    if (has_order(p)) {
        for (int64_t r = 0; r < q.count; ++r) {
            const int64_t row = lse_row(p, q.b, q.h, q.rows.begin + r) * p.key_rows;
            for (int64_t j = keys.begin; j < keys.end; ++j)
                store_bias(p, row + key_of(p, q.b, q.h, j), static_cast<double>(t.dP[(j - keys.begin) * w + r]));
        }
        return;
    }
    with_bias_type<T>(p, [&](auto element) {
        using E = decltype(element);
        E* data = static_cast<E*>(p.dbias.data) + keys.begin;
        const TensorView view{data, p.Hq * p.Nq * p.Nk, p.Nq * p.Nk, p.Nk};
        store_transposed<E, A>(t.dP, w, view, q.b, q.h, q.rows.begin, q.count, keys.end - keys.begin, t.scratch,
                               [](Vec<A> x, int64_t) { return x; });
    });
}

// The tile's sums of dS along its diagonals.
template <class A>
inline void add_diagonal_gradients(const AttentionParams& p, const QueryTile& q, Range keys, int64_t w,
                                   const BackwardTile<A>& t) {
    A* line = static_cast<A*>(p.ddiagonals) + (q.b * p.Hq + q.h) * (p.Nq + p.Nk - 1) + p.Nk - 1;
    fold_diagonals(t.dP, keys.end - keys.begin, w, q.count, t.folded, line + q.rows.begin - keys.begin);
}

// dQt += keys * dS
template <class T, class A>
inline void add_keys(const AttentionParams& p, const QueryTile& q, int64_t kv, Range keys, bool masked,
                     const Rows<Operand<T, A>>& K, int64_t w, BackwardTile<A>& t, A* dQt) {
    const int64_t n = keys.end - keys.begin;
    if constexpr (kPairProducts<T>) {
        const Poison poison = masked ? find_poison(K, n, p.D, t.bits, low_bits(q.count)) : Poison{};
        const LeftFactor left = pack_left_factor<T>(p.key, q.b, kv, keys.begin, n, p.D, t.K_pairs);
        clear_poison(poison, p.D, left);
        round_to_pairs(t.dP, n, w, t.dS_pairs);
        accumulate_columns<A>(left, n, p.D, t.dS_pairs, w, nullptr, dQt);
        add_poison_to_columns(K, poison, p.D, t.dP, w, t.bits, dQt);
    } else if (masked) {
        accumulate_columns_masked<A>(K, n, p.D, t.dP, w, nullptr, t.bits, low_bits(q.count), t.buffer, dQt);
    } else {
        accumulate_columns<A>(K, n, p.D, t.dP, w, nullptr, dQt);
    }
}

// Adds to dQt what the keys inside `limits` give a tile of queries. begin() is called before the first piece of keys,
// visit(keys, masked) after each, while S and dP hold Z P and dS (by the products, with a soft cap).
template <class T, class A, class Begin, class Visit>
inline void add_query_gradients(const AttentionParams& p, const QueryTile& q, Range limits, int64_t w,
                                BackwardTile<A>& t, A* dQt, Begin begin, Visit visit) {
    const int64_t kv = q.h / (p.Hq / p.Hkv);
    bool begun = false;
    for_each_chunk(p, q.b, q.h, q.block, q.rows, limits, [&](const Chunk& chunk) {
        const Range keys = chunk.keys;
        if (!begun) begin();
        begun = true;
        const auto K = load_operand<T>(p.key, q.b, kv, keys, p.D, t.K_copy, t.K_buffer);
        const auto V = load_operand<T>(p.value, q.b, kv, keys, p.Dv, t.V_copy, t.V_buffer);
        const bool masked = score_gradients<T>(p, q, chunk, K, V, w, t);
        if (bias_is_full(p)) store_bias_tile<T>(p, q, keys, w, t);
        if (p.ddiagonals) add_diagonal_gradients(p, q, keys, w, t);
        const int64_t elements = (keys.end - keys.begin) * w;
        for (int64_t i = 0; i < elements && p.softcap > 0; i += kLanes<A>)
            store(t.dP + i, load<A>(t.dP + i) * load<A>(t.slope + i));
        add_keys<T>(p, q, kv, keys, masked, K, w, t, dQt);
        visit(keys, masked);
    });
}

template <class T, class A>
inline void store_query_gradients(const AttentionParams& p, const QueryTile& q, int64_t w, const A* dQt,
                                  BackwardTile<A>& t) {
    const A scale = static_cast<A>(p.scale);
    store_transposed<T>(
        dQt, w, p.dq, q.b, q.h, q.rows.begin, q.count, p.D, t.scratch, [=](Vec<A> x, int64_t) { return x * scale; },
        p.continues);
}

// The keys and values of a task, for all of its tiles.
template <class T, class A>
inline void copy_keys(const AttentionParams& p, int64_t b, int64_t kv, Range keys, BackwardTile<A>& t) {
    if (!p.copies_keys) return;
    t.K_copy = copy_rows<T>(p.key, b, kv, keys, p.D, t.K_place);
    t.V_copy = copy_rows<T>(p.value, b, kv, keys, p.Dv, t.V_place);
}

// Phase 1.
template <class T, class A>
inline void span_task(const AttentionParams& p, int64_t task, char* memory, const BackwardShared<A>& shared) {
    const Pipeline line = Pipeline::of<A>(p);
    const int64_t head = line.head(task), span = line.span(task), kv = head % p.Hkv, b = head / p.Hkv;
    const int64_t D = whole_vectors<A>(p.D), Dv = whole_vectors<A>(p.Dv), size = key_span<A>(p);
    const Range keys{span * size, min_of((span + 1) * size, p.Nk)};
    const QueryTiling tiling = attention_tiling(p);
    int64_t* done = shared.done + head * line.spans + span;
    BackwardTile<A> t(p, memory);
    fill_zero(t.dK, size * D);
    fill_zero(t.dV, size * Dv);
    copy_keys<T>(p, b, kv, keys, t);
    // Tasks are taken in order, so what is waited for is done or being done.
    if (span == 0 && head >= line.slots) wait_until(done - line.slots * line.spans + line.spans - 1, line.tiles);

    for (int64_t index = 0; index < line.tiles; ++index) {
        const QueryTile q = query_tile(p, tiling, b, kv * (p.Hq / p.Hkv) + index / tiling.count, index % tiling.count);
        A* dQt = shared.dQt + (head % line.slots * line.tiles + index) * p.D * kQueries;
        const int64_t w = whole_lanes<T, A>(q.count);
        QueryRows<T, A> query_rows;
        auto begin = [&] {
            load_query_tile<T>(p, q, shared, w, t);
            query_rows = load_query_rows<T>(p, q, t);
        };
        if (span == 0) {
            fill_zero(dQt, p.D * w);
        } else {
            wait_until(done - 1, index + 1);
        }
        if (q.count > 0) {
            add_query_gradients<T>(p, q, keys, w, t, dQt, begin, [&](Range part, bool masked) {
                add_key_gradients<T>(p, q, part.end - part.begin, w, masked, query_rows, t,
                                     t.dK + (part.begin - keys.begin) * D, t.dV + (part.begin - keys.begin) * Dv);
            });
            if (span == line.spans - 1) store_query_gradients<T>(p, q, w, dQt, t);
        }
        __atomic_store_n(done, index + 1, __ATOMIC_RELEASE);
    }
    store_key_gradients<T>(p, b, kv, keys, t.dK, t.dV);
}

// How the gradient of the bias is cut: by tiles of queries and keys where the bias has them, else in one piece.
struct BiasTiling {
    int64_t query_tiles, key_tiles, count;
};

inline BiasTiling bias_tiling(const AttentionParams& p) {
    const int64_t* size = p.dbias.size;
    const int64_t queries = size[2] > 1 ? attention_tiling(p).count : 1, keys = size[3] > 1 ? ceil_div(p.Nk, kKeys) : 1;
    return {queries, keys, size[2] * size[3] > 0 ? size[0] * size[1] * queries * keys : 0};
}

// Adds dS [keys][w] to `sum` [key][query], folding the dimensions that the bias broadcasts.
template <class A>
inline void fold_tile(const A* dS, Range keys, int64_t first_key, int64_t w, int64_t count, bool by_query, bool by_key,
                      double* sum) {
    for (int64_t j = keys.begin; j < keys.end; ++j) {
        double* row = sum + (by_key ? j - first_key : 0) * kQueries;
        for (int64_t r = 0; r < count; ++r) row[by_query ? r : 0] += static_cast<double>(dS[(j - keys.begin) * w + r]);
    }
}

// Phase 2.
template <class T, class A>
inline void bias_task(const AttentionParams& p, int64_t task, char* memory, const BackwardShared<A>& shared) {
    const BiasTiling cut = bias_tiling(p);
    const int64_t* size = p.dbias.size;
    const bool by_query = size[2] > 1, by_key = size[3] > 1;
    const int64_t jt = task % cut.key_tiles, it = task / cut.key_tiles % cut.query_tiles;
    const int64_t bias_h = task / cut.key_tiles / cut.query_tiles % size[1],
                  bias_b = task / cut.key_tiles / cut.query_tiles / size[1];
    const QueryTiling tiling = attention_tiling(p);
    const Range keys = by_key ? Range{jt * kKeys, min_of((jt + 1) * kKeys, p.Nk)} : Range{0, p.Nk};
    BackwardTile<A> t(p, memory);
    fill_zero(t.sum, kKeys * kQueries);
    for (int64_t b = size[0] > 1 ? bias_b : 0; b < (size[0] > 1 ? bias_b + 1 : p.B); ++b) {
        for (int64_t h = size[1] > 1 ? bias_h : 0; h < (size[1] > 1 ? bias_h + 1 : p.Hq); ++h) {
            for (int64_t tile = by_query ? it : 0; tile < (by_query ? it + 1 : tiling.count); ++tile) {
                const QueryTile q = query_tile(p, tiling, b, h, tile);
                if (q.count <= 0) continue;
                const int64_t w = whole_lanes<T, A>(q.count), kv = h / (p.Hq / p.Hkv);
                load_query_tile<T>(p, q, shared, w, t);
                for_each_chunk(p, b, h, q.block, q.rows, keys, [&](const Chunk& chunk) {
                    const auto K = load_operand<T>(p.key, b, kv, chunk.keys, p.D, t.K_buffer);
                    const auto V = load_operand<T>(p.value, b, kv, chunk.keys, p.Dv, t.V_buffer);
                    score_gradients<T>(p, q, chunk, K, V, w, t);
                    fold_tile(t.dP, chunk.keys, keys.begin, w, q.count, by_query, by_key, t.sum);
                });
            }
        }
    }
    const Range rows = by_query ? tile_rows(p, tiling, it) : Range{0, 1};
    const Range columns = by_key ? keys : Range{0, 1};
    const int64_t first = (bias_b * size[1] + bias_h) * size[2];  // an order is one for all (b, h) that were folded
    for (int64_t i = rows.begin; i < rows.end; ++i) {
        const int64_t row = first + (by_query ? query_of(p, bias_b, bias_h, i) : 0);
        for (int64_t j = columns.begin; j < columns.end; ++j)
            store_bias(p, row * size[3] + (by_key ? key_of(p, bias_b, bias_h, j) : 0),
                       t.sum[(j - columns.begin) * kQueries + i - rows.begin]);
    }
}

}  // namespace
}  // namespace efficient_attn
