// dQ on Hopper (wgmma, TMA), as sm80/attention_query_gradient.h defines it.
//
// The producer walks the keys that a tile of 128 queries sees, kKeys at a time; two consumers own 64 of the queries
// each. A consumer computes S = Q K^T and dP = dO V^T from shared memory; dS is then in the registers where the product
// with K wants it.
//
// Shared memory: Q and dO of each consumer; slots of K and V; a line for the step in each slot; barriers. A consumer's
// dQ passes through the memory of its Q.
#pragma once

#include "cuda/sm80/attention_query_gradient.h"
#include "cuda/sm90/gradients.h"

namespace efficient_attn {
namespace sm90 {
namespace {

// kWide: steps of 128 keys.
template <class T_, int kHead_, bool kWide_ = false>
struct QueryGradient {
    using T = T_;
    static constexpr int kHead = kHead_;
    static constexpr bool kWide = kWide_;
    static_assert(!kWide || kHead < 256, "the sums of heads of 256 leave no registers for it");
    static constexpr int kRows = kConsumers * kGroupRows, kKeys = kWide ? 128 : kHead == 256 ? 32 : 64, kN = kKeys / 8;
    static constexpr int kStages = kWide && kHead == 128 ? 2 : 3, kProducerRegisters = 40, kConsumerRegisters = 232;

    static constexpr uint32_t kOwnBytes = kGroupRows * kHead * 2, kTileBytes = kKeys * kHead * 2;
    static constexpr uint32_t kQuery = 0, kGradOut = kConsumers * kOwnBytes, kKeySlots = 2 * kGradOut;
    static constexpr uint32_t kValueSlots = kKeySlots + kStages * kTileBytes;
    static constexpr uint32_t kSteps = kValueSlots + kStages * kTileBytes;
    static constexpr uint32_t kRowsFull = kSteps + kStages * kLineBytes, kRowsEmpty = kRowsFull + 8;
    static constexpr uint32_t kFull = kRowsEmpty + 8, kEmpty = kFull + kStages * 8;
    static constexpr uint32_t kSharedBytes = kEmpty + kStages * 8;

    static EA_DEVICE uint32_t line(const Slot<kStages>& slot) { return slot.of(kSteps, kLineBytes); }
};

template <class G>
EA_DEVICE void load_rows(const BackwardInputs& in, const Place& at) {
    barrier_arrive_expect(G::kRowsFull, 2 * kConsumers * G::kOwnBytes);
    EA_UNROLL
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
        const uint32_t offset = consumer * G::kOwnBytes;
        const int row = at.lines.begin + consumer * kGroupRows;
        load_panels<G::kHead, kGroupRows>(G::kQuery + offset, in.query, G::kRowsFull, row, at.h, at.b);
        load_panels<G::kHead, kGroupRows>(G::kGradOut + offset, in.grad_out, G::kRowsFull, row, at.h, at.b);
    }
}

// The flag of the consumer whose lines begin at `line`.
template <class G>
EA_DEVICE int64_t query_flag(const KernelParams& p, const Place& at, int line) {
    constexpr int kFlagRows = sm80::QueryGradient<typename G::T, G::kHead, false, 1>::kRows;
    static_assert(kFlagRows == kGroupRows, "a consumer has a flag of its own");
    return flag_of<kFlagRows>(p.call.mask.indptr != nullptr, static_cast<int>(p.call.mask.block_q),
                              static_cast<int>(p.call.Nq), at.b * p.call.Hq + at.h, at.lines.begin, line, true);
}

// The producer, one warp. A tile without visible keys has one step, with no key in it.
template <class G>
EA_DEVICE void produce_keys(const KernelParams& p, const BackwardInputs& in) {
    const int lane = thread_index() % kWarp;
    Slot<G::kStages> slot;
    int rows_parity = 0;
    draw_tiles(in.work, [&](int tile) {
        const Place at = query_place<G::kRows>(p, tile);
        if (at.lines.begin >= at.lines.end) {
            for (int consumer = 0; p.flags && lane == 0 && consumer < kConsumers; ++consumer)
                write_consumer_flag<false>(p.flags, query_flag<G>(p, at, at.lines.begin + consumer * kGroupRows),
                                           consumer, false);
            return;
        }
        const Reach sees = reach(at.lines.begin, at.lines.end - 1, p.low, p.high, key_count(p, at.b));
        Walk<G::kKeys, kByQuery> walk(p, at.b, at.h, at.lines.begin, sees.any);
        Step next{0, 0, -1, 0};
        bool more = walk.next(p, next);
        barrier_wait(G::kRowsEmpty, rows_parity ^ 1);
        rows_parity ^= 1;
        if (lane == 0) load_rows<G>(in, at);
        do {
            const Step step = next;
            more = more && walk.next(p, next);
            barrier_wait(slot.of(G::kEmpty, 8), slot.parity ^ 1);
            send_step(G::line(slot), step, more, at.h, tile, lane);
            warp_sync();
            if (lane == 0) {
                load_pair<G, G::kKeys>(in.key, slot.of(G::kKeySlots, G::kTileBytes), in.value,
                                       slot.of(G::kValueSlots, G::kTileBytes), slot.of(G::kFull, 8), step.first,
                                       at.h / p.group, at.b);
            }
            slot.advance();
        } while (more);
    });
    barrier_wait(slot.of(G::kEmpty, 8), slot.parity ^ 1);
    send_end(G::line(slot), lane);
    release(slot.of(G::kFull, 8), lane);
}

// Adds a step to dQ.
template <class G>
EA_DEVICE void add_keys(float (&dq)[1][G::kHead / 8][4], const KernelParams& p, const Step& step, Span rows,
                        const RowSums& sums, bool full, const Slot<G::kStages>& slot) {
    using T = typename G::T;
    const int lane = thread_index() % kWarp, row = rows.begin + group_warp_row() + lane / 4;
    const uint32_t own = consumer_index() * G::kOwnBytes;
    const uint32_t keys = slot.of(G::kKeySlots, G::kTileBytes), values = slot.of(G::kValueSlots, G::kTileBytes);
    const Bits<G::kN> visible = full ? kEveryPair<G::kN> : visible_bits<G::kN>([&](float (&s)[1][G::kN][4]) {
        hide(s, p, step, row, rows, p.low, p.high, lane);
    });
    float s[1][G::kN][4], dp[1][G::kN][4];
    group_fence(s[0], dp[0]);
    group_multiply_transposed<T, G::kHead, G::kKeys>(s[0], G::kQuery + own, keys);
    group_commit();
    group_multiply_transposed<T, G::kHead, G::kKeys>(dp[0], G::kGradOut + own, values);
    group_commit();
    group_wait<1>(s[0]);
    each(s,
         [&](float& x, int, int, int e) { x = power_of_2(multiply_add_scalar(x, p.score_scale, -sums.shift[e / 2])); });
    if (visible != kEveryPair<G::kN>) drop(s, visible);
    group_wait<0>(dp[0]);  // the weights are found while dP is multiplied
    each(dp, [&](float& x, int m, int n, int e) { x = score_gradient(s[m][n][e], x, sums.delta[e / 2]); });
    uint32_t gradients[G::kN / 2][4];
    pack_a<T>(gradients, dp[0]);
    group_fence(gradients, dq[0]);
    group_multiply_rows<T, G::kHead, G::kKeys>(dq[0], gradients, keys);
    group_commit();
    group_wait<0>(dq[0], gradients);
}

template <class G>
EA_DEVICE void consume_keys(const KernelParams& p) {
    const int lane = thread_index() % kWarp;
    Slot<G::kStages> slot;
    int rows_parity = 0;
    EA_KEEP_LOOP
    for (int tile = await_tile<G>(slot); tile != kNoMore; tile = await_tile<G>(slot)) {
        const Place at = query_place<G::kRows>(p, tile);
        const int first = at.lines.begin + consumer_index() * kGroupRows;
        const Span rows{first, smaller(first + kGroupRows, at.lines.end)};
        const int row = first + group_warp_row() + lane / 4;
        const RowSums sums = load_sums(p, at.b, at.h, row, rows.end);
        const Reach sees = reach(rows.begin, rows.end - 1, p.low, p.high, key_count(p, at.b));
        float dq[1][G::kHead / 8][4];
        clear(dq);
        barrier_wait(G::kRowsFull, rows_parity);
        rows_parity ^= 1;
        bool more;
        EA_KEEP_LOOP
        do {
            const Step step = await_step<G>(slot);
            const Sight sight = sight_of(sees, step, G::kKeys);
            if (sight.any && rows.begin < rows.end) add_keys<G>(dq, p, step, rows, sums, sight.all, slot);
            more = more_follow<G>(slot);
            release(slot.of(G::kEmpty, 8), lane);
            slot.advance();
        } while (more);
        meet<false>(p.flags, query_flag<G>(p, at, first), suspicious(dq, row, rows.end));
        scale_by(dq, p.scale);
        store_panels<typename G::T, G::kHead>(dq, G::kQuery + consumer_index() * G::kOwnBytes,
                                              head_pointer(p.call.dq, at.b, at.h), p.call.dq.row_stride, rows.begin,
                                              rows.end, static_cast<int>(p.call.D), p.dq_aligned);
        async_proxy_fence();  // Q of the next tile is copied to where dQ has been
        release(G::kRowsEmpty, lane);
    }
}

template <class G>
EA_DEVICE void query_gradient(const KernelParams& p, const BackwardInputs& in) {
    if constexpr (kHopper) {
        if (thread_index() == 0) {
            barrier_init(G::kRowsFull, 1);
            barrier_init(G::kRowsEmpty, kConsumerWarps);
            init_slots<G>(1);
        }
        share_work<G>([&] { produce_keys<G>(p, in); }, [&] { consume_keys<G>(p); });
    }
}

// Grid: any; p.flags as in sm80, whose attention_query_gradient_safe does the suspicious tiles again.
template <class G>
EA_KERNEL(kBlockThreads, 1)
attention_query_gradient(EA_PARAMETER KernelParams p, EA_PARAMETER BackwardInputs in) {
    query_gradient<G>(p, in);
}

// The same under a name of its own, for profilers.
template <class G>
EA_KERNEL(kBlockThreads, 1)
attention_query_gradient_wide(EA_PARAMETER KernelParams p, EA_PARAMETER BackwardInputs in) {
    query_gradient<G>(p, in);
}

}  // namespace
}  // namespace sm90
}  // namespace efficient_attn
