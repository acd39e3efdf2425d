// What forward and backward do alike to a tile of scores in registers: mask, bias and dropout.
//
// Fragments are m16n8 accumulators. kKeysAcross: rows are queries and columns keys, as in the forward; otherwise rows
// are keys and columns queries.
#pragma once

#include "cuda/philox.h"
#include "cuda/tile.h"

namespace efficient_attn {
namespace {

// Where a block of threads works: batch element, query head, and the lines that it owns.
struct Place {
    int b, h;
    Span lines;
};

EA_DEVICE uint64_t dropout_seed(const KernelParams& p) {
    return p.seed ? static_cast<uint64_t>(load_global(p.seed)) : p.call.dropout_seed;
}

// Sets invisible pairs to -inf. Rows are the lines row, row + 8, row + 16 ..; line i sees the steps i + low .. i +
// high. The bits of a line are a row of the bit tile: queries are lines.
template <int kM, int kN>
EA_DEVICE void hide(float (&s)[kM][kN][4], const KernelParams& p, const Step& step, int row, Span lines, int low,
                    int high, int lane) {
    const int row_bytes = static_cast<int>(p.call.mask.block_k) / 8, block = static_cast<int>(p.call.mask.block_q);
    EA_UNROLL
    for (int m = 0; m < kM; ++m) EA_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int line = row + m * 16 + half * 8;
        const bool exists = line < lines.end;
        const int begin = line + low - step.first;
        const int end = exists ? smaller(line + high + 1, step.end) - step.first : begin;
        const uint8_t* bits = nullptr;
        if (step.tile >= 0 && exists)
            bits = bit_tile(p.call.mask, step.tile) + line % block * row_bytes + step.offset / 8;
        EA_UNROLL
        for (int pair = 0; pair < kN / 2; ++pair) {
            uint32_t word = 0xFFFFu;
            if (bits) {
                const bool inside = step.first + pair * 16 < step.end;
                word = inside ? load_global(reinterpret_cast<const uint16_t*>(bits) + pair) : 0u;
            }
            EA_UNROLL
            for (int c = 0; c < 4; ++c) {
                const int in_word = c / 2 * 8 + lane % 4 * 2 + c % 2, column = pair * 16 + in_word;
                const bool visible = column >= begin && column < end && (word >> in_word & 1);
                float& score = s[m][pair * 2 + c / 2][half * 2 + c % 2];
                score = visible ? score : -infinity();
            }
        }
    }
}

// Bias of query i and key j in units of log2.
template <class T>
EA_DEVICE float load_bias(const KernelParams& p, int b, int h, int i, int j) {
    const BiasView& bias = p.call.bias;
    const int64_t place = b * bias.stride[0] + h * bias.stride[1] + i * bias.stride[2] + j * bias.stride[3];
    const float value = bias.dtype == kFloat32
                            ? load_global(static_cast<const float*>(bias.data) + place)
                            : unpack<T>(load_global(static_cast<const uint16_t*>(bias.data) + place));
    return value * 1.4426950408889634f;
}

// Adds the bias to the visible scores, which are in units of log2; `add` false: only hides where the bias is -inf.
template <class T, bool kKeysAcross, int kM, int kN>
EA_DEVICE void add_bias(float (&s)[kM][kN][4], const KernelParams& p, int b, int h, int row, int column, bool add) {
    EA_UNROLL
    for (int m = 0; m < kM; ++m) EA_UNROLL
    for (int n = 0; n < kN; ++n) EA_UNROLL
    for (int e = 0; e < 4; ++e) {
        if (s[m][n][e] == -infinity()) continue;
        const int line = row + m * 16 + e / 2 * 8, step = column + n * 8 + e % 2;
        const float bias = load_bias<T>(p, b, h, kKeysAcross ? line : step, kKeysAcross ? step : line);
        s[m][n][e] = bias == -infinity() ? bias : add ? s[m][n][e] + bias : s[m][n][e];
    }
}

}  // namespace
}  // namespace efficient_attn
