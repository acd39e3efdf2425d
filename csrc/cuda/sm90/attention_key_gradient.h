// dK and dV on tensor cores of compute capability 9.0 (wgmma, TMA); what is computed is said in sm80's file of the same
// name.
//
// A block of threads owns kRows keys of one key/value head at a time and walks the queries that see some of them, in
// every query head of the group, kQueries at a time. A group of warps computes S^T = K Q^T and dP^T = V dO^T of its 64
// keys from shared memory; the weights are then in the registers where the products with dO and Q want them. For heads
// of up to 128 each of the two groups owns its keys alone. For heads of 256 the registers of a group hold either dK or
// dV: both groups own the same 64 keys, one computes S^T and gathers dV, the other computes dP^T and gathers dK, and
// the weights go from the first to the second through shared memory.
//
// Shared memory: K and V [kRows, kHead]; kStages of Q and dO [kQueries, kHead]; the weights under way; of each stage
// the shift and delta of its queries, and its message; barriers.
#pragma once

#include "cuda/sm90/gradients.h"

namespace efficient_attn {
namespace sm90 {
namespace {

// kOnePass_: dQ too, see attention_backward.h.
template <class T_, int kHead_, bool kOnePass_ = false>
struct KeyGradient {
    using T = T_;
    static constexpr int kHead = kHead_;
    static constexpr bool kOnePass = kOnePass_, kShared = kHead == 256;  // kShared: both groups own the same keys
    static constexpr int kRows = kShared ? 64 : 128, kQueries = 64, kStages = kShared || kOnePass ? 2 : 3, kN = kQueries / 8;

    static constexpr uint32_t kGroupTile = kGroupRows * kHead * 2;
    static constexpr uint32_t kKey = 0, kValue = kRows * kHead * 2, kSlots = 2 * kValue;
    static constexpr uint32_t kTileBytes = kQueries * kHead * 2, kSlotBytes = 2 * kTileBytes;
    static constexpr uint32_t kWeights = kSlots + kStages * kSlotBytes;
    static constexpr uint32_t kGradients = kWeights + (kShared ? kGroupRows * kQueries * 4 : 0);
    static constexpr uint32_t kGradientBytes = kRows * kQueries * 2;  // dS of a step; two steps
    static constexpr uint32_t kPartial = kGradients + (kOnePass ? 2 * kGradientBytes : 0);
    static constexpr uint32_t kPartialBytes = kQueries * kPanel * 4;  // a group's part of dQ of a step
    static constexpr uint32_t kRowSums = kPartial + (kOnePass ? kGroups * kPartialBytes : 0);
    static constexpr uint32_t kRowSumBytes = 2 * kQueries * 4, kMessages = kRowSums + kStages * kRowSumBytes;
    static constexpr uint32_t kStageRing = kMessages + kStages * kMessageBytes,
                              kTileRing = kStageRing + Ring<kStages>::kBytes;
    static constexpr uint32_t kWeightRing = kTileRing + Ring<1>::kBytes;
    static constexpr uint32_t kSharedBytes = kWeightRing + Ring<1>::kBytes;

    // The group's own rows of K and V.
    static EA_DEVICE uint32_t key() { return kKey + (kShared ? 0 : group_index()) * kGroupTile; }
    static EA_DEVICE uint32_t value() { return kValue + (kShared ? 0 : group_index()) * kGroupTile; }
    static EA_DEVICE Span rows(Span lines) {
        const int begin = lines.begin + (kShared ? 0 : group_index()) * kGroupRows;
        return {begin, smaller(begin + kGroupRows, lines.end)};
    }
};

// The tile of keys with number `index` of the grid's.
template <class G>
EA_DEVICE Place key_place(const KernelParams& p, int index) {
    const Tiling tiles = tiling<G::kRows>(p.call.mask.indptr != nullptr, static_cast<int>(p.call.mask.block_k));
    const TilePlace at = longest_first(index, static_cast<int>(p.call.B * p.call.Hkv),
                                       ceil_div(p.call.Nk, tiles.block) * tiles.tiles_per_block, false);
    return {at.head / static_cast<int>(p.call.Hkv), at.head % static_cast<int>(p.call.Hkv),
            tiles.lines(at.tile, static_cast<int>(p.call.Nk))};
}

// What is taken off the scores of the queries of a step, and their delta: two words of each for a lane.
struct QuerySums {
    float shift[2], delta[2];
};

EA_DEVICE QuerySums load_query_sums(const KernelParams& p, int b, int h, const Step& step, int lane) {
    QuerySums sums;
    EA_UNROLL
    for (int k = 0; k < 2; ++k) {
        const int i = step.first + lane + k * kWarp;
        const int64_t place = (static_cast<int64_t>(b) * p.call.Hq + h) * p.call.Nq + i;
        sums.shift[k] =
            i < step.end ? weight_shift(load_global(static_cast<const float*>(p.call.lse) + place)) : infinity();
        sums.delta[k] = i < step.end ? load_global(p.delta + place) : 0.0f;
    }
    return sums;
}

// The warp that loads.
template <class G>
EA_DEVICE void load_for_keys(const KernelParams& p, const TensorMap& query, const TensorMap& key,
                             const TensorMap& value, const TensorMap& grad_out, int tiles) {
    static_assert(G::kQueries == 2 * kWarp, "a lane loads the sums of two queries");
    const int lane = thread_index() % kWarp;
    Turn<G::kStages> turn;
    Turn<1> tile_turn;
    for (int index = first_tile(); index < tiles; index += tile_stride()) {
        const Place at = key_place<G>(p, index);
        if (at.lines.begin >= at.lines.end) continue;
        const Span alive{at.lines.begin, smaller(at.lines.end, key_count(p, at.b))};
        Reach seen = reach(alive.begin, alive.end - 1, -p.high, -p.low, static_cast<int>(p.call.Nq));
        if (alive.end <= alive.begin) seen.any.end = seen.any.begin;
        GroupWalk<G::kQueries> walk(p, at.b, at.h, at.lines.begin, seen.any);

        Ring<1>::wait_empty(G::kTileRing, tile_turn);
        if (lane == 0) {
            const uint32_t full = Ring<1>::full(G::kTileRing, 0);
            barrier_arrive_expect(full, 2 * G::kRows * G::kHead * 2);
            for (int part = 0; part < G::kRows / kGroupRows; ++part) {
                const uint32_t offset = part * G::kGroupTile;
                const int row = at.lines.begin + part * kGroupRows;
                load_panels<kGroupRows, G::kHead>(G::kKey + offset, key, full, row, at.h, at.b);
                load_panels<kGroupRows, G::kHead>(G::kValue + offset, value, full, row, at.h, at.b);
            }
        }
        tile_turn.advance();

        Step next{0, 0, -1, 0};
        int next_head = 0;
        bool more = walk.next(p, next, next_head);
        do {
            const Step step = next;
            const int head = next_head;
            more = more && walk.next(p, next, next_head);
            const QuerySums sums = load_query_sums(p, at.b, head, step, lane);
            Ring<G::kStages>::wait_empty(G::kStageRing, turn);
            const uint32_t full = Ring<G::kStages>::full(G::kStageRing, turn.stage);
            if (lane == 0) {
                const bool loads = step.first < step.end;
                const uint32_t slot = G::kSlots + turn.stage * G::kSlotBytes;
                barrier_arrive_expect(full, loads ? G::kSlotBytes : 0);
                if (loads) {
                    load_panels<G::kQueries, G::kHead>(slot, query, full, step.first, head, at.b);
                    load_panels<G::kQueries, G::kHead>(slot + G::kTileBytes, grad_out, full, step.first, head, at.b);
                }
            }
            const uint32_t words = G::kRowSums + turn.stage * G::kRowSumBytes + lane * 4;
            EA_UNROLL
            for (int k = 0; k < 2; ++k) {
                store_shared_32(words + k * kWarp * 4, as_bits(sums.shift[k]));
                store_shared_32(words + (G::kQueries + k * kWarp) * 4, as_bits(sums.delta[k]));
            }
            post(G::kMessages + turn.stage * kMessageBytes, step, !more, head);
            warp_sync();
            if (lane == 0) barrier_arrive(full);
            turn.advance();
        } while (more);
    }
}

template <class G>
EA_DEVICE uint32_t visible_to_keys(const KernelParams& p, const Step& step, Span alive, int lane) {
    return visible_bits<G::kN>([&](float (&s)[1][G::kN][4]) {
        hide_transposed(s, p, step, alive.begin + group_warp_row() + lane / 4, alive, -p.high, -p.low, lane);
    });
}

// Scores become weights: of hidden pairs 0.
template <class G>
EA_DEVICE void weigh(float (&s)[1][G::kN][4], const KernelParams& p, bool full, uint32_t visible, uint32_t shifts,
                     int lane) {
    if (!full) hide_by<G::kN>(s, visible);
    EA_UNROLL
    for (int n = 0; n < G::kN; ++n) {
        const Words2 words = load_shared_64(shifts + n * 32 + lane % 4 * 8);
        const float shift[2] = {as_float(words.x), as_float(words.y)};
        EA_UNROLL
        for (int e = 0; e < 4; ++e)
            s[0][n][e] = power_of_2(multiply_add_scalar(s[0][n][e], p.score_scale, -shift[e % 2]));
    }
}

// dP becomes dS.
template <class G>
EA_DEVICE void weigh_gradients(float (&dp)[1][G::kN][4], const float (&weights)[1][G::kN][4], uint32_t deltas,
                               int lane) {
    EA_UNROLL
    for (int n = 0; n < G::kN; ++n) {
        const Words2 words = load_shared_64(deltas + n * 32 + lane % 4 * 8);
        const float delta[2] = {as_float(words.x), as_float(words.y)};
        EA_UNROLL
        for (int e = 0; e < 4; ++e) dp[0][n][e] = score_gradient(weights[0][n][e], dp[0][n][e], delta[e % 2]);
    }
}

template <class G>
EA_DEVICE Sight sight_of_keys(const KernelParams& p, const Step& step, Span alive, Span rows) {
    Sight sight =
        sight_of(reach(alive.begin, alive.end - 1, -p.high, -p.low, static_cast<int>(p.call.Nq)), step, G::kQueries);
    sight.any = sight.any && alive.begin < alive.end;
    sight.all = sight.all && alive.end == rows.end;
    return sight;
}

// P^T and dS^T of a group that owns its keys alone, rounded; the product of P^T and dO has begun to add to dV.
template <class G>
EA_DEVICE void find_gradients(uint32_t (&weights)[G::kN / 2][4], uint32_t (&gradients)[G::kN / 2][4],
                              float (&dv)[1][G::kHead / 8][4], const KernelParams& p, const Step& step, Span alive,
                              bool full, int stage) {
    using T = typename G::T;
    const int lane = thread_index() % kWarp;
    const uint32_t queries = G::kSlots + stage * G::kSlotBytes, grad_out = queries + G::kTileBytes;
    const uint32_t shifts = G::kRowSums + stage * G::kRowSumBytes, deltas = shifts + G::kQueries * 4;
    const uint32_t visible = full ? 0 : visible_to_keys<G>(p, step, alive, lane);
    float s[1][G::kN][4], dp[1][G::kN][4];
    group_fence(s[0], dp[0]);
    group_multiply_transposed<T, G::kHead, G::kQueries>(s[0], G::key(), queries);
    group_commit();
    group_multiply_transposed<T, G::kHead, G::kQueries>(dp[0], G::value(), grad_out);
    group_commit();
    group_wait<1>(s[0]);
    weigh<G>(s, p, full, visible, shifts, lane);
    pack_a<T>(weights, s[0]);
    group_fence(weights, dv[0]);
    group_multiply_rows<T, G::kHead, G::kQueries>(dv[0], weights, grad_out);
    group_commit();
    group_wait<1>(dp[0]);
    weigh_gradients<G>(dp, s, deltas, lane);
    pack_a<T>(gradients, dp[0]);
}

// Adds a step to dK and dV of a group that owns its keys alone.
template <class G>
EA_DEVICE void add_step(float (&dk)[1][G::kHead / 8][4], float (&dv)[1][G::kHead / 8][4], const KernelParams& p,
                        const Step& step, Span alive, bool full, int stage) {
    using T = typename G::T;
    uint32_t weights[G::kN / 2][4], gradients[G::kN / 2][4];
    find_gradients<G>(weights, gradients, dv, p, step, alive, full, stage);
    group_fence(gradients, dk[0]);
    group_multiply_rows<T, G::kHead, G::kQueries>(dk[0], gradients, G::kSlots + stage * G::kSlotBytes);
    group_commit();
    group_wait<0>(dk[0], dv[0], weights, gradients);
}

// The word in shared memory of element (n, 0) of this thread's weights under way.
EA_DEVICE uint32_t weight_address(uint32_t base, int n) {
    return base + (n * kGroupThreads + thread_index() % kGroupThreads) * 16;
}

// Adds a step to dV of shared keys and hands the weights over.
template <class G>
EA_DEVICE void add_value_step(float (&dv)[1][G::kHead / 8][4], const KernelParams& p, const Step& step, Span alive,
                              bool full, int stage, const Turn<1>& turn) {
    using T = typename G::T;
    const int lane = thread_index() % kWarp;
    const uint32_t queries = G::kSlots + stage * G::kSlotBytes, grad_out = queries + G::kTileBytes;
    const uint32_t visible = full ? 0 : visible_to_keys<G>(p, step, alive, lane);
    float s[1][G::kN][4];
    group_fence(s[0]);
    group_multiply_transposed<T, G::kHead, G::kQueries>(s[0], G::key(), queries);
    group_commit();
    group_wait<0>(s[0]);
    weigh<G>(s, p, full, visible, G::kRowSums + stage * G::kRowSumBytes, lane);
    Ring<1>::wait_empty(G::kWeightRing, turn);
    EA_UNROLL
    for (int n = 0; n < G::kN; ++n)
        store_shared_128(weight_address(G::kWeights, n),
                         {as_bits(s[0][n][0]), as_bits(s[0][n][1]), as_bits(s[0][n][2]), as_bits(s[0][n][3])});
    warp_sync();
    if (lane == 0) barrier_arrive(Ring<1>::full(G::kWeightRing, 0));
    uint32_t weights[G::kN / 2][4];
    pack_a<T>(weights, s[0]);
    group_fence(weights, dv[0]);
    group_multiply_rows<T, G::kHead, G::kQueries>(dv[0], weights, grad_out);
    group_commit();
    group_wait<0>(dv[0], weights);
}

// Adds a step to dK of shared keys with the weights that the other group hands over.
template <class G>
EA_DEVICE void add_key_step(float (&dk)[1][G::kHead / 8][4], int stage, const Turn<1>& turn) {
    using T = typename G::T;
    const int lane = thread_index() % kWarp;
    const uint32_t queries = G::kSlots + stage * G::kSlotBytes, grad_out = queries + G::kTileBytes;
    float dp[1][G::kN][4], weights[1][G::kN][4];
    group_fence(dp[0]);
    group_multiply_transposed<T, G::kHead, G::kQueries>(dp[0], G::value(), grad_out);
    group_commit();
    Ring<1>::wait_full(G::kWeightRing, turn);
    EA_UNROLL
    for (int n = 0; n < G::kN; ++n) {
        const Words4 words = load_shared_128(weight_address(G::kWeights, n));
        weights[0][n][0] = as_float(words.x), weights[0][n][1] = as_float(words.y);
        weights[0][n][2] = as_float(words.z), weights[0][n][3] = as_float(words.w);
    }
    Ring<1>::release(G::kWeightRing, turn);
    group_wait<0>(dp[0]);
    weigh_gradients<G>(dp, weights, G::kRowSums + stage * G::kRowSumBytes + G::kQueries * 4, lane);
    uint32_t gradients[G::kN / 2][4];
    pack_a<T>(gradients, dp[0]);
    group_fence(gradients, dk[0]);
    group_multiply_rows<T, G::kHead, G::kQueries>(dk[0], gradients, queries);
    group_commit();
    group_wait<0>(dk[0], gradients);
}

template <class G>
EA_DEVICE void store_flag_of_keys(const KernelParams& p, const Place& at, bool suspect) {
    constexpr int kFlagRows = sm80::KeyGradient<typename G::T, G::kHead, false>::kRows;
    constexpr bool kTogether = kFlagRows == G::kRows;
    const int line = at.lines.begin + (kTogether ? 0 : group_index() * kGroupRows);
    const int64_t head = at.b * p.call.Hkv + at.h;
    store_flag<kTogether>(p.flags,
                          flag_place<kFlagRows>(p.call.mask.indptr != nullptr, static_cast<int>(p.call.mask.block_k),
                                                static_cast<int>(p.call.Nk), head, at.lines.begin, line, false),
                          suspect);
}

// Rounds and writes dK or dV of the group's rows; says whether something in it is suspicious.
template <class G>
EA_DEVICE bool store_sum(float (&sum)[1][G::kHead / 8][4], uint32_t tile, const TensorView& target, const Place& at,
                         Span rows, float factor, int64_t width, bool aligned) {
    const int row = rows.begin + group_warp_row() + thread_index() % kWarp / 4;
    const bool suspect = suspicious(sum, row, rows.end);
    scale_by(sum, factor);
    store_panels<typename G::T, G::kHead>(sum, tile, head_pointer(target, at.b, at.h), target.row_stride, rows.begin,
                                          rows.end, static_cast<int>(width), aligned);
    return suspect;
}

// The groups that multiply: each its own keys.
template <class G>
EA_DEVICE void gather_own_keys(const KernelParams& p, int tiles) {
    Turn<G::kStages> turn;
    Turn<1> tile_turn;
    for (int index = first_tile(); index < tiles; index += tile_stride()) {
        const Place at = key_place<G>(p, index);
        bool suspect = false;
        if (at.lines.begin < at.lines.end) {
            const Span rows = G::rows(at.lines), alive{rows.begin, smaller(rows.end, key_count(p, at.b))};
            float dk[1][G::kHead / 8][4], dv[1][G::kHead / 8][4];
            clear(dk);
            clear(dv);
            Ring<1>::wait_full(G::kTileRing, tile_turn);
            bool last;
            do {
                Ring<G::kStages>::wait_full(G::kStageRing, turn);
                const Message message = read_message(G::kMessages + turn.stage * kMessageBytes);
                const Sight sight = sight_of_keys<G>(p, message.step, alive, rows);
                if (sight.any) add_step<G>(dk, dv, p, message.step, alive, sight.all, turn.stage);
                Ring<G::kStages>::release(G::kStageRing, turn);
                turn.advance();
                last = message.last;
            } while (!last);
            named_sync(group_barrier(), kGroupThreads);  // results pass through the group's tiles of K and V
            const bool suspects = store_sum<G>(dk, G::key(), p.call.dk, at, rows, p.scale, p.call.D, p.dk_aligned);
            suspect = store_sum<G>(dv, G::value(), p.call.dv, at, rows, 1.0f, p.call.Dv, p.dv_aligned) || suspects;
            async_proxy_fence();
            Ring<1>::release(G::kTileRing, tile_turn);
            tile_turn.advance();
        }
        store_flag_of_keys<G>(p, at, suspect);
    }
}

// The groups that multiply where they share their keys: the first gathers dV, the second dK.
template <class G>
EA_DEVICE void gather_shared_keys(const KernelParams& p, int tiles) {
    Turn<G::kStages> turn;
    Turn<1> tile_turn, weight_turn;
    const bool values = group_index() == 0;
    for (int index = first_tile(); index < tiles; index += tile_stride()) {
        const Place at = key_place<G>(p, index);
        bool suspect = false;
        if (at.lines.begin < at.lines.end) {
            const Span rows = G::rows(at.lines), alive{rows.begin, smaller(rows.end, key_count(p, at.b))};
            float sum[1][G::kHead / 8][4];
            clear(sum);
            Ring<1>::wait_full(G::kTileRing, tile_turn);
            bool last;
            do {
                Ring<G::kStages>::wait_full(G::kStageRing, turn);
                const Message message = read_message(G::kMessages + turn.stage * kMessageBytes);
                const Sight sight = sight_of_keys<G>(p, message.step, alive, rows);
                if (sight.any) {
                    if (values) {
                        add_value_step<G>(sum, p, message.step, alive, sight.all, turn.stage, weight_turn);
                    } else {
                        add_key_step<G>(sum, turn.stage, weight_turn);
                    }
                    weight_turn.advance();
                }
                Ring<G::kStages>::release(G::kStageRing, turn);
                turn.advance();
                last = message.last;
            } while (!last);
            named_sync(group_barrier(), kGroupThreads);  // results pass through the tile of K or of V
            suspect = values ? store_sum<G>(sum, G::key(), p.call.dv, at, rows, 1.0f, p.call.Dv, p.dv_aligned)
                             : store_sum<G>(sum, G::value(), p.call.dk, at, rows, p.scale, p.call.D, p.dk_aligned);
            async_proxy_fence();
            Ring<1>::release(G::kTileRing, tile_turn);
            tile_turn.advance();
        }
        store_flag_of_keys<G>(p, at, suspect);
    }
}

// Grid: any; `tiles` of them in all. p.flags: where to say which tiles are suspicious, or null.
template <class G>
EA_KERNEL(kBlockThreads, 1)
attention_key_gradient(EA_PARAMETER KernelParams p, EA_PARAMETER TensorMap query, EA_PARAMETER TensorMap key,
                       EA_PARAMETER TensorMap value, EA_PARAMETER TensorMap grad_out, int tiles) {
    if constexpr (!kHopper) return;
    if (thread_index() == 0) {
        Ring<G::kStages>::init(G::kStageRing, 2, kMultiplyingWarps);  // filled by copies and by words
        Ring<1>::init(G::kTileRing, 1, kMultiplyingWarps);
        if (G::kShared) Ring<1>::init(G::kWeightRing, kGroupThreads / kWarp, kGroupThreads / kWarp);
        barrier_init_fence();
    }
    block_sync();
    if (group_index() < 0) {
        registers_give<kLoadingRegisters>();
        if (thread_index() < kWarp) load_for_keys<G>(p, query, key, value, grad_out, tiles);
    } else {
        registers_take<kMultiplyingRegisters>();
        if constexpr (G::kShared) {
            gather_shared_keys<G>(p, tiles);
        } else {
            gather_own_keys<G>(p, tiles);
        }
    }
}

}  // namespace
}  // namespace sm90
}  // namespace efficient_attn
