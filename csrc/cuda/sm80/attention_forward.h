// Attention forward on tensor cores of compute capability 8.0 and newer (mma.sync, cp.async).
//
//     s_ij = scale q_i . k_j + bias_ij      out_i = sum_j Z_ij e^(s_ij - lse_i) v_j      lse_i = log sum_j e^(s_ij)
//
// with the online softmax of Milakov and Gimelshein (2018), tiled as in FlashAttention-2 (Dao, 2023). One block of
// threads owns kRows queries of one head and walks the keys that some of them see, kKeys at a time; a warp owns 16 kM
// of the rows. Keys and values are double-buffered: while a tile is worked off, the next one is on its way, and a tile
// costs one barrier. The same loop serves dense attention, windows and lists of blocks.
//
// Shared memory: Q [kRows, kHead], then two slots of K and V [kKeys, kHead]. D and Dv are padded to kHead with zeros.
#pragma once

#include "cuda/scores.h"

namespace efficient_attn {
namespace sm80 {
namespace {

// kExtras: with bias or dropout, or a scale that is not positive. kParts: a warp works off its rows in so many parts,
// one pass over the keys each.
template <class T_, int kHead_, bool kExtras_, int kParts_ = 1>
struct Forward {
    using T = T_;
    static constexpr int kHead = kHead_;
    static constexpr bool kExtras = kExtras_;
    static constexpr int kRows = 128, kKeys = kHead == 64 && !kExtras ? 64 : 32;
    static constexpr int kWarps = kHead == 256 || kExtras ? 8 : 4, kThreads = kWarps * kWarp;
    static constexpr int kWarpRows = kRows / kWarps, kParts = kParts_, kM = kWarpRows / kParts / 16;
    using InParts = Forward<T, kHead, kExtras, kWarpRows / 16>;
    static constexpr int kBlocksAtOnce = kWarps == 4 ? 2 : 1;
    static constexpr uint32_t kQuery = 0, kSlots = kRows * kHead * 2;
    static constexpr uint32_t kTileBytes = kKeys * kHead * 2, kSlotBytes = 2 * kTileBytes;
    static constexpr uint32_t kSharedBytes = kSlots + 2 * kSlotBytes;

    float out[kM][kHead / 8][4];     // not yet divided by `total`
    float top[kM][2], total[kM][2];  // of rows g and g + 8: maximum in units of log2; this thread's part of the sum
};

// The first row of this warp's part in the tile.
template <class F>
EA_DEVICE int first_row(int part) {
    return thread_index() / kWarp * F::kWarpRows + part * 16 * F::kM;
}

template <class F>
EA_DEVICE void load_slot(const KernelParams& p, const Place& at, const Step& step, int slot) {
    const uint32_t base = F::kSlots + slot * F::kSlotBytes;
    const AttentionParams& c = p.call;
    const int kv = at.h / p.group;
    load_tile<F::kKeys, F::kHead, F::kThreads>(base, row_pointer(c.key, at.b, kv, 0), c.key.row_stride, step.first,
                                               step.end, static_cast<int>(c.D), p.key_aligned);
    load_tile<F::kKeys, F::kHead, F::kThreads>(base + F::kTileBytes, row_pointer(c.value, at.b, kv, 0),
                                               c.value.row_stride, step.first, step.end, static_cast<int>(c.Dv),
                                               p.value_aligned);
}

// s = Q K^T of the warp's rows.
template <class F>
EA_DEVICE void score(float (&s)[F::kM][F::kKeys / 8][4], uint32_t keys, int row, int lane) {
    const uint32_t a_lane = lane_down<F::kHead>(F::kQuery + row * F::kHead * 2, lane);
    const uint32_t b_lane = lane_across<F::kHead>(keys, lane);
    EA_UNROLL
    for (int k = 0; k < F::kHead / 16; ++k) {
        uint32_t a[F::kM][4];
        EA_UNROLL
        for (int m = 0; m < F::kM; ++m) load_a<F::kHead>(a[m], a_lane, m * 16, k);
        EA_UNROLL
        for (int n = 0; n < F::kKeys / 16; ++n) {
            uint32_t b[4];
            load_b<F::kHead>(b, b_lane, n * 16, k);
            EA_UNROLL
            for (int m = 0; m < F::kM; ++m) {
                multiply_add<typename F::T>(s[m][2 * n], a[m], b[0], b[1]);
                multiply_add<typename F::T>(s[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// Turns scores (times `unit`: log2) into weights e^(s - top) and fades what was summed before.
template <class F>
EA_DEVICE void online_softmax_update(F& f, float (&s)[F::kM][F::kKeys / 8][4], float unit) {
    float fade[F::kM][2];
    bool fades = false;
    EA_UNROLL
    for (int m = 0; m < F::kM; ++m) EA_UNROLL
    for (int half = 0; half < 2; ++half) {
        float best = -infinity();
        EA_UNROLL
        for (int n = 0; n < F::kKeys / 8; ++n) best = fmaxf(best, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        const float top = fmaxf(f.top[m][half], quad_maximum(best) * unit);
        const float shift = top == -infinity() ? 0.0f : top;  // a row without a visible key so far
        fade[m][half] = power_of_2(f.top[m][half] - shift);
        fades |= fade[m][half] != 1.0f;
        float sum = 0.0f;
        EA_UNROLL
        for (int n = 0; n < F::kKeys / 8; ++n) EA_UNROLL
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
            s[m][n][e] = power_of_2(multiply_add_scalar(s[m][n][e], unit, -shift));
            sum += s[m][n][e];
        }
        f.top[m][half] = top;
        f.total[m][half] = f.total[m][half] * fade[m][half] + sum;
    }
    if (!warp_any(fades)) return;  // most tiles after the first few change no maximum
    EA_UNROLL
    for (int m = 0; m < F::kM; ++m) EA_UNROLL
    for (int n = 0; n < F::kHead / 8; ++n) EA_UNROLL
    for (int e = 0; e < 4; ++e) f.out[m][n][e] *= fade[m][e / 2];
}

// Sets the weights of dropped pairs to 0.
template <class F>
EA_DEVICE void drop(float (&s)[F::kM][F::kKeys / 8][4], const KernelParams& p, const Place& at, int row, int column) {
    const uint64_t seed = dropout_seed(p);
    EA_UNROLL
    for (int m = 0; m < F::kM; ++m) EA_UNROLL
    for (int n = 0; n < F::kKeys / 8; ++n) {
        bool keep[4];
        draw_kept(keep, seed, p.threshold, at.b, at.h, row + m * 16, column + n * 8);
        EA_UNROLL
        for (int e = 0; e < 4; ++e) s[m][n][e] = keep[e] ? s[m][n][e] : 0.0f;
    }
}

// out += P V, V read as `reading` says where kSafe.
template <class F, bool kSafe>
EA_DEVICE void accumulate(F& f, const float (&s)[F::kM][F::kKeys / 8][4], uint32_t values, Reading reading, int lane) {
    const uint32_t b_lane = lane_down<F::kHead>(values, lane);
    uint32_t a[F::kM][F::kKeys / 16][4];
    EA_UNROLL
    for (int m = 0; m < F::kM; ++m) pack_a<typename F::T>(a[m], s[m]);
    EA_UNROLL
    for (int k = 0; k < F::kKeys / 16; ++k) EA_UNROLL
    for (int n = 0; n < F::kHead / 16; ++n) {
        uint32_t b[4];
        load_b_transposed<F::kHead>(b, b_lane, k * 16, n);
        EA_UNROLL
        for (int r = 0; r < 4; ++r)
            if (kSafe) b[r] = read_as<typename F::T>(b[r], reading);
        EA_UNROLL
        for (int m = 0; m < F::kM; ++m) {
            multiply_add<typename F::T>(f.out[m][2 * n], a[m][k], b[0], b[1]);
            multiply_add<typename F::T>(f.out[m][2 * n + 1], a[m][k], b[2], b[3]);
        }
    }
}

// Walks the keys. Reading kMarks: weights are 1 for visible pairs and out counts the NaN and infinities that a row
// sees.
template <class F, bool kSafe>
EA_DEVICE void attend(F& f, const KernelParams& p, const Place& at, Reading reading, int part) {
    using T = typename F::T;
    const int lane = thread_index() % kWarp, warp_row = first_row<F>(part);
    const int row = at.lines.begin + warp_row + lane / 4;
    const bool active = at.lines.begin + warp_row < at.lines.end, biased = F::kExtras && p.call.bias.data;
    const Reach sees = reach(at.lines.begin, at.lines.end - 1, p.low, p.high, key_count(p, at.b));

    clear(f.out);
    EA_UNROLL
    for (int m = 0; m < F::kM; ++m) EA_UNROLL
    for (int half = 0; half < 2; ++half) f.top[m][half] = -infinity(), f.total[m][half] = 0.0f;

    Walk<F::kKeys, kByQuery> walk(p, at.b, at.h, at.lines.begin, sees.any);
    Step next;
    bool more = walk.next(p, next);
    if (kSafe) block_sync();  // the pass before may still be reading what is loaded now
    if (more) {
        if (reading != kMarks)
            load_tile<F::kRows, F::kHead, F::kThreads>(F::kQuery, row_pointer(p.call.query, at.b, at.h, 0),
                                                       p.call.query.row_stride, at.lines.begin, at.lines.end,
                                                       static_cast<int>(p.call.D), p.query_aligned);
        load_slot<F>(p, at, next, 0);
        copy_async_commit();
    }
    for (int slot = 0; more; slot ^= 1) {
        const Step step = next;
        more = walk.next(p, next);
        copy_async_wait<0>();
        block_sync();  // this slot has arrived, and every warp is done with the other one
        if (more) {
            load_slot<F>(p, at, next, slot ^ 1);
            copy_async_commit();
        }
        if (!active) continue;
        const uint32_t tile = F::kSlots + slot * F::kSlotBytes;
        float s[F::kM][F::kKeys / 8][4];
        clear(s);
        if (!kSafe || reading != kMarks) score<F>(s, tile, warp_row, lane);
        if (F::kExtras) {
            EA_UNROLL
            for (int m = 0; m < F::kM; ++m) EA_UNROLL
            for (int n = 0; n < F::kKeys / 8; ++n) EA_UNROLL
            for (int e = 0; e < 4; ++e) s[m][n][e] *= p.score_scale;
        }
        const bool full = step.tile < 0 && step.first >= sees.all.begin && step.first + F::kKeys <= sees.all.end &&
                          step.end == step.first + F::kKeys;
        if (!full || biased) hide<F::kM, F::kKeys / 8>(s, p, step, row, at.lines, p.low, p.high, lane);
        if (biased) add_bias<T, true>(s, p, at.b, at.h, row, step.first + lane % 4 * 2, !kSafe || reading != kMarks);
        if (kSafe && reading == kMarks) {
            EA_UNROLL
            for (int m = 0; m < F::kM; ++m) EA_UNROLL
            for (int n = 0; n < F::kKeys / 8; ++n) EA_UNROLL
            for (int e = 0; e < 4; ++e) s[m][n][e] = s[m][n][e] == 0.0f ? 1.0f : 0.0f;
        } else {
            online_softmax_update(f, s, F::kExtras ? 1.0f : p.score_scale);
            if (F::kExtras && p.call.dropout_p > 0) drop<F>(s, p, at, row, step.first + lane % 4 * 2);
        }
        accumulate<F, kSafe>(f, s, tile + F::kTileBytes, reading, lane);
    }
}

// Whether a row that exists holds a NaN or infinity: then one may have come from a value that the row does not see.
template <class F>
EA_DEVICE bool suspicious(const F& f, int row, int end) {
    bool found = false;
    EA_UNROLL
    for (int m = 0; m < F::kM; ++m) EA_UNROLL
    for (int n = 0; n < F::kHead / 8; ++n) EA_UNROLL
    for (int e = 0; e < 4; ++e) found |= !finite(f.out[m][n][e]) && row + m * 16 + e / 2 * 8 < end;
    return found;
}

// Divides by the sums and writes out and lse.
template <class F>
EA_DEVICE void store_results(F& f, const KernelParams& p, const Place& at, int part) {
    const int lane = thread_index() % kWarp, warp_row = first_row<F>(part);
    if (at.lines.begin + warp_row >= at.lines.end) return;
    EA_UNROLL
    for (int m = 0; m < F::kM; ++m) EA_UNROLL
    for (int half = 0; half < 2; ++half) {
        const float total = quad_sum(f.total[m][half]);
        const float factor = total == 0.0f ? 0.0f : p.keep_scale / total;
        EA_UNROLL
        for (int n = 0; n < F::kHead / 8; ++n) {
            f.out[m][n][2 * half] *= factor;
            f.out[m][n][2 * half + 1] *= factor;
        }
        const int row = at.lines.begin + warp_row + m * 16 + half * 8 + lane / 4;
        if (lane % 4 == 0 && row < at.lines.end) {
            const int64_t head = static_cast<int64_t>(at.b) * p.call.Hq + at.h;
            const float lse = (f.top[m][half] + logarithm_2(total)) * 0.6931471805599453f;
            store_global(static_cast<float*>(p.call.lse) + head * p.call.Nq + row, total == 0.0f ? -infinity() : lse);
        }
    }
    uint16_t* base =
        static_cast<uint16_t*>(p.call.out.data) + at.b * p.call.out.batch_stride + at.h * p.call.out.head_stride;
    store_rows<typename F::T>(f.out, F::kQuery, base, p.call.out.row_stride, at.lines.begin, warp_row, at.lines.end,
                              static_cast<int>(p.call.Dv), p.out_aligned, lane);
}

// After store_results: NaN where a row sees a value that is NaN or infinite.
template <class F>
EA_DEVICE void store_marks(const F& f, const KernelParams& p, const Place& at, int part) {
    const int lane = thread_index() % kWarp, row = at.lines.begin + first_row<F>(part) + lane / 4;
    const TensorView& out = p.call.out;
    uint16_t* base = static_cast<uint16_t*>(out.data) + at.b * out.batch_stride + at.h * out.head_stride;
    EA_UNROLL
    for (int m = 0; m < F::kM; ++m) EA_UNROLL
    for (int n = 0; n < F::kHead / 8; ++n) EA_UNROLL
    for (int e = 0; e < 4; ++e) {
        const int i = row + m * 16 + e / 2 * 8, d = n * 8 + lane % 4 * 2 + e % 2;
        if (f.out[m][n][e] > 0.0f && i < at.lines.end && d < p.call.Dv)
            store_global(base + i * out.row_stride + d,
                         static_cast<uint16_t>(pack<typename F::T>(not_a_number(), 0.0f)));
    }
}

// The tile that block number `index` of the grid owns.
template <class F>
EA_DEVICE Place place(const KernelParams& p, int64_t index) {
    const Tiling tiles = tiling<F::kRows>(p.call.mask.indptr != nullptr, static_cast<int>(p.call.mask.block_q));
    const int count = ceil_div(p.call.Nq, tiles.block) * tiles.tiles_per_block;
    const int64_t head = index / count;
    const int tile = count - 1 - static_cast<int>(index % count);  // under a causal mask the last are the longest
    return {static_cast<int>(head / p.call.Hq), static_cast<int>(head % p.call.Hq),
            tiles.lines(tile, static_cast<int>(p.call.Nq))};
}

// Grid: a block of threads for each tile. p.flags: where to say which tiles are suspicious, or null.
template <class F>
EA_KERNEL(F::kThreads, F::kBlocksAtOnce)
attention_forward(EA_PARAMETER KernelParams p) {
    const Place at = place<F>(p, block_index());
    bool suspect = false;
    if (at.lines.begin < at.lines.end) {
        F f;
        attend<F, false>(f, p, at, kAsIs, 0);
        suspect = suspicious(f, at.lines.begin + first_row<F>(0) + thread_index() % kWarp / 4, at.lines.end);
        store_results(f, p, at, 0);
    }
    if (!p.flags) return;
    suspect = block_any(suspect);
    if (thread_index() == 0) store_global(p.flags + block_index(), suspect ? 1 : 0);
}

// The suspicious tiles again; F has a warp's rows in parts of 16. A weight of zero does not silence a NaN: so zeros
// take the place of what is not finite, and then the rows that do see such a value are marked. Grid: any.
template <class F>
EA_KERNEL(F::kThreads, 1)
attention_forward_safe(EA_PARAMETER KernelParams p, int64_t tiles) {
    for (int64_t index = block_index(); index < tiles; index += block_count()) {
        if (load_global(p.flags + index) == 0) continue;
        const Place at = place<F>(p, index);
        for (int part = 0; part < F::kParts; ++part) {
            F f;
            attend<F, true>(f, p, at, kFinite, part);
            store_results(f, p, at, part);
            attend<F, true>(f, p, at, kMarks, part);
            store_marks(f, p, at, part);
        }
    }
}

}  // namespace
}  // namespace sm80
}  // namespace efficient_attn
