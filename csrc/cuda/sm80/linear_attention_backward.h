// Linear attention backward on given features a = phi(query) and b = phi(key). With g_i = dout_i / n_i (0 where n_i =
// 0) and h_i = dn_i - g_i . out_i every gradient is one of the sums of linear_sums.h:
//
//     da_i = sum_j (g_i . v_j + h_i) b_j      db_j = sum_i (v_j . g_i + h_i) a_i      dv_j = sum_i (b_j . a_i) g_i
//
// over the pairs that the forward sees; keys sum over the queries of their whole group, in turn. No atomics.
#pragma once

#include "cuda/linear_launch.h"

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
linear_terms(EA_PARAMETER TermsParams p) {
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

namespace {

inline int64_t linear_backward_workspace(const LinearAttentionParams& p, int64_t processors) {
    return p.B * p.Hq * p.Nq + std::max(state_floats(p, p.F, p.Dv, processors), state_floats(p, p.Dv, p.F, processors));
}

// workspace: as many floats.
template <int kWidest = kWidestLinear, class Launch>
void serve_linear_backward(const LinearAttentionParams& p, int64_t processors, float* workspace, Launch& launch) {
    const int64_t offset = causal_offset(p), count = p.B * p.Hq * p.Nq;
    const int group = static_cast<int>(p.Hq / p.Hkv), features = p.feature_dtype, values = p.value_dtype;
    const Rows a = rows(p.query, features, p.B, p.Hq, p.Nq, p.F, 0);
    Rows b = rows(p.key, features, p.B, p.Hkv, p.Nk, p.F, offset);
    Rows v = rows(p.value, values, p.B, p.Hkv, p.Nk, p.Dv, offset);
    b.alive = v.alive = p.key_mask;
    Rows g = rows(p.grad_out, values, p.B, p.Hq, p.Nq, p.Dv, 0);
    const float* normaliser = static_cast<const float*>(p.normaliser);

    const sm80::TermsParams terms{rows(p.out, values, p.B, p.Hq, p.Nq, p.Dv, 0), g,         normaliser,
                                  static_cast<const float*>(p.grad_normaliser),  workspace, count};
    constexpr int64_t kRowsAtOnce = sm80::kTermsThreads / kWarp;
    launch(&sm80::linear_terms, (count + kRowsAtOnce - 1) / kRowsAtOnce, sm80::kTermsThreads, 0u, terms);

    g.norm = normaliser;
    Rows gh = g;
    gh.extra = workspace;
    SumsParams s{};
    s.B = p.B;
    s.states = workspace + count;
    s.causal = p.is_causal;

    s.x = gh, s.y = v, s.u = b, s.extra = true, s.spread = 1;
    s.times = cut_time(p, p.Dv, processors);
    s.out = rows(p.dq, features, p.B, p.Hq, p.Nq, p.F, 0);
    launch_sums<kWidest>(s, launch);

    s.x = v, s.y = gh, s.u = a, s.reverse = true, s.spread = group;
    s.out = rows(p.dk, features, p.B, p.Hkv, p.Nk, p.F, offset);
    launch_sums<kWidest>(s, launch);

    s.x = b, s.y = a, s.u = g, s.extra = false;
    s.times = cut_time(p, p.F, processors);
    s.out = rows(p.dv, values, p.B, p.Hkv, p.Nk, p.Dv, offset);
    launch_sums<kWidest>(s, launch);
}

}  // namespace
}  // namespace efficient_attn
