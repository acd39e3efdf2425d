// Products of bfloat16 where the processor has them (AVX512_BF16: a lane takes two products at a time, summed in
// float32), at twice the rate of float32. The left factor is read in place where its pairs lie side by side; the right
// one is packed:
//
//     pairs [terms / 2][w]        of w columns, each the terms 2 k and 2 k + 1; the last is filled up with 0
#pragma once

#include "pack.h"

namespace efficient_attn {
namespace {

// Rows [first, first + count) of (b, h) with an even number of elements: in place, or with a 0 at the end in `buffer`.
template <class T>
inline Rows<T> load_paired_rows(const TensorView& t, int64_t b, int64_t h, int64_t first, int64_t count, int64_t width,
                                T* buffer) {
    const T* source = row_pointer<T>(t, b, h, first);
    if (width % 2 == 0) return {source, t.row_stride};
    for (int64_t r = 0; r < count; ++r) {
        T* row = buffer + r * (width + 1);
        __builtin_memcpy(row, source + r * t.row_stride, static_cast<size_t>(width) * sizeof(T));
        row[width] = T{};
    }
    return {buffer, width + 1};
}

// out[d / 2][r] = elements d and d + 1 of row r, for r < w; lanes from `count` on are 0.
template <class T, class A>
inline void pack_paired_columns(const TensorView& t, int64_t b, int64_t h, int64_t first, int64_t count, int64_t width,
                                int64_t w, A* scratch, Pair* out) {
    static_assert(sizeof(A) == sizeof(Pair), "a pair moves as one element");
    constexpr int64_t L = kLanes<A>;
    const int64_t pairs = ceil_div(width, 2), padded = whole_vectors<A>(pairs);
    for (int64_t r0 = 0; r0 < w; r0 += L) {
        const int64_t present = max_of(0, min_of(L, count - r0));
        fill_zero(scratch, L * padded);
        for (int64_t r = 0; r < present; ++r)
            __builtin_memcpy(scratch + r * padded, row_pointer<T>(t, b, h, first + r0 + r),
                             static_cast<size_t>(width) * sizeof(T));
        for (int64_t d0 = 0; d0 < pairs; d0 += L)
            transpose_block(scratch + d0, padded, present, Unscaled{}, reinterpret_cast<A*>(out) + d0 * w + r0, w,
                            pairs - d0);
    }
}

// out[r / 2][d] = element d of rows r and r + 1 of (b, h), of which `count` exist; columns from `width` on are 0.
template <class T>
inline void pack_paired_rows(const TensorView& t, int64_t b, int64_t h, int64_t first, int64_t count, int64_t width,
                             int64_t padded, Pair* out) {
    for (int64_t r = 0; r < count; r += 2) {
        const T *row = row_pointer<T>(t, b, h, first + r), *next = row + t.row_stride;
        const bool alone = r + 1 == count;
        Pair* place = out + r / 2 * padded;
        int64_t d = 0;
        for (; !alone && d + kLanes<float> <= width; d += kLanes<float>) store(place + d, join(row + d, next + d));
        for (; d < width; ++d) place[d] = {row[d], alone ? T{} : next[d]};
        for (; d < padded; ++d) place[d] = {};
    }
}

// out[k / 2][lane] = rows k and k + 1 of a float tile, rounded.
template <class A>
EA_NOINLINE void round_to_pairs(const A* tile, int64_t count, int64_t w, Pair* out) {
    for (int64_t k = 0; k < count; k += 2)
        for (int64_t lane = 0; lane < w; lane += kLanes<A>) {
            const A* place = tile + k * w + lane;
            store(out + k / 2 * w + lane, join(load(place), k + 1 < count ? load(place + w) : Vec<A>{}));
        }
}

// Rounds a tile in its layout: pairs of columns lie side by side.
template <class A>
EA_NOINLINE void round_rows(const A* tile, int64_t count, int64_t w, BFloat16* out) {
    for (int64_t i = 0; i < count * w; i += kLanes<A>) store(out + i, round(load(tile + i)));
}

inline bool row_is_finite(const BFloat16* row, int64_t width) {
    bool finite = true;
    for (int64_t d = 0; d < width; ++d) finite &= (row[d].bits & 0x7F80) != 0x7F80;
    return finite;
}

}  // namespace
}  // namespace efficient_attn
