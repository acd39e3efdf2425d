// What the kernels of the backward share: a pair's gradient, the walk that gathers dK and dV, and delta.
#pragma once

#include "cuda/scores.h"

namespace efficient_attn {
namespace {

// What is taken off a score (log2) to get its weight: infinity for a row that sees nothing, whose weights are 0.
EA_DEVICE float weight_shift(float lse) { return lse == -infinity() ? infinity() : lse * static_cast<float>(kLog2e); }

// dS = P (Z dP - delta); 0 where P is 0, even if the mask hides a NaN.
EA_DEVICE float score_gradient(float weight, float grad_weight, float delta) {
    return weight == 0.0f ? 0.0f : weight * (grad_weight - delta);
}

// Of the two queries of a thread that are rows g and g + 8 of a fragment.
struct RowSums {
    float shift[2], delta[2];
};

EA_DEVICE RowSums load_sums(const KernelParams& p, int b, int h, int row, int end) {
    RowSums sums;
    EA_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int64_t place = (static_cast<int64_t>(b) * p.call.Hq + h) * p.call.Nq + row + half * 8;
        const bool exists = row + half * 8 < end;
        sums.shift[half] =
            exists ? weight_shift(load_global(static_cast<const float*>(p.call.lse) + place)) : infinity();
        sums.delta[half] = exists ? load_global(p.delta + place) : 0.0f;
    }
    return sums;
}

// A step of the queries of one head of a group.
struct HeadStep : Step {
    int head;
};

// The queries of every head of a group, one head after the other.
template <int kWidth>
class GroupWalk {
  public:
    EA_DEVICE GroupWalk(const KernelParams& p, int b, int kv, int line, Span limits)
        : b_(b),
          line_(line),
          head_(kv * p.group),
          last_(head_ + p.group),
          limits_(limits),
          walk_(p, b, head_, line, limits) {}

    EA_DEVICE bool next(const KernelParams& p, HeadStep& step) {
        while (!walk_.next(p, step)) {
            if (++head_ >= last_) return false;
            walk_ = Walk<kWidth, kByKey>(p, b_, head_, line_, limits_);
        }
        step.head = head_;
        return true;
    }

  private:
    int b_, line_, head_, last_;
    Span limits_;
    Walk<kWidth, kByKey> walk_;
};

constexpr int kDeltaThreads = 128;

// delta = dO . O - dlse of every row; a warp a row.
EA_KERNEL(kDeltaThreads, 1)
attention_delta(EA_PARAMETER KernelParams p) {
    const AttentionParams& c = p.call;
    const int64_t row = block_index() * (kDeltaThreads / kWarp) + thread_index() / kWarp;
    if (row >= c.B * c.Hq * c.Nq) return;
    const int lane = thread_index() % kWarp;
    const int64_t head = row / c.Nq, i = row % c.Nq;
    const int b = static_cast<int>(head / c.Hq), h = static_cast<int>(head % c.Hq);
    const uint16_t* out = head_pointer(c.out, b, h) + i * c.out.row_stride;
    const uint16_t* grad_out = head_pointer(c.grad_out, b, h) + i * c.grad_out.row_stride;
    float sum = 0.0f;
    for (int d = lane; d < c.Dv; d += kWarp) {
        const uint32_t x = load_global(out + d), y = load_global(grad_out + d);
        sum +=
            c.dtype == kBFloat16 ? unpack<BFloat16>(x) * unpack<BFloat16>(y) : unpack<Float16>(x) * unpack<Float16>(y);
    }
    EA_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane != 0) return;
    if (c.grad_lse) sum -= load_global(static_cast<const float*>(c.grad_lse) + row);
    store_global(p.delta + row, sum);
}

}  // namespace
}  // namespace efficient_attn
