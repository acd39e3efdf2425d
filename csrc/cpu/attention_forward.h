// Attention forward on a CPU:  out_i = sum_j softmax_j(scale q_i . k_j + bias_ij) v_j,  lse_i = log sum_j exp(...)
//
// Online softmax (Milakov & Gimelshein 2018; Dao et al. 2022) over tiles of keys. A task is a tile of queries of one
// (batch, head); it owns its rows of out and lse, so tasks run in any order and the bits do not depend on the threads.
#pragma once

#include "tile.h"

namespace efficient_attn {
namespace {

template <class A>
struct ForwardTile {
    A *Qt, *S, *Ot, *top, *total, *decay, *buffer, *V_buffer;
    uint64_t *bits, *keep;

    ForwardTile(const AttentionParams& p, char* memory) {
        Arena arena{memory};
        Qt = arena.take<A>(p.D * kQueries);
        S = arena.take<A>(kKeys * kQueries);
        Ot = arena.take<A>(p.Dv * kQueries);
        top = arena.take<A>(kQueries);
        total = arena.take<A>(kQueries);
        decay = arena.take<A>(kQueries);
        buffer = arena.take<A>(kKeys * max_of(p.D, p.Dv));
        V_buffer = arena.take<A>(kKeys * p.Dv);
        bits = arena.take<uint64_t>(kKeys);
        keep = arena.take<uint64_t>(kKeys);
    }
};

template <class A>
inline int64_t forward_thread_bytes(const AttentionParams& p) {
    return 64 * 12 +
           static_cast<int64_t>(sizeof(A)) * (kQueries * (p.D + p.Dv + kKeys + 3) + kKeys * (p.D + 2 * p.Dv)) +
           16 * kKeys;
}

// S becomes exp(S - top); top, total and the decay of what was accumulated before are updated.
template <class A>
inline void online_softmax_update(int64_t keys, int64_t w, A unit, A* S, A* top, A* total, A* decay) {
    for (int64_t lane = 0; lane < w; lane += kLanes<A>) {
        const Vec<A> before = load<A>(top + lane);
        Vec<A> best = before;
        for (int64_t k = 0; k < keys; ++k) best = larger(load<A>(S + k * w + lane), best);
        const Vec<A> reference = select<A>(best == -kInfinity<A>, Vec<A>{}, best);  // a row without visible keys so far
        const Vec<A> shrink = exp((before - reference) * unit);
        Vec<A> sum[4] = {};
        for (int64_t k = 0; k < keys; ++k) {
            const Vec<A> weight = exp((load<A>(S + k * w + lane) - reference) * unit);
            store(S + k * w + lane, weight);
            sum[k & 3] += weight;
        }
        store(decay + lane, shrink);
        store(total + lane, load<A>(total + lane) * shrink + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
        store(top + lane, best);
    }
}

template <class T, class A>
inline void forward_task(const AttentionParams& p, int64_t task, char* memory) {
    const QueryTiling tiling = query_tiling(p, kQueries);
    const int64_t tile = tiling.count - 1 - task % tiling.count;  // under a causal mask the last tiles are the longest
    const int64_t h = task / tiling.count % p.Hq, b = task / tiling.count / p.Hq, kv = h / (p.Hq / p.Hkv);
    const Range rows = tile_rows(p, tiling, tile);
    const int64_t count = rows.end - rows.begin;
    if (count <= 0) return;
    const int64_t block = p.mask.indptr ? rows.begin / p.mask.block_q : 0;
    const int64_t block_row = p.mask.indptr ? rows.begin % p.mask.block_q : 0;
    const int64_t w = round_up(count, kLanes<A>);
    ForwardTile<A> t(p, memory);

    // The scale's sign goes into the queries, so that the largest score stays the largest; its size into the exponent.
    const A sign = p.scale < 0 ? -1 : p.scale > 0 ? 1 : 0, size = static_cast<A>(p.scale < 0 ? -p.scale : p.scale);
    const bool biased = has_bias(p);
    const A scale = size == 0 ? 1 : size;
    const A unit = biased ? 1 : scale;  // what one unit of S is worth
    pack_transposed<T>(p.query, b, h, rows.begin, count, p.D, sign, w, t.Qt);
    for (int64_t r = 0; r < w; ++r) t.top[r] = -kInfinity<A>, t.total[r] = 0;
    for (int64_t k = 0; k < p.Dv * w; ++k) t.Ot[k] = 0;

    for_each_chunk(p, b, h, block, rows, {0, p.Nk}, [&](Range keys, const Segment& segment) {
        const int64_t n = keys.end - keys.begin;
        tile_product(load_rows<T>(p.key, b, kv, keys.begin, n, p.D, t.buffer), n, p.D, t.Qt, w, t.S);
        bool masked = visible_bits(p, b, rows, block_row, keys, segment.tile, segment.tile_key, t.bits);
        if (biased) masked = add_bias<T>(p, b, h, rows, keys, scale, w, t.S, masked, t.bits);
        if (masked) fill_masked(t.bits, n, w, -kInfinity<A>, t.S);
        online_softmax_update(n, w, unit, t.S, t.top, t.total, t.decay);
        if (p.dropout_p > 0) {
            dropout_bits(p.dropout_seed, p.dropout_p, b, h, rows.begin, count, keys.begin, keys.end, t.keep);
            fill_masked(t.keep, n, w, A{0}, t.S);
        }
        const Rows<A> values = load_rows<T>(p.value, b, kv, keys.begin, n, p.Dv, t.V_buffer);
        if (masked) {
            accumulate_columns_masked(values, n, p.Dv, t.S, w, t.decay, t.bits, t.buffer, t.Ot);
        } else {
            accumulate_columns(values, n, p.Dv, t.S, w, t.decay, t.Ot);
        }
    });

    const A kept = static_cast<A>(1.0 / (1.0 - p.dropout_p));
    for (int64_t r = 0; r < count; ++r) {
        const bool empty = t.total[r] == 0;
        const A weight = empty ? 0 : kept / t.total[r];
        T* out = static_cast<T*>(p.out.data) + row_offset(p.out, b, h, rows.begin + r);
        for (int64_t d = 0; d < p.Dv; ++d) out[d] = narrow<T>(empty ? A{0} : t.Ot[d * w + r] * weight);
        static_cast<A*>(p.lse)[(b * p.Hq + h) * p.Nq + rows.begin + r] =
            empty
                ? -kInfinity<A>
                : static_cast<A>(static_cast<double>(t.top[r]) * unit + __builtin_log(static_cast<double>(t.total[r])));
    }
}

inline int64_t forward_task_count(const AttentionParams& p) { return p.B * p.Hq * query_tiling(p, kQueries).count; }

}  // namespace
}  // namespace efficient_attn
