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

// The tile of queries that block number `index` of the grid owns, kRows of them at most.
template <int kRows>
EA_DEVICE Place query_place(const KernelParams& p, int64_t index) {
    const Tiling tiles = tiling<kRows>(p.call.mask.indptr != nullptr, static_cast<int>(p.call.mask.block_q));
    const int count = ceil_div(p.call.Nq, tiles.block) * tiles.tiles_per_block;
    const int64_t head = index / count;
    const int tile = count - 1 - static_cast<int>(index % count);  // under a causal mask the last ones are the longest
    return {static_cast<int>(head / p.call.Hq), static_cast<int>(head % p.call.Hq),
            tiles.lines(tile, static_cast<int>(p.call.Nq))};
}

EA_DEVICE uint64_t dropout_seed(const KernelParams& p) {
    return p.seed ? static_cast<uint64_t>(load_global(p.seed)) : p.call.dropout_seed;
}

// Sets invisible pairs to -inf. Row 8 r of this thread is line line_of(r); line i sees the steps i + low .. i + high.
// The bits of a line are a row of the bit tile: lines are queries.
template <int kM, int kN, class LineOf>
EA_DEVICE void hide_lines(float (&s)[kM][kN][4], const KernelParams& p, const Step& step, LineOf line_of, Span lines,
                          int low, int high, int lane) {
    const int row_bytes = static_cast<int>(p.call.mask.block_k) / 8, block = static_cast<int>(p.call.mask.block_q);
    EA_UNROLL
    for (int r = 0; r < 2 * kM; ++r) {
        const int line = line_of(r);
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
                float& score = s[r / 2][pair * 2 + c / 2][r % 2 * 2 + c % 2];
                score = visible ? score : -infinity();
            }
        }
    }
}

// The same for rows that are the lines row, row + 8, row + 16 ..
template <int kM, int kN>
EA_DEVICE void hide(float (&s)[kM][kN][4], const KernelParams& p, const Step& step, int row, Span lines, int low,
                    int high, int lane) {
    hide_lines(s, p, step, [&](int r) { return row + r * 8; }, lines, low, high, lane);
}

// The same where there is no list, so that a row sees one span of keys.
template <int kN>
EA_DEVICE void hide_outside(float (&s)[1][kN][4], const Step& step, int row, Span lines, int low, int high, int lane) {
    EA_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int i = row + half * 8, place = step.first + lane % 4 * 2;  // of column 0
        const int begin = i + low - place, end = i < lines.end ? smaller(i + high + 1, step.end) - place : begin;
        EA_UNROLL
        for (int k = 0; k < 2 * kN; ++k) {
            const int column = k / 2 * 8 + k % 2;
            float& score = s[0][k / 2][half * 2 + k % 2];
            score = column >= begin && column < end ? score : -infinity();
        }
    }
}

// The same for fragments whose rows are keys and whose columns are queries: a row of the bit tile is a column here.
// Line j sees the steps j + low .. j + high; the fragments begin at line `row` - lane / 4, a multiple of 16.
template <int kM, int kN>
EA_DEVICE void hide_transposed(float (&s)[kM][kN][4], const KernelParams& p, const Step& step, int row, Span lines,
                               int low, int high, int lane) {
    const int block = static_cast<int>(p.call.mask.block_k), row_bytes = block / 8;
    EA_UNROLL
    for (int m = 0; m < kM; ++m) {
        const int line = row + m * 16, first = line - lane / 4;
        const uint8_t* bits = nullptr;
        if (step.tile >= 0 && first < lines.end)
            bits = bit_tile(p.call.mask, step.tile) + first % block / 8 + step.offset * row_bytes;
        EA_UNROLL
        for (int k = 0; k < 2 * kN; ++k) {
            const int column = k / 2 * 8 + lane % 4 * 2 + k % 2, i = step.first + column;
            const bool exists = i < step.end;
            uint32_t word = 0xFFFFu;
            if (bits && exists) word = load_global(reinterpret_cast<const uint16_t*>(bits + column * row_bytes));
            EA_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int j = line + half * 8;
                const bool visible =
                    exists && j < lines.end && i >= j + low && i <= j + high && (word >> (lane / 4 + half * 8) & 1);
                float& score = s[m][k / 2][half * 2 + k % 2];
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
    return value * static_cast<float>(kLog2e);
}

// Adds the bias to the visible scores, which are in units of log2; `add` false: only hides where the bias is -inf.
// `row` and `column`: this thread's first; rows are queries if kKeysAcross, else keys.
template <class T, bool kKeysAcross, int kM, int kN>
EA_DEVICE void add_bias(float (&s)[kM][kN][4], const KernelParams& p, int b, int h, int row, int column, bool add) {
    each(s, [&](float& score, int m, int n, int e) {
        if (score == -infinity()) return;
        const int line = row + m * 16 + e / 2 * 8, step = column + n * 8 + e % 2;
        const float bias = load_bias<T>(p, b, h, kKeysAcross ? line : step, kKeysAcross ? step : line);
        score = bias == -infinity() ? bias : add ? score + bias : score;
    });
}

// 1 for visible scores, all of which are 0, and 0 for hidden ones.
template <int kM, int kN>
EA_DEVICE void visible_ones(float (&s)[kM][kN][4]) {
    each(s, [](float& score, int, int, int) { score = score == 0.0f ? 1.0f : 0.0f; });
}

// Bit (m kN + n) 4 + e: whether dropout keeps that element (see `each`). `row` and `column`: this thread's first.
template <bool kKeysAcross, int kM, int kN>
EA_DEVICE uint32_t draw_kept(const KernelParams& p, int b, int h, int row, int column) {
    static_assert(kM * kN * 4 <= 32, "one bit an element");
    const uint64_t seed = dropout_seed(p);
    uint32_t kept = 0;
    EA_UNROLL
    for (int k = 0; k < kM * kN; ++k) {
        const int m = k / kN, n = k % kN;
        if (kKeysAcross) {
            const Words4 w = dropout_words(seed, b, h, row + m * 16, column + n * 8);
            const uint32_t four = static_cast<uint32_t>(w.x >= p.threshold) | (w.y >= p.threshold) << 1 |
                                  (w.z >= p.threshold) << 2 | (w.w >= p.threshold) << 3;
            kept |= four << (k * 4);
        } else if (n % 2 == 0) {
            EA_UNROLL
            for (int e = 0; e < 4; ++e) {
                const int j = row + m * 16 + e / 2 * 8;
                const Words4 w = dropout_words(seed, b, h, column + n * 8 + e % 2, j);
                const uint32_t first = j % 2 ? w.y : w.x, second = j % 2 ? w.w : w.z;  // queries i and i + 8
                kept |= static_cast<uint32_t>(first >= p.threshold) << (k * 4 + e);
                kept |= static_cast<uint32_t>(second >= p.threshold) << (k * 4 + 4 + e);
            }
        }
    }
    return kept;
}

// Whether bit (m kN + n) 4 + e is set.
template <int kN, class Bits>
EA_DEVICE bool is_kept(Bits kept, int m, int n, int e) {
    return kept >> ((m * kN + n) * 4 + e) & 1;
}

// Turns scores (times `unit`: log2) into weights e^(s - top). What was summed before is to be faded: says whether so,
// and by what. `top`, `total`: of rows g and g + 8, the maximum in units of log2 and this thread's part of the sum.
template <int kM, int kN>
EA_DEVICE bool online_softmax(float (&s)[kM][kN][4], float (&top)[kM][2], float (&total)[kM][2], float (&fade)[kM][2],
                              float unit) {
    bool fades = false;
    EA_UNROLL
    for (int r = 0; r < 2 * kM; ++r) {
        const int m = r / 2, half = r % 2;
        float best = -infinity();
        EA_UNROLL
        for (int n = 0; n < kN; ++n) best = fmaxf(best, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        const float now = fmaxf(top[m][half], quad_maximum(best) * unit);
        const float shift = now == -infinity() ? 0.0f : now;  // a row without a visible key so far
        fade[m][half] = power_of_2(top[m][half] - shift);
        fades |= fade[m][half] != 1.0f;
        float sum = 0.0f;
        EA_UNROLL
        for (int k = 0; k < 2 * kN; ++k) {
            float& score = s[m][k / 2][2 * half + k % 2];
            score = power_of_2(multiply_add_scalar(score, unit, -shift));
            sum += score;
        }
        top[m][half] = now;
        total[m][half] = total[m][half] * fade[m][half] + sum;
    }
    return fades;
}

// Writes the lse of rows row, row + 8, .. below the end of the tile; `factor`: what their sums are to be divided by.
template <int kM>
EA_DEVICE void finish_softmax(const float (&top)[kM][2], const float (&total)[kM][2], float (&factor)[kM][2],
                              const KernelParams& p, const Place& at, int row, int lane) {
    EA_UNROLL
    for (int r = 0; r < 2 * kM; ++r) {
        const float sum = quad_sum(total[r / 2][r % 2]);
        factor[r / 2][r % 2] = sum == 0.0f ? 0.0f : p.keep_scale / sum;
        const int line = row + r * 8;
        if (lane % 4 == 0 && line < at.lines.end) {
            const int64_t head = static_cast<int64_t>(at.b) * p.call.Hq + at.h;
            const float lse = (top[r / 2][r % 2] + logarithm_2(sum)) * static_cast<float>(kLn2);
            store_global(static_cast<float*>(p.call.lse) + head * p.call.Nq + line, sum == 0.0f ? -infinity() : lse);
        }
    }
}

// Every thread of the block says whether it met something suspicious in the block's tile. p.flags: null if it is not
// asked for.
EA_DEVICE void write_flag(const KernelParams& p, bool suspect) {
    if (!p.flags) return;
    suspect = block_any(suspect);
    if (thread_index() == 0) store_global(p.flags + block_index(), suspect ? 1 : 0);
}

// f(index) for the tiles of this block of threads that a kernel before has flagged.
template <class Function>
EA_DEVICE void each_flagged(const KernelParams& p, int64_t tiles, Function f) {
    for (int64_t index = block_index(); index < tiles; index += block_count())
        if (load_global(p.flags + index) != 0) f(index);
}

// Sets the weights of dropped pairs to 0.
template <int kM, int kN, class Bits>
EA_DEVICE void drop(float (&s)[kM][kN][4], Bits kept) {
    each(s, [&](float& x, int m, int n, int e) { x = is_kept<kN>(kept, m, n, e) ? x : 0.0f; });
}

}  // namespace
}  // namespace efficient_attn
