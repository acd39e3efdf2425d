// The register-blocked product that all five matrix products of attention use:
//
//     acc[m][n] += sum_k a[m * m_stride + k * k_stride] * b[k * ldb + n]        m < MR, n < NV vectors
//
// a is read by broadcast and so needs no packing, b by vectors (of half precision, too). MR x NV accumulators plus NV
// values of b fill the registers (4 x 3 of 16, 8 x 3 of 32), and MR divides every block size, NV vectors every tile of
// queries.
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

template <bool B>
struct Bool {
    static constexpr bool value = B;
};

// Calls f with a condition as a type.
template <class F>
EA_INLINE void with_bool(bool condition, F f) {
    condition ? f(Bool<true>{}) : f(Bool<false>{});
}

template <class A, int MR, int NV>
EA_INLINE void clear(Vec<A> (&acc)[MR][NV]) {
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) acc[m][v] = Vec<A>{};
}

template <class A, class L, class B, int MR, int NV, class MStride, class KStride>
EA_INLINE void multiply_accumulate(Vec<A> (&acc)[MR][NV], int64_t k_count, const L* a, MStride m_stride,
                                   KStride k_stride, const B* b, int64_t ldb) {
    using Operand = decltype(load_widened<A>(b));
#pragma GCC unroll 4
    for (int64_t k = 0; k < k_count; ++k) {
        Operand row[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) row[v] = load_widened<A>(b + v * kLanes<A>);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
            const Operand x = broadcast_at(a + m * m_stride);
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) acc[m][v] = multiply_add(x, row[v], acc[m][v]);
        }
        a += k_stride;
        b += ldb;
    }
}

// Calls f(Int<rows>, first) over [0, count) in groups of kTileRows, and the rest in groups of half, a quarter, ... of
// it.
template <int MR, class F>
EA_INLINE void rest_of_rows(int64_t rest, int64_t first, F& f) {
    if constexpr (MR > 0) {
        if (rest & MR) f(Int<MR>{}, first);
        rest_of_rows<MR / 2>(rest, first + (rest & MR), f);
    }
}

template <class F>
EA_INLINE void for_row_groups(int64_t count, F f) {
    int64_t first = 0;
    for (; first + kTileRows <= count; first += kTileRows) f(Int<kTileRows>{}, first);
    rest_of_rows<kTileRows / 2>(count - first, first, f);
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

// What becomes of the products: out = product, out = product * factor, out += product, out = out * factor + product,
// with a factor for each column.
enum class Into { kReplace, kScale, kAdd, kFade };

// Not inlined: a function of its own keeps its accumulators in registers, whatever surrounds the call.
template <class A, Into kInto, int MR, int NV, class L, class B, class MStride, class KStride>
EA_NOINLINE void product_tile(int64_t depth, const L* a, MStride m_stride, KStride k_stride, const B* b, int64_t ldb,
                              A* out, int64_t ldo, const A* factor) {
    if constexpr (kInto == Into::kAdd || kInto == Into::kFade) {  // a gradient's sums may lie in the last cache level
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m)
            for (int byte = 0; byte < NV * kVectorBytes; byte += 64)
                __builtin_prefetch(reinterpret_cast<const char*>(out + m * ldo) + byte, 1);
    }
    Vec<A> acc[MR][NV];
    clear<A>(acc);
    multiply_accumulate<A>(acc, depth, a, m_stride, k_stride, b, ldb);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
            A* place = out + m * ldo + v * kLanes<A>;
            if constexpr (kInto == Into::kReplace) store(place, acc[m][v]);
            if constexpr (kInto == Into::kScale) store(place, acc[m][v] * load<A>(factor + v * kLanes<A>));
            if constexpr (kInto == Into::kAdd) store(place, load<A>(place) + acc[m][v]);
            if constexpr (kInto == Into::kFade)
                store(place, load<A>(place) * load<A>(factor + v * kLanes<A>) + acc[m][v]);
        }
    }
}

// out[m][n] (into) sum_k a[m * m_stride + k * k_stride] * b[k * ldb + n]      m < rows, n < vectors of lanes, k < depth
//
// kRun terms are summed in one go: a long sum in float is kept as a sum of short ones.
template <class A, Into kInto, int64_t kRun, class L, class B, class MStride, class KStride>
inline void product(int64_t rows, int64_t vectors, int64_t depth, const L* a, MStride m_stride, KStride k_stride,
                    const B* b, int64_t ldb, A* out, int64_t ldo, const A* factor = nullptr) {
    constexpr bool with_factor = kInto == Into::kScale || kInto == Into::kFade;
    for_row_groups(rows, [&](auto group, int64_t first) {
        for_panels<A>(vectors, [&](auto panel, int64_t lane) {
            constexpr int MR = decltype(group)::value, NV = decltype(panel)::value;
            const L* left = a + first * m_stride;
            A* place = out + first * ldo + lane;
            const int64_t run = depth < kRun ? depth : kRun;
            product_tile<A, kInto, MR, NV>(run, left, m_stride, k_stride, b + lane, ldb, place, ldo,
                                           with_factor ? factor + lane : nullptr);
            for (int64_t k = run; k < depth; k += kRun) {
                product_tile<A, Into::kAdd, MR, NV>(depth - k < kRun ? depth - k : kRun, left + k * k_stride, m_stride,
                                                    k_stride, b + k * ldb + lane, ldb, place, ldo, nullptr);
            }
        });
    });
}

}  // namespace
}  // namespace efficient_attn
