// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011), eight counters at
// once, and the dropout rule that every backend shares: for the pair (b, h, i, j)
//
//     counter = (j >> 1, (i >> 4) * 8 + (i & 7), h, b)      word = ((i >> 3) & 1) * 2 + (j & 1)
//     kept iff word >= floor(dropout_p * 2^32)
#pragma once

#include <cstdint>

namespace efficient_attn {
namespace {

constexpr int kPhiloxLanes = 8;

struct PhiloxWords {
    uint32_t word[4][kPhiloxLanes];
};

// The words for the counters (c0, c1[lane], c2, c3).
inline PhiloxWords philox(uint64_t seed, uint32_t c0, const uint32_t (&c1)[kPhiloxLanes], uint32_t c2, uint32_t c3) {
    PhiloxWords x;
    for (int lane = 0; lane < kPhiloxLanes; ++lane) {
        x.word[0][lane] = c0;
        x.word[1][lane] = c1[lane];
        x.word[2][lane] = c2;
        x.word[3][lane] = c3;
    }
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        for (int lane = 0; lane < kPhiloxLanes; ++lane) {
            const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * x.word[0][lane];
            const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * x.word[2][lane];
            x.word[0][lane] = static_cast<uint32_t>(p1 >> 32) ^ x.word[1][lane] ^ key0;
            x.word[1][lane] = static_cast<uint32_t>(p1);
            x.word[2][lane] = static_cast<uint32_t>(p0 >> 32) ^ x.word[3][lane] ^ key1;
            x.word[3][lane] = static_cast<uint32_t>(p0);
        }
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return x;
}

// keep[j - k0] bit (i - i0) says whether the pair (i, j) is kept, for j in [k0, k1) and i in [i0, i0 + rows), rows
// <= 64.
inline void dropout_bits(uint64_t seed, double dropout_p, int64_t b, int64_t h, int64_t i0, int64_t rows, int64_t k0,
                         int64_t k1, uint64_t* keep) {
    const uint64_t threshold = static_cast<uint64_t>(dropout_p * 4294967296.0);
    for (int64_t j = k0; j < k1; ++j) keep[j - k0] = 0;
    for (int64_t pair = k0 >> 1; pair <= (k1 - 1) >> 1; ++pair) {
        for (int64_t group = i0 >> 4; group <= (i0 + rows - 1) >> 4; ++group) {
            uint32_t rows_of_group[kPhiloxLanes];
            for (int lane = 0; lane < kPhiloxLanes; ++lane)
                rows_of_group[lane] = static_cast<uint32_t>(group * 8 + lane);
            const PhiloxWords x = philox(seed, static_cast<uint32_t>(pair), rows_of_group, static_cast<uint32_t>(h),
                                         static_cast<uint32_t>(b));
            uint64_t bits[2] = {0, 0};  // even and odd key, 16 queries
            for (int lane = 0; lane < kPhiloxLanes; ++lane) {
                for (int odd = 0; odd < 2; ++odd) {
                    bits[odd] |= static_cast<uint64_t>(x.word[odd][lane] >= threshold) << lane;
                    bits[odd] |= static_cast<uint64_t>(x.word[2 + odd][lane] >= threshold) << (lane + 8);
                }
            }
            const int64_t shift = group * 16 - i0;
            for (int64_t odd = 0; odd < 2; ++odd) {
                const int64_t j = pair * 2 + odd;
                if (j >= k0 && j < k1) keep[j - k0] |= shift >= 0 ? bits[odd] << shift : bits[odd] >> -shift;
            }
        }
    }
}

// Bit r says whether the pair (rows[r], j) is kept, r < count <= 64, wherever these rows lie.
inline uint64_t dropout_bits_of_rows(uint64_t seed, double dropout_p, int64_t b, int64_t h, const int64_t* rows,
                                     int64_t count, int64_t j) {
    const uint64_t threshold = static_cast<uint64_t>(dropout_p * 4294967296.0);
    uint64_t keep = 0;
    for (int64_t first = 0; first < count; first += kPhiloxLanes) {
        uint32_t counters[kPhiloxLanes] = {};
        const int64_t lanes = count - first < kPhiloxLanes ? count - first : kPhiloxLanes;
        for (int64_t lane = 0; lane < lanes; ++lane) {
            const int64_t i = rows[first + lane];
            counters[lane] = static_cast<uint32_t>((i >> 4) * 8 + (i & 7));
        }
        const PhiloxWords x =
            philox(seed, static_cast<uint32_t>(j >> 1), counters, static_cast<uint32_t>(h), static_cast<uint32_t>(b));
        for (int64_t lane = 0; lane < lanes; ++lane) {
            const int64_t word = (rows[first + lane] >> 3 & 1) * 2 + (j & 1);
            keep |= static_cast<uint64_t>(x.word[word][lane] >= threshold) << (first + lane);
        }
    }
    return keep;
}

}  // namespace
}  // namespace efficient_attn
