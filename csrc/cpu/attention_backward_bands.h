// Phase 1 of the backward under a mask that is a band (bands.h).
//
// Spans of keys that run behind one another would wait for each other there: what two of them share are the last tiles
// of queries of one and the first of the next. Instead a task owns a run of tiles of queries of one (batch, key/value
// head). It sums up and stores dQ of a tile at once, and sums up dK and dV of all keys that the run sees. Of keys that
// a neighbour sees too, the run that is done first leaves its sums to the other one, which adds its own: no run waits
// for another, and of two sums the order does not matter. Runs depend on sizes and mask alone, so that the bits do not
// depend on the threads.
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

// Step `number` and the one before share `keys`, which lie from `first` on in the sums of this run: they are left to
// the other run, or stored with what that one left.
template <class T, class A>
inline void meet_neighbour(const AttentionParams& p, int64_t number, Range keys, int64_t first,
                           const BackwardShared<A>& shared, const BackwardTile<A>& t) {
    const int64_t D = whole_vectors<A>(p.D), Dv = whole_vectors<A>(p.Dv), runs = band_runs(p);
    const int64_t slots = shared.left_slots(p), count = keys.end - keys.begin;
    int64_t* state = shared.done + number;
    if (count <= 0) return __atomic_store_n(state, kStored, __ATOMIC_RELEASE);
    A *dK = t.dK + (keys.begin - first) * D, *dV = t.dV + (keys.begin - first) * Dv;
    A *left_dK = shared.left + number % slots * shared.left_by_run(p), *left_dV = left_dK + p.band_overlap * D;
    int64_t nothing = 0;
    if (__atomic_compare_exchange_n(state, &nothing, kLeaves, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
        // Tasks are taken in order, so both that are waited for are done or being done.
        if (number >= slots) wait_until(state - slots, kStored);
        __builtin_memcpy(left_dK, dK, static_cast<size_t>(count * D) * sizeof(A));
        __builtin_memcpy(left_dV, dV, static_cast<size_t>(count * Dv) * sizeof(A));
        __atomic_store_n(state, kLeft, __ATOMIC_RELEASE);
        return;
    }
    wait_until(state, kLeft);
    add_to(left_dK, count * D, dK);
    add_to(left_dV, count * Dv, dV);
    __atomic_store_n(state, kStored, __ATOMIC_RELEASE);
    store_key_gradients<T>(p, number / runs / p.Hkv, number / runs % p.Hkv, keys, dK, dV);
}

// dK and dV of the keys of a run: stored, or left to a neighbour.
template <class T, class A>
inline void finish_run_keys(const AttentionParams& p, int64_t head, int64_t run, Range keys,
                            const BackwardShared<A>& shared, const BackwardTile<A>& t) {
    const int64_t runs = band_runs(p), kv = head % p.Hkv, b = head / p.Hkv;
    const int64_t D = whole_vectors<A>(p.D), Dv = whole_vectors<A>(p.Dv), number = head * runs + run;
    const int64_t seen_before = run > 0 ? run_keys(p, b, kv, run - 1).end : 0;
    const int64_t seen_after = run + 1 < runs ? run_keys(p, b, kv, run + 1).begin : p.Nk;
    const int64_t own = max_of(keys.begin, min_of(keys.end, seen_before)),
                  last = max_of(own, min_of(keys.end, seen_after));
    if (run > 0) meet_neighbour<T>(p, number, {keys.begin, own}, keys.begin, shared, t);
    store_key_gradients<T>(p, b, kv, {own, last}, t.dK + (own - keys.begin) * D, t.dV + (own - keys.begin) * Dv);
    if (run + 1 < runs) meet_neighbour<T>(p, number + 1, {last, keys.end}, keys.begin, shared, t);
    if (p.continues) return;
    const auto clear = [&](Range unseen) {
        clear_rows<T>(p.dk, b, kv, unseen, p.D);
        clear_rows<T>(p.dv, b, kv, unseen, p.Dv);
    };
    if (run == 0) clear({0, keys.begin});
    clear({keys.end, seen_after});
}

template <class T, class A>
inline void run_task(const AttentionParams& p, int64_t task, char* memory, const BackwardShared<A>& shared) {
    const QueryTiling tiling = attention_tiling(p);
    const int64_t runs = band_runs(p), size = p.band_tiles;
    const int64_t head = task / runs, run = task % runs, kv = head % p.Hkv, b = head / p.Hkv;
    const int64_t D = whole_vectors<A>(p.D), Dv = whole_vectors<A>(p.Dv), group = p.Hq / p.Hkv;
    const Range keys = run_keys(p, b, kv, run);
    BackwardTile<A> t(p, memory);
    fill_zero(t.dK, (keys.end - keys.begin) * D);
    fill_zero(t.dV, (keys.end - keys.begin) * Dv);
    copy_keys<T>(p, b, kv, keys, t);

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
}

}  // namespace
}  // namespace efficient_attn
