// What is done to a tile of scores S [keys][w] besides scaling them: a soft cap, a bias by relative position, and the
// gradients of both.
#pragma once

#include "../common/params.h"
#include "pack.h"

namespace efficient_attn {
namespace {

// S holds x 2 log2(e) / cap and becomes cap tanh(x / cap), `factor` being the cap in the unit of scores; `slope`, if
// given, the derivative of that by x.
template <class A>
EA_NOINLINE void cap_scores(int64_t count, A factor, A* S, A* slope) {
    for (int64_t i = 0; i < count; i += kLanes<A>) {
        const Vec<A> bounded = tanh_of_log2<A>(load<A>(S + i));
        store(S + i, bounded * factor);
        if (slope) store(slope + i, A{1} - bounded * bounded);
    }
}

// One line of numbers by relative position, from which what belongs to query i and key j is read at i - j.
template <class A>
inline const A* diagonal_line(const AttentionParams& p, int64_t b, int64_t h) {
    const DiagonalView& view = p.diagonals;
    return static_cast<const A*>(view.data) + b * view.batch_stride + h * view.head_stride + p.Nk - 1;
}

// S[key][lane] += what stands at (first + lane) - key
template <class A>
EA_NOINLINE void add_diagonals(const AttentionParams& p, int64_t b, int64_t h, int64_t first, Range keys, int64_t w,
                               A* S) {
    const A* line = diagonal_line<A>(p, b, h) + first - keys.begin;
    for (int64_t k = 0; k < keys.end - keys.begin; ++k)
        for (int64_t lane = 0; lane < w; lane += kLanes<A>) {
            A* place = S + k * w + lane;
            store(place, load<A>(place) + load<A>(line + lane - k));
        }
}

// How many elements `fold_diagonals` needs of memory, for tiles of at most so many keys and lanes.
template <class A>
constexpr int64_t fold_elements(int64_t keys, int64_t w) {
    return kLanes<A> * (keys + w + 2 * kLanes<A>);
}

// sums[lane - k] += dS[k][lane], for `count` of the lanes; sums has its element 0 in the middle.
//
// Keys that are a whole number of vectors apart meet in the same lanes: they are summed up for themselves, in
// registers, and what comes of each of the kLanes kinds is shifted and added up at the end.
template <class A>
EA_NOINLINE void fold_diagonals(const A* dS, int64_t keys, int64_t w, int64_t count, A* memory, A* sums) {
    constexpr int64_t L = kLanes<A>;
    const int64_t groups = (keys + L - 1) / L, columns = w / L, line = (groups + columns + 1) * L;
    // Kind f holds at vector u, from 1 on, the sum over lane - (k - f) = (u - groups) L + 0 .. L - 1.
    for (int64_t f = 0; f < L; ++f) {
        A* kind = memory + f * line;
        store(kind, Vec<A>{});
        store(kind + line - L, Vec<A>{});
        for (int64_t u = 1; u < groups + columns; ++u) {
            const int64_t apart = u - groups;  // vector of lanes less group of keys
            Vec<A> sum = {};
            for (int64_t g = max_of(0, -apart); g < groups && g + apart < columns && g * L + f < keys; ++g)
                sum += load<A>(dS + (g * L + f) * w + (g + apart) * L);
            store(kind + u * L, sum);
        }
    }
    // lane - k = m, where kind f has it at m + f.
    const int64_t first = 1 - keys, last = count;
    int64_t m = first;
    for (; m + L <= last; m += L) {
        Vec<A> sum = {};
        for (int64_t f = 0; f < L; ++f) sum += load<A>(memory + f * line + m + f + groups * L);
        store(sums + m, load<A>(sums + m) + sum);
    }
    for (; m < last; ++m)
        for (int64_t f = 0; f < L; ++f) sums[m] += memory[f * line + m + f + groups * L];
}

}  // namespace
}  // namespace efficient_attn
