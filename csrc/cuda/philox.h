// Philox4x32-10 for one counter, and with it the dropout rule of csrc/common/philox.h: the four words of a counter are
// what a thread needs for its four elements (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1) of an m16n8 fragment.
#pragma once

#include "cuda/ptx.h"

namespace efficient_attn {
namespace {

EA_DEVICE Words4 philox(uint64_t seed, uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    EA_UNROLL
    for (int round = 0; round < 10; ++round) {
        const uint32_t high0 = multiply_high(0xD2511F53u, x0), low0 = 0xD2511F53u * x0;
        const uint32_t high1 = multiply_high(0xCD9E8D57u, x2), low1 = 0xCD9E8D57u * x2;
        x0 = high1 ^ x1 ^ key0;
        x1 = low1;
        x2 = high0 ^ x3 ^ key1;
        x3 = low0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return {x0, x1, x2, x3};
}

// The words of query i (or i + 8: z and w, for i % 16 < 8) and key j (even: x and z, odd: y and w) of head (b, h).
EA_DEVICE Words4 dropout_words(uint64_t seed, int b, int h, int i, int j) {
    return philox(seed, static_cast<uint32_t>(j) >> 1, (static_cast<uint32_t>(i) >> 4) * 8 + (i & 7),
                  static_cast<uint32_t>(h), static_cast<uint32_t>(b));
}

}  // namespace
}  // namespace efficient_attn
