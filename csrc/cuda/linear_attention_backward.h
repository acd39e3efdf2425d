// Launches linear attention backward on given features a = phi(query) and b = phi(key). With g_i = dout_i / n_i (0
// where n_i = 0) and h_i = dn_i - g_i . out_i every gradient is one of the sums of sm80/linear_attention_sums.h:
//
//     da_i = sum_j (g_i . v_j + h_i) b_j      db_j = sum_i (v_j . g_i + h_i) a_i      dv_j = sum_i (b_j . a_i) g_i
//
// over the pairs that the forward sees; keys sum over the queries of their whole group, in turn. No atomics.
#pragma once

#include "cuda/linear_attention.h"
#include "cuda/sm80/linear_attention_backward.h"

namespace efficient_attn {
namespace {

inline int64_t linear_attention_backward_workspace(const LinearAttentionParams& p, int64_t processors) {
    return p.B * p.Hq * p.Nq + std::max(state_floats(p, p.F, p.Dv, processors), state_floats(p, p.Dv, p.F, processors));
}

// workspace: as many floats.
template <int kWidest = kWidestLinear, class Launch>
void launch_linear_attention_backward(const LinearAttentionParams& p, int64_t processors, float* workspace,
                                      Launch& launch) {
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
    launch(&sm80::linear_attention_terms, (count + kRowsAtOnce - 1) / kRowsAtOnce, sm80::kTermsThreads, 0u, terms);

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
