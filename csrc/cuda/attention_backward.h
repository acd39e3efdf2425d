// Launches the kernels of attention backward: delta, then dK and dV, dQ, and the gradient of the bias, by Hopper's
// kernels (sm90/) where they serve the call, else by those of sm80/. `launch` as in plan.h.
#pragma once

#include "cuda/attention_forward.h"
#include "cuda/plan.h"
#include "cuda/sm80/attention_key_gradient.h"
#include "cuda/sm80/attention_query_gradient.h"
#include "cuda/sm90/attention_backward.h"
#include "cuda/sm90/attention_key_gradient.h"
#include "cuda/sm90/attention_query_gradient.h"

namespace efficient_attn {
namespace {

template <class Launch>
void launch_delta(const KernelParams& k, Launch& launch) {
    const int64_t rows = k.call.B * k.call.Hq * k.call.Nq, rows_at_once = kDeltaThreads / kWarp;
    launch(&attention_delta, (rows + rows_at_once - 1) / rows_at_once, kDeltaThreads, 0u, k);
}

// The suspicious tiles of dK and dV, and of dQ, again.
template <class Keys, class Launch>
void launch_safe_keys(const KernelParams& k, Launch& launch) {
    launch_safe<Keys>(k, key_tiles(k.call, Keys::kRows), &sm80::attention_key_gradient_safe<Keys>, launch);
}

template <class Queries, class Launch>
void launch_safe_queries(const KernelParams& k, Launch& launch) {
    launch_safe<Queries>(k, query_tiles(k.call, Queries::kRows), &sm80::attention_query_gradient_safe<Queries>, launch);
}

template <class G, class Launch>
void launch_bias_gradient(const KernelParams& k, Launch& launch) {
    const AttentionParams& p = k.call;
    const int64_t* size = p.dbias.size;
    const int64_t queries = tile_count(p.Nq, p.mask.indptr ? p.mask.block_q : G::kRows, G::kRows);
    const int64_t keys = tile_count(p.Nk, p.mask.indptr ? p.mask.block_k : G::kKeys, G::kKeys);
    const int64_t per_head = (size[2] == 1 && p.Nq > 1 ? 1 : queries) * (size[3] == 1 && p.Nk > 1 ? 1 : keys);
    launch(&sm80::attention_bias_gradient<G>, size[0] * size[1] * per_head, G::kThreads, G::kSharedBytes, k);
}

// --- Hopper ---

// The tiles of dK and dV, of `rows` keys each.
inline sm90::Work key_work(const KernelParams& k, int rows) {
    const AttentionParams& p = k.call;
    sm90::Work work = sm90::work_of(key_tiles(p, rows), p.B * p.Hkv, k.group * p.Nq * (p.D + p.Dv) * 2);
    sm90::put_in_order(work, p.mask, k.key_order, p.Hkv, p.mask.block_k, rows);
    return work;
}

// A kernel that walks queries, dK and dV alone or all in one pass.
template <class G, class Kernel, class Launch>
void launch_hopper_keys(const KernelParams& k, Kernel kernel, Launch& launch) {
    const AttentionParams& p = k.call;
    sm90::BackwardInputs in;
    in.query = launch.tensor_map(p.query, p.B, p.Hq, p.Nq, p.D, G::kQueries);
    in.key = launch.tensor_map(p.key, p.B, p.Hkv, p.Nk, p.D, sm90::kGroupRows);
    in.value = launch.tensor_map(p.value, p.B, p.Hkv, p.Nk, p.Dv, sm90::kGroupRows);
    in.grad_out = launch.tensor_map(p.grad_out, p.B, p.Hq, p.Nq, p.Dv, G::kQueries);
    in.work = key_work(k, G::kRows);
    const bool waits = G::kOnePass && k.turns;
    const int64_t blocks = sm90::share_out(in.work, launch.multiprocessors(), k.counters, waits);
    launch(kernel, blocks, sm90::kBlockThreads, G::kSharedBytes, k, in);
}

template <class G, class Launch>
void launch_hopper_queries(const KernelParams& k, Launch& launch) {
    constexpr auto kernel = [] {
        if constexpr (G::kWide) {
            return &sm90::attention_query_gradient_wide<G>;
        } else {
            return &sm90::attention_query_gradient<G>;
        }
    }();
    const AttentionParams& p = k.call;
    sm90::BackwardInputs in;
    in.query = launch.tensor_map(p.query, p.B, p.Hq, p.Nq, p.D, sm90::kGroupRows);
    in.key = launch.tensor_map(p.key, p.B, p.Hkv, p.Nk, p.D, G::kKeys);
    in.value = launch.tensor_map(p.value, p.B, p.Hkv, p.Nk, p.Dv, G::kKeys);
    in.grad_out = launch.tensor_map(p.grad_out, p.B, p.Hq, p.Nq, p.Dv, sm90::kGroupRows);
    in.work = query_work(k, G::kRows, 1);
    const int64_t blocks = sm90::share_out(in.work, launch.multiprocessors(), k.counters ? k.counters + 1 : nullptr);
    launch(kernel, blocks, sm90::kBlockThreads, G::kSharedBytes, k, in);
}

// Keys, Queries: sm80's kernels, which do the suspicious tiles again.
template <class T, int kHead, class Keys, class Queries, class Launch>
void launch_hopper_backward(const KernelParams& k, Launch& launch) {
    if constexpr (kHead == sm90::Backward<T>::kHead) {
        if (k.query_sums) {  // in one pass
            using G = sm90::Backward<T>;
            launch_hopper_keys<G>(k, &sm90::attention_backward<G>, launch);
            launch_safe_keys<Keys>(k, launch);
            launch(&sm90::attention_round_queries<T>, query_tiles(k.call, Queries::kRows), sm90::kRoundingThreads, 0u,
                   k);
            return launch_safe_queries<Queries>(k, launch);
        }
    }
    using G = sm90::KeyGradient<T, kHead>;
    launch_hopper_keys<G>(k, &sm90::attention_key_gradient<G>, launch);
    launch_safe_keys<Keys>(k, launch);
    const bool wide = takes_wide_gradient_steps(k.call, kHead);
    if constexpr (kHead < 256) {
        if (wide) launch_hopper_queries<sm90::QueryGradient<T, kHead, true>>(k, launch);
    }
    if (!wide) launch_hopper_queries<sm90::QueryGradient<T, kHead>>(k, launch);
    launch_safe_queries<Queries>(k, launch);
}

// --- a call ---

template <class T, int kHead, bool kExtras, class Launch>
void launch_attention_backward(const KernelParams& k, Launch& launch) {
    using Keys = sm80::KeyGradient<T, kHead, kExtras>;
    using Queries = sm80::QueryGradient<T, kHead, kExtras, kHead == 256 ? 2 : 1>;
    launch_delta(k, launch);
    if constexpr (!kExtras) {
        if (launch.capability() >= 90 && hopper_serves_backward(k.call))
            return launch_hopper_backward<T, kHead, Keys, Queries>(k, launch);
    }
    launch(&sm80::attention_key_gradient<Keys>, key_tiles(k.call, Keys::kRows), Keys::kThreads, Keys::kSharedBytes, k);
    launch_safe_keys<Keys>(k, launch);
    launch(&sm80::attention_query_gradient<Queries>, query_tiles(k.call, Queries::kRows), Queries::kThreads,
           Queries::kSharedBytes, k);
    launch_safe_queries<Queries>(k, launch);
    if constexpr (kExtras) {  // a bias is among the extras
        if (k.call.dbias.data) launch_bias_gradient<sm80::QueryGradient<T, kHead, true, 1>>(k, launch);
    }
}

}  // namespace
}  // namespace efficient_attn
