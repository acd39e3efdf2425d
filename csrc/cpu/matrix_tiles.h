// Products of bfloat16 in the tile registers of AMX_BF16: sixteen rows by sixteen columns by sixteen pairs an
// instruction.
#pragma once

#include "microkernels.h"

namespace efficient_attn {
namespace {

#if defined(__AMX_BF16__)
constexpr int64_t kTilePairs = 16;  // of a row of the left factor

// The shapes of the tile registers: accumulators 0 to 3, two by two; 4 and 5 of the left factor, one below the other;
// 6 and 7 of the right one, side by side. `rows`: of accumulators and left factor.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};

    explicit TileShapes(int64_t count) {
        for (int tile = 0; tile < 8; ++tile) {
            bytes[tile] = 64;
            rows[tile] = static_cast<uint8_t>(tile < 6 ? count : 16);
        }
    }
    void load() const {
        asm volatile("" ::"r"(this) : "memory");  // the instruction does not say that it reads all of it
        _tile_loadconfig(this);
    }
};

// The tile registers of this thread are in use while it lives; afterwards nobody need save them.
class TileRegisters {
  public:
    explicit TileRegisters(bool wanted) : wanted_(wanted) {
        if (wanted_) TileShapes(16).load();
    }
    ~TileRegisters() {
        if (wanted_) _tile_release();
    }
    TileRegisters(const TileRegisters&) = delete;
    TileRegisters& operator=(const TileRegisters&) = delete;

  private:
    bool wanted_;
};

// out[16 kM][16 kN] (into) a b; strides in elements. kAhead: and the rows below of `a` are fetched, which may lie
// anywhere in memory and nothing else would call for sixteen of them in time.
template <Into kInto, int kM, int kN, bool kAhead>
EA_NOINLINE void tile_block(int64_t rows, int64_t depth, const BFloat16* a, int64_t a_stride, const Pair* b,
                            int64_t b_stride, float* out, int64_t out_stride, const float* factor) {
    const int64_t a_bytes = a_stride * 2, b_bytes = b_stride * 4, out_bytes = out_stride * 4;
    const auto scale = [&] {
        Vec<float> by[kN];
#pragma GCC unroll 2
        for (int n = 0; n < kN; ++n) by[n] = load(factor + 16 * n);
        for (int64_t m = 0; m < rows; ++m)
#pragma GCC unroll 2
            for (int n = 0; n < kN; ++n) {
                float* place = out + m * out_stride + 16 * n;
                store(place, load(place) * by[n]);
            }
    };
    if constexpr (kInto == Into::kFade) scale();
    asm volatile("" ::: "memory");  // the instructions below do not say that they read memory
    if constexpr (kInto == Into::kAdd || kInto == Into::kFade) {
        _tile_loadd(0, out, out_bytes);
        if constexpr (kN == 2) _tile_loadd(1, out + 16, out_bytes);
        if constexpr (kM == 2) _tile_loadd(2, out + 16 * out_stride, out_bytes);
        if constexpr (kM == 2 && kN == 2) _tile_loadd(3, out + 16 * out_stride + 16, out_bytes);
    } else {
        _tile_zero(0);
        if constexpr (kN == 2) _tile_zero(1);
        if constexpr (kM == 2) _tile_zero(2);
        if constexpr (kM == 2 && kN == 2) _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += kTilePairs, a += 2 * kTilePairs, b += kTilePairs * b_stride) {
        if constexpr (kAhead)
            for (int m = 0; m < 32; ++m) __builtin_prefetch(a + (32 + m) * a_stride);
        _tile_loadd(4, a, a_bytes);
        _tile_loadd(6, b, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (kN == 2) {
            _tile_loadd(7, b + 16, b_bytes);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (kM == 2) {
            _tile_loadd(5, a + 16 * a_stride, a_bytes);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (kM == 2 && kN == 2) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, out_bytes);
    if constexpr (kN == 2) _tile_stored(1, out + 16, out_bytes);
    if constexpr (kM == 2) _tile_stored(2, out + 16 * out_stride, out_bytes);
    if constexpr (kM == 2 && kN == 2) _tile_stored(3, out + 16 * out_stride + 16, out_bytes);
    if constexpr (kInto == Into::kScale) scale();
}

template <Into kInto, int kM>
inline void tile_rows_product(int64_t rows, int64_t lanes, int64_t depth, const BFloat16* a, int64_t a_stride,
                              const Pair* b, float* out, const float* factor) {
    constexpr bool with_factor = kInto == Into::kScale || kInto == Into::kFade;
    const auto block = [&](auto width, auto ahead, int64_t n) {
        tile_block<kInto, kM, width.value, ahead.value>(rows, depth, a, a_stride, b + n, lanes, out + n, lanes,
                                                        with_factor ? factor + n : nullptr);
    };
    int64_t n = 0;
    if (lanes >= 32) block(Int<2>{}, Bool<kM == 2>{}, 0), n = 32;
    for (; n + 32 <= lanes; n += 32) block(Int<2>{}, Bool<false>{}, n);
    if (n < lanes) block(Int<1>{}, Bool<false>{}, n);
}

// out[m][n] (into) sum_k a[m][k] * b[k][n] of pairs      m < rows, n < lanes (whole vectors), k < depth (whole tiles)
//
// Pairs of a lie side by side, its rows `a_stride` elements apart; those of b and out are `lanes` wide.
template <Into kInto>
inline void tile_product(int64_t rows, int64_t lanes, int64_t depth, const BFloat16* a, int64_t a_stride, const Pair* b,
                         float* out, const float* factor) {
    if constexpr (kInto == Into::kFade) {  // most maxima do not change after the first tiles
        bool fades = false;
        for (int64_t n = 0; n < lanes; ++n) fades |= factor[n] != 1;
        if (!fades) return tile_product<Into::kAdd>(rows, lanes, depth, a, a_stride, b, out, factor);
    }
    int64_t m = 0;
    for (; m + 32 <= rows; m += 32)
        tile_rows_product<kInto, 2>(32, lanes, depth, a + m * a_stride, a_stride, b, out + m * lanes, factor);
    if (m + 16 <= rows) {
        tile_rows_product<kInto, 1>(16, lanes, depth, a + m * a_stride, a_stride, b, out + m * lanes, factor);
        m += 16;
    }
    if (m == rows) return;
    TileShapes(rows - m).load();
    tile_rows_product<kInto, 1>(rows - m, lanes, depth, a + m * a_stride, a_stride, b, out + m * lanes, factor);
    TileShapes(16).load();
}
#else
constexpr int64_t kTilePairs = 1;

struct TileRegisters {
    explicit TileRegisters(bool) {}
};
#endif

}  // namespace
}  // namespace efficient_attn
