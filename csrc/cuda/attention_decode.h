// Launches the kernels for few queries (sm80/attention_decode.h): a call for which decode_splits is not 0. `launch` as
// in plan.h.
#pragma once

#include "cuda/plan.h"
#include "cuda/sm80/attention_decode.h"

namespace efficient_attn {
namespace {

template <class D, class Launch>
void launch_decode_tiles(const DecodeParams& d, Launch& launch) {
    const AttentionParams& p = d.base.call;
    launch(&sm80::attention_decode<D>, decode_tiles(p) * d.splits, D::kThreads, D::kSharedBytes, d);
    if (d.splits > 1)
        launch(&sm80::attention_decode_join<typename D::T>, p.B * p.Hq * p.Nq, sm80::kJoinThreads, sm80::kJoinShared,
               d);
}

template <class T, int kHead, class Launch>
void launch_decode_head(const DecodeParams& d, Launch& launch) {
    const AttentionParams& p = d.base.call;
    const int64_t queries = p.mask.indptr ? std::min(p.Nq, p.mask.block_q) : p.Nq;
    if (queries * d.pack <= 16) {
        launch_decode_tiles<sm80::Decode<T, kHead, 16>>(d, launch);
    } else {
        launch_decode_tiles<sm80::Decode<T, kHead, kDecodeRows>>(d, launch);
    }
}

template <class T, class Launch>
void launch_attention_decode(const DecodeParams& d, Launch& launch) {
    const int64_t widest = std::max(d.base.call.D, d.base.call.Dv);
    if (widest <= 64) {
        launch_decode_head<T, 64>(d, launch);
    } else if (widest <= 128) {
        launch_decode_head<T, 128>(d, launch);
    } else {
        launch_decode_head<T, 256>(d, launch);
    }
}

}  // namespace
}  // namespace efficient_attn
