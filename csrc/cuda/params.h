// What a kernel is launched with: the call as csrc/common/params.h describes it, and what the host derives from it
// once.
#pragma once

#include <cstdint>

#include "common/params.h"

namespace efficient_attn {

struct KernelParams {
    AttentionParams call;
    const int64_t* seed;  // on the device; null: call.dropout_seed
    int32_t* flags;       // one for each block of the grid: 1 where its tile is suspicious; null: not asked
    float* delta;         // (B, Hq, Nq) contiguous, backward only
    float* query_sums;    // see sm90/attention_backward.h; null: not in one pass
    int32_t* turns;       // zeros, see turn_count in plan.h; null: query_sums are added up in any order
    int32_t* counters;    // zeros, see counter_count in plan.h; null: not asked for
    const int32_t *query_order, *key_order;  // of each list, its blocks with the longest first; null: as they lie
    float score_scale;                       // scale in units of log2
    float scale, keep_scale;                 // keep_scale = 1 / (1 - dropout_p)
    uint32_t threshold;                      // a pair is kept iff its random word is not below
    int group;                               // query heads of a key/value head
    int low, high;  // query i sees the keys i + low .. i + high, bounded so that beyond nothing changes
    bool query_aligned, key_aligned, value_aligned, out_aligned, grad_out_aligned, dq_aligned, dk_aligned,
        dv_aligned;  // every row begins on 16 bytes
};

// A call with few queries whose keys several blocks of threads share (sm80/attention_decode.h).
struct DecodeParams {
    KernelParams base;
    float* part_out;  // (splits, B, Hq, Nq, Dv): attention over a part of the keys
    float* part_lse;  // (splits, B, Hq, Nq), in units of log2
    int splits;
    int pack;  // query heads in a tile: those of a key/value head
};

// A CUtensorMap: where a tensor lies, its sizes and strides, the box that a copy moves and its swizzle. A parameter of
// the kernel.
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};

namespace {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// Sizes of tiles that the host counts with too.
constexpr int kForwardRows = 128;  // queries of every forward kernel
constexpr int kGradientRows = 64;  // the fewest queries or keys that a gradient kernel owns
constexpr int kTurnQueries = 64;   // queries whose sums have a turn, see sm90/attention_backward.h
constexpr int kDecodeRows = 64;    // of few queries: queries times the query heads of a key/value head, at most
constexpr int kDecodeStep = 64;    // and their keys of a step

inline int64_t bounded(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

inline bool rows_aligned(const TensorView& view, int64_t B, int64_t H, int64_t N) {
    return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && (B == 1 || view.batch_stride % 8 == 0) &&
           (H == 1 || view.head_stride % 8 == 0) && (N == 1 || view.row_stride % 8 == 0);
}

inline KernelParams kernel_params(const AttentionParams& p, const int64_t* seed) {
    KernelParams k{};
    k.call = p;
    k.seed = seed;
    k.score_scale = static_cast<float>(p.scale * kLog2e);
    k.scale = static_cast<float>(p.scale);
    k.keep_scale = static_cast<float>(1.0 / (1.0 - p.dropout_p));
    k.threshold = static_cast<uint32_t>(p.dropout_p * 4294967296.0);
    k.group = static_cast<int>(p.Hq / p.Hkv);
    const MaskView& mask = p.mask;
    k.low =
        static_cast<int>(mask.window_left < 0 ? -p.Nq : bounded(mask.window_offset - mask.window_left, -p.Nq, p.Nk));
    k.high =
        static_cast<int>(mask.window_right < 0 ? p.Nk : bounded(mask.window_offset + mask.window_right, -p.Nq, p.Nk));
    k.query_aligned = rows_aligned(p.query, p.B, p.Hq, p.Nq);
    k.key_aligned = rows_aligned(p.key, p.B, p.Hkv, p.Nk);
    k.value_aligned = rows_aligned(p.value, p.B, p.Hkv, p.Nk);
    k.out_aligned = rows_aligned(p.out, p.B, p.Hq, p.Nq) && p.Dv % 8 == 0;
    if (p.grad_out.data) {
        k.grad_out_aligned = rows_aligned(p.grad_out, p.B, p.Hq, p.Nq);
        k.dq_aligned = rows_aligned(p.dq, p.B, p.Hq, p.Nq) && p.D % 8 == 0;
        k.dk_aligned = rows_aligned(p.dk, p.B, p.Hkv, p.Nk) && p.D % 8 == 0;
        k.dv_aligned = rows_aligned(p.dv, p.B, p.Hkv, p.Nk) && p.Dv % 8 == 0;
    }
    return k;
}

}  // namespace
}  // namespace efficient_attn
