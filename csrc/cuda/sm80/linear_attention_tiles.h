// The tiles of linear attention's sums (linear_attention_sums.h): how rows become operands, and the products of one
// chunk.
//
// A block of threads owns 64 columns of u and a warp 16 of them, whose rows of the state stay in the warp's registers
// as accumulators [16, E]: they are B operands of the product with x as they lie. The term e f is one more column of x
// and y; the normaliser sum_t x_s . y_t is one more column of u, of ones, which a fifth warp carries.
//
// Products are of bfloat16, whose range is that of float32: an operand that is not bfloat16 is the sum of two, its
// rounding and what that left, and of a product of two such sums only the part below 2^-16 is left out.
//
// Shared memory: x and y [kChunk, kE], u [kChunk, 64] and the weights [kChunk, 64], each twice where split; e, f and n.
#pragma once

#include "cuda/linear_attention_params.h"
#include "cuda/tile.h"

namespace efficient_attn {
namespace sm80 {
namespace {

// kSplit: some operand is not bfloat16.
template <int kE_, bool kSplit_>
struct Sums {
    using T = BFloat16;
    static constexpr int kE = kE_, kR = 64, kChunk = kE == 256 ? 32 : 64, kM = kChunk / 16;
    static constexpr bool kSplit = kSplit_;
    static constexpr int kBlocksAtOnce = kE == 64 && kSplit ? 2 : 1;
    static constexpr int kWarps = 4, kThreads = kWarps * kWarp, kMostThreads = kThreads + kWarp;
    static constexpr uint32_t kWide = kChunk * kE * 2, kNarrow = kChunk * kR * 2, kCopies = kSplit ? 2 : 1;
    static constexpr uint32_t kX = 0, kY = kX + kCopies * kWide, kU = kY + kCopies * kWide;
    static constexpr uint32_t kWeights = kU + kCopies * kNarrow, kColumns = kWeights + 2 * kNarrow;
    static constexpr uint32_t kExtraX = kColumns, kExtraY = kExtraX + kChunk * 4, kNorms = kExtraY + kChunk * 4;
    static constexpr uint32_t kSharedBytes = kNorms + kChunk * 4;
};

// The state of a warp: rows are its columns of u, columns those of y; the last tile holds the one of f alone.
template <class S>
using State = float[S::kE / 8 + 1][4];

// --- operands ---

EA_DEVICE bool counts(const Rows& r, int b, int n) {
    return n >= 0 && n < r.N && (!r.alive || load_global(r.alive + static_cast<int64_t>(b) * r.N + n) != 0);
}

EA_DEVICE int64_t row_offset(const Rows& r, int b, int h, int n) {
    return b * r.view.batch_stride + h * r.view.head_stride + n * r.view.row_stride;
}

EA_DEVICE int64_t line_offset(const Rows& r, int b, int h) { return (static_cast<int64_t>(b) * r.heads + h) * r.N; }

EA_DEVICE float unpack_as(int dtype, uint32_t bits) {
    return dtype == kBFloat16 ? unpack<BFloat16>(bits) : unpack<Float16>(bits);
}

// Eight elements in float32, of which `count` exist.
EA_DEVICE void load_floats(float (&v)[8], const Rows& r, int64_t offset, int count) {
    const bool whole = r.aligned && count == 8;
    if (r.dtype == kFloat32) {
        const float* source = static_cast<const float*>(r.view.data) + offset;
        Words4 words[2] = {};
        if (whole) {
            words[0] = load_global(reinterpret_cast<const Words4*>(source));
            words[1] = load_global(reinterpret_cast<const Words4*>(source) + 1);
        }
        EA_UNROLL
        for (int e = 0; e < 8; ++e) {
            const Words4& w = words[e / 4];
            v[e] = as_float(e % 4 == 0 ? w.x : e % 4 == 1 ? w.y : e % 4 == 2 ? w.z : w.w);
            if (!whole && e < count) v[e] = load_global(source + e);
        }
        return;
    }
    const uint16_t* source = static_cast<const uint16_t*>(r.view.data) + offset;
    const Words4 words =
        whole ? load_global(reinterpret_cast<const Words4*>(source)) : load_elements(source, smaller(count, 8));
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
    EA_UNROLL
    for (int e = 0; e < 8; ++e) v[e] = unpack_as(r.dtype, word[e / 2] >> (e % 2 * 16) & 0xFFFFu);
}

// What rounding to bfloat16 leaves of two float32.
EA_DEVICE uint32_t rest_of(uint32_t rounded, float low, float high) {
    return pack<BFloat16>(low - unpack<BFloat16>(rounded & 0xFFFFu), high - unpack<BFloat16>(rounded >> 16));
}

// Loads rows first .. of an operand into a tile, columns from `column` on, and with kSplit what rounding leaves into
// the tile behind it; zeros where a row does not count. Returns whether this thread met a NaN or infinity.
template <class S, int kWidth>
EA_DEVICE bool load_rows(uint32_t tile, const Rows& r, int b, int h, int first, int column) {
    constexpr int kChunks = kWidth / 8, kRowsAtOnce = S::kThreads / kChunks, kBatch = S::kE == 128 ? 4 : 2;
    constexpr int kPieces = S::kChunk / kRowsAtOnce, kAtOnce = kPieces < kBatch ? kPieces : kBatch;
    if (thread_index() >= S::kThreads) return false;
    const int chunk = thread_index() % kChunks, count = smaller(8, r.width - column - chunk * 8);
    bool bad = false;
    EA_KEEP_LOOP
    for (int piece = 0; piece < kPieces; piece += kAtOnce) {
        float v[kAtOnce][8];
        const int row = piece * kRowsAtOnce + thread_index() / kChunks;
        EA_UNROLL
        for (int k = 0; k < kAtOnce; ++k) {
            const int n = first + row + k * kRowsAtOnce;
            const bool exists = count > 0 && counts(r, b, n);
            load_floats(v[k], r, exists ? row_offset(r, b, h, n) + column + chunk * 8 : 0, exists ? count : 0);
            if (!r.norm) continue;
            const float norm = exists ? load_global(r.norm + line_offset(r, b, h) + n) : 0.0f;
            EA_UNROLL
            for (int e = 0; e < 8; ++e) v[k][e] = norm == 0.0f ? 0.0f : v[k][e] / norm;
        }
        EA_UNROLL
        for (int k = 0; k < kAtOnce; ++k) {
            uint32_t high[4], low[4];
            EA_UNROLL
            for (int e = 0; e < 4; ++e) {
                bad |= !finite(v[k][2 * e]) || !finite(v[k][2 * e + 1]);
                high[e] = pack<BFloat16>(v[k][2 * e], v[k][2 * e + 1]);
                low[e] = rest_of(high[e], v[k][2 * e], v[k][2 * e + 1]);
            }
            const uint32_t place = tile + chunk_offset<kWidth>(row + k * kRowsAtOnce, chunk);
            store_shared_128(place, {high[0], high[1], high[2], high[3]});
            if (S::kSplit) store_shared_128(place + S::kChunk * kWidth * 2, {low[0], low[1], low[2], low[3]});
        }
    }
    return bad;
}

// The factors e or f of rows first ..; 0 for rows that do not count.
template <class S>
EA_DEVICE void load_extra(uint32_t target, const Rows& r, int b, int h, int first) {
    if (thread_index() >= S::kChunk) return;
    const int n = first + thread_index();
    const bool exists = counts(r, b, n);
    const float value = !exists ? 0.0f : r.extra ? load_global(r.extra + line_offset(r, b, h) + n) : 1.0f;
    store_shared_32(target + thread_index() * 4, as_bits(value));
}

// --- products ---

// An operand and what rounding left of it.
template <int kRegisters>
struct Pair {
    uint32_t high[kRegisters], low[kRegisters];
};

// Two float32 as elements of a fragment.
template <int kRegisters>
EA_DEVICE void split(Pair<kRegisters>& f, int r, float first, float second) {
    f.high[r] = pack<BFloat16>(first, second);
    f.low[r] = rest_of(f.high[r], first, second);
}

// c += a b without the product of the rests; kA, kB: whether there is a rest.
template <bool kA, bool kB>
EA_DEVICE void multiply_add_pair(float (&c)[4], const Pair<4>& a, const Pair<4>& b, int n) {
    multiply_add<BFloat16>(c, a.high, b.high[2 * n], b.high[2 * n + 1]);
    if (kB) multiply_add<BFloat16>(c, a.high, b.low[2 * n], b.low[2 * n + 1]);
    if (kA) multiply_add<BFloat16>(c, a.low, b.high[2 * n], b.high[2 * n + 1]);
}

enum Matrices : int { kPlain, kTransposed };

// The fragment and its rest at one place of a tile and the one behind it.
template <class S, int kWidth, Matrices kOrder, bool kRest = S::kSplit>
EA_DEVICE void load_pair(Pair<4>& f, uint32_t lane_address, int row, int k) {
    const uint32_t place = matrices_at<kWidth>(lane_address, row, k);
    if (kOrder == kPlain) {
        load_matrices(f.high, place);
        if (kRest) load_matrices(f.low, place + S::kChunk * kWidth * 2);
    } else {
        load_matrices_transposed(f.high, place);
        if (kRest) load_matrices_transposed(f.low, place + S::kChunk * kWidth * 2);
    }
}

// This warp's columns of u [kChunk, 16] as the products read them: its part of the tile, or for the fifth warp ones in
// the first column.
template <class S>
struct Columns {
    bool ones;
    int column, lane;  // in units of 16

    // A operand u^T: sum over rows 16 k .. +15.
    EA_DEVICE void load_a(Pair<4>& f, int k) const {
        if (ones) return fill(f, 2);
        load_pair<S, S::kR, kTransposed>(f, lane_across<S::kR>(S::kU, lane), k * 16, column);
    }
    // B operand u: sum over rows 16 k .. +15.
    EA_DEVICE void load_b(Pair<4>& f, int k) const {
        if (ones) return fill(f, 1);
        load_pair<S, S::kR, kTransposed>(f, lane_down<S::kR>(S::kU, lane), k * 16, column);
    }

  private:
    EA_DEVICE void fill(Pair<4>& f, int second) const {
        EA_UNROLL
        for (int r = 0; r < 4; ++r) f.high[r] = (r == 0 || r == second) && lane < 4 ? 0x3F803F80u : 0u, f.low[r] = 0;
    }
};

// A operand [16, 16] whose first column is e of rows row .. row+15, and 0 elsewhere.
EA_DEVICE void load_extra_a(Pair<4>& f, uint32_t extra, int row, int lane) {
    EA_UNROLL
    for (int r = 0; r < 2; ++r) {
        const float e = as_float(load_shared_32(extra + (row + r * 8 + lane / 4) * 4));
        split(f, r, lane % 4 == 0 ? e : 0.0f, 0.0f);
        split(f, r + 2, 0.0f, 0.0f);
    }
}

// state += u^T [y, f] over the rows of a chunk.
template <class S>
EA_DEVICE void add_to_state(State<S>& state, const Columns<S>& u, bool extra, int lane) {
    const uint32_t y_lane = lane_down<S::kE>(S::kY, lane);
    EA_KEEP_LOOP
    for (int k = 0; k < S::kM; ++k) {
        Pair<4> a, b;
        u.load_a(a, k);
        EA_UNROLL
        for (int n = 0; n < S::kE / 16; ++n) {
            load_pair<S, S::kE, kTransposed>(b, y_lane, k * 16, n);
            multiply_add_pair<S::kSplit, S::kSplit>(state[2 * n], a, b, 0);
            multiply_add_pair<S::kSplit, S::kSplit>(state[2 * n + 1], a, b, 1);
        }
        if (!extra) continue;
        EA_UNROLL
        for (int r = 0; r < 2; ++r) {
            float f[2];
            EA_UNROLL
            for (int e = 0; e < 2; ++e) {
                const int row = k * 16 + r * 8 + lane % 4 * 2 + e;
                f[e] = as_float(load_shared_32(S::kExtraY + static_cast<uint32_t>(row) * 4));
            }
            split(b, r, lane < 4 ? f[0] : 0.0f, lane < 4 ? f[1] : 0.0f);
        }
        multiply_add_pair<S::kSplit, true>(state[S::kE / 8], a, b, 0);
    }
}

// out = [x, e] state^T.
template <class S>
EA_DEVICE void multiply_state(float (&out)[S::kM][2][4], const State<S>& state, bool extra, int lane) {
    const uint32_t x_lane = lane_down<S::kE>(S::kX, lane);
    Pair<4> a, b;
    EA_UNROLL
    for (int k = 0; k < S::kE / 16; ++k) {
        EA_UNROLL
        for (int r = 0; r < 4; ++r) split(b, r, state[2 * k + r % 2][r / 2 * 2], state[2 * k + r % 2][r / 2 * 2 + 1]);
        EA_UNROLL
        for (int m = 0; m < S::kM; ++m) {
            load_pair<S, S::kE, kPlain>(a, x_lane, m * 16, k);
            multiply_add_pair<S::kSplit, true>(out[m][0], a, b, 0);
            multiply_add_pair<S::kSplit, true>(out[m][1], a, b, 1);
        }
    }
    if (!extra) return;
    EA_UNROLL
    for (int r = 0; r < 4; ++r) {
        const float (&last)[4] = state[S::kE / 8];
        split(b, r, r % 2 == 0 ? last[r] : 0.0f, r % 2 == 0 ? last[r + 1] : 0.0f);
    }
    EA_UNROLL
    for (int m = 0; m < S::kM; ++m) {
        load_extra_a(a, S::kExtraX, m * 16, lane);
        multiply_add_pair<true, true>(out[m][0], a, b, 0);
        multiply_add_pair<true, true>(out[m][1], a, b, 1);
    }
}

// Whether row s of a chunk sums over row t.
EA_DEVICE bool visible(const SumsParams& p, int s, int t) { return p.reverse ? t >= s : t <= s; }

// The weights x y^T + e f^T within a chunk, 16 rows a warp, to shared memory; 0 where not visible. Half of the columns
// at a time, to save registers.
template <class S>
EA_DEVICE void store_weights(const SumsParams& p, int warp, int lane) {
    if (warp >= S::kM) return;
    constexpr int kHalf = S::kChunk / 2;
    const uint32_t x_lane = lane_down<S::kE>(S::kX, lane), y_lane = lane_across<S::kE>(S::kY, lane);
    const int row = warp * 16;
    EA_KEEP_LOOP
    for (int first = 0; first < S::kChunk; first += kHalf) {
        float w[1][kHalf / 8][4];
        clear(w);
        const bool seen = visible(p, row + 15, first) || visible(p, row, first + kHalf - 1);
        Pair<4> a, b;
        EA_KEEP_LOOP
        for (int k = 0; seen && k < S::kE / 16; ++k) {
            load_pair<S, S::kE, kPlain>(a, x_lane, row, k);
            EA_UNROLL
            for (int n = 0; n < kHalf / 16; ++n) {
                load_pair<S, S::kE, kPlain>(b, y_lane, first + n * 16, k);
                multiply_add_pair<S::kSplit, S::kSplit>(w[0][2 * n], a, b, 0);
                multiply_add_pair<S::kSplit, S::kSplit>(w[0][2 * n + 1], a, b, 1);
            }
        }
        if (p.extra) {
            load_extra_a(a, S::kExtraX, row, lane);
            EA_UNROLL
            for (int n = 0; n < kHalf / 8; ++n) {
                const uint32_t place = S::kExtraY + static_cast<uint32_t>(first + n * 8 + lane / 4) * 4;
                const float f = as_float(load_shared_32(place));
                split(b, 0, lane % 4 == 0 ? f : 0.0f, 0.0f);
                split(b, 1, 0.0f, 0.0f);
                multiply_add_pair<true, true>(w[0][n], a, b, 0);
            }
        }
        each(w, [&](float& x, int, int n, int e) {
            x = visible(p, row + lane / 4 + e / 2 * 8, first + n * 8 + lane % 4 * 2 + e % 2) ? x : 0.0f;
        });
        EA_UNROLL
        for (int k = 0; k < kHalf / 4; ++k) {
            const int n = k / 2, half = k % 2;
            const uint32_t place =
                S::kWeights + chunk_offset<S::kR>(row + half * 8 + lane / 4, first / 8 + n) + lane % 4 * 4;
            const uint32_t rounded = pack<BFloat16>(w[0][n][2 * half], w[0][n][2 * half + 1]);
            store_shared_32(place, rounded);
            store_shared_32(place + S::kNarrow, rest_of(rounded, w[0][n][2 * half], w[0][n][2 * half + 1]));
        }
    }
}

// out += weights u. `bad`: u holds a NaN or infinity, which a weight of 0 does not silence: zeros take their place.
template <class S>
EA_DEVICE void multiply_weights(float (&out)[S::kM][2][4], const Columns<S>& u, bool bad, int lane) {
    const uint32_t w_lane = lane_down<S::kR>(S::kWeights, lane);
    Pair<4> a, b;
    EA_KEEP_LOOP
    for (int k = 0; k < S::kM; ++k) {
        u.load_b(b, k);
        EA_UNROLL
        for (int r = 0; r < 4; ++r) {
            if (bad) b.high[r] = read_as<BFloat16>(b.high[r], kFinite);
            if (bad && S::kSplit) b.low[r] = read_as<BFloat16>(b.low[r], kFinite);
        }
        EA_UNROLL
        for (int m = 0; m < S::kM; ++m) {
            load_pair<S, S::kR, kPlain, true>(a, w_lane, m * 16, k);
            multiply_add_pair<true, S::kSplit>(out[m][0], a, b, 0);
            multiply_add_pair<true, S::kSplit>(out[m][1], a, b, 1);
        }
    }
}

// NaN where a row sees a NaN or infinity of u within the chunk; 16 rows at a time, to save registers.
template <class S>
EA_DEVICE void mark(float (&out)[S::kM][2][4], const SumsParams& p, const Columns<S>& u, int lane) {
    EA_UNROLL
    for (int m = 0; m < S::kM; ++m) {
        float met[2][4] = {};
        EA_KEEP_LOOP
        for (int k = 0; k < S::kM; ++k) {
            Pair<4> a, b;
            u.load_b(b, k);
            EA_UNROLL
            for (int r = 0; r < 4; ++r) {
                const int s = m * 16 + r % 2 * 8 + lane / 4, t = k * 16 + r / 2 * 8 + lane % 4 * 2;
                a.high[r] = pack<BFloat16>(visible(p, s, t) ? 1.0f : 0.0f, visible(p, s, t + 1) ? 1.0f : 0.0f);
                b.high[r] = read_as<BFloat16>(b.high[r], kMarks);
            }
            multiply_add_pair<false, false>(met[0], a, b, 0);
            multiply_add_pair<false, false>(met[1], a, b, 1);
        }
        EA_UNROLL
        for (int e = 0; e < 8; ++e) {
            float& x = out[m][e / 4][e % 4];
            x = met[e / 4][e % 4] > 0.0f ? not_a_number() : x;
        }
    }
}

}  // namespace
}  // namespace sm80
}  // namespace efficient_attn
