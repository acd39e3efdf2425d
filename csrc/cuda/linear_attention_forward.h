// Launches linear attention forward on given features a = phi(query) and b = phi(key):
//
//     n_i = sum_j a_i . b_j        out_i = sum_j (a_i . b_j) v_j / n_i        over visible keys j (causal: j <= i +
//     offset)
//
// one of the sums of sm80/linear_attention_sums.h, with a column of ones beside the values.
#pragma once

#include "cuda/linear_attention.h"

namespace efficient_attn {
namespace {

inline int64_t linear_attention_forward_workspace(const LinearAttentionParams& p, int64_t processors) {
    return state_floats(p, p.F, p.Dv, processors);
}

// workspace: as many floats.
template <int kWidest = kWidestLinear, class Launch>
void launch_linear_attention_forward(const LinearAttentionParams& p, int64_t processors, float* workspace,
                                     Launch& launch) {
    const int64_t offset = causal_offset(p);
    SumsParams s{};
    s.x = rows(p.query, p.feature_dtype, p.B, p.Hq, p.Nq, p.F, 0);
    s.y = rows(p.key, p.feature_dtype, p.B, p.Hkv, p.Nk, p.F, offset);
    s.u = rows(p.value, p.value_dtype, p.B, p.Hkv, p.Nk, p.Dv, offset);
    s.y.alive = s.u.alive = p.key_mask;
    s.out = rows(p.out, p.value_dtype, p.B, p.Hq, p.Nq, p.Dv, 0);
    s.times = cut_time(p, p.F, processors);
    s.B = p.B;
    s.states = workspace;
    s.normaliser = static_cast<float*>(p.normaliser);
    s.spread = 1;
    s.causal = p.is_causal;
    launch_sums<kWidest>(s, launch);
}

}  // namespace
}  // namespace efficient_attn
