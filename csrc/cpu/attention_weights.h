// Attention forward that returns what it multiplies the values with, in the pass that makes the output:
//
//     W_ij = Z_ij exp(s_ij - lse_i)      of each head, or averaged over the heads, which never exist all at once
//
// The online softmax knows the maximum of a row only at its end. A tile therefore keeps the exponentials of all its
// keys, and for each piece of keys what they were taken against, and sets them right afterwards: two or three passes
// over memory of the second cache level instead of another product. A task is a tile of queries of one head, or of all
// heads one after another where their average is wanted; it owns its rows of the result.
#pragma once

#include "attention_forward.h"

namespace efficient_attn {
namespace {

inline bool averages_weights(const AttentionParams& p) { return p.weights.heads != p.Hq; }

// The queries of a tile: fewer where its strips would not stay in the second cache level, or threads without a tile.
// Every query is worked on alike however many there are.
template <class A>
inline QueryTiling weights_tiling(const AttentionParams& p) {
    constexpr int64_t cache = 1280 * 1024;
    const int64_t lines = p.B * p.weights.heads, row = 2 * p.Nk * static_cast<int64_t>(sizeof(A));
    int64_t largest = kQueries * row <= cache ? kQueries : kQueries / 2;
    // Not under a window: which keys a tile comes to, and how they group, depends there on its queries.
    const bool alike = p.mask.window_left < 0 && p.mask.window_right < 0;
    while (alike && largest > 16 && lines * ceil_div(p.Nq, largest) < p.threads) largest /= 2;
    return query_tiling(p, min_of(largest, round_up(max_of(1, p.Nq), 16)));
}

// At most as many pieces as there are blocks of the list and multiples of kKeys; a list that names blocks twice, which
// no BlockMask does, loses those beyond.
inline int64_t most_pieces(const AttentionParams& p) {
    return ceil_div(p.Nk, kKeys) + (p.mask.indptr ? ceil_div(p.Nk, p.mask.block_k) : 0) + 1;
}

template <class A>
struct WeightsTile {
    ForwardTile<A> forward;
    A *mean, *tops, *factor;  // [Nk][w], [pieces][w], [w]
    Range* pieces;

    WeightsTile(const AttentionParams& p, char* memory) : forward(p, memory) {
        const int64_t w = round_up(weights_tiling<A>(p).tile, 2 * kTilePairs);
        Arena arena{memory + ForwardTile<A>::bytes(p)};
        forward.strip = arena.take<A>(p.Nk * w);
        mean = arena.take<A>(averages_weights(p) ? p.Nk * w : 0);
        tops = arena.take<A>(most_pieces(p) * w);
        factor = arena.take<A>(w);
        pieces = arena.take<Range>(most_pieces(p));
        end = arena.next;
    }

    static int64_t bytes(const AttentionParams& p) { return WeightsTile(p, kNoMemory).end - kNoMemory; }

  private:
    char* end;
};

// What the exponentials of a piece, taken against `top`, are to be multiplied with, for every lane.
template <class A>
inline void weight_factors(const AttentionParams& p, const A* top, const ForwardTile<A>& t, int64_t w, A* factor) {
    const A share = static_cast<A>(1.0 / static_cast<double>(averages_weights(p) ? p.Hq : 1));
    for (int64_t lane = 0; lane < w; lane += kLanes<A>) {
        const Vec<A> difference = load(top + lane) - load(t.top + lane), total = load(t.total + lane);
        const Vec<A> change = is_natural(p) ? exponential<true>(difference) : exponential<false>(difference);
        store(factor + lane, select<A>(total == 0, Vec<A>{}, change * share / total));
    }
}

template <class A>
EA_NOINLINE void add_weights(const A* exponentials, int64_t keys, int64_t w, const A* factor, A* sum) {
    for (int64_t k = 0; k < keys; ++k)
        for (int64_t lane = 0; lane < w; lane += kLanes<A>) {
            A* place = sum + k * w + lane;
            store(place, load<A>(place) + load(exponentials + k * w + lane) * load(factor + lane));
        }
}

// Rows of the result for some keys: columns [keys][w], finished by finish(x, row).
template <class T, class A, class Finish>
inline void store_weights(const AttentionParams& p, const A* columns, int64_t w, int64_t b, int64_t h, Range rows,
                          Range keys, A* scratch, Finish finish) {
    const int64_t* stride = p.weights.stride;
    const TensorView view{static_cast<T*>(p.weights.data) + keys.begin, stride[0], stride[1], stride[2]};
    store_transposed<T>(columns, w, view, b, h, rows.begin, rows.end - rows.begin, keys.end - keys.begin, scratch,
                        finish);
}

// Weights of pairs that no pass comes to.
template <class T>
inline void clear_weights(const AttentionParams& p, int64_t b, int64_t h, Range rows) {
    const int64_t* stride = p.weights.stride;
    for (int64_t i = rows.begin; i < rows.end; ++i)
        __builtin_memset(static_cast<T*>(p.weights.data) + b * stride[0] + h * stride[1] + i * stride[2], 0,
                         static_cast<size_t>(p.Nk) * sizeof(T));
}

template <class T, class A>
inline void weights_task(const AttentionParams& p, int64_t task, char* memory, char* shared) {
    const QueryTiling tiling = weights_tiling<A>(p);
    const int64_t tile = tiling.count - 1 - task % tiling.count, line = task / tiling.count;
    const int64_t heads = p.weights.heads, b = line / heads, head = line % heads;
    const Range rows = tile_rows(p, tiling, tile);
    if (rows.begin >= rows.end) return;
    const int64_t w = whole_lanes<T, A>(rows.end - rows.begin);
    const bool average = averages_weights(p);
    WeightsTile<A> t(p, memory);
    if (average) {
        fill_zero(t.mean, p.Nk * w);
    } else if (may_hide_pairs(p)) {
        clear_weights<T>(p, b, head, rows);
    }
    for (int64_t h = average ? 0 : head; h < (average ? p.Hq : head + 1); ++h) {
        int64_t pieces = 0;
        attend<T>(p, b, h, rows, w, shared, t.forward, [&](Range keys) {
            if (pieces == most_pieces(p)) return;
            __builtin_memcpy(t.tops + pieces * w, t.forward.top, static_cast<size_t>(w) * sizeof(A));
            t.pieces[pieces++] = keys;
        });
        for (int64_t piece = 0; piece < pieces; ++piece) {
            const Range keys = t.pieces[piece];
            const A* exponentials = t.forward.strip + keys.begin * w;
            weight_factors(p, t.tops + piece * w, t.forward, w, t.factor);
            if (average) {
                add_weights(exponentials, keys.end - keys.begin, w, t.factor, t.mean + keys.begin * w);
            } else {
                store_weights<T>(p, exponentials, w, b, h, rows, keys, t.forward.scratch,
                                 [&](Vec<A> x, int64_t r) { return x * t.factor[r]; });
            }
        }
    }
    for (int64_t key = 0; average && key < p.Nk; key += kKeys)
        store_weights<T>(p, t.mean + key * w, w, b, 0, rows, {key, min_of(key + kKeys, p.Nk)}, t.forward.scratch,
                         [](Vec<A> x, int64_t) { return x; });
}

template <class A>
inline int64_t weights_task_count(const AttentionParams& p) {
    return p.B * p.weights.heads * weights_tiling<A>(p).count;
}

}  // namespace
}  // namespace efficient_attn
