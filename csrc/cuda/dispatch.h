// From a call to the kernels that serve it: which instance, how many blocks of threads, how much shared memory.
// `launch` stands for a GPU or the host twin:
//     launch(kernel, blocks, threads, shared bytes, arguments...)    starts a kernel
//     launch.capability()        80 or 90: the newest kernels here that it runs
//     launch.multiprocessors()   how many blocks of threads of a whole multiprocessor each run at once
//     launch.tensor_map(view, B, H, N, D, rows)    a TensorMap of that tensor of 16-bit elements, dimensions (D, N, H,
//     B)
//         from the innermost, boxes of (64, rows, 1, 1), 128-byte swizzle, zeros outside: cuTensorMapEncodeTiled's
//         rules hold (see copies_serve); the stride of a dimension of size 1 means nothing and must be replaced by a
//         valid one
#pragma once

#include <algorithm>
#include <climits>

#include "cuda/sm80/attention_decode.h"
#include "cuda/sm80/attention_forward.h"
#include "cuda/sm80/attention_key_gradient.h"
#include "cuda/sm80/attention_query_gradient.h"
#include "cuda/sm90/attention_backward.h"
#include "cuda/sm90/attention_forward.h"
#include "cuda/sm90/attention_key_gradient.h"
#include "cuda/sm90/attention_query_gradient.h"

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

// A kernel on `tiles` tiles, and where a NaN may have to be kept away the one that does the flagged tiles again.
template <class Shape, class SafeShape = Shape, class Launch, class Kernel, class SafeKernel>
void launch_guarded(Launch& launch, const KernelParams& k, int64_t tiles, Kernel kernel, SafeKernel safe) {
    launch(kernel, tiles, Shape::kThreads, Shape::kSharedBytes, k);
    if (!k.flags) return;
    launch(safe, std::min(tiles, kSafeBlocks), SafeShape::kThreads, SafeShape::kSharedBytes, k, tiles);
}

template <class F, class Launch>
void launch_forward(const KernelParams& k, Launch& launch) {
    using Safe = typename F::InParts;
    launch_guarded<F, Safe>(launch, k, forward_tiles(k.call), &sm80::attention_forward<F>,
                            &sm80::attention_forward_safe<Safe>);
}

// Whether tensor copies can read it, and each dimension has a stride.
inline bool copies_serve(const TensorView& view, int64_t B, int64_t H, int64_t N) {
    constexpr int64_t kMost = int64_t{1} << 39;
    const auto fits = [](int64_t size, int64_t stride) { return size == 1 || (stride > 0 && stride < kMost); };
    return rows_aligned(view, B, H, N) && fits(B, view.batch_stride) && fits(H, view.head_stride) &&
           fits(N, view.row_stride);
}

// Whether Hopper's forward takes a call without extras: tiles of 128 queries and 64 or 128 keys must be worth while.
inline bool hopper_serves(const AttentionParams& p) {
    const MaskView& mask = p.mask;
    return copies_serve(p.query, p.B, p.Hq, p.Nq) && copies_serve(p.key, p.B, p.Hkv, p.Nk) &&
           copies_serve(p.value, p.B, p.Hkv, p.Nk) && forward_tiles(p) <= INT_MAX / 2 &&
           (!mask.indptr || (mask.block_q >= 64 && mask.block_k >= 64));
}

template <class F, class Launch>
void launch_hopper_forward(const KernelParams& k, Launch& launch) {
    using Safe = typename sm80::Forward<typename F::T, F::kHead, false>::InParts;
    constexpr int64_t kCacheBytes = int64_t{32} << 20;
    const AttentionParams& p = k.call;
    const int64_t tiles = forward_tiles(p), heads = p.B * p.Hq;
    sm90::ForwardInputs in;
    in.query = launch.tensor_map(p.query, p.B, p.Hq, p.Nq, p.D, sm90::kGroupRows);
    in.key = launch.tensor_map(p.key, p.B, p.Hkv, p.Nk, p.D, F::kKeys);
    in.value = launch.tensor_map(p.value, p.B, p.Hkv, p.Nk, p.Dv, F::kKeys);
    in.work.tiles = static_cast<int>(tiles);
    in.work.tiles_per_head = static_cast<int>(tiles / heads);
    in.work.heads_at_once =
        static_cast<int>(bounded(kCacheBytes / (p.Nk * (p.D + p.Dv) * 2), 1, p.B * p.Hkv)) * k.group;
    launch(&sm90::attention_forward<F>, std::min<int64_t>(tiles, launch.multiprocessors()), F::kThreads,
           F::kSharedBytes, k, in);
    if (k.flags)
        launch(&sm80::attention_forward_safe<Safe>, std::min(tiles, kSafeBlocks), Safe::kThreads, Safe::kSharedBytes, k,
               tiles);
}

template <class G, class Launch>
void launch_key_gradient(const KernelParams& k, Launch& launch) {
    const AttentionParams& p = k.call;
    const int64_t tiles = p.B * p.Hkv * tile_count(p.Nk, p.mask.indptr ? p.mask.block_k : G::kRows, G::kRows);
    launch_guarded<G>(launch, k, tiles, &sm80::attention_key_gradient<G>, &sm80::attention_key_gradient_safe<G>);
}

template <class G, class Launch>
void launch_query_gradient(const KernelParams& k, Launch& launch) {
    const AttentionParams& p = k.call;
    const int64_t tiles = p.B * p.Hq * tile_count(p.Nq, p.mask.indptr ? p.mask.block_q : G::kRows, G::kRows);
    launch_guarded<G>(launch, k, tiles, &sm80::attention_query_gradient<G>, &sm80::attention_query_gradient_safe<G>);
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

// Flags that the kernels of a call may write: of the one with most tiles. Hopper's kernels multiply what lies beyond
// the length by weights of zero.
inline int64_t flag_count(const AttentionParams& p, bool backward) {
    if (!hides(p) && !p.mask.kv_lengths) return 0;
    if (!backward) return forward_tiles(p);
    constexpr int kRows = 64;  // the fewest that any gradient kernel owns
    return std::max(p.B * p.Hq * tile_count(p.Nq, p.mask.indptr ? p.mask.block_q : kRows, kRows),
                    p.B * p.Hkv * tile_count(p.Nk, p.mask.indptr ? p.mask.block_k : kRows, kRows));
}

// --- few queries ---

constexpr int64_t kDecodeRows = 64;  // rows of a tile: queries times the query heads of a key/value head

inline bool decodes(const AttentionParams& p) { return p.dropout_p == 0 && p.Nq * (p.Hq / p.Hkv) <= kDecodeRows; }

// Query heads that share a tile: those of a key/value head, unless each has a list of its own.
inline int64_t decode_pack(const AttentionParams& p) { return p.mask.indptr && p.mask.heads > 1 ? 1 : p.Hq / p.Hkv; }

inline int64_t decode_tiles(const AttentionParams& p) {
    return p.B * p.Hq / decode_pack(p) * (p.mask.indptr ? tile_count(p.Nq, p.mask.block_q, p.mask.block_q) : 1);
}

// Into how many parts the keys are split: 0 where other kernels serve the call, else enough parts to fill a GPU of so
// many processors, each of two steps or more.
inline int64_t decode_splits(const AttentionParams& p, int64_t processors) {
    if (!decodes(p)) return 0;
    constexpr int64_t kStep = sm80::Decode<BFloat16, 64, 16>::kStep;  // the same in every instance
    int64_t steps = (p.Nk + kStep - 1) / kStep;
    if (p.mask.indptr) {
        const int64_t rows = p.mask.batch * p.mask.heads * tile_count(p.Nq, p.mask.block_q, p.mask.block_q);
        steps = p.mask.entries * p.mask.block_k / kStep / std::max<int64_t>(rows, 1);
    }
    const int64_t tiles = decode_tiles(p);
    if (tiles * 5 >= processors * 4 || steps < 4) return 1;
    return bounded((2 * processors + tiles - 1) / tiles, 1, std::min<int64_t>(steps / 2, 128));
}

inline DecodeParams decode_params(const KernelParams& k, float* part_out, float* part_lse, int64_t splits) {
    return {k, part_out, part_lse, static_cast<int>(splits), static_cast<int>(decode_pack(k.call))};
}

template <class D, class Launch>
void launch_decode(const DecodeParams& d, Launch& launch) {
    const AttentionParams& p = d.base.call;
    launch(&sm80::attention_decode<D>, decode_tiles(p) * d.splits, D::kThreads, D::kSharedBytes, d);
    if (d.splits > 1)
        launch(&sm80::attention_decode_join<typename D::T>, p.B * p.Hq * p.Nq, sm80::kJoinThreads, sm80::kJoinShared,
               d);
}

template <class T, int kHead, class Launch>
void serve_decode_head(const DecodeParams& d, Launch& launch) {
    const AttentionParams& p = d.base.call;
    const int64_t queries = p.mask.indptr ? std::min(p.Nq, p.mask.block_q) : p.Nq;
    if (queries * d.pack <= 16) {
        launch_decode<sm80::Decode<T, kHead, 16>>(d, launch);
    } else {
        launch_decode<sm80::Decode<T, kHead, kDecodeRows>>(d, launch);
    }
}

// Launches the kernels of a call for which decode_splits is not 0.
template <class T, class Launch>
void serve_decode(const DecodeParams& d, Launch& launch) {
    const int64_t widest = std::max(d.base.call.D, d.base.call.Dv);
    if (widest <= 64) {
        serve_decode_head<T, 64>(d, launch);
    } else if (widest <= 128) {
        serve_decode_head<T, 128>(d, launch);
    } else {
        serve_decode_head<T, 256>(d, launch);
    }
}

// --- the others ---

// What serves a call: serve<T, kHead, kExtras>.
struct ServeForward {
    template <class T, int kHead, bool kExtras, class Launch>
    static void serve(const KernelParams& k, Launch& launch) {
        if constexpr (!kExtras) {
            if (launch.capability() >= 90 && hopper_serves(k.call))
                return launch_hopper_forward<sm90::Forward<T, kHead>>(k, launch);
        }
        launch_forward<sm80::Forward<T, kHead, kExtras>>(k, launch);
    }
};

// The work of `tiles` tiles where a head's walk reads `bytes` of global memory.
inline sm90::Work hopper_work(int64_t tiles, int64_t heads, int64_t bytes) {
    constexpr int64_t kCacheBytes = int64_t{32} << 20;
    return {static_cast<int>(tiles), static_cast<int>(tiles / heads),
            static_cast<int>(bounded(kCacheBytes / bytes, 1, heads))};
}

inline int64_t key_tiles(const AttentionParams& p, int rows) {
    return p.B * p.Hkv * tile_count(p.Nk, p.mask.indptr ? p.mask.block_k : rows, rows);
}

inline int64_t query_tiles(const AttentionParams& p, int rows) {
    return p.B * p.Hq * tile_count(p.Nq, p.mask.indptr ? p.mask.block_q : rows, rows);
}

inline bool hopper_serves_backward(const AttentionParams& p) {
    return hopper_serves(p) && copies_serve(p.grad_out, p.B, p.Hq, p.Nq) &&
           key_tiles(p, sm90::kGroupRows) <= INT_MAX / 2;
}

// What the kernels that walk queries read.
template <class G, class Launch>
sm90::BackwardInputs inputs_of_keys(const KernelParams& k, Launch& launch) {
    const AttentionParams& p = k.call;
    sm90::BackwardInputs in;
    in.query = launch.tensor_map(p.query, p.B, p.Hq, p.Nq, p.D, G::kQueries);
    in.key = launch.tensor_map(p.key, p.B, p.Hkv, p.Nk, p.D, sm90::kGroupRows);
    in.value = launch.tensor_map(p.value, p.B, p.Hkv, p.Nk, p.Dv, sm90::kGroupRows);
    in.grad_out = launch.tensor_map(p.grad_out, p.B, p.Hq, p.Nq, p.Dv, G::kQueries);
    in.work = hopper_work(key_tiles(p, G::kRows), p.B * p.Hkv, k.group * p.Nq * (p.D + p.Dv) * 2);
    return in;
}

template <class Safe, class Launch>
void launch_safe_keys(const KernelParams& k, Launch& launch) {
    const int64_t tiles = key_tiles(k.call, Safe::kRows);
    launch(&sm80::attention_key_gradient_safe<Safe>, std::min(tiles, kSafeBlocks), Safe::kThreads, Safe::kSharedBytes,
           k, tiles);
}

template <class Safe, class Launch>
void launch_safe_queries(const KernelParams& k, Launch& launch) {
    const int64_t tiles = query_tiles(k.call, Safe::kRows);
    launch(&sm80::attention_query_gradient_safe<Safe>, std::min(tiles, kSafeBlocks), Safe::kThreads, Safe::kSharedBytes,
           k, tiles);
}

template <class G, class Safe, class Launch>
void launch_hopper_key_gradient(const KernelParams& k, Launch& launch) {
    const sm90::BackwardInputs in = inputs_of_keys<G>(k, launch);
    launch(&sm90::attention_key_gradient<G>, std::min<int64_t>(in.work.tiles, launch.multiprocessors()),
           sm90::kBlockThreads, G::kSharedBytes, k, in);
    if (k.flags) launch_safe_keys<Safe>(k, launch);
}

template <class G, class Safe, class Launch>
void launch_hopper_query_gradient(const KernelParams& k, Launch& launch) {
    const AttentionParams& p = k.call;
    sm90::BackwardInputs in;
    in.query = launch.tensor_map(p.query, p.B, p.Hq, p.Nq, p.D, sm90::kGroupRows);
    in.key = launch.tensor_map(p.key, p.B, p.Hkv, p.Nk, p.D, G::kKeys);
    in.value = launch.tensor_map(p.value, p.B, p.Hkv, p.Nk, p.Dv, G::kKeys);
    in.grad_out = launch.tensor_map(p.grad_out, p.B, p.Hq, p.Nq, p.Dv, sm90::kGroupRows);
    in.work = hopper_work(query_tiles(p, G::kRows), p.B * p.Hq, p.Nk * (p.D + p.Dv) * 2);
    launch(&sm90::attention_query_gradient<G>, std::min<int64_t>(in.work.tiles, launch.multiprocessors()),
           sm90::kBlockThreads, G::kSharedBytes, k, in);
    if (k.flags) launch_safe_queries<Safe>(k, launch);
}

// In one pass, whose sums come in any order.
template <class T, class SafeKeys, class SafeQueries, class Launch>
void launch_hopper_backward(const KernelParams& k, Launch& launch) {
    using G = sm90::Backward<T>;
    const sm90::BackwardInputs in = inputs_of_keys<G>(k, launch);
    launch(&sm90::attention_backward<G>, std::min<int64_t>(in.work.tiles, launch.multiprocessors()),
           sm90::kBlockThreads, G::kSharedBytes, k, in);
    if (k.flags) launch_safe_keys<SafeKeys>(k, launch);
    launch(&sm90::attention_round_queries<T>, query_tiles(k.call, SafeQueries::kRows), sm90::kRoundingThreads, 0u, k);
    if (k.flags) launch_safe_queries<SafeQueries>(k, launch);
}

struct ServeBackward {
    template <class T, int kHead, bool kExtras, class Launch>
    static void serve(const KernelParams& k, Launch& launch) {
        const int64_t rows = k.call.B * k.call.Hq * k.call.Nq, rows_at_once = kDeltaThreads / kWarp;
        launch(&attention_delta, (rows + rows_at_once - 1) / rows_at_once, kDeltaThreads, 0u, k);
        using Keys = sm80::KeyGradient<T, kHead, kExtras>;
        using Queries = sm80::QueryGradient<T, kHead, kExtras, kHead == 256 ? 2 : 1>;
        if constexpr (!kExtras) {
            if (launch.capability() >= 90 && hopper_serves_backward(k.call)) {
                if constexpr (kHead == sm90::Backward<T>::kHead) {
                    if (k.query_sums) return launch_hopper_backward<T, Keys, Queries>(k, launch);
                }
                launch_hopper_key_gradient<sm90::KeyGradient<T, kHead>, Keys>(k, launch);
                launch_hopper_query_gradient<sm90::QueryGradient<T, kHead>, Queries>(k, launch);
                return;
            }
        }
        launch_key_gradient<Keys>(k, launch);
        launch_query_gradient<Queries>(k, launch);
        if constexpr (kExtras) {  // a bias is among the extras
            if (k.call.dbias.data) launch_bias_gradient<sm80::QueryGradient<T, kHead, true, 1>>(k, launch);
        }
    }
};

inline bool has_extras(const AttentionParams& p) { return p.bias.data || p.dropout_p > 0 || p.scale <= 0; }

// Elements of KernelParams::query_sums with which a backward is done in one pass; 0: it cannot be.
inline int64_t query_sum_count(const AttentionParams& p, int capability) {
    const int64_t widest = std::max(p.D, p.Dv);
    const bool served = capability >= 90 && widest > 64 && widest <= 128 && !has_extras(p) && hopper_serves_backward(p);
    return served ? p.B * p.Hq * p.Nq * 128 : 0;
}

template <class Serve, class T, int kHead, class Launch>
void serve_head(const KernelParams& k, Launch& launch) {
    has_extras(k.call) ? Serve::template serve<T, kHead, true>(k, launch)
                       : Serve::template serve<T, kHead, false>(k, launch);
}

// Launches the kernels of a call on elements of type T.
template <class Serve, class T, class Launch>
void serve(const KernelParams& k, Launch& launch) {
    const int64_t widest = std::max(k.call.D, k.call.Dv);
    if (widest <= 64) {
        serve_head<Serve, T, 64>(k, launch);
    } else if (widest <= 128) {
        serve_head<Serve, T, 128>(k, launch);
    } else {
        serve_head<Serve, T, 256>(k, launch);
    }
}

}  // namespace
}  // namespace efficient_attn
