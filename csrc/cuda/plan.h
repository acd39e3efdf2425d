// What the host decides about a call before any kernel starts: which instance of the kernels serves it, whether
// Hopper's do, how many tiles, flags and parts of the keys it has. Only the capability of the GPU comes from outside.
//
// The launchers (attention_forward.h and its like) are templates of `launch`, which stands for a GPU or its emulator:
//     launch(kernel, blocks, threads, shared bytes, arguments...)    starts a kernel
//     launch.capability()        80 or 90: the newest kernels here that it runs
//     launch.multiprocessors()   how many blocks of threads of a whole multiprocessor each run at once
//     launch.tensor_map(view, B, H, N, D, rows)    a TensorMap of that tensor of 16-bit elements: dimensions from the
//         innermost (D, N, H, B), boxes of (64, rows, 1, 1), 128-byte swizzle, zeros outside. cuTensorMapEncodeTiled's
//         rules hold (see copies_serve); the stride of a dimension of size 1 means nothing and is replaced by a valid
//         one.
#pragma once

#include <algorithm>
#include <climits>
#include <type_traits>

#include "cuda/params.h"

namespace efficient_attn {
namespace {

// --- instances ---

// With what a kernel's `kExtras` stands for.
inline bool has_extras(const AttentionParams& p) { return p.bias.data || p.dropout_p > 0 || p.scale <= 0; }

// f(dtype, head, extras) with the constants of the instance that serves a call: the dtype of its elements, the width
// that its heads are padded to, and whether it has extras.
template <class Function>
void choose_instance(const AttentionParams& p, Function f) {
    const auto of_dtype = [&](auto dtype) {
        const auto of_head = [&](auto head) {
            has_extras(p) ? f(dtype, head, std::true_type{}) : f(dtype, head, std::false_type{});
        };
        const int64_t widest = std::max(p.D, p.Dv);
        if (widest <= 64) {
            of_head(std::integral_constant<int, 64>{});
        } else if (widest <= 128) {
            of_head(std::integral_constant<int, 128>{});
        } else {
            of_head(std::integral_constant<int, 256>{});
        }
    };
    if (p.dtype == kBFloat16) {
        of_dtype(std::integral_constant<int, kBFloat16>{});
    } else {
        of_dtype(std::integral_constant<int, kFloat16>{});
    }
}

// --- tiles ---

// Tiles of at most `rows` positions of an axis; a tile never crosses a block of the list (see Tiling in mask.h).
inline int64_t tile_count(int64_t count, int64_t block, int64_t rows) {
    const int64_t per_block = (block + rows - 1) / rows;
    return (count + block - 1) / block * per_block;
}

inline int64_t query_tiles(const AttentionParams& p, int rows) {
    return p.B * p.Hq * tile_count(p.Nq, p.mask.indptr ? p.mask.block_q : rows, rows);
}

inline int64_t key_tiles(const AttentionParams& p, int rows) {
    return p.B * p.Hkv * tile_count(p.Nk, p.mask.indptr ? p.mask.block_k : rows, rows);
}

// --- Hopper ---

// Whether tensor copies can read it, and each dimension has a stride.
inline bool copies_serve(const TensorView& view, int64_t B, int64_t H, int64_t N) {
    constexpr int64_t kMost = int64_t{1} << 39;
    const auto fits = [](int64_t size, int64_t stride) { return size == 1 || (stride > 0 && stride < kMost); };
    return rows_aligned(view, B, H, N) && fits(B, view.batch_stride) && fits(H, view.head_stride) &&
           fits(N, view.row_stride);
}

// Whether Hopper's forward takes a call without extras: its tiles, 128 queries by 64 or 128 keys, are wasted on a list
// of blocks below 64.
inline bool hopper_serves(const AttentionParams& p) {
    const MaskView& mask = p.mask;
    return copies_serve(p.query, p.B, p.Hq, p.Nq) && copies_serve(p.key, p.B, p.Hkv, p.Nk) &&
           copies_serve(p.value, p.B, p.Hkv, p.Nk) && query_tiles(p, kForwardRows) <= INT_MAX / 2 &&
           (!mask.indptr || (mask.block_q >= 64 && mask.block_k >= 64));
}

// Keys of a step of Hopper's forward where no list cuts them short: as many as registers and shared memory hold.
constexpr int wide_step(int head) { return head == 256 ? 80 : 176; }

// Whether the end cuts off at most a 32nd more of steps of `wide` keys than of `narrow` ones.
inline bool pads_little(const AttentionParams& p, int64_t wide, int64_t narrow) {
    const auto padded = [&](int64_t step) { return (p.Nk + step - 1) / step * step; };
    return padded(wide) * 32 <= padded(narrow) * 33;
}

// Whether its steps are that wide. A causal mask or a window would cut too many of 176 off.
inline bool takes_wide_steps(const AttentionParams& p, int head) {
    if (head == 64 || p.mask.indptr) return false;
    if (head == 128 && (p.mask.window_left >= 0 || p.mask.window_right >= 0)) return false;
    return pads_little(p, wide_step(head), head == 256 ? 64 : 128);
}

// Whether those of Hopper's dQ have 128 keys instead of 64.
inline bool takes_wide_gradient_steps(const AttentionParams& p, int head) {
    if (head == 256) return false;
    if (p.mask.indptr) return p.mask.block_k % 128 == 0;
    return (p.mask.window_left < 0 || p.mask.window_right < 0) && pads_little(p, 128, 64);
}

inline bool hopper_serves_backward(const AttentionParams& p) {
    return hopper_serves(p) && copies_serve(p.grad_out, p.B, p.Hq, p.Nq) && key_tiles(p, kGradientRows) <= INT_MAX / 2;
}

// Elements of KernelParams::query_sums with which a backward is done in one pass; 0: it cannot be.
inline int64_t query_sum_count(const AttentionParams& p, int capability) {
    const int64_t widest = std::max(p.D, p.Dv);
    const bool served = capability >= 90 && widest > 64 && widest <= 128 && !has_extras(p) && hopper_serves_backward(p);
    return served ? p.B * p.Hq * p.Nq * 128 : 0;
}

// Turns, zeros, by which these are added up in a fixed order; 0: they cannot be.
inline int64_t turn_count(const AttentionParams& p, int capability) {
    if (p.mask.indptr || query_sum_count(p, capability) == 0) return 0;
    return p.B * p.Hq * 2 * ((p.Nq + kTurnQueries - 1) / kTurnQueries);
}

// How many counters of tickets, zeros, Hopper's kernels of a call need: one for each kernel that has more tiles than
// the GPU has processors, or whose tiles wait for earlier ones.
inline int64_t counter_count(const AttentionParams& p, bool backward, int capability, int64_t processors) {
    if (capability < 90 || has_extras(p)) return 0;
    if (!backward) return hopper_serves(p) && query_tiles(p, kForwardRows) > processors ? 1 : 0;
    const int64_t most = std::max(query_tiles(p, kForwardRows), key_tiles(p, kGradientRows));
    return hopper_serves_backward(p) && (most > processors || turn_count(p, capability) > 0) ? 2 : 0;
}

// --- a NaN that must be kept away ---

// Whether a key may be visible to one query of a tile and not to another, so that a NaN in it must be kept away.
inline bool hides(const AttentionParams& p) {
    return p.mask.indptr || p.mask.window_left >= 0 || p.mask.window_right >= 0 || p.bias.data;
}

// Flags that the kernels of a call may write: of the one with most tiles. Hopper's kernels multiply what lies beyond
// the length by weights of zero.
inline int64_t flag_count(const AttentionParams& p, bool backward) {
    if (!hides(p) && !p.mask.kv_lengths) return 0;
    if (!backward) return query_tiles(p, kForwardRows);
    return std::max(query_tiles(p, kGradientRows), key_tiles(p, kGradientRows));
}

// Starts the kernel that does the suspicious ones of `tiles` tiles again, where there may be any.
template <class Shape, class Kernel, class Launch>
void launch_safe(const KernelParams& k, int64_t tiles, Kernel kernel, Launch& launch) {
    constexpr int64_t kSafeBlocks = 1024;  // enough to fill any GPU; they share the flags
    if (k.flags) launch(kernel, std::min(tiles, kSafeBlocks), Shape::kThreads, Shape::kSharedBytes, k, tiles);
}

// --- few queries ---

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
    int64_t steps = (p.Nk + kDecodeStep - 1) / kDecodeStep;
    if (p.mask.indptr) {
        const int64_t rows = p.mask.batch * p.mask.heads * tile_count(p.Nq, p.mask.block_q, p.mask.block_q);
        steps = p.mask.entries * p.mask.block_k / kDecodeStep / std::max<int64_t>(rows, 1);
    }
    const int64_t tiles = decode_tiles(p);
    if (tiles * 5 >= processors * 4 || steps < 4) return 1;
    return bounded((2 * processors + tiles - 1) / tiles, 1, std::min<int64_t>(steps / 2, 128));
}

inline DecodeParams decode_params(const KernelParams& k, float* part_out, float* part_lse, int64_t splits) {
    return {k, part_out, part_lse, static_cast<int>(splits), static_cast<int>(decode_pack(k.call))};
}

}  // namespace
}  // namespace efficient_attn
