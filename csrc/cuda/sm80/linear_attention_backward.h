// The terms h_i = dn_i - dout_i . out_i / n_i (0 for the quotient where n_i = 0) of linear attention's backward, see
// cuda/linear_attention_backward.h; the gradients themselves are sums of linear_attention_sums.h.
#pragma once

#include "cuda/sm80/linear_attention_tiles.h"

namespace efficient_attn {
namespace sm80 {
namespace {

struct TermsParams {
    Rows out, grad_out;
    const float* normaliser;
    const float* grad_normaliser;  // or null
    float* terms;                  // h, (B, Hq, Nq)
    int64_t rows;
};

constexpr int kTermsThreads = 128;

// h of every row; a warp a row.
EA_KERNEL(kTermsThreads, 1)
linear_attention_terms(EA_PARAMETER TermsParams p) {
    const int64_t row = block_index() * (kTermsThreads / kWarp) + thread_index() / kWarp;
    if (row >= p.rows) return;
    const int64_t head = row / p.out.N, b = head / p.out.heads;
    const int h = static_cast<int>(head % p.out.heads), i = static_cast<int>(row % p.out.N),
              lane = thread_index() % kWarp;
    const int64_t out = row_offset(p.out, static_cast<int>(b), h, i);
    const int64_t grad_out = row_offset(p.grad_out, static_cast<int>(b), h, i);
    float sum = 0.0f;
    for (int d = lane; d < p.out.width; d += kWarp)
        sum += unpack_as(p.out.dtype, load_global(static_cast<const uint16_t*>(p.out.view.data) + out + d)) *
               unpack_as(p.out.dtype, load_global(static_cast<const uint16_t*>(p.grad_out.view.data) + grad_out + d));
    EA_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane != 0) return;
    const float norm = load_global(p.normaliser + row);
    const float grad = p.grad_normaliser ? load_global(p.grad_normaliser + row) : 0.0f;
    store_global(p.terms + row, norm == 0.0f ? grad : grad - sum / norm);
}

}  // namespace
}  // namespace sm80
}  // namespace efficient_attn
