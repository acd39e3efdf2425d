// Rows of a (B, H, N, D) tensor into tiles and back: widened to the accumulation type, transposed so that a row becomes
// a lane, or in place where neither is needed.
#pragma once

#include "../common/block_mask.h"
#include "convert.h"
#include "simd.h"

namespace efficient_attn {
namespace {

template <class A>
struct Rows {
    const A* data;
    int64_t stride;
};

// A bump allocator over a thread's memory; every piece starts on a cache line.
struct Arena {
    char* next;

    template <class X>
    X* take(int64_t count) {
        X* piece = reinterpret_cast<X*>(next);
        next += round_up(count * static_cast<int64_t>(sizeof(X)), 64);
        return piece;
    }
};

template <class A>
inline void fill_zero(A* data, int64_t count) {
    __builtin_memset(data, 0, static_cast<size_t>(count) * sizeof(A));
}

// Laid out from here, a tile tells its size.
char* const kNoMemory = reinterpret_cast<char*>(64);

template <class A>
inline int64_t whole_vectors(int64_t width) {
    return round_up(width, kLanes<A>);
}

// The tensor's own row that `row` of a call is.
inline int64_t ordered_row(const TensorView& t, int64_t b, int64_t h, int64_t row) {
    return t.order ? t.order[b * t.order_batch_stride + h * t.order_head_stride + row] : row;
}

inline int64_t row_offset(const TensorView& t, int64_t b, int64_t h, int64_t row) {
    if (t.pages)
        return t.pages[b * t.pages_batch_stride + row / t.page_rows] * t.batch_stride + h * t.head_stride +
               row % t.page_rows * t.row_stride;
    return b * t.batch_stride + h * t.head_stride + ordered_row(t, b, h, row) * t.row_stride;
}

// A row of a tensor. The next ones lie behind it, row_stride apart, as far as `run_end` says.
template <class T>
inline T* row_pointer(const TensorView& t, int64_t b, int64_t h, int64_t row) {
    return static_cast<T*>(t.data) + row_offset(t, b, h, row);
}

// Where the rows from `first` on that lie one behind another end, at `end` at the latest.
inline int64_t run_end(const TensorView& t, int64_t b, int64_t first, int64_t end) {
    if (t.order) return min_of(first + 1, end);
    if (!t.pages) return end;
    int64_t index = first / t.page_rows, reached = (index + 1) * t.page_rows;
    const int32_t* page = t.pages + b * t.pages_batch_stride;
    const bool joined = t.batch_stride == t.page_rows * t.row_stride;  // a page begins where the one before ends
    for (; joined && reached < end && page[index + 1] == page[index] + 1; ++index) reached += t.page_rows;
    return min_of(reached, end);
}

inline bool is_run(const TensorView& t, int64_t b, int64_t first, int64_t count) {
    if (!t.order && !t.pages) return true;
    // Without dividing:
    if (t.pages && count > t.page_rows && t.batch_stride != t.page_rows * t.row_stride) return false;
    return !t.order && count > 0 && run_end(t, b, first, first + count) == first + count;
}

// Calls f(r, row first + r), r < count.
template <class T, class F>
inline void for_each_row(const TensorView& t, int64_t b, int64_t h, int64_t first, int64_t count, F f) {
    for (int64_t r = 0; r < count;) {
        const T* row = row_pointer<T>(t, b, h, first + r);
        for (const int64_t end = run_end(t, b, first + r, first + count) - first; r < end; ++r, row += t.row_stride)
            f(r, row);
    }
}

template <class T, class A>
inline void copy_row(const T* source, int64_t width, A* out) {
    int64_t d = 0;
    if constexpr (sizeof(T) == sizeof(A))
        for (; d + kLanes<A> <= width; d += kLanes<A>) store(out + d, load(source + d));
    widen_row(source + d, width - d, out + d);
}

// Rows [first, first + count) of (b, h) into `buffer`, `stride` apart. What says where they lie is read before: a store
// into the buffer might change it, as far as a compiler knows.
template <class T, class A>
inline void gather_rows(const TensorView& t, int64_t b, int64_t h, int64_t first, int64_t count, int64_t width,
                        int64_t stride, A* buffer) {
    if (t.pages)
        return for_each_row<T>(t, b, h, first, count,
                               [&](int64_t r, const T* row) { copy_row(row, width, buffer + r * stride); });
    const T* data = static_cast<const T*>(t.data) + b * t.batch_stride + h * t.head_stride;
    const int64_t step = t.row_stride;
    const int32_t* order = t.order ? t.order + b * t.order_batch_stride + h * t.order_head_stride : nullptr;
    for (int64_t r = first; r < first + count; ++r)
        copy_row(data + (order ? order[r] : r) * step, width, buffer + (r - first) * stride);
}

// Rows [first, first + count) of (b, h), in place, or gathered or widened into `buffer`.
template <class T, class A>
inline Rows<A> load_rows(const TensorView& t, int64_t b, int64_t h, int64_t first, int64_t count, int64_t width,
                         A* buffer) {
    if constexpr (sizeof(T) == sizeof(A))
        if (is_run(t, b, first, count)) return {row_pointer<T>(t, b, h, first), t.row_stride};
    gather_rows<T>(t, b, h, first, count, width, width, buffer);
    return {buffer, width};
}

// The same for use by whole vectors: in place only if `width` is some, else padded with zeros.
template <class T, class A>
inline Rows<A> load_padded_rows(const TensorView& t, int64_t b, int64_t h, int64_t first, int64_t count, int64_t width,
                                A* buffer) {
    const int64_t padded = whole_vectors<A>(width);
    if constexpr (sizeof(T) == sizeof(A))
        if (padded == width && is_run(t, b, first, count)) return {row_pointer<T>(t, b, h, first), t.row_stride};
    gather_rows<T>(t, b, h, first, count, width, padded, buffer);
    for (int64_t r = 0; r < count && padded > width; ++r)
        for (int64_t d = width; d < padded; ++d) buffer[r * padded + d] = 0;
    return {buffer, padded};
}

struct Unscaled {
    template <class V>
    EA_INLINE V operator()(V x) const {
        return x;
    }
};

// Times a factor in two parts, where that is rounded once: rounding the factor to one would be the same error in every
// product.
template <class A>
struct Scaled {
    A high, low;
    explicit Scaled(double factor)
        : high(static_cast<A>(factor)), low(static_cast<A>(factor - static_cast<double>(high))) {}
    EA_INLINE Vec<A> operator()(Vec<A> x) const {
        if constexpr (sizeof(A) == sizeof(double)) return x * high;
#if defined(__FMA__) || defined(__aarch64__)
        return x * high + x * low;
#else
        const double factor = static_cast<double>(high) + static_cast<double>(low);
        for (int lane = 0; lane < kLanes<A>; ++lane) x[lane] = static_cast<A>(static_cast<double>(x[lane]) * factor);
        return x;
#endif
    }
};

// out[c][r] = by(in[r][c]) for a square of lanes, of which `rows` exist (the others count as 0) and `columns` are
// wanted.
template <class A, class By>
EA_NOINLINE void transpose_block(const A* in, int64_t in_stride, int64_t rows, By by, A* out, int64_t out_stride,
                                 int64_t columns) {
    Vec<A> square[kLanes<A>];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i) square[i] = i < rows ? by(load(in + i * in_stride)) : Vec<A>{};
    transpose_square<A>(square);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i)
        if (i < columns) store(out + i * out_stride, square[i]);
}

// a . b
template <class A, class T>
inline A row_product(const T* a, const T* b, int64_t width) {
    constexpr int64_t L = kLanes<A>;
    Vec<A> sum = {};
    A left[L], right[L];
    int64_t d = 0;
    for (; d + L <= width; d += L) {
        widen_row(a + d, L, left);
        widen_row(b + d, L, right);
        sum += load(left) * load(right);
    }
    A total = 0;
    for (; d < width; ++d) total += widen<A>(a[d]) * widen<A>(b[d]);
    return total + sum_of_lanes<A>(sum);
}

// Elements that `pack_transposed` and `store_transposed` need as scratch.
template <class A>
inline int64_t transpose_scratch(int64_t width) {
    return kLanes<A> * whole_vectors<A>(width);
}

// out[d][r] = by(row r, element d) for r < w; lanes from `count` on are 0.
template <class T, class A, class By>
inline void pack_transposed(const TensorView& t, int64_t b, int64_t h, int64_t first, int64_t count, int64_t width,
                            By by, int64_t w, A* scratch, A* out) {
    constexpr int64_t L = kLanes<A>;
    for (int64_t r0 = 0; r0 < w; r0 += L) {
        const int64_t present = max_of(0, min_of(L, count - r0));
        const Rows<A> rows = load_padded_rows<T>(t, b, h, first + r0, present, width, scratch);
        for (int64_t d0 = 0; d0 < width; d0 += L)
            transpose_block(rows.data + d0, rows.stride, present, by, out + d0 * w + r0, w, width - d0);
    }
}

// A row of a result; or what is added to it.
template <class T, class A>
inline void store_row(A* row, int64_t width, T* out, bool adds) {
    for (int64_t d = 0; d < width && adds; ++d) row[d] += widen<A>(out[d]);
    narrow_row(row, width, out);
}

// Row r, element d, of the tensor = or, if `adds`, += finish(columns[d][r], r), for r < count.
template <class T, class A, class Finish>
inline void store_transposed(const A* columns, int64_t w, const TensorView& t, int64_t b, int64_t h, int64_t first,
                             int64_t count, int64_t width, A* scratch, Finish finish, bool adds = false) {
    constexpr int64_t L = kLanes<A>;
    const int64_t padded = whole_vectors<A>(width);
    for (int64_t r0 = 0; r0 < count; r0 += L) {
        for (int64_t d0 = 0; d0 < width; d0 += L)
            transpose_block(columns + d0 * w + r0, w, width - d0, Unscaled{}, scratch + d0, padded, L);
        for (int64_t r = r0; r < min_of(r0 + L, count); ++r) {
            A* row = scratch + (r - r0) * padded;
            for (int64_t d = 0; d < padded; d += kLanes<A>) store(row + d, finish(load(row + d), r));
            store_row<T>(row, width, row_pointer<T>(t, b, h, first + r), adds);
        }
    }
}

}  // namespace
}  // namespace efficient_attn
