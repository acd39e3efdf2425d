// Products of bfloat16 where the processor has them, summed in float32: in vectors (AVX512_BF16: a lane takes two
// products at a time) or in tiles (AMX_BF16: matrix_tiles.h). The left factor is read in place where its pairs lie side
// by side; the right one is packed:
//
//     pairs [depth][w]        of w columns, each the terms 2 k and 2 k + 1
//
// What a factor has fewer terms than `depth` pairs is filled up with 0.
#pragma once

#include "matrix_tiles.h"
#include "pack.h"

namespace efficient_attn {
namespace {

// How many pairs so many terms fill.
inline int64_t pair_depth(int64_t terms) { return round_up(ceil_div(terms, 2), kTilePairs); }

// Lanes for `count` rows of a tile: whole vectors, and of bfloat16 whole factors of a product too.
template <class T, class A>
inline int64_t whole_lanes(int64_t count) {
    return kPairProducts<T> ? round_up(count, max_of(kLanes<A>, 2 * kTilePairs)) : whole_vectors<A>(count);
}

// Rows [first, first + count) of (b, h), whole pairs wide: in place, or gathered, with zeros at their ends, in
// `buffer`.
template <class T>
inline Rows<T> load_paired_rows(const TensorView& t, int64_t b, int64_t h, int64_t first, int64_t count, int64_t width,
                                T* buffer) {
    const int64_t padded = 2 * pair_depth(width);
    if (padded == width && is_run(t, b, first, count)) return {row_pointer<T>(t, b, h, first), t.row_stride};
    for_each_row<T>(t, b, h, first, count, [&](int64_t r, const T* row) {
        T* place = buffer + r * padded;
        __builtin_memcpy(place, row, static_cast<size_t>(width) * sizeof(T));
        for (int64_t d = width; d < padded; ++d) place[d] = T{};
    });
    return {buffer, padded};
}

// Rows in place, or gathered into `buffer`.
template <class T, class A>
inline Rows<T> gathered_rows(const TensorView& t, int64_t b, int64_t h, int64_t first, int64_t count, int64_t width,
                             A* buffer) {
    if (is_run(t, b, first, count)) return {row_pointer<T>(t, b, h, first), t.row_stride};
    T* rows = reinterpret_cast<T*>(buffer);
    for_each_row<T>(t, b, h, first, count, [&](int64_t r, const T* row) {
        __builtin_memcpy(rows + r * width, row, static_cast<size_t>(width) * sizeof(T));
    });
    return {rows, width};
}

// out[d / 2][r] = elements d and d + 1 of row r, for r < w; lanes from `count` on are 0.
template <class T, class A>
inline void pack_paired_columns(const TensorView& t, int64_t b, int64_t h, int64_t first, int64_t count, int64_t width,
                                int64_t w, A* scratch, Pair* out) {
    static_assert(sizeof(A) == sizeof(Pair), "a pair moves as one element");
    constexpr int64_t L = kLanes<A>;
    const int64_t pairs = pair_depth(width), padded = whole_vectors<A>(pairs);
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

// out[r / 2][d] = element d of rows r and r + 1 of (b, h), of which `count` exist; columns from `width` on are 0, and
// so are the pairs that fill up.
template <class T>
inline void pack_paired_rows(const TensorView& t, int64_t b, int64_t h, int64_t first, int64_t count, int64_t width,
                             int64_t padded, Pair* out) {
    for (int64_t r = 0; r < count; r += 2) {
        const bool alone = r + 1 == count;
        const T *row = row_pointer<T>(t, b, h, first + r), *next = alone ? row : row_pointer<T>(t, b, h, first + r + 1);
        Pair* place = out + r / 2 * padded;
        int64_t d = 0;
        for (; !alone && d + kLanes<float> <= width; d += kLanes<float>) store(place + d, join(row + d, next + d));
        for (; d < width; ++d) place[d] = {row[d], alone ? T{} : next[d]};
        for (; d < padded; ++d) place[d] = {};
    }
    const int64_t pairs = ceil_div(count, 2);
    fill_zero(out + pairs * padded, (pair_depth(count) - pairs) * padded);
}

// The left factor of a sum over rows: element d of rows r and r + 1 side by side.
struct LeftFactor {
    BFloat16* data;
    int64_t column_stride, pair_stride;  // in elements: from d to d + 1, and from r to r + 2

    BFloat16& at(int64_t r, int64_t d) const { return data[d * column_stride + r / 2 * pair_stride + r % 2]; }
};

#if defined(__AMX_BF16__)
// As pack_left_factor lays it out: out[d][r] = element d of row r, for the tiles of a left factor are read row by row.
inline LeftFactor left_factor(Pair* packed, int64_t count, int64_t) {
    return {&packed->first, 2 * pair_depth(count), 2};
}

template <class T>
EA_NOINLINE LeftFactor pack_left_factor(const TensorView& t, int64_t b, int64_t h, int64_t first, int64_t count,
                                        int64_t width, Pair* out) {
    constexpr int64_t L = kLanes<float>;
    const int64_t pairs = pair_depth(count);
    for (int64_t k = 0; k < pairs; k += L) {
        for (int64_t d = 0; d < width; d += L) {
            const int64_t columns = min_of(L, width - d);
            Vec<float> square[L];
#pragma GCC unroll 16
            for (int64_t i = 0; i < L; ++i) {
                const int64_t r = 2 * (k + i);
                const T* row = r < count ? row_pointer<T>(t, b, h, first + r) + d : nullptr;
                square[i] = (Vec<float>)(r + 1 < count ? join(row, row_pointer<T>(t, b, h, first + r + 1) + d, columns)
                                         : r + 1 == count ? join(row, row, columns) & 0xFFFFu
                                                          : PairVector{});
            }
            transpose_square<float>(square);
#pragma GCC unroll 16
            for (int64_t i = 0; i < L; ++i)
                if (i < columns) store(out + (d + i) * pairs + k, (PairVector)square[i]);
        }
    }
    return left_factor(out, count, width);
}
#else
// As pack_left_factor lays it out: like a right factor.
inline LeftFactor left_factor(Pair* packed, int64_t, int64_t width) { return {&packed->first, 2, 2 * width}; }

template <class T>
inline LeftFactor pack_left_factor(const TensorView& t, int64_t b, int64_t h, int64_t first, int64_t count,
                                   int64_t width, Pair* out) {
    pack_paired_rows<T>(t, b, h, first, count, width, width, out);
    return left_factor(out, count, width);
}
#endif

// out[k / 2][lane] = rows k and k + 1 of a float tile, rounded.
template <class A>
EA_NOINLINE void round_to_pairs(const A* tile, int64_t count, int64_t w, Pair* out) {
    for (int64_t k = 0; k < count; k += 2)
        for (int64_t lane = 0; lane < w; lane += kLanes<A>) {
            const A* place = tile + k * w + lane;
            store(out + k / 2 * w + lane, join(load(place), k + 1 < count ? load(place + w) : Vec<A>{}));
        }
    const int64_t pairs = ceil_div(count, 2);
    fill_zero(out + pairs * w, (pair_depth(count) - pairs) * w);
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
