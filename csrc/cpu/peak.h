// The ceiling that benchmarks compare with: fused multiply-adds without memory, as many at once as hide their latency.
#pragma once

#include "simd.h"

namespace efficient_attn {
namespace {

// Ten chains: enough for two units of five cycles, few enough for sixteen registers.
constexpr int kChains = 10;

// Runs `steps` multiply-adds on every chain; returns the floating-point operations done.
inline int64_t fma_loop(int64_t steps) {
    const Vec<float> factor = broadcast(0.999f), term = broadcast(0.001f);
    Vec<float> chain[kChains];
    // Equal chains would become one, and a chain that starts at the limit (1) would become a constant.
    for (int k = 0; k < kChains; ++k) chain[k] = broadcast(static_cast<float>(k + 2));
    for (int64_t n = 0; n < steps; ++n) {
#pragma GCC unroll 16
        for (int k = 0; k < kChains; ++k) chain[k] = chain[k] * factor + term;
    }
    Vec<float> sum = {};
    for (int k = 0; k < kChains; ++k) sum += chain[k];
    volatile float keep = sum[0];  // the results are wanted, so the loop cannot be left out
    static_cast<void>(keep);
    return steps * kChains * kLanes<float> * 2;
}

}  // namespace
}  // namespace efficient_attn
