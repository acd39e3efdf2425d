// What the launchers of linear attention share: from one of its sums to the kernels that compute it. `launch` as in
// plan.h.
#pragma once

#include <algorithm>

#include "cuda/sm80/linear_attention_sums.h"

namespace efficient_attn {
namespace {

constexpr int kWidestLinear = 256;  // features and value dimensions

inline Rows rows(const TensorView& view, int dtype, int64_t B, int64_t heads, int64_t N, int64_t width, int64_t shift) {
    return {view,
            dtype,
            static_cast<int>(heads),
            static_cast<int>(N),
            static_cast<int>(width),
            static_cast<int>(shift),
            nullptr,
            nullptr,
            nullptr,
            on_16_bytes(view, dtype, B, heads, N)};
}

// Rows that keys and queries share a time with: query t beside key t + offset.
inline int64_t causal_offset(const LinearAttentionParams& p) {
    return p.is_causal ? bounded(p.causal_offset, -p.Nq, p.Nk) : 0;  // beyond these bounds nothing changes
}

// Segments long enough to make the states small beside the rows, and enough of them to fill the GPU.
inline Times cut_time(const LinearAttentionParams& p, int64_t width, int64_t processors) {
    constexpr int64_t kBlocksPerProcessor = 4, kLongest = 2048;
    const int64_t offset = causal_offset(p), first = std::min<int64_t>(0, -offset);
    const int64_t count = std::max(p.Nq, p.Nk - offset) - first;
    const int64_t chunk = width > 128 ? sm80::Sums<256, true>::kChunk : sm80::Sums<64, true>::kChunk;
    const int64_t lines = std::max<int64_t>(p.B * p.Hkv, 1);
    const int64_t wanted = (kBlocksPerProcessor * processors + lines - 1) / lines;
    const int64_t chunks = bounded(count / (chunk * wanted), 1, kLongest / chunk);
    return {static_cast<int>(first), static_cast<int>((count + chunk * chunks - 1) / (chunk * chunks)),
            static_cast<int>(chunks)};
}

// Floats of the states of a sum whose x has E columns and u R, with one more each.
inline int64_t state_floats(const LinearAttentionParams& p, int64_t E, int64_t R, int64_t processors) {
    return p.B * p.Hkv * cut_time(p, E, processors).slots * (E + 1) * (R + 1);
}

inline bool is_exact(const Rows& r) { return r.dtype == kBFloat16 && !r.norm; }

template <class S, class Launch>
void launch_sums_of(const SumsParams& p, Launch& launch) {
    const int64_t lines = p.B * (p.y.heads / p.spread), slots = p.times.slots, r_tiles = p.r_tiles;
    const int64_t size = static_cast<int64_t>(p.u.width + (p.normaliser ? 1 : 0)) * (p.x.width + p.extra);
    const int threads = p.normaliser ? S::kMostThreads : S::kThreads;
    launch(&sm80::linear_attention_states<S>, lines * slots * r_tiles, threads, S::kSharedBytes, p);
    const int64_t scans = (size + sm80::kScanThreads - 1) / sm80::kScanThreads;
    launch(&sm80::linear_attention_scan, lines * scans, sm80::kScanThreads, 0u, p);
    launch(&sm80::linear_attention_sums<S>, p.B * p.x.heads * slots * r_tiles, threads, S::kSharedBytes, p);
}

template <int kE, class Launch>
void launch_sums_wide(const SumsParams& p, Launch& launch) {
    if (is_exact(p.x) && is_exact(p.y) && is_exact(p.u)) {
        launch_sums_of<sm80::Sums<kE, false>>(p, launch);
    } else {
        launch_sums_of<sm80::Sums<kE, true>>(p, launch);
    }
}

// Launches the kernels of a sum whose x has up to kWidest columns.
template <int kWidest, class Launch>
void launch_sums(SumsParams p, Launch& launch) {
    constexpr int kR = sm80::Sums<64, true>::kR;
    p.r_tiles = (p.u.width + kR - 1) / kR;
    if (p.x.width <= 64) return launch_sums_wide<64>(p, launch);
    if constexpr (kWidest > 64) {
        if (p.x.width <= 128) return launch_sums_wide<128>(p, launch);
        launch_sums_wide<256>(p, launch);
    }
}

}  // namespace
}  // namespace efficient_attn
