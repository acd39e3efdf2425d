// Launches the kernels of attention forward: Hopper's (sm90/attention_forward.h) where they serve the call, else those
// of sm80/attention_forward.h. `launch` as in plan.h.
#pragma once

#include "cuda/plan.h"
#include "cuda/sm80/attention_forward.h"
#include "cuda/sm90/attention_forward.h"

namespace efficient_attn {
namespace {

// The tiles of the forward or of dQ, of `rows` queries each.
inline sm90::Work query_work(const KernelParams& k, int rows, int64_t heads_of_keys) {
    const AttentionParams& p = k.call;
    sm90::Work work = sm90::work_of(query_tiles(p, rows), p.B * p.Hq, p.Nk * (p.D + p.Dv) * 2, heads_of_keys);
    sm90::put_in_order(work, p.mask, k.query_order, p.Hq, p.mask.block_q, rows);
    work.last_first = true;
    return work;
}

template <class F, class Launch>
void launch_hopper_forward(const KernelParams& k, Launch& launch) {
    constexpr auto kernel = [] {
        if constexpr (F::kWide) {
            return &sm90::attention_forward_wide<F>;
        } else {
            return &sm90::attention_forward<F>;
        }
    }();
    const AttentionParams& p = k.call;
    sm90::ForwardInputs in;
    in.query = launch.tensor_map(p.query, p.B, p.Hq, p.Nq, p.D, sm90::kGroupRows);
    in.key = launch.tensor_map(p.key, p.B, p.Hkv, p.Nk, p.D, F::kKeys);
    in.value = launch.tensor_map(p.value, p.B, p.Hkv, p.Nk, p.Dv, F::kKeys);
    in.work = query_work(k, F::kRows, k.group);
    const int64_t blocks = sm90::share_out(in.work, launch.multiprocessors(), k.counters);
    launch(kernel, blocks, F::kThreads, F::kSharedBytes, k, in);
}

template <class T, int kHead, bool kExtras, class Launch>
void launch_attention_forward(const KernelParams& k, Launch& launch) {
    using F = sm80::Forward<T, kHead, kExtras>;
    using Safe = typename sm80::Forward<T, kHead, kExtras>::InParts;
    const int64_t tiles = query_tiles(k.call, kForwardRows);
    const bool on_hopper = !kExtras && launch.capability() >= 90 && hopper_serves(k.call);
    if constexpr (!kExtras) {
        const bool wide = takes_wide_steps(k.call, kHead);
        if constexpr (kHead > 64) {
            if (on_hopper && wide) launch_hopper_forward<sm90::Forward<T, kHead, true>>(k, launch);
        }
        if (on_hopper && !wide) launch_hopper_forward<sm90::Forward<T, kHead>>(k, launch);
    }
    if (!on_hopper) launch(&sm80::attention_forward<F>, tiles, F::kThreads, F::kSharedBytes, k);
    launch_safe<Safe>(k, tiles, &sm80::attention_forward_safe<Safe>, launch);
}

}  // namespace
}  // namespace efficient_attn
