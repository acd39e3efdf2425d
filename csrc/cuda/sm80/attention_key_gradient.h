// dK and dV on tensor cores of compute capability 8.0 and newer. With P_ij = e^(s_ij - lse_i), Z the dropout factor and
// delta_i = dO_i . O_i - dlse_i:
//
//     dV = (Z P)^T dO      dS = P (Z (dO V^T) - delta)      dK = scale dS^T Q
//
// One block of threads owns kRows keys of one key/value head and walks the queries that see some of them, in every
// query head of the group, kQueries at a time; so no sum is shared between blocks and the bits are the same in every
// run. A warp owns 16 keys and computes S^T = K Q^T and dP^T = V dO^T for them: the weights are then in the registers
// where the products with dO and Q want them. For heads of 256 two warps share their keys, each with half of the
// columns.
//
// Shared memory: K and V [kRows, kHead], then two slots of Q and dO [kQueries, kHead], lse and delta [kQueries].
#pragma once

#include "cuda/gradients.h"

namespace efficient_attn {
namespace sm80 {
namespace {

template <class T_, int kHead_, bool kExtras_>
struct KeyGradient {
    using T = T_;
    static constexpr int kHead = kHead_;
    static constexpr bool kExtras = kExtras_;
    static constexpr int kColumnParts = kHead == 256 ? 2 : 1,
                         kColumns = kHead / 8 / kColumnParts;  // columns in units of 8
    static constexpr int kRows = kHead == 64 ? 128 : kGradientRows, kQueries = 32;
    static constexpr int kWarps = kRows / 16 * kColumnParts, kThreads = kWarps * kWarp;
    static constexpr int kBlocksAtOnce = kWarps == 4 ? 2 : 1;

    static constexpr uint32_t kKey = 0, kValue = kRows * kHead * 2, kSlots = 2 * kValue;
    static constexpr uint32_t kTileBytes = kQueries * kHead * 2, kSlotBytes = 2 * kTileBytes;
    static constexpr uint32_t kRowSums = kSlots + 2 * kSlotBytes;  // lse and delta of each slot
    static constexpr uint32_t kSharedBytes = kRowSums + 2 * 2 * kQueries * 4;

    float dk[1][kColumns][4], dv[1][kColumns][4];

    // The first row and column (in units of 8) of this warp.
    static EA_DEVICE int first_row() { return thread_index() / kWarp / kColumnParts * 16; }
    static EA_DEVICE int first_column() { return thread_index() / kWarp % kColumnParts * kColumns; }
};

template <class G>
EA_DEVICE void load_queries(const KernelParams& p, int b, int h, const Step& step, int slot) {
    const AttentionParams& c = p.call;
    const uint32_t base = G::kSlots + slot * G::kSlotBytes;
    load_tile<G::kQueries, G::kHead, G::kThreads>(base, head_pointer(c.query, b, h), c.query.row_stride, step.first,
                                                  step.end, static_cast<int>(c.D), p.query_aligned);
    load_tile<G::kQueries, G::kHead, G::kThreads>(base + G::kTileBytes, head_pointer(c.grad_out, b, h),
                                                  c.grad_out.row_stride, step.first, step.end, static_cast<int>(c.Dv),
                                                  p.grad_out_aligned);
    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp, i = step.first + lane;
    static_assert(G::kQueries == kWarp, "a lane loads a row's sums");
    if (warp >= 2) return;  // warp 0: lse, warp 1: delta
    const int64_t place = (static_cast<int64_t>(b) * c.Hq + h) * c.Nq + (i < step.end ? i : 0);
    const float* source = warp == 0 ? static_cast<const float*>(c.lse) : p.delta;
    copy_async_32(G::kRowSums + (slot * 2 + warp) * G::kQueries * 4 + lane * 4, source + place, i < step.end);
}

// Walks the queries. Reading kMarks: weights are 1 for visible pairs, and dk and dv count the NaN and infinities that a
// key is seen by.
template <class G, bool kSafe>
EA_DEVICE void gather(G& g, const KernelParams& p, const Place& at, Reading reading) {
    using T = typename G::T;
    constexpr int kN = G::kQueries / 8;
    const AttentionParams& c = p.call;
    const int lane = thread_index() % kWarp, warp_row = G::first_row(), row = at.lines.begin + warp_row + lane / 4;
    const bool biased = G::kExtras && c.bias.data, marks = kSafe && reading == kMarks;
    const Span alive{at.lines.begin, smaller(at.lines.end, key_count(p, at.b))};
    const bool active = at.lines.begin + warp_row < alive.end;
    Reach seen = reach(at.lines.begin, at.lines.end - 1, -p.high, -p.low, static_cast<int>(c.Nq));
    if (alive.end <= alive.begin) seen.any.end = seen.any.begin;
    clear(g.dk);
    clear(g.dv);

    GroupWalk<G::kQueries> walk(p, at.b, at.h, at.lines.begin, seen.any);
    HeadStep next;
    bool more = walk.next(p, next);
    if (kSafe) block_sync();  // the pass before may still be reading what is loaded now
    if (more) {
        load_tile<G::kRows, G::kHead, G::kThreads>(G::kKey, head_pointer(c.key, at.b, at.h), c.key.row_stride,
                                                   alive.begin, alive.end, static_cast<int>(c.D), p.key_aligned);
        load_tile<G::kRows, G::kHead, G::kThreads>(G::kValue, head_pointer(c.value, at.b, at.h), c.value.row_stride,
                                                   alive.begin, alive.end, static_cast<int>(c.Dv), p.value_aligned);
        load_queries<G>(p, at.b, next.head, next, 0);
        copy_async_commit();
    }
    for (int slot = 0; more; slot ^= 1) {
        const HeadStep step = next;
        more = walk.next(p, next);
        await_slot();
        if (more) {
            load_queries<G>(p, at.b, next.head, next, slot ^ 1);
            copy_async_commit();
        }
        if (!active) continue;
        const uint32_t queries = G::kSlots + slot * G::kSlotBytes, grad_out = queries + G::kTileBytes;
        const uint32_t sums = G::kRowSums + slot * 2 * G::kQueries * 4;
        const int column = step.first + lane % 4 * 2;
        const bool full = sight_of(seen, step, G::kQueries).all && alive.end == at.lines.end;
        float s[1][kN][4];
        clear(s);
        if (!marks) multiply_transposed<T, G::kHead>(s, G::kKey, warp_row, queries, lane);
        if (G::kExtras) scale_by(s, p.score_scale);
        if (!full || biased) hide_transposed(s, p, step, row, alive, -p.high, -p.low, lane);
        if (biased) add_bias<T, false>(s, p, at.b, step.head, row, column, !marks);
        if (marks) {
            visible_ones(s);
            multiply<T, G::kHead, kSafe>(g.dv, s, grad_out, G::first_column() / 2, reading, lane);
            multiply<T, G::kHead, kSafe>(g.dk, s, queries, G::first_column() / 2, reading, lane);
            continue;
        }
        float dp[1][kN][4];
        clear(dp);
        multiply_transposed<T, G::kHead>(dp, G::kValue, warp_row, grad_out, lane);
        EA_UNROLL
        for (int n = 0; n < kN; ++n) {
            const Words2 lse = load_shared_64(sums + n * 32 + lane % 4 * 8);
            const float shift[2] = {weight_shift(as_float(lse.x)), weight_shift(as_float(lse.y))};
            EA_UNROLL
            for (int e = 0; e < 4; ++e) {
                const bool hidden = kSafe && s[0][n][e] == -infinity();  // even from a query whose lse is NaN
                const float unit = G::kExtras ? 1.0f : p.score_scale;
                s[0][n][e] = hidden ? 0.0f : power_of_2(multiply_add_scalar(s[0][n][e], unit, -shift[e % 2]));
            }
        }
        uint32_t kept = 0xFFFFFFFFu;
        if constexpr (G::kExtras) {
            if (c.dropout_p > 0) {
                kept = draw_kept<false, 1, kN>(p, at.b, step.head, row, column);
                drop(dp, kept);
                scale_by(dp, p.keep_scale);
            }
        }
        EA_UNROLL
        for (int n = 0; n < kN; ++n) {
            const Words2 words = load_shared_64(sums + G::kQueries * 4 + n * 32 + lane % 4 * 8);
            const float delta[2] = {as_float(words.x), as_float(words.y)};
            EA_UNROLL
            for (int e = 0; e < 4; ++e) dp[0][n][e] = score_gradient(s[0][n][e], dp[0][n][e], delta[e % 2]);
        }
        if constexpr (G::kExtras) drop(s, kept);
        multiply<T, G::kHead, kSafe>(g.dv, s, grad_out, G::first_column() / 2, reading, lane);
        multiply<T, G::kHead, kSafe>(g.dk, dp, queries, G::first_column() / 2, reading, lane);
    }
}

template <class G>
EA_DEVICE void store_key_gradients(G& g, const KernelParams& p, const Place& at) {
    const int lane = thread_index() % kWarp, warp_row = G::first_row();
    block_sync();  // results pass through the tiles of K and V
    if (at.lines.begin + warp_row >= at.lines.end) return;
    scale_by(g.dk, p.scale);
    scale_by(g.dv, p.keep_scale);
    store_rows<typename G::T, G::kHead>(g.dk, G::kKey, head_pointer(p.call.dk, at.b, at.h), p.call.dk.row_stride,
                                        at.lines.begin, warp_row, at.lines.end, G::first_column(),
                                        static_cast<int>(p.call.D), p.dk_aligned, lane);
    store_rows<typename G::T, G::kHead>(g.dv, G::kValue, head_pointer(p.call.dv, at.b, at.h), p.call.dv.row_stride,
                                        at.lines.begin, warp_row, at.lines.end, G::first_column(),
                                        static_cast<int>(p.call.Dv), p.dv_aligned, lane);
}

template <class G>
EA_DEVICE Place key_place(const KernelParams& p, int64_t index) {
    const Tiling tiles = tiling<G::kRows>(p.call.mask.indptr != nullptr, static_cast<int>(p.call.mask.block_k));
    const int count = ceil_div(p.call.Nk, tiles.block) * tiles.tiles_per_block;
    const int64_t head = index / count;  // under a causal mask the first tiles are the longest
    return {static_cast<int>(head / p.call.Hkv), static_cast<int>(head % p.call.Hkv),
            tiles.lines(static_cast<int>(index % count), static_cast<int>(p.call.Nk))};
}

// Grid: a block of threads for each tile. p.flags: where to say which tiles are suspicious, or null.
template <class G>
EA_KERNEL(G::kThreads, G::kBlocksAtOnce)
attention_key_gradient(EA_PARAMETER KernelParams p) {
    const Place at = key_place<G>(p, block_index());
    bool suspect = false;
    if (at.lines.begin < at.lines.end) {
        G g;
        gather<G, false>(g, p, at, kAsIs);
        const int row = at.lines.begin + G::first_row() + thread_index() % kWarp / 4;
        suspect = suspicious(g.dk, row, at.lines.end) || suspicious(g.dv, row, at.lines.end);
        store_key_gradients(g, p, at);
    }
    write_flag(p, suspect);
}

// The suspicious tiles again, as in the forward. Grid: any.
template <class G>
EA_KERNEL(G::kThreads, 1)
attention_key_gradient_safe(EA_PARAMETER KernelParams p, int64_t tiles) {
    each_flagged(p, tiles, [&](int64_t index) {
        const Place at = key_place<G>(p, index);
        G g;
        EA_KEEP_LOOP
        for (int pass = kFinite; pass <= kMarks; ++pass) {
            gather<G, true>(g, p, at, static_cast<Reading>(pass));
            if (pass == kFinite) {
                store_key_gradients(g, p, at);
                continue;
            }
            const int lane = thread_index() % kWarp, row = at.lines.begin + G::first_row() + lane / 4;
            const int column = G::first_column() * 8 + lane % 4 * 2;
            store_marks<typename G::T>(g.dk, head_pointer(p.call.dk, at.b, at.h), p.call.dk.row_stride, row,
                                       at.lines.end, column, p.call.D);
            store_marks<typename G::T>(g.dv, head_pointer(p.call.dv, at.b, at.h), p.call.dv.row_stride, row,
                                       at.lines.end, column, p.call.Dv);
        }
    });
}

}  // namespace
}  // namespace sm80
}  // namespace efficient_attn
