// From a call to the kernels that serve it: which instance, how many blocks of threads, how much shared memory.
// `launch` starts a kernel, on a GPU or in the host twin: launch(kernel, blocks, threads, shared bytes, arguments...).
#pragma once

#include <algorithm>

#include "cuda/sm80/attention_forward.h"

namespace efficient_attn {
namespace {

constexpr int64_t kSafeBlocks = 1024;  // enough to fill any GPU; each looks at every so manyth flag

inline int64_t forward_tiles(const AttentionParams& p) {
    constexpr int kRows = sm80::Forward<BFloat16, 64, false>::kRows;  // the same in every instance
    return p.B * p.Hq * tile_count(p.Nq, p.mask.indptr ? p.mask.block_q : kRows, kRows);
}

// Whether a key may be visible to one query of a tile and not to another, so that a NaN in it must be kept away.
inline bool hides(const AttentionParams& p) {
    return p.mask.indptr || p.mask.window_left >= 0 || p.mask.window_right >= 0 || p.bias.data;
}

template <class F, class Launch>
void launch_forward(const KernelParams& k, Launch& launch) {
    const int64_t tiles = forward_tiles(k.call);
    launch(&sm80::attention_forward<F>, tiles, F::kThreads, F::kSharedBytes, k);
    if (!k.flags) return;
    using Safe = typename F::InParts;
    launch(&sm80::attention_forward_safe<Safe>, std::min(tiles, kSafeBlocks), Safe::kThreads, Safe::kSharedBytes, k,
           tiles);
}

template <class T, int kHead, class Launch>
void launch_forward(const KernelParams& k, Launch& launch) {
    const bool extras = k.call.bias.data || k.call.dropout_p > 0 || k.call.scale <= 0;
    extras ? launch_forward<sm80::Forward<T, kHead, true>>(k, launch)
           : launch_forward<sm80::Forward<T, kHead, false>>(k, launch);
}

template <class T, class Launch>
void attention_forward(const KernelParams& k, Launch& launch) {
    const int64_t widest = std::max(k.call.D, k.call.Dv);
    if (widest <= 64) {
        launch_forward<T, 64>(k, launch);
    } else if (widest <= 128) {
        launch_forward<T, 128>(k, launch);
    } else {
        launch_forward<T, 256>(k, launch);
    }
}

}  // namespace
}  // namespace efficient_attn
