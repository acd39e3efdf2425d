// What the kernels of linear attention are launched with: sums over pairs of rows (sm80/linear_attention_sums.h).
#pragma once

#include "cuda/params.h"

namespace efficient_attn {
namespace {

// Rows (B, heads, N, width) of one operand. Row of time t: t + shift.
struct Rows {
    TensorView view;
    int dtype, heads, N, width, shift;
    const float* norm;     // (B, heads, N): each row is divided by it, and 0 where it is 0; null: 1
    const float* extra;    // (B, heads, N): the factor of one more column; null: 1
    const uint8_t* alive;  // (B, N): rows that are 0 count as zeros; null: all live
    bool aligned;          // every row begins on 16 bytes
};

// How time is cut: `slots` segments of `chunks` chunks, the first of which begins at time `first`.
struct Times {
    int first, slots, chunks;
};

// out_s = sum_t (x_s . y_t + e_s f_t) u_t; x and y have E columns, u and out R.
struct SumsParams {
    Rows x, y, u, out;
    Times times;
    int64_t B;
    float* states;      // (B * lines, slots, R + ones, E + extra): sum_t u_t y_t^T, with ones and f beside u and y
    float* normaliser;  // (B, heads of x, N of x): sum_t x_s . y_t, by which out is divided; null: neither
    int r_tiles;        // blocks of threads that share the columns of u
    int spread;         // heads of y and u that are summed over
    bool causal, reverse, extra;  // over t <= s, or reverse t >= s; with the term e f
};

inline int64_t element_bytes(int dtype) { return dtype == kFloat32 ? 4 : 2; }

inline bool on_16_bytes(const TensorView& view, int dtype, int64_t B, int64_t H, int64_t N) {
    const int64_t bytes = element_bytes(dtype);
    return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && (B == 1 || view.batch_stride * bytes % 16 == 0) &&
           (H == 1 || view.head_stride * bytes % 16 == 0) && (N == 1 || view.row_stride * bytes % 16 == 0);
}

}  // namespace
}  // namespace efficient_attn
