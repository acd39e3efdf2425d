// What the backward knows of each row before it walks the pairs (its phase 0), and what its tasks share.
#pragma once

#include "attention_forward.h"

namespace efficient_attn {
namespace {

// The bias has an element for every pair: its gradient is dS itself, stored on the way.
inline bool bias_is_full(const AttentionParams& p) {
    const int64_t* size = p.dbias.size;
    return p.dbias.data && size[0] == p.B && size[1] == p.Hq && size[2] == p.query_rows && size[3] == p.key_rows;
}

// Keys of one task: few enough that their K, V, dK and dV stay in the second cache level while every query comes by,
// and that there is a task for each thread. Under lists not more than kMostSpans: each looks up every tile of queries,
// of which most see none of its keys. Spans end where pieces of keys do.
constexpr int64_t kMostSpans = 64;

template <class A>
inline int64_t key_span(const AttentionParams& p) {
    constexpr int64_t cache = 512 * 1024;
    const int64_t bytes = 2 * static_cast<int64_t>(sizeof(A)) * (whole_vectors<A>(p.D) + whole_vectors<A>(p.Dv));
    const int64_t wanted = ceil_div(2 * max_of(1, p.threads), max_of(1, p.B * p.Hkv));
    const int64_t least = p.mask.indptr ? p.Nk / kMostSpans : 0;
    const int64_t span = min_of(max_of(cache / bytes, least), ceil_div(p.Nk, wanted));
    return max_of(span / kKeys, 1) * kKeys;
}

// Of all heads, only so many are under way that the accumulators of dQ stay few. As many as there are threads take
// turns, span by span: where spans of one head run behind one another, a short one waits for a long one.
struct Pipeline {
    int64_t spans, heads, slots, tiles, turns;

    template <class A>
    static Pipeline of(const AttentionParams& p) {
        const int64_t heads = p.B * p.Hkv;
        const int64_t threads = max_of(1, p.threads), turns = min_of(threads, max_of(1, heads));
        return {max_of(1, ceil_div(p.Nk, key_span<A>(p))), heads, min_of(heads, max_of(threads + 1, 2 * turns)),
                p.Hq / max_of(1, p.Hkv) * attention_tiling(p).count, turns};
    }
    int64_t head(int64_t task) const { return task / (turns * spans) * turns + task % (turns * spans) % now(task); }
    int64_t span(int64_t task) const { return task % (turns * spans) / now(task); }

  private:
    // How many heads take turns around a task: the last ones may be fewer.
    int64_t now(int64_t task) const { return min_of(turns, heads - task / (turns * spans) * turns); }
};

// What the tasks share: of each row delta, and top and rest, which make its weights exp((s - top) - rest) in the unit
// of the scores; how many tiles of queries each span is done with, and of the heads under way dQt; or what becomes of
// the keys that a run shares with the one before, and the sums of those that wait for the other run.
template <class A>
struct BackwardShared {
    A *delta, *top, *rest, *dQt, *left;
    int64_t *done, steps;

    BackwardShared(const AttentionParams& p, char* memory) {
        const Pipeline line = Pipeline::of<A>(p);
        const bool bands = has_bands(p);
        steps = line.heads * (bands ? band_runs(p) : line.spans);
        Arena arena{memory};
        delta = p.delta ? static_cast<A*>(p.delta) : arena.take<A>(p.B * p.Hq * p.Nq);
        top = arena.take<A>(p.B * p.Hq * p.Nq);
        rest = arena.take<A>(p.B * p.Hq * p.Nq);
        done = arena.take<int64_t>(steps);
        dQt = arena.take<A>(bands ? 0 : line.slots * line.tiles * p.D * kQueries);
        left = arena.take<A>(bands ? left_slots(p) * left_by_run(p) : 0);
        end = arena.next;
    }
    static int64_t bytes(const AttentionParams& p) { return BackwardShared(p, kNoMemory).end - kNoMemory; }
    // How many runs may have left something at once.
    static int64_t left_slots(const AttentionParams& p) {
        return min_of(p.B * p.Hkv * band_runs(p), 8 * max_of(1, p.threads));
    }
    // Elements of dK and dV that a run leaves.
    static int64_t left_by_run(const AttentionParams& p) {
        return p.band_overlap * (whole_vectors<A>(p.D) + whole_vectors<A>(p.Dv));
    }

  private:
    char* end;
};

// The gradient of the bias is 0 for pairs that no pass comes to; with an order it is 0 already.
template <class T>
inline void clear_bias_rows(const AttentionParams& p, int64_t row, int64_t rows) {
    with_bias_type<T>(p, [&](auto element) {
        using E = decltype(element);
        const size_t bytes = static_cast<size_t>(rows * p.Nk) * sizeof(E);
        __builtin_memset(static_cast<E*>(p.dbias.data) + row * p.Nk, 0, bytes);
    });
}

// Weights are exp(s - lse), so that an error of the stored lse is one of every weight of its row: half an ulp. From
// here on, where that is 2^-14 in float32, it would show, and soon an lse of 1e9 cannot even hold the log of the number
// of keys: rows under a bias of one large number.
constexpr double kCoarseLse = 1024;

template <class A>
constexpr double kLastPlace = sizeof(A) == sizeof(double) ? 0x1p-52 : 0x1p-23;

template <class A>
inline bool is_coarse(A lse) {
    const A size = lse < 0 ? -lse : lse;
    return size > static_cast<A>(kCoarseLse) && size < kInfinity<A>;
}

// Whether lse is that of these scores alone, but for its last places: what a call may see is sometimes one part of what
// its rows see, and then lse is all that is known of the other ones.
template <class A>
inline bool is_log_sum(A lse, A top, A total, double unit) {
    const double own = static_cast<double>(top) * unit + __builtin_log(static_cast<double>(total));
    const double difference = own - static_cast<double>(lse), last = static_cast<double>(lse) * kLastPlace<A>;
    return difference * difference <= 16 * last * last;
}

// top and rest of the rows of a tile: from lse where that is exact enough, else from the scores once more, maximum and
// sum apart.
template <class T, class A>
inline void measure_rows(const AttentionParams& p, int64_t b, int64_t h, Range rows, char* memory,
                         const BackwardShared<A>& shared) {
    const int64_t first = (b * p.Hq + h) * p.Nq, count = rows.end - rows.begin;
    const double unit = score_unit(p);
    bool coarse = false;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
        // Rows without a visible key get weight 0 through an infinite top.
        const A lse = static_cast<const A*>(p.lse)[lse_row(p, b, h, i)];
        const int64_t row = first + i;
        const bool empty = lse == -kInfinity<A> || lse == kInfinity<A>;
        const double exponent = static_cast<double>(lse) / unit;
        shared.top[row] = empty ? kInfinity<A> : static_cast<A>(exponent);
        shared.rest[row] = empty ? 0 : static_cast<A>(exponent - static_cast<double>(shared.top[row]));
        coarse |= is_coarse(lse);
    }
    if (!coarse) return;
    const TileRegisters tiles(kPairProducts<T>);
    ForwardTile<A> t(p, memory);
    begin_softmax(p, h, whole_lanes<T, A>(count), t);
    softmax_pass<T>(p, b, h, rows, whole_lanes<T, A>(count), t, [](Range, bool) {});
    for (int64_t r = 0; r < count; ++r) {
        const int64_t i = rows.begin + r, row = first + i;
        const A lse = static_cast<const A*>(p.lse)[lse_row(p, b, h, i)];
        if (!is_coarse(lse) || !(t.total[r] > 0) || !is_log_sum(lse, t.top[r], t.total[r], unit)) continue;
        shared.top[row] = t.top[r];
        shared.rest[row] = static_cast<A>(__builtin_log(static_cast<double>(t.total[r])) / unit);
    }
}

// Of one head; without queries there is still a task, to start the counters.
inline int64_t row_tiles(const AttentionParams& p) { return max_of(1, attention_tiling(p).count); }

// What `done` says before phase 1.
inline int64_t first_state(const AttentionParams& p, int64_t step) {
    return has_bands(p) && step % band_runs(p) == 0 ? kStored : 0;
}

// Phase 0.
template <class T, class A>
inline void rows_task(const AttentionParams& p, int64_t task, char* memory, const BackwardShared<A>& shared) {
    if (task == 0) {
        for (int64_t k = 0; k < shared.steps; ++k) shared.done[k] = first_state(p, k);
    }
    const int64_t tiles = row_tiles(p), tile = task % tiles, head = task / tiles;
    const int64_t h = head % p.Hq, b = head / p.Hq;
    const Range rows = tile_rows(p, attention_tiling(p), tile);
    if (rows.begin >= rows.end) return;
    if (bias_is_full(p) && may_hide_pairs(p) && !has_order(p))
        clear_bias_rows<T>(p, head * p.Nq + rows.begin, rows.end - rows.begin);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
        const A sum = row_product<A>(row_pointer<T>(p.out, b, h, i), row_pointer<T>(p.grad_out, b, h, i), p.Dv);
        shared.delta[head * p.Nq + i] = p.grad_lse ? sum - static_cast<const A*>(p.grad_lse)[lse_row(p, b, h, i)] : sum;
    }
    measure_rows<T>(p, b, h, rows, memory, shared);
}

}  // namespace
}  // namespace efficient_attn
