// dQ on tensor cores of compute capability 9.0 (wgmma, TMA); what is computed is said in sm80's file of the same name.
//
// A block of threads owns kRows queries of one head at a time, a group of warps 64 of them, and walks the keys that
// some of them see, kKeys at a time. A group computes S = Q K^T and dP = dO V^T from shared memory; dS is then in the
// registers where the product with K wants it.
//
// Shared memory: Q and dO [kRows, kHead]; kStages of K and V [kKeys, kHead]; the message of each stage; barriers.
#pragma once

#include "cuda/sm80/attention_query_gradient.h"
#include "cuda/sm90/gradients.h"

namespace efficient_attn {
namespace sm90 {
namespace {

template <class T_, int kHead_>
struct QueryGradient {
    using T = T_;
    static constexpr int kHead = kHead_;
    static constexpr int kRows = kGroups * kGroupRows, kKeys = kHead == 256 ? 32 : 64, kStages = 3, kN = kKeys / 8;

    static constexpr uint32_t kGroupTile = kGroupRows * kHead * 2;
    static constexpr uint32_t kQuery = 0, kGradOut = kRows * kHead * 2, kSlots = 2 * kGradOut;
    static constexpr uint32_t kTileBytes = kKeys * kHead * 2, kSlotBytes = 2 * kTileBytes;
    static constexpr uint32_t kMessages = kSlots + kStages * kSlotBytes;
    static constexpr uint32_t kStageRing = kMessages + kStages * kMessageBytes,
                              kTileRing = kStageRing + Ring<kStages>::kBytes;
    static constexpr uint32_t kSharedBytes = kTileRing + Ring<1>::kBytes;

    // The group's own rows of Q and dO.
    static EA_DEVICE uint32_t query() { return kQuery + group_index() * kGroupTile; }
    static EA_DEVICE uint32_t grad_out() { return kGradOut + group_index() * kGroupTile; }
};

// The tile of queries with number `index` of the grid's.
template <class G>
EA_DEVICE Place long_query_place(const KernelParams& p, int index) {
    const Tiling tiles = tiling<G::kRows>(p.call.mask.indptr != nullptr, static_cast<int>(p.call.mask.block_q));
    const TilePlace at = longest_first(index, static_cast<int>(p.call.B * p.call.Hq),
                                       ceil_div(p.call.Nq, tiles.block) * tiles.tiles_per_block, true);
    return {at.head / static_cast<int>(p.call.Hq), at.head % static_cast<int>(p.call.Hq),
            tiles.lines(at.tile, static_cast<int>(p.call.Nq))};
}

// The warp that loads.
template <class G>
EA_DEVICE void load_for_queries(const KernelParams& p, const TensorMap& query, const TensorMap& key,
                                const TensorMap& value, const TensorMap& grad_out, int tiles) {
    const int lane = thread_index() % kWarp;
    Turn<G::kStages> turn;
    Turn<1> tile_turn;
    for (int index = first_tile(); index < tiles; index += tile_stride()) {
        const Place at = long_query_place<G>(p, index);
        if (at.lines.begin >= at.lines.end) continue;
        const Reach sees = reach(at.lines.begin, at.lines.end - 1, p.low, p.high, key_count(p, at.b));
        Walk<G::kKeys, kByQuery> walk(p, at.b, at.h, at.lines.begin, sees.any);

        Ring<1>::wait_empty(G::kTileRing, tile_turn);
        if (lane == 0) {
            const uint32_t full = Ring<1>::full(G::kTileRing, 0);
            barrier_arrive_expect(full, 2 * G::kRows * G::kHead * 2);
            for (int part = 0; part < kGroups; ++part) {
                const uint32_t offset = part * G::kGroupTile;
                const int row = at.lines.begin + part * kGroupRows;
                load_panels<kGroupRows, G::kHead>(G::kQuery + offset, query, full, row, at.h, at.b);
                load_panels<kGroupRows, G::kHead>(G::kGradOut + offset, grad_out, full, row, at.h, at.b);
            }
        }
        tile_turn.advance();

        Step next{0, 0, -1, 0};
        bool more = walk.next(p, next);
        do {
            const Step step = next;
            more = more && walk.next(p, next);
            Ring<G::kStages>::wait_empty(G::kStageRing, turn);
            post(G::kMessages + turn.stage * kMessageBytes, step, !more, at.h);
            warp_sync();
            if (lane == 0) {
                const bool loads = step.first < step.end;
                const uint32_t slot = G::kSlots + turn.stage * G::kSlotBytes;
                const uint32_t full = Ring<G::kStages>::full(G::kStageRing, turn.stage);
                barrier_arrive_expect(full, loads ? G::kSlotBytes : 0);
                if (loads) {
                    const int kv = at.h / p.group;
                    load_panels<G::kKeys, G::kHead>(slot, key, full, step.first, kv, at.b);
                    load_panels<G::kKeys, G::kHead>(slot + G::kTileBytes, value, full, step.first, kv, at.b);
                }
            }
            turn.advance();
        } while (more);
    }
}

// Adds a step to dQ of a group.
template <class G>
EA_DEVICE void add_keys(float (&dq)[1][G::kHead / 8][4], const KernelParams& p, const Step& step, Span rows,
                        const RowSums& sums, bool full, int stage) {
    using T = typename G::T;
    const int lane = thread_index() % kWarp, row = rows.begin + group_warp_row() + lane / 4;
    const uint32_t keys = G::kSlots + stage * G::kSlotBytes, values = keys + G::kTileBytes;
    const uint32_t visible =
        full ? 0
             : visible_bits<G::kN>([&](float (&s)[1][G::kN][4]) { hide(s, p, step, row, rows, p.low, p.high, lane); });
    float s[1][G::kN][4], dp[1][G::kN][4];
    group_fence(s[0], dp[0]);
    group_multiply_transposed<T, G::kHead, G::kKeys>(s[0], G::query(), keys);
    group_multiply_transposed<T, G::kHead, G::kKeys>(dp[0], G::grad_out(), values);
    group_commit();
    group_wait<0>(s[0], dp[0]);
    if (!full) hide_by<G::kN>(s, visible);
    each(dp, [&](float& x, int m, int n, int e) {
        const float weight = power_of_2(multiply_add_scalar(s[m][n][e], p.score_scale, -sums.shift[e / 2]));
        x = score_gradient(weight, x, sums.delta[e / 2]);
    });
    uint32_t gradients[G::kN / 2][4];
    pack_a<T>(gradients, dp[0]);
    group_fence(gradients, dq[0]);
    group_multiply_rows<T, G::kHead, G::kKeys>(dq[0], gradients, keys);
    group_commit();
    group_wait<0>(dq[0], gradients);
}

// The groups that multiply.
template <class G>
EA_DEVICE void gather_keys(const KernelParams& p, int tiles) {
    constexpr int kFlagRows = sm80::QueryGradient<typename G::T, G::kHead, false, 1>::kRows;
    static_assert(kFlagRows == kGroupRows, "a group has a flag of its own");
    const bool listed = p.call.mask.indptr != nullptr;
    Turn<G::kStages> turn;
    Turn<1> tile_turn;
    for (int index = first_tile(); index < tiles; index += tile_stride()) {
        const Place at = long_query_place<G>(p, index);
        const int first = at.lines.begin + group_index() * kGroupRows;
        const Span rows{first, smaller(first + kGroupRows, at.lines.end)};
        bool suspect = false;
        if (at.lines.begin < at.lines.end) {
            const int row = first + group_warp_row() + thread_index() % kWarp / 4;
            const RowSums sums = load_sums(p, at.b, at.h, row, rows.end);
            const Reach sees = reach(rows.begin, rows.end - 1, p.low, p.high, key_count(p, at.b));
            float dq[1][G::kHead / 8][4];
            clear(dq);
            Ring<1>::wait_full(G::kTileRing, tile_turn);
            bool last;
            do {
                Ring<G::kStages>::wait_full(G::kStageRing, turn);
                const Message message = read_message(G::kMessages + turn.stage * kMessageBytes);
                const Sight sight = sight_of(sees, message.step, G::kKeys);
                if (sight.any && rows.begin < rows.end)
                    add_keys<G>(dq, p, message.step, rows, sums, sight.all, turn.stage);
                Ring<G::kStages>::release(G::kStageRing, turn);
                turn.advance();
                last = message.last;
            } while (!last);
            named_sync(group_barrier(), kGroupThreads);  // results pass through the group's tile of Q
            suspect = suspicious(dq, row, rows.end);
            scale_by(dq, p.scale);
            store_panels<typename G::T, G::kHead>(dq, G::query(), head_pointer(p.call.dq, at.b, at.h),
                                                  p.call.dq.row_stride, rows.begin, rows.end,
                                                  static_cast<int>(p.call.D), p.dq_aligned);
            async_proxy_fence();
            Ring<1>::release(G::kTileRing, tile_turn);
            tile_turn.advance();
        }
        store_flag<false>(
            p.flags,
            flag_place<kFlagRows>(listed, static_cast<int>(p.call.mask.block_q), static_cast<int>(p.call.Nq),
                                  at.b * p.call.Hq + at.h, at.lines.begin, first, true),
            suspect);
    }
}

// Grid: any; `tiles` of them in all. p.flags: where to say which tiles are suspicious, or null.
template <class G>
EA_KERNEL(kBlockThreads, 1)
attention_query_gradient(EA_PARAMETER KernelParams p, EA_PARAMETER TensorMap query, EA_PARAMETER TensorMap key,
                         EA_PARAMETER TensorMap value, EA_PARAMETER TensorMap grad_out, int tiles) {
    if constexpr (!kHopper) return;
    if (thread_index() == 0) {
        Ring<G::kStages>::init(G::kStageRing, 1, kMultiplyingWarps);
        Ring<1>::init(G::kTileRing, 1, kMultiplyingWarps);
        barrier_init_fence();
    }
    block_sync();
    if (group_index() < 0) {
        registers_give<kLoadingRegisters>();
        if (thread_index() < kWarp) load_for_queries<G>(p, query, key, value, grad_out, tiles);
    } else {
        registers_take<kMultiplyingRegisters>();
        gather_keys<G>(p, tiles);
    }
}

}  // namespace
}  // namespace sm90
}  // namespace efficient_attn
