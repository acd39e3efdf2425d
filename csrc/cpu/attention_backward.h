// Attention backward on a CPU. With P_ij = exp(s_ij - lse_i), Z the dropout factor and delta_i = dO_i . O_i - dlse_i:
//
//     dV = (Z P)^T dO      dS = P (Z (dO V^T) - delta)      dQ = scale dS K      dK = scale dS^T Q      dbias = dS
//
// Phases, each parallel over tasks that own what they write (no atomics, the same bits for any number of threads):
//     0  delta            a tile of queries
//     1  dK, dV           a tile of keys of one (batch, key/value head), over the query heads of its group
//     2  dQ               a tile of queries of one (batch, head)
//     3  dbias            a tile of the bias, over every dimension that it broadcasts
#pragma once

#include "attention_forward.h"

namespace efficient_attn {
namespace {

template <class A>
struct BackwardTile {
    A *Qt, *dOt, *Q, *dO, *S, *dP, *lse, *delta, *K_buffer, *V_buffer, *buffer, *first, *second;
    double* sum;
    uint64_t *bits, *keep;

    static int64_t padded(int64_t width) { return round_up(width, kLanes<A>); }

    // `first` and `second` are the accumulators: dK and dV, or dQt.
    BackwardTile(const AttentionParams& p, char* memory) {
        Arena arena{memory};
        Qt = arena.take<A>(p.D * kQueries);
        dOt = arena.take<A>(p.Dv * kQueries);
        Q = arena.take<A>(padded(p.D) * kQueries);
        dO = arena.take<A>(padded(p.Dv) * kQueries);
        S = arena.take<A>(kKeys * kQueries);
        dP = arena.take<A>(kKeys * kQueries);
        lse = arena.take<A>(kQueries);
        delta = arena.take<A>(kQueries);
        K_buffer = arena.take<A>(kKeys * p.D);
        V_buffer = arena.take<A>(kKeys * p.Dv);
        buffer = arena.take<A>(kKeys * max_of(p.D, p.Dv));
        first = arena.take<A>(kKeys * padded(p.D));
        second = arena.take<A>(kKeys * padded(p.Dv));
        sum = arena.take<double>(kKeys * kQueries);
        bits = arena.take<uint64_t>(kKeys);
        keep = arena.take<uint64_t>(kKeys);
    }

    static int64_t bytes(const AttentionParams& p) {
        const int64_t d = padded(p.D), dv = padded(p.Dv);
        return 64 * 20 +
               static_cast<int64_t>(sizeof(A)) * (kQueries * (2 * d + 2 * dv + 2 * kKeys + 2) + kKeys * 3 * (d + dv)) +
               kKeys * (kQueries * 8 + 16);
    }
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
inline void load_query_tile(const AttentionParams& p, const QueryTile& q, const A* delta, int64_t w,
                            BackwardTile<A>& t) {
    pack_transposed<T>(p.query, q.b, q.h, q.rows.begin, q.count, p.D, A{1}, w, t.Qt);
    pack_transposed<T>(p.grad_out, q.b, q.h, q.rows.begin, q.count, p.Dv, A{1}, w, t.dOt);
    const int64_t row = (q.b * p.Hq + q.h) * p.Nq + q.rows.begin;
    for (int64_t r = 0; r < w; ++r) {
        // Lanes without a row, and rows without a visible key, get weight 0 through an infinite lse.
        const A lse = r < q.count ? static_cast<const A*>(p.lse)[row + r] : kInfinity<A>;
        t.lse[r] = lse == -kInfinity<A> ? kInfinity<A> : lse;
        t.delta[r] = r < q.count ? delta[row + r] : 0;
    }
}

// S becomes Z P, dP becomes dS, both [keys][w]. Returns whether pairs are masked; then `bits` says which.
template <class T, class A>
inline bool score_gradients(const AttentionParams& p, const QueryTile& q, Range keys, const uint8_t* tile,
                            int64_t tile_key, const Rows<A>& K, const Rows<A>& V, int64_t w, BackwardTile<A>& t) {
    const int64_t n = keys.end - keys.begin;
    tile_product(K, n, p.D, t.Qt, w, t.S);
    tile_product(V, n, p.Dv, t.dOt, w, t.dP);
    bool masked = visible_bits(p, q.b, q.rows, q.block_row, keys, tile, tile_key, t.bits);
    A scale = static_cast<A>(p.scale);
    if (has_bias(p)) {
        masked = add_bias<T>(p, q.b, q.h, q.rows, keys, scale, w, t.S, masked, t.bits);
        scale = 1;
    }
    const bool dropped = p.dropout_p > 0;
    if (dropped)
        dropout_bits(p.dropout_seed, p.dropout_p, q.b, q.h, q.rows.begin, q.count, keys.begin, keys.end, t.keep);
    const A rescale = static_cast<A>(1.0 / (1.0 - p.dropout_p));
    for (int64_t k = 0; k < n; ++k) {
        for (int64_t lane = 0; lane < w; lane += kLanes<A>) {
            A *s = t.S + k * w + lane, *g = t.dP + k * w + lane;
            Vec<A> P = exp(load<A>(s) * scale - load<A>(t.lse + lane));
            Vec<A> gradient = load<A>(g), weight = P;
            if (dropped) {
                const Mask<A> kept = lanes_from_bits<A>(t.keep[k] >> lane);
                gradient = select<A>(kept, gradient * rescale, Vec<A>{});
                weight = select<A>(kept, P * rescale, Vec<A>{});
            }
            gradient = P * (gradient - load<A>(t.delta + lane));
            if (masked) {
                const Mask<A> visible = lanes_from_bits<A>(t.bits[k] >> lane);
                gradient = select<A>(visible, gradient, Vec<A>{});
                weight = select<A>(visible, weight, Vec<A>{});
            }
            store(s, weight);
            store(g, gradient);
        }
    }
    return masked;
}

// Phase 0.
template <class T, class A>
inline void delta_task(const AttentionParams& p, int64_t task, A* delta) {
    const int64_t tiles = ceil_div(p.Nq, kQueries), tile = task % tiles, head = task / tiles;
    const int64_t h = head % p.Hq, b = head / p.Hq;
    for (int64_t i = tile * kQueries; i < min_of(p.Nq, (tile + 1) * kQueries); ++i) {
        const T* out = static_cast<const T*>(p.out.data) + row_offset(p.out, b, h, i);
        const T* grad = static_cast<const T*>(p.grad_out.data) + row_offset(p.grad_out, b, h, i);
        A sum = 0;
        for (int64_t d = 0; d < p.Dv; ++d) sum += widen<A>(out[d]) * widen<A>(grad[d]);
        const int64_t row = head * p.Nq + i;
        delta[row] = p.grad_lse ? sum - static_cast<const A*>(p.grad_lse)[row] : sum;
    }
}

struct KeyTiling {
    int64_t tile, count;
};

// A tile of keys lies inside one block of the list.
inline KeyTiling key_tiling(const AttentionParams& p) {
    const int64_t tile =
        p.mask.indptr ? (p.mask.block_k > kKeys ? round_up(ceil_div(p.mask.block_k, 2), 16) : p.mask.block_k) : kKeys;
    if (!p.mask.indptr) return {tile, ceil_div(p.Nk, tile)};
    return {tile, ceil_div(p.Nk, p.mask.block_k) * ceil_div(p.mask.block_k, tile)};
}

inline Range key_tile(const AttentionParams& p, const KeyTiling& tiling, int64_t index) {
    if (!p.mask.indptr) return {index * tiling.tile, min_of((index + 1) * tiling.tile, p.Nk)};
    const int64_t parts = ceil_div(p.mask.block_k, tiling.tile), block = index / parts;
    const int64_t begin = block * p.mask.block_k + index % parts * tiling.tile;
    const int64_t end = min_of(begin + tiling.tile, min_of((block + 1) * p.mask.block_k, p.Nk));
    return {begin, max_of(begin, end)};
}

// Phase 1.
template <class T, class A>
inline void key_value_task(const AttentionParams& p, int64_t task, const A* delta, char* memory) {
    const KeyTiling tiling = key_tiling(p);
    const QueryTiling queries = query_tiling(p, kQueries);
    const Range keys = key_tile(p, tiling, task % tiling.count);
    const int64_t kv = task / tiling.count % p.Hkv, b = task / tiling.count / p.Hkv, n = keys.end - keys.begin;
    if (n <= 0) return;
    const int64_t group = p.Hq / p.Hkv, Dp = BackwardTile<A>::padded(p.D), Dvp = BackwardTile<A>::padded(p.Dv);
    BackwardTile<A> t(p, memory);
    const Rows<A> K = load_rows<T>(p.key, b, kv, keys.begin, n, p.D, t.K_buffer);
    const Rows<A> V = load_rows<T>(p.value, b, kv, keys.begin, n, p.Dv, t.V_buffer);
    for (int64_t k = 0; k < n * Dp; ++k) t.first[k] = 0;
    for (int64_t k = 0; k < n * Dvp; ++k) t.second[k] = 0;

    auto visit = [&](int64_t h, int64_t tile_index, const uint8_t* tile, int64_t tile_key) {
        const QueryTile q = query_tile(p, queries, b, h, tile_index);
        if (q.count <= 0) return;
        const Range seen = intersect(any_visible(p, b, q.rows.begin, q.rows.end), keys);
        if (seen.begin >= seen.end) return;
        const int64_t w = round_up(q.count, kLanes<A>);
        load_query_tile<T>(p, q, delta, w, t);
        pack_rows<T>(p.query, b, h, q.rows.begin, q.count, p.D, Dp, t.Q);
        pack_rows<T>(p.grad_out, b, h, q.rows.begin, q.count, p.Dv, Dvp, t.dO);
        if (score_gradients<T>(p, q, keys, tile, tile_key, K, V, w, t)) {
            accumulate_rows_masked(t.S, n, w, q.count, t.dO, Dvp, t.bits, t.second);
            accumulate_rows_masked(t.dP, n, w, q.count, t.Q, Dp, t.bits, t.first);
        } else {
            accumulate_rows(t.S, n, w, q.count, t.dO, Dvp, t.second);
            accumulate_rows(t.dP, n, w, q.count, t.Q, Dp, t.first);
        }
    };
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
        if (!p.mask.indptr) {
            for (int64_t tile = 0; tile < queries.count; ++tile) visit(h, tile, nullptr, 0);
            continue;
        }
        const MaskView& mask = p.mask;
        const int64_t block = keys.begin / mask.block_k, q_blocks = ceil_div(p.Nq, mask.block_q);
        const int64_t row = list_row(mask, b, h, ceil_div(p.Nk, mask.block_k), block);
        const Range entries = list_entries(mask, mask.t_indptr, row);
        for (int64_t e = entries.begin; e < entries.end; ++e) {
            const int64_t q_block = mask.t_indices[e];
            if (q_block < 0 || q_block >= q_blocks) continue;
            for (int64_t part = 0; part < queries.tiles_per_block; ++part)
                visit(h, q_block * queries.tiles_per_block + part, bit_tile(mask, mask.t_tile_ids[e]),
                      block * mask.block_k);
        }
    }
    const A scale = static_cast<A>(p.scale);
    for (int64_t k = 0; k < n; ++k) {
        T* dk = static_cast<T*>(p.dk.data) + row_offset(p.dk, b, kv, keys.begin + k);
        T* dv = static_cast<T*>(p.dv.data) + row_offset(p.dv, b, kv, keys.begin + k);
        for (int64_t d = 0; d < p.D; ++d) dk[d] = narrow<T>(t.first[k * Dp + d] * scale);
        for (int64_t d = 0; d < p.Dv; ++d) dv[d] = narrow<T>(t.second[k * Dvp + d]);
    }
}

// Phase 2.
template <class T, class A>
inline void query_task(const AttentionParams& p, int64_t task, const A* delta, char* memory) {
    const QueryTiling tiling = query_tiling(p, kQueries);
    const int64_t h = task / tiling.count % p.Hq, b = task / tiling.count / p.Hq, kv = h / (p.Hq / p.Hkv);
    const QueryTile q = query_tile(p, tiling, b, h, tiling.count - 1 - task % tiling.count);
    if (q.count <= 0) return;
    const int64_t w = round_up(q.count, kLanes<A>);
    BackwardTile<A> t(p, memory);
    load_query_tile<T>(p, q, delta, w, t);
    A* dQt = t.first;  // [D][w]
    for (int64_t k = 0; k < p.D * w; ++k) dQt[k] = 0;
    for_each_chunk(p, b, h, q.block, q.rows, {0, p.Nk}, [&](Range keys, const Segment& segment) {
        const int64_t n = keys.end - keys.begin;
        const Rows<A> K = load_rows<T>(p.key, b, kv, keys.begin, n, p.D, t.K_buffer);
        const Rows<A> V = load_rows<T>(p.value, b, kv, keys.begin, n, p.Dv, t.V_buffer);
        if (score_gradients<T>(p, q, keys, segment.tile, segment.tile_key, K, V, w, t)) {
            accumulate_columns_masked<A>(K, n, p.D, t.dP, w, nullptr, t.bits, t.buffer, dQt);
        } else {
            accumulate_columns<A>(K, n, p.D, t.dP, w, nullptr, dQt);
        }
    });
    const A scale = static_cast<A>(p.scale);
    for (int64_t r = 0; r < q.count; ++r) {
        T* dq = static_cast<T*>(p.dq.data) + row_offset(p.dq, b, h, q.rows.begin + r);
        for (int64_t d = 0; d < p.D; ++d) dq[d] = narrow<T>(dQt[d * w + r] * scale);
    }
}

// How the gradient of the bias is cut: by tiles of queries and keys where the bias has them, else in one piece.
struct BiasTiling {
    int64_t query_tiles, key_tiles, count;
};

inline BiasTiling bias_tiling(const AttentionParams& p) {
    const int64_t* size = p.dbias.size;
    const int64_t queries = size[2] > 1 ? query_tiling(p, kQueries).count : 1,
                  keys = size[3] > 1 ? ceil_div(p.Nk, kKeys) : 1;
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

template <class T>
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

// Phase 3.
template <class T, class A>
inline void bias_task(const AttentionParams& p, int64_t task, const A* delta, char* memory) {
    const BiasTiling cut = bias_tiling(p);
    const int64_t* size = p.dbias.size;
    const bool by_query = size[2] > 1, by_key = size[3] > 1;
    const int64_t jt = task % cut.key_tiles, it = task / cut.key_tiles % cut.query_tiles;
    const int64_t bias_h = task / cut.key_tiles / cut.query_tiles % size[1],
                  bias_b = task / cut.key_tiles / cut.query_tiles / size[1];
    const QueryTiling tiling = query_tiling(p, kQueries);
    const Range keys = by_key ? Range{jt * kKeys, min_of((jt + 1) * kKeys, p.Nk)} : Range{0, p.Nk};
    BackwardTile<A> t(p, memory);
    for (int64_t k = 0; k < kKeys * kQueries; ++k) t.sum[k] = 0;
    for (int64_t b = size[0] > 1 ? bias_b : 0; b < (size[0] > 1 ? bias_b + 1 : p.B); ++b) {
        for (int64_t h = size[1] > 1 ? bias_h : 0; h < (size[1] > 1 ? bias_h + 1 : p.Hq); ++h) {
            for (int64_t tile = by_query ? it : 0; tile < (by_query ? it + 1 : tiling.count); ++tile) {
                const QueryTile q = query_tile(p, tiling, b, h, tile);
                if (q.count <= 0) continue;
                const int64_t w = round_up(q.count, kLanes<A>), kv = h / (p.Hq / p.Hkv);
                load_query_tile<T>(p, q, delta, w, t);
                for_each_chunk(p, b, h, q.block, q.rows, keys, [&](Range chunk, const Segment& segment) {
                    const int64_t n = chunk.end - chunk.begin;
                    const Rows<A> K = load_rows<T>(p.key, b, kv, chunk.begin, n, p.D, t.K_buffer);
                    const Rows<A> V = load_rows<T>(p.value, b, kv, chunk.begin, n, p.Dv, t.V_buffer);
                    score_gradients<T>(p, q, chunk, segment.tile, segment.tile_key, K, V, w, t);
                    fold_tile(t.dP, chunk, keys.begin, w, q.count, by_query, by_key, t.sum);
                });
            }
        }
    }
    const Range rows = by_query ? tile_rows(p, tiling, it) : Range{0, 1};
    const Range columns = by_key ? keys : Range{0, 1};
    for (int64_t i = rows.begin; i < rows.end; ++i)
        for (int64_t j = columns.begin; j < columns.end; ++j)
            store_bias<T>(p, ((bias_b * size[1] + bias_h) * size[2] + i) * size[3] + j,
                          t.sum[(j - columns.begin) * kQueries + i - rows.begin]);
}

}  // namespace
}  // namespace efficient_attn
