// The register-blocked product that all five matrix products of attention use:
//
//     acc[m][n] += sum_k a[m * m_stride + k * k_stride] * b[k * ldb + n]        m < MR, n < NV vectors
//
// a is read by broadcast and so needs no packing, b by vectors. MR x NV accumulators plus NV values of b fill the
// registers (4 x 3 of 16, 8 x 3 of 32), and MR divides every block size, NV vectors every tile of queries.
#pragma once

#include <cstdint>

#include "simd.h"

namespace efficient_attn {
namespace {

// A stride of one that the compiler knows.
struct Unit {
    constexpr operator int64_t() const { return 1; }
};

template <int N>
struct Int {
    static constexpr int value = N;
};

template <class A, int MR, int NV>
EA_INLINE void clear(Vec<A> (&acc)[MR][NV]) {
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) acc[m][v] = Vec<A>{};
}

template <class A, int MR, int NV, class MStride, class KStride>
EA_INLINE void multiply_accumulate(Vec<A> (&acc)[MR][NV], int64_t k_count, const A* a, MStride m_stride,
                                   KStride k_stride, const A* b, int64_t ldb) {
    for (int64_t k = 0; k < k_count; ++k) {
        Vec<A> row[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) row[v] = load<A>(b + v * kLanes<A>);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
            const Vec<A> x = broadcast<A>(a[m * m_stride]);
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) acc[m][v] += x * row[v];
        }
        a += k_stride;
        b += ldb;
    }
}

// Calls f(Int<rows>, first) over [0, count) in groups of kTileRows and one smaller rest.
template <int MR, class F>
EA_INLINE void rest_of_rows(int64_t rest, int64_t first, F& f) {
    if constexpr (MR > 0) {
        if (rest == MR) return f(Int<MR>{}, first);
        rest_of_rows<MR - 1>(rest, first, f);
    }
}

template <class F>
EA_INLINE void for_row_groups(int64_t count, F f) {
    int64_t first = 0;
    for (; first + kTileRows <= count; first += kTileRows) f(Int<kTileRows>{}, first);
    rest_of_rows<kTileRows - 1>(count - first, first, f);
}

// The widths, in vectors, into which `vectors` are split: as even as possible, at most kTileVectors each.
struct PanelSplit {
    int64_t count, base, extra;
};

inline PanelSplit split_panels(int64_t vectors) {
    const int64_t count = (vectors + kTileVectors - 1) / kTileVectors;
    return {count, count ? vectors / count : 0, count ? vectors % count : 0};
}

// Calls f(Int<vectors>, first lane) for each panel of `vectors`.
template <class A, class F>
EA_INLINE void for_panels(int64_t vectors, F f) {
    const PanelSplit split = split_panels(vectors);
    int64_t first = 0;
    for (int64_t panel = 0; panel < split.count; ++panel) {
        const int64_t width = split.base + (panel < split.extra);
        if (width == 3) f(Int<3>{}, first);
        if (width == 2) f(Int<2>{}, first);
        if (width == 1) f(Int<1>{}, first);
        first += width * kLanes<A>;
    }
}

}  // namespace
}  // namespace efficient_attn
