// Phase 1 of the backward under a mask that is a band (bands.h).
//
// Spans of keys that run behind one another would wait for each other there: what two of them share are the last tiles
// of queries of one and the first of the next. Instead a task owns a run of tiles of queries of one (batch, key/value
// head). It sums up and stores dQ of a tile at once, and sums up dK and dV of all keys that the run sees. Of keys that
// the next run sees too it leaves the sums to that one, which adds them to its own at its end. Runs depend on sizes and
// mask alone, so that the bits do not depend on the threads.
#pragma once

#include "attention_backward.h"

namespace efficient_attn {
namespace {

template <class A>
inline void add_to(const A* from, int64_t count, A* to) {
    for (int64_t n = 0; n < count; n += kLanes<A>) store(to + n, load<A>(to + n) + load(from + n));
}

template <class T>
inline void clear_rows(const TensorView& t, int64_t b, int64_t h, Range rows, int64_t width) {
    for (int64_t i = rows.begin; i < rows.end; ++i)
        __builtin_memset(row_pointer<T>(t, b, h, i), 0, static_cast<size_t>(width) * sizeof(T));
}

// dK and dV of the keys of a run: with what the run before left, stored, or left to the next.
template <class T, class A>
inline void finish_run_keys(const AttentionParams& p, int64_t head, int64_t run, Range keys,
                            const BackwardShared<A>& shared, const BackwardTile<A>& t) {
    const int64_t runs = band_runs(p), kv = head % p.Hkv, b = head / p.Hkv, slots = Pipeline::of<A>(p).slots;
    const int64_t D = whole_vectors<A>(p.D), Dv = whole_vectors<A>(p.Dv), size = shared.left_by_run(p);
    const int64_t seen_before = run > 0 ? run_keys(p, b, kv, run - 1).end : 0;
    const int64_t seen_after = run + 1 < runs ? run_keys(p, b, kv, run + 1).begin : p.Nk;
    A* left = shared.left + (head % slots * runs + run) * size;
    if (run > 0 && p.band_overlap > 0) {
        wait_until(shared.done + head * runs + run - 1, 1);
        const int64_t count = max_of(0, seen_before - keys.begin);
        add_to(left - size, count * D, t.dK);
        add_to(left - size + p.band_overlap * D, count * Dv, t.dV);
    }
    const int64_t own = max_of(keys.begin, min_of(keys.end, seen_after));
    store_key_gradients<T>(p, b, kv, {keys.begin, own}, t.dK, t.dV);
    if (own < keys.end) {
        const size_t bytes = static_cast<size_t>(keys.end - own) * sizeof(A);
        __builtin_memcpy(left, t.dK + (own - keys.begin) * D, bytes * static_cast<size_t>(D));
        __builtin_memcpy(left + p.band_overlap * D, t.dV + (own - keys.begin) * Dv, bytes * static_cast<size_t>(Dv));
    }
    const auto clear = [&](Range unseen) {
        clear_rows<T>(p.dk, b, kv, unseen, p.D);
        clear_rows<T>(p.dv, b, kv, unseen, p.Dv);
    };
    if (run == 0) clear({0, keys.begin});
    clear({max_of(own, keys.end), seen_after});
}

template <class T, class A>
inline void run_task(const AttentionParams& p, int64_t task, char* memory, const BackwardShared<A>& shared) {
    const QueryTiling tiling = attention_tiling(p);
    const int64_t runs = band_runs(p), size = run_tiles(p, tiling), slots = Pipeline::of<A>(p).slots;
    const int64_t head = task / runs, run = task % runs, kv = head % p.Hkv, b = head / p.Hkv;
    const int64_t D = whole_vectors<A>(p.D), Dv = whole_vectors<A>(p.Dv), group = p.Hq / p.Hkv;
    const Range keys = run_keys(p, b, kv, run);
    int64_t* done = shared.done + head * runs + run;
    BackwardTile<A> t(p, memory);
    fill_zero(t.dK, (keys.end - keys.begin) * D);
    fill_zero(t.dV, (keys.end - keys.begin) * Dv);
    // Tasks are taken in order, so what is waited for is done or being done.
    if (run == 0 && head >= slots) wait_until(done - (slots - 1) * runs - 1, 1);

    for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
        for (int64_t tile = run * size; tile < min_of((run + 1) * size, tiling.count); ++tile) {
            const QueryTile q = query_tile(p, tiling, b, h, tile);
            if (q.count <= 0) continue;
            const int64_t w = whole_lanes<T, A>(q.count);
            QueryRows<T, A> query_rows;
            auto begin = [&] {
                load_query_tile<T>(p, q, shared, w, t);
                query_rows = load_query_rows<T>(p, q, t);
            };
            fill_zero(t.dQt, p.D * w);
            add_query_gradients<T>(p, q, keys, w, t, t.dQt, begin, [&](Range part, bool masked) {
                add_key_gradients<T>(p, q, part.end - part.begin, w, masked, query_rows, t,
                                     t.dK + (part.begin - keys.begin) * D, t.dV + (part.begin - keys.begin) * Dv);
            });
            store_query_gradients<T>(p, q, w, t.dQt, t);
        }
    }
    finish_run_keys<T>(p, head, run, keys, shared, t);
    __atomic_store_n(done, 1, __ATOMIC_RELEASE);
}

}  // namespace
}  // namespace efficient_attn
