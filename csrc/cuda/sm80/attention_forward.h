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
    static constexpr int kRows = kForwardRows, kKeys = kHead == 64 && !kExtras ? 64 : 32;
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
    load_tile<F::kKeys, F::kHead, F::kThreads>(base, head_pointer(c.key, at.b, kv), c.key.row_stride, step.first,
                                               step.end, static_cast<int>(c.D), p.key_aligned);
    load_tile<F::kKeys, F::kHead, F::kThreads>(base + F::kTileBytes, head_pointer(c.value, at.b, kv),
                                               c.value.row_stride, step.first, step.end, static_cast<int>(c.Dv),
                                               p.value_aligned);
}

template <class F>
EA_DEVICE void online_softmax_update(F& f, float (&s)[F::kM][F::kKeys / 8][4], float unit) {
    float fade[F::kM][2];
    if (!warp_any(online_softmax(s, f.top, f.total, fade, unit))) return;  // most tiles after the first few
    each(f.out, [&](float& x, int m, int, int e) { x *= fade[m][e / 2]; });
}

// Walks the keys. Reading kMarks: weights are 1 for visible pairs and out counts the NaN and infinities that a row
// sees.
template <class F, bool kSafe>
EA_DEVICE void attend(F& f, const KernelParams& p, const Place& at, Reading reading, int part) {
    using T = typename F::T;
    const int lane = thread_index() % kWarp, warp_row = first_row<F>(part);
    const int row = at.lines.begin + warp_row + lane / 4;
    const bool active = at.lines.begin + warp_row < at.lines.end, biased = F::kExtras && p.call.bias.data;
    const bool marks = kSafe && reading == kMarks;
    const Reach sees = reach(at.lines.begin, at.lines.end - 1, p.low, p.high, key_count(p, at.b));

    clear(f.out);
    EA_UNROLL
    for (int r = 0; r < 2 * F::kM; ++r) f.top[r / 2][r % 2] = -infinity(), f.total[r / 2][r % 2] = 0.0f;

    Walk<F::kKeys, kByQuery> walk(p, at.b, at.h, at.lines.begin, sees.any);
    Step next;
    bool more = walk.next(p, next);
    if (kSafe) block_sync();  // the pass before may still be reading what is loaded now
    if (more) {
        if (!marks)
            load_tile<F::kRows, F::kHead, F::kThreads>(F::kQuery, head_pointer(p.call.query, at.b, at.h),
                                                       p.call.query.row_stride, at.lines.begin, at.lines.end,
                                                       static_cast<int>(p.call.D), p.query_aligned);
        load_slot<F>(p, at, next, 0);
        copy_async_commit();
    }
    for (int slot = 0; more; slot ^= 1) {
        const Step step = next;
        more = walk.next(p, next);
        await_slot();
        if (more) {
            load_slot<F>(p, at, next, slot ^ 1);
            copy_async_commit();
        }
        if (!active) continue;
        const uint32_t keys = F::kSlots + slot * F::kSlotBytes, values = keys + F::kTileBytes;
        float s[F::kM][F::kKeys / 8][4];
        clear(s);
        if (!marks) multiply_transposed<T, F::kHead>(s, F::kQuery, warp_row, keys, lane);
        if (F::kExtras) scale_by(s, p.score_scale);
        const int column = step.first + lane % 4 * 2;
        if (!sight_of(sees, step, F::kKeys).all || biased) hide(s, p, step, row, at.lines, p.low, p.high, lane);
        if (biased) add_bias<T, true>(s, p, at.b, at.h, row, column, !marks);
        if (marks) {
            visible_ones(s);
        } else {
            online_softmax_update(f, s, F::kExtras ? 1.0f : p.score_scale);
            if constexpr (F::kExtras) {
                if (p.call.dropout_p > 0) drop(s, draw_kept<true, F::kM, F::kKeys / 8>(p, at.b, at.h, row, column));
            }
        }
        multiply<T, F::kHead, kSafe>(f.out, s, values, 0, reading, lane);
    }
}

// Divides by the sums and writes out and lse.
template <class F>
EA_DEVICE void store_output(F& f, const KernelParams& p, const Place& at, int part) {
    const int lane = thread_index() % kWarp, warp_row = first_row<F>(part);
    if (at.lines.begin + warp_row >= at.lines.end) return;
    float factor[F::kM][2];
    finish_softmax(f.top, f.total, factor, p, at, at.lines.begin + warp_row + lane / 4, lane);
    each(f.out, [&](float& x, int m, int, int e) { x *= factor[m][e / 2]; });
    store_rows<typename F::T, F::kHead>(f.out, F::kQuery, head_pointer(p.call.out, at.b, at.h), p.call.out.row_stride,
                                        at.lines.begin, warp_row, at.lines.end, 0, static_cast<int>(p.call.Dv),
                                        p.out_aligned, lane);
}

// Grid: a block of threads for each tile. p.flags: where to say which tiles are suspicious, or null.
template <class F>
EA_KERNEL(F::kThreads, F::kBlocksAtOnce)
attention_forward(EA_PARAMETER KernelParams p) {
    const Place at = query_place<F::kRows>(p, block_index());
    bool suspect = false;
    if (at.lines.begin < at.lines.end) {
        F f;
        attend<F, false>(f, p, at, kAsIs, 0);
        suspect = suspicious(f.out, at.lines.begin + first_row<F>(0) + thread_index() % kWarp / 4, at.lines.end);
        store_output(f, p, at, 0);
    }
    write_flag(p, suspect);
}

// The suspicious tiles again; F has a warp's rows in parts of 16. A weight of zero does not silence a NaN: so zeros
// take the place of what is not finite, and then the rows that do see such a value are marked. Grid: any.
template <class F>
EA_KERNEL(F::kThreads, 1)
attention_forward_safe(EA_PARAMETER KernelParams p, int64_t tiles) {
    each_flagged(p, tiles, [&](int64_t index) {
        const Place at = query_place<F::kRows>(p, index);
        for (int part = 0; part < F::kParts; ++part) {
            F f;
            attend<F, true>(f, p, at, kFinite, part);
            store_output(f, p, at, part);
            attend<F, true>(f, p, at, kMarks, part);
            const int lane = thread_index() % kWarp;
            store_marks<typename F::T>(f.out, head_pointer(p.call.out, at.b, at.h), p.call.out.row_stride,
                                       at.lines.begin + first_row<F>(part) + lane / 4, at.lines.end, lane % 4 * 2,
                                       p.call.Dv);
        }
    });
}

}  // namespace
}  // namespace sm80
}  // namespace efficient_attn
