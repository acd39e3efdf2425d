// Attention forward on a CPU:  out_i = sum_j softmax_j(cap(scale q_i . k_j) + bias_ij) v_j,  lse_i = log sum_j exp(...)
//
// with a sink's score beside those of the keys, where there are sinks: the online softmax begins with it.
//
// Online softmax (Milakov & Gimelshein 2018; Dao et al. 2022) over tiles of keys. A task is a tile of queries of one
// (batch, head), or a run of tiles that copies its keys once; it owns its rows of out and lse, so tasks run in any
// order and the bits do not depend on the threads.
#pragma once

#include "bands.h"

namespace efficient_attn {
namespace {

template <class A>
struct ForwardTile {
    A* strip;  // where S lies of every key at once, [Nk][w]; null: of one piece of keys after another
    A *Qt, *S, *bias, *Ot, *top, *total, *fade, *scratch, *K_buffer, *V_buffer;
    uint64_t *bits, *keep;
    Pair *Q_pairs, *V_pairs, *P_pairs;  // with products of pairs only
    A* scale;
    CopiedRows<A> K_copy, V_copy;

    ForwardTile(const AttentionParams& p, char* memory) {
        Arena arena{memory};
        Qt = arena.take<A>(p.D * kQueries);
        S = arena.take<A>(kKeys * kQueries);
        strip = nullptr;
        bias = arena.take<A>(has_bias(p) || p.diagonals.hides ? kKeys * kQueries : 0);
        Ot = arena.take<A>(p.Dv * kQueries);
        top = arena.take<A>(kQueries);
        total = arena.take<A>(kQueries);
        fade = arena.take<A>(kQueries);
        scratch = arena.take<A>(transpose_scratch<A>(max_of(kKeys, max_of(p.D, p.Dv))));
        K_buffer = arena.take<A>(kKeys * max_of(pair_depth(p.D), max_of(p.D, p.Dv)));
        V_buffer = arena.take<A>(kKeys * p.Dv);
        bits = arena.take<uint64_t>(kKeys);
        keep = arena.take<uint64_t>(kKeys);
        if constexpr (kMultipliesPairs) {
            Q_pairs = arena.take<Pair>(pair_depth(p.D) * kQueries);
            V_pairs = arena.take<Pair>(kKeys / 2 * p.Dv);
            P_pairs = arena.take<Pair>(kKeys / 2 * kQueries);
            scale = arena.take<A>(kQueries);
        }
        end = arena.next;
    }

    static int64_t bytes(const AttentionParams& p) { return ForwardTile(p, kNoMemory).end - kNoMemory; }

  private:
    char* end;
};

// The largest of a column of S, and of what came before.
template <class A>
EA_INLINE Vec<A> column_maximum(const A* S, int64_t keys, int64_t w, Vec<A> before) {
    Vec<A> best[4] = {before, before, before, before};
    int64_t k = 0;
    for (; k + 4 <= keys; k += 4)
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) best[part] = larger(load<A>(S + (k + part) * w), best[part]);
    for (; k < keys; ++k) best[0] = larger(load<A>(S + k * w), best[0]);
    return larger(larger(best[0], best[1]), larger(best[2], best[3]));
}

// S becomes exp(S - top), in the unit of the scores, for kCount keys of a column; their sum is returned, added up in
// pairs of pairs.
template <class A, bool kNatural, int kCount>
EA_INLINE Vec<A> exponentials(A* S, int64_t w, Vec<A> top) {
    Vec<A> weight[kCount];
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) {
        weight[k] = exponential<kNatural>(load(S + k * w) - top);
        store(S + k * w, weight[k]);
    }
    if constexpr (kCount == 4) return (weight[0] + weight[1]) + (weight[2] + weight[3]);
    return weight[0];
}

// S becomes exp(S - top); top, total and the fade of what was accumulated before are updated.
template <class A, bool kNatural>
EA_NOINLINE void online_softmax_update(int64_t keys, int64_t w, A* S, A* top, A* total, A* fade) {
    for (int64_t lane = 0; lane < w; lane += kLanes<A>) {
        const Vec<A> before = load<A>(top + lane), best = column_maximum<A>(S + lane, keys, w, before);
        const Vec<A> reference = select<A>(best == -kInfinity<A>, Vec<A>{}, best);  // a row without visible keys so far
        const Vec<A> shrink = exponential<kNatural>(before - reference);
        Vec<A> sum[2] = {};
        int64_t k = 0;
        for (; k + 8 <= keys; k += 8) {
            sum[0] += exponentials<A, kNatural, 4>(S + k * w + lane, w, reference);
            sum[1] += exponentials<A, kNatural, 4>(S + (k + 4) * w + lane, w, reference);
        }
        for (; k < keys; ++k) sum[0] += exponentials<A, kNatural, 1>(S + k * w + lane, w, reference);
        store(fade + lane, shrink);
        store(total + lane, load<A>(total + lane) * shrink + (sum[0] + sum[1]));
        store(top + lane, best);
    }
}

template <class A>
inline void online_softmax_update(const AttentionParams& p, int64_t keys, int64_t w, A* S, A* top, A* total, A* fade) {
    is_natural(p) ? online_softmax_update<A, true>(keys, w, S, top, total, fade)
                  : online_softmax_update<A, false>(keys, w, S, top, total, fade);
}

// What a row of head h has met before any key: nothing, or a sink.
template <class A>
inline void begin_softmax(const AttentionParams& p, int64_t h, A& top, A& total) {
    top = -kInfinity<A>;
    if (p.sinks) top = static_cast<A>(static_cast<double>(static_cast<const A*>(p.sinks)[h]) / score_unit(p));
    total = top == -kInfinity<A> ? 0 : 1;
}

// The soft cap, where there is one, of scores as `score_scale` makes them; `slope` may be null.
template <class A>
inline void cap_scores(const AttentionParams& p, int64_t count, A* S, A* slope) {
    if (p.softcap > 0) cap_scores<A>(count, static_cast<A>(p.softcap / score_unit(p)), S, slope);
}

// Values as left factors, packed once for all tiles of queries in memory that tasks share, a piece of kKeys keys after
// another: where packing costs something beside the products, and each piece is needed more than once.
inline bool shares_values(const AttentionParams& p) {
    if (kTilePairs == 1 || !kMultipliesPairs || p.Nk == 0) return false;
    const double tiles = static_cast<double>(p.Hq / p.Hkv * ceil_div(p.Nq, kQueries));
    const MaskView& mask = p.mask;
    if (!mask.indptr) return tiles >= 4;
    const int64_t blocks = ceil_div(p.Nq, mask.block_q) * ceil_div(p.Nk, mask.block_k) * mask.heads * mask.batch;
    return tiles * static_cast<double>(mask.entries) >= 4 * static_cast<double>(blocks);
}
inline int64_t value_pieces(const AttentionParams& p) { return p.B * p.Hkv * ceil_div(p.Nk, kKeys); }
inline int64_t shared_values_bytes(const AttentionParams& p) {
    return value_pieces(p) * kKeys / 2 * p.Dv * static_cast<int64_t>(sizeof(Pair));
}
inline Pair* shared_values(const AttentionParams& p, int64_t piece, char* shared) {
    return reinterpret_cast<Pair*>(shared) + piece * (kKeys / 2 * p.Dv);
}

template <class T>
inline void pack_values_task(const AttentionParams& p, int64_t task, char* shared) {
    if constexpr (kPairProducts<T>) {
        const int64_t pieces = ceil_div(p.Nk, kKeys), first = task % pieces * kKeys, head = task / pieces;
        pack_left_factor<T>(p.value, head / p.Hkv, head % p.Hkv, first, min_of(kKeys, p.Nk - first), p.Dv,
                            shared_values(p, task, shared));
    }
}

// What a tile of queries keeps of them.
template <class T, class A>
inline void load_queries(const AttentionParams& p, int64_t b, int64_t h, int64_t first, int64_t count, int64_t w,
                         ForwardTile<A>& t) {
    if constexpr (kPairProducts<T>) {
        pack_paired_columns<T>(p.query, b, h, first, count, p.D, w, t.scratch, t.Q_pairs);
        const A scale = static_cast<A>(score_scale(p));
        for (int64_t r = 0; r < w; ++r) t.scale[r] = scale;
    } else {
        pack_transposed<T>(p.query, b, h, first, count, p.D, Scaled<A>(score_scale(p)), w, t.scratch, t.Qt);
    }
}

// S of the tile's queries and some keys.
template <class T, class A>
inline void score(const AttentionParams& p, int64_t b, int64_t kv, Range keys, int64_t w, ForwardTile<A>& t) {
    const auto rows = load_operand<T>(p.key, b, kv, keys, p.D, t.K_copy, t.K_buffer);
    if constexpr (kPairProducts<T>) {
        score_tile(rows, keys.end - keys.begin, p.D, t.Q_pairs, w, t.scale, t.S);
    } else {
        score_tile(rows, keys.end - keys.begin, p.D, t.Qt, w, t.S);
    }
    cap_scores<A>(p, (keys.end - keys.begin) * w, t.S, nullptr);
}

// The values of some keys without the rows of `poison`: shared (null: none are), or packed now.
template <class T, class A>
inline LeftFactor load_values(const AttentionParams& p, int64_t b, int64_t kv, Range keys, const Poison& poison,
                              char* shared, const ForwardTile<A>& t) {
    const int64_t n = keys.end - keys.begin;
    const bool whole = keys.begin % kKeys == 0 && (n == kKeys || keys.end == p.Nk);
    if (shared && whole && !poison.count) {
        const int64_t piece = (b * p.Hkv + kv) * ceil_div(p.Nk, kKeys) + keys.begin / kKeys;
        return left_factor(shared_values(p, piece, shared), n, p.Dv);
    }
    const LeftFactor left = pack_left_factor<T>(p.value, b, kv, keys.begin, n, p.Dv, t.V_pairs);
    clear_poison(poison, p.Dv, left);
    return left;
}

// Ot = Ot * fade + values * S, of `count` queries
template <class T, class A>
inline void accumulate(const AttentionParams& p, int64_t b, int64_t kv, int64_t count, Range keys, bool masked,
                       int64_t w, char* shared, ForwardTile<A>& t) {
    const int64_t n = keys.end - keys.begin;
    if constexpr (kPairProducts<T>) {
        const Rows<T> values = masked ? gathered_rows<T>(p.value, b, kv, keys.begin, n, p.Dv, t.V_buffer) : Rows<T>{};
        const Poison poison = masked ? find_poison(values, n, p.Dv, t.bits, low_bits(count)) : Poison{};
        round_to_pairs(t.S, n, w, t.P_pairs);
        accumulate_columns(load_values<T>(p, b, kv, keys, poison, shared, t), n, p.Dv, t.P_pairs, w, t.fade, t.Ot);
        add_poison_to_columns(values, poison, p.Dv, t.S, w, t.bits, t.Ot);
    } else {
        const Rows<A> values = load_operand<T>(p.value, b, kv, keys, p.Dv, t.V_copy, t.V_buffer);
        if (masked) {
            accumulate_columns_masked(values, n, p.Dv, t.S, w, t.fade, t.bits, low_bits(count), t.K_buffer, t.Ot);
        } else {
            accumulate_columns(values, n, p.Dv, t.S, w, t.fade, t.Ot);
        }
    }
}

template <class A>
inline void begin_softmax(const AttentionParams& p, int64_t h, int64_t w, ForwardTile<A>& t) {
    for (int64_t r = 0; r < w; ++r) begin_softmax(p, h, t.top[r], t.total[r]);
}

// The rows go on from results for other keys, which are to a softmax a key of score lse, with out as its value.
template <class T, class A>
inline void resume_softmax(const AttentionParams& p, int64_t b, int64_t h, Range rows, int64_t w, ForwardTile<A>& t) {
    const int64_t count = rows.end - rows.begin;
    pack_transposed<T>(p.out, b, h, rows.begin, count, p.Dv, Scaled<A>(1.0 - p.dropout_p), w, t.scratch, t.Ot);
    for (int64_t r = 0; r < w; ++r) {
        const A lse = r < count ? static_cast<const A*>(p.lse)[lse_row(p, b, h, rows.begin + r)] : -kInfinity<A>;
        t.top[r] = static_cast<A>(static_cast<double>(lse) / score_unit(p));
        t.total[r] = lse == -kInfinity<A> ? 0 : 1;
    }
}

// The online softmax of a tile of queries from a begun one on: calls visit(keys, masked) for each piece of keys that
// they see, when S holds the weights exp(s - top) of it. Afterwards top and total are those of the whole rows.
template <class T, class A, class Visit>
inline void softmax_pass(const AttentionParams& p, int64_t b, int64_t h, Range rows, int64_t w, ForwardTile<A>& t,
                         Visit visit) {
    const int64_t block = p.mask.indptr ? rows.begin / p.mask.block_q : 0;
    const int64_t block_row = p.mask.indptr ? rows.begin % p.mask.block_q : 0;
    const int64_t kv = h / (p.Hq / p.Hkv);
    load_queries<T>(p, b, h, rows.begin, rows.end - rows.begin, w, t);
    const Range limits = t.K_copy.data ? t.K_copy.rows : Range{0, p.Nk};
    for_each_chunk(p, b, h, block, rows, limits, [&](const Chunk& chunk) {
        const Range keys = chunk.keys;
        const int64_t n = keys.end - keys.begin;
        if (t.strip) t.S = t.strip + keys.begin * w;
        score<T>(p, b, kv, keys, w, t);
        bool masked = visible_bits(p, b, h, rows, block_row, chunk, t.bits);
        masked = add_biases<T>(p, b, h, rows, keys, w, t.S, masked, t.bits, t.scratch, t.bias);
        if (masked) fill_masked(t.bits, n, w, -kInfinity<A>, t.S);
        online_softmax_update(p, n, w, t.S, t.top, t.total, t.fade);
        visit(keys, masked);
    });
}

// out and lse of a tile of queries of one head. Calls visit(keys) for each piece of keys when S holds its weights,
// dropout included, as exp(s - top); afterwards they are to be divided by total.
template <class T, class A, class Visit>
inline void attend(const AttentionParams& p, int64_t b, int64_t h, Range rows, int64_t w, char* shared,
                   ForwardTile<A>& t, Visit visit) {
    const int64_t count = rows.end - rows.begin, kv = h / (p.Hq / p.Hkv);
    if (p.continues) {
        resume_softmax<T>(p, b, h, rows, w, t);
    } else {
        fill_zero(t.Ot, p.Dv * w);
        begin_softmax(p, h, w, t);
    }
    softmax_pass<T>(p, b, h, rows, w, t, [&](Range keys, bool masked) {
        if (p.dropout_p > 0) {
            kept_bits(p, b, h, rows, keys, t.keep);
            fill_masked(t.keep, keys.end - keys.begin, w, A{0}, t.S);
        }
        accumulate<T>(p, b, kv, count, keys, masked, w, shared, t);
        visit(keys);
    });

    for (int64_t r = 0; r < count; ++r) {
        const double total = static_cast<double>(t.total[r]);
        store_lse<A>(p, b, h, rows.begin + r, t.top[r], total);
        t.total[r] = static_cast<A>(total * (1.0 - p.dropout_p));
    }
    store_transposed<T>(t.Ot, w, p.out, b, h, rows.begin, count, p.Dv, t.scratch,
                        [&](Vec<A> x, int64_t r) { return t.total[r] == 0 ? Vec<A>{} : x / t.total[r]; });
}

template <class T, class A>
inline void attend_tile(const AttentionParams& p, int64_t b, int64_t h, int64_t tile, char* shared, ForwardTile<A>& t) {
    const Range rows = tile_rows(p, attention_tiling(p), tile);
    if (rows.begin >= rows.end) return;
    attend<T>(p, b, h, rows, whole_lanes<T, A>(rows.end - rows.begin), shared, t, [](Range) {});
}

template <class T, class A>
inline void forward_task(const AttentionParams& p, int64_t task, char* memory, char* shared) {
    const int64_t tiles = attention_tiling(p).count, head = task / tiles;
    ForwardTile<A> t(p, memory);
    // Under a causal mask the last tiles are the longest.
    attend_tile<T>(p, head / p.Hq, head % p.Hq, tiles - 1 - task % tiles, shared, t);
}

// A run of tiles of queries of one (batch, key/value head), whose keys and values are copied once (bands.h).
template <class T, class A>
inline void forward_run_task(const AttentionParams& p, int64_t task, char* memory) {
    const int64_t runs = band_runs(p), run = runs - 1 - task % runs, head = task / runs;
    const int64_t b = head / p.Hkv, kv = head % p.Hkv, group = p.Hq / p.Hkv;
    const int64_t last = min_of((run + 1) * p.band_tiles, attention_tiling(p).count);
    ForwardTile<A> t(p, memory);
    Arena arena{memory + ForwardTile<A>::bytes(p)};
    const Range keys = run_keys(p, b, kv, run);
    t.K_copy = copy_rows<T>(p.key, b, kv, keys, p.D, arena.take<A>(p.band_keys * p.D));
    t.V_copy = copy_rows<T>(p.value, b, kv, keys, p.Dv, arena.take<A>(p.band_keys * p.Dv));
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
        for (int64_t tile = run * p.band_tiles; tile < last; ++tile) attend_tile<T>(p, b, h, tile, nullptr, t);
}

template <class A>
inline int64_t forward_tile_bytes(const AttentionParams& p) {
    const int64_t copies = p.copies_keys ? round_up(p.band_keys * p.D * static_cast<int64_t>(sizeof(A)), 64) +
                                               round_up(p.band_keys * p.Dv * static_cast<int64_t>(sizeof(A)), 64)
                                         : 0;
    return ForwardTile<A>::bytes(p) + copies;
}

// How many blocks the list of a tile of queries names, for tasks numbered as in forward_task.
inline double query_tile_cost(const AttentionParams& p, int64_t task) {
    const QueryTiling tiling = attention_tiling(p);
    const int64_t tile = tiling.count - 1 - task % tiling.count;
    const int64_t h = task / tiling.count % p.Hq, b = task / tiling.count / p.Hq;
    const int64_t row = list_row(p, b, h, tile / tiling.tiles_per_block);
    const Range entries = list_entries(p.mask, p.mask.indptr, row);
    return static_cast<double>(entries.end - entries.begin);
}

inline int64_t forward_task_count(const AttentionParams& p) {
    return p.copies_keys ? p.B * p.Hkv * band_runs(p) : p.B * p.Hq * attention_tiling(p).count;
}

}  // namespace
}  // namespace efficient_attn
