// Tiles in shared memory and fragments in registers: how a tile is loaded, addressed, multiplied and stored.
//
// A tile [rows, kWidth] of 16-bit elements lies row by row; of each row the 16-byte chunks are permuted (swizzled) by
// the row's number, so that the eight rows of one matrix, and the chunks of one row, lie in all 32 banks: neither
// ldmatrix nor cp.async nor the epilogue has a bank conflict.
#pragma once

#include "cuda/mask.h"

namespace efficient_attn {
namespace {

constexpr int kWarp = 32;

template <int kDType>
using Element = std::conditional_t<kDType == kBFloat16, BFloat16, Float16>;

// Byte offset of chunk `chunk` (8 elements) of row `row` in a tile kWidth elements wide.
template <int kWidth>
EA_DEVICE uint32_t chunk_offset(int row, int chunk) {
    return static_cast<uint32_t>(row * (kWidth * 2) + ((chunk ^ (row & 7)) << 4));
}

EA_DEVICE uint16_t* head_pointer(const TensorView& view, int b, int h) {
    return static_cast<uint16_t*>(view.data) + b * view.batch_stride + h * view.head_stride;
}

// Eight elements of which `count` exist, one by one: for rows that do not begin on 16 bytes.
EA_DEVICE Words4 load_elements(const uint16_t* source, int count) {
    uint32_t word[4] = {0, 0, 0, 0};
    EA_UNROLL
    for (int e = 0; e < 8; ++e)
        if (e < count) word[e / 2] |= static_cast<uint32_t>(load_global(source + e)) << (e % 2 * 16);
    return {word[0], word[1], word[2], word[3]};
}

// In a walk with two slots of tiles, while one is worked off and the other one loaded: a step costs one barrier.
EA_DEVICE void await_slot() {
    copy_async_wait<0>();
    block_sync();  // this slot has arrived, and every warp is done with the other one
}

// Starts loading rows [first, end) into a tile of kRows rows; rows and columns beyond `end` and `width` become zeros.
// `base` is row 0. Visible to the block after copy_async_wait and block_sync.
template <int kRows, int kWidth, int kThreads>
EA_DEVICE void load_tile(uint32_t tile, const uint16_t* base, int64_t row_stride, int first, int end, int width,
                         bool aligned) {
    constexpr int kChunks = kWidth / 8, kRowsAtOnce = kThreads / kChunks;
    static_assert(kThreads % kChunks == 0 && kRows % kRowsAtOnce == 0, "every thread loads the same number of chunks");
    const int chunk = thread_index() % kChunks, count = smaller(8, width - chunk * 8);
    int row = thread_index() / kChunks;
    if (aligned) {
        EA_UNROLL
        for (int k = 0; k < kRows / kRowsAtOnce; ++k, row += kRowsAtOnce) {
            const bool exists = first + row < end && count > 0;
            const uint16_t* source = base + (exists ? (first + row) * row_stride + chunk * 8 : 0);
            copy_async(tile + chunk_offset<kWidth>(row, chunk), source, exists ? count * 2 : 0);
        }
    } else {
        for (int k = 0; k < kRows / kRowsAtOnce; ++k, row += kRowsAtOnce) {
            const bool exists = first + row < end;
            const uint16_t* source = base + (exists ? (first + row) * row_stride + chunk * 8 : 0);
            store_shared_128(tile + chunk_offset<kWidth>(row, chunk), load_elements(source, exists ? count : 0));
        }
    }
}

// --- fragments ---

// Where a lane begins to read matrices of a tile; chunk 2 k further on is address ^ (k << 5), for tiles begin on 512
// bytes. One for operands whose matrices follow one another down the rows first, one across the chunks first.
template <int kWidth>
EA_DEVICE uint32_t lane_down(uint32_t tile, int lane) {
    return tile + chunk_offset<kWidth>(lane & 15, lane >> 4);
}
template <int kWidth>
EA_DEVICE uint32_t lane_across(uint32_t tile, int lane) {
    return tile + chunk_offset<kWidth>((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
}
template <int kWidth>
EA_DEVICE uint32_t matrices_at(uint32_t lane_address, int row, int k) {
    return (lane_address ^ static_cast<uint32_t>(k << 5)) + static_cast<uint32_t>(row * kWidth * 2);
}

// A operand: rows row .. row+15 (row a multiple of 16), columns 16 k .. +15 of a tile; from lane_down.
template <int kWidth>
EA_DEVICE void load_a(uint32_t (&a)[4], uint32_t lane_address, int row, int k) {
    load_matrices(a, matrices_at<kWidth>(lane_address, row, k));
}

// B operand of a product with the transposed tile: two fragments (b[0..1], b[2..3]), columns = rows row .. row+15, sum
// over columns 16 k .. +15; from lane_across.
template <int kWidth>
EA_DEVICE void load_b(uint32_t (&b)[4], uint32_t lane_address, int row, int k) {
    load_matrices(b, matrices_at<kWidth>(lane_address, row, k));
}

// B operand of a product with the tile itself: two fragments, columns 16 n .. +15, sum over rows row .. row+15; from
// lane_down.
template <int kWidth>
EA_DEVICE void load_b_transposed(uint32_t (&b)[4], uint32_t lane_address, int row, int n) {
    load_matrices_transposed(b, matrices_at<kWidth>(lane_address, row, n));
}

// Accumulators [16, 8 kN] as A operands of the next product, [16, 16] each.
template <class T, int kN>
EA_DEVICE void pack_a(uint32_t (&a)[kN / 2][4], const float (&c)[kN][4]) {
    EA_UNROLL
    for (int k = 0; k < kN / 2; ++k) {
        a[k][0] = pack<T>(c[2 * k][0], c[2 * k][1]);
        a[k][1] = pack<T>(c[2 * k][2], c[2 * k][3]);
        a[k][2] = pack<T>(c[2 * k + 1][0], c[2 * k + 1][1]);
        a[k][3] = pack<T>(c[2 * k + 1][2], c[2 * k + 1][3]);
    }
}

// f(element, m, n, e) for every element that this thread holds of [16 kM, 8 kN] accumulators: in row 16 m + 8 (e / 2) +
// lane / 4 and column 8 n + 2 (lane % 4) + e % 2.
template <int kM, int kN, class Function>
EA_DEVICE void each(float (&c)[kM][kN][4], Function f) {
    EA_UNROLL
    for (int m = 0; m < kM; ++m) {
        EA_UNROLL
        for (int n = 0; n < kN; ++n) {
            EA_UNROLL
            for (int e = 0; e < 4; ++e) f(c[m][n][e], m, n, e);
        }
    }
}

template <int kM, int kN>
EA_DEVICE void clear(float (&c)[kM][kN][4]) {
    each(c, [](float& x, int, int, int) { x = 0.0f; });
}

// Whether 16 bits are NaN or infinite.
template <class T>
EA_DEVICE bool not_finite_bits(uint32_t bits);
template <>
EA_DEVICE bool not_finite_bits<BFloat16>(uint32_t bits) {
    return (bits & 0x7F80u) == 0x7F80u;
}
template <>
EA_DEVICE bool not_finite_bits<Float16>(uint32_t bits) {
    return (bits & 0x7C00u) == 0x7C00u;
}

// How an operand is read by the products that a NaN must not pass (see safe_passes in the kernels).
enum Reading : int {
    kAsIs = 0,
    kFinite = 1,  // zeros in the place of NaN and infinity
    kMarks = 2,   // ones in their place, zeros elsewhere
};

template <class T>
EA_DEVICE uint32_t read_as(uint32_t pair, Reading reading) {
    const bool low = not_finite_bits<T>(pair & 0xFFFFu), high = not_finite_bits<T>(pair >> 16);
    if (reading == kMarks) return pack<T>(low ? 1.0f : 0.0f, high ? 1.0f : 0.0f);
    return (low ? 0u : pair & 0xFFFFu) | (high ? 0u : pair & 0xFFFF0000u);
}

EA_DEVICE bool finite(float x) { return x - x == 0.0f; }

EA_DEVICE float quad_maximum(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}

EA_DEVICE float quad_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

// --- products ---

// s += A B^T: A are rows `row` .. of one tile, B the rows of another one, both kWidth wide.
template <class T, int kWidth, int kM, int kN>
EA_DEVICE void multiply_transposed(float (&s)[kM][kN][4], uint32_t a_tile, int row, uint32_t b_tile, int lane) {
    const uint32_t a_lane = lane_down<kWidth>(a_tile + row * kWidth * 2, lane);
    const uint32_t b_lane = lane_across<kWidth>(b_tile, lane);
    EA_UNROLL
    for (int k = 0; k < kWidth / 16; ++k) {
        uint32_t a[kM][4];
        EA_UNROLL
        for (int m = 0; m < kM; ++m) load_a<kWidth>(a[m], a_lane, m * 16, k);
        EA_UNROLL
        for (int n = 0; n < kN / 2; ++n) {
            uint32_t b[4];
            load_b<kWidth>(b, b_lane, n * 16, k);
            EA_UNROLL
            for (int m = 0; m < kM; ++m) {
                multiply_add<T>(s[m][2 * n], a[m], b[0], b[1]);
                multiply_add<T>(s[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// c += S B: S rounded to T, B the columns of a tile from 16 `column` on, read as `reading` says where kSafe.
template <class T, int kWidth, bool kSafe, int kM, int kN, int kC>
EA_DEVICE void multiply(float (&c)[kM][kC][4], const float (&s)[kM][kN][4], uint32_t tile, int column, Reading reading,
                        int lane) {
    const uint32_t b_lane = matrices_at<kWidth>(lane_down<kWidth>(tile, lane), 0, column);
    uint32_t a[kM][kN / 2][4];
    EA_UNROLL
    for (int m = 0; m < kM; ++m) pack_a<T>(a[m], s[m]);
    EA_UNROLL
    for (int k = 0; k < kN / 2; ++k) EA_UNROLL
    for (int n = 0; n < kC / 2; ++n) {
        uint32_t b[4];
        load_b_transposed<kWidth>(b, b_lane, k * 16, n);
        EA_UNROLL
        for (int r = 0; r < 4; ++r)
            if (kSafe) b[r] = read_as<T>(b[r], reading);
        EA_UNROLL
        for (int m = 0; m < kM; ++m) {
            multiply_add<T>(c[m][2 * n], a[m][k], b[0], b[1]);
            multiply_add<T>(c[m][2 * n + 1], a[m][k], b[2], b[3]);
        }
    }
}

// --- results ---

// Whether an element of the rows row, row + 8, .. below `end` is NaN or infinite: then it may have come from a position
// that the row does not see.
template <int kM, int kC>
EA_DEVICE bool suspicious(float (&c)[kM][kC][4], int row, int end) {
    bool found = false;
    each(c, [&](float x, int m, int, int e) { found |= !finite(x) && row + m * 16 + e / 2 * 8 < end; });
    return found;
}

template <int kM, int kC>
EA_DEVICE void scale_by(float (&c)[kM][kC][4], float factor) {
    each(c, [&](float& x, int, int, int) { x *= factor; });
}

// Rounds a warp's rows [16 kM, 8 kC] to T and writes those below `end`. They pass through the warp's own rows and
// columns of a tile in shared memory, so that memory is written 16 bytes a lane. `row` is the warp's first row in the
// tile, `first` the tile's in the tensor, `column` its first column in units of 8.
template <class T, int kWidth, int kM, int kC>
EA_DEVICE void store_rows(float (&c)[kM][kC][4], uint32_t tile, uint16_t* base, int64_t row_stride, int first, int row,
                          int end, int column, int width, bool aligned, int lane) {
    static_assert(kC <= kWarp && kWarp % kC == 0, "a row is at most one access wide");
    warp_sync();
    EA_UNROLL
    for (int m = 0; m < kM; ++m) {
        EA_UNROLL
        for (int n = 0; n < 2 * kC; ++n) {
            const int half = n % 2, place = row + m * 16 + half * 8 + lane / 4;
            store_shared_32(tile + chunk_offset<kWidth>(place, column + n / 2) + lane % 4 * 4,
                            pack<T>(c[m][n / 2][2 * half], c[m][n / 2][2 * half + 1]));
        }
    }
    warp_sync();
    const int chunk = column + lane % kC, count = smaller(8, width - chunk * 8);
    for (int r = lane / kC; r < kM * 16; r += kWarp / kC) {
        const Words4 words = load_shared_128(tile + chunk_offset<kWidth>(row + r, chunk));
        const int position = first + row + r;
        if (position >= end || count <= 0) continue;
        uint16_t* target = base + position * row_stride + chunk * 8;
        if (aligned) {
            store_global(reinterpret_cast<Words4*>(target), words);
            continue;
        }
        const uint32_t word[4] = {words.x, words.y, words.z, words.w};
        EA_UNROLL
        for (int e = 0; e < 8; ++e)
            if (e < count) store_global(target + e, static_cast<uint16_t>(word[e / 2] >> (e % 2 * 16)));
    }
}

// NaN where a mark was counted: rows row, row + 8, .. below `end`, columns from `column` on.
template <class T, int kM, int kC>
EA_DEVICE void store_marks(float (&c)[kM][kC][4], uint16_t* base, int64_t row_stride, int row, int end, int column,
                           int64_t width) {
    const uint16_t nan = static_cast<uint16_t>(pack<T>(not_a_number(), 0.0f));
    each(c, [&](float x, int m, int n, int e) {
        const int i = row + m * 16 + e / 2 * 8, d = column + n * 8 + e % 2;
        if (x > 0.0f && i < end && d < width) store_global(base + i * row_stride + d, nan);
    });
}

}  // namespace
}  // namespace efficient_attn
