// dK and dV on Hopper (wgmma, TMA), as sm80/attention_key_gradient.h defines them.
//
// The producer walks the queries that see some of a tile of kRows keys, in every query head of the group, kQueries at a
// time; two consumers multiply. A consumer computes S^T = K Q^T and dP^T = V dO^T of 64 keys from shared memory; the
// weights are then in the registers where the products with dO and Q want them. For heads of up to 128 each consumer
// has 64 keys of its own. For heads of 256 the registers of a consumer hold either dK or dV: both have the same 64
// keys, one computes S^T and gathers dV, the other computes dP^T and gathers dK, and the weights go from the first to
// the second through shared memory.
//
// Shared memory: K and V of each consumer; slots of Q and dO; the weights under way; for each slot the shift and delta
// of its queries and a line for its step; barriers. Results pass through the memory of K and V.
#pragma once

#include "cuda/sm80/attention_key_gradient.h"
#include "cuda/sm90/gradients.h"

namespace efficient_attn {
namespace sm90 {
namespace {

// kOnePass: with room for dQ, see attention_backward.h.
template <class T_, int kHead_, bool kOnePass_ = false>
struct KeyGradient {
    using T = T_;
    static constexpr int kHead = kHead_;
    static constexpr bool kOnePass = kOnePass_, kShared = kHead == 256;  // kShared: both consumers have the same keys
    static constexpr int kRows = kShared ? 64 : 128, kQueries = 64, kN = kQueries / 8,
                         kStages = kShared || kOnePass ? 2 : 3;
    static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

    static constexpr uint32_t kOwnBytes = kGroupRows * kHead * 2, kTileBytes = kQueries * kHead * 2;
    static constexpr uint32_t kKey = 0, kValue = kRows * kHead * 2, kQuerySlots = 2 * kValue;
    static constexpr uint32_t kGradOutSlots = kQuerySlots + kStages * kTileBytes;
    static constexpr uint32_t kWeights = kGradOutSlots + kStages * kTileBytes;
    static constexpr uint32_t kGradients = kWeights + (kShared ? kGroupRows * kQueries * 4 : 0);
    static constexpr uint32_t kGradientBytes = kRows * kQueries * 2;  // dS^T of a step; there are two
    static constexpr uint32_t kPartials = kGradients + (kOnePass ? 2 * kGradientBytes : 0);
    static constexpr uint32_t kPartialBytes = kQueries * kPanel * 4;  // half of dQ of a step; each consumer has one
    static constexpr uint32_t kSums = kPartials + (kOnePass ? kConsumers * kPartialBytes : 0);
    static constexpr uint32_t kSumBytes = kQueries * 4;  // the shifts of a slot, behind them the deltas
    static constexpr uint32_t kSteps = kSums + kStages * 2 * kSumBytes;
    static constexpr int kLines = kOnePass ? 2 * kStages : kStages;
    static constexpr uint32_t kKeysFull = kSteps + kLines * kLineBytes, kKeysEmpty = kKeysFull + 8;
    static constexpr uint32_t kWeightsFull = kKeysEmpty + 8, kWeightsEmpty = kWeightsFull + 8;
    static constexpr uint32_t kFull = kWeightsEmpty + 8, kEmpty = kFull + kStages * 8;
    static constexpr uint32_t kSharedBytes = kEmpty + kStages * 8;

    // The line of the step in a slot; in one pass those of two rounds, for who writes dQ reads it after the consumers.
    static EA_DEVICE uint32_t line(const Slot<kStages>& slot) {
        return slot.of(kSteps, kLineBytes) + (kOnePass ? slot.parity * (kStages * kLineBytes) : 0);
    }
    // This consumer's K and V, and which lines of the tile they are.
    static EA_DEVICE uint32_t own() { return kShared ? 0 : consumer_index() * kOwnBytes; }
    static EA_DEVICE Span rows(Span lines) {
        const int begin = lines.begin + (kShared ? 0 : consumer_index() * kGroupRows);
        return {begin, smaller(begin + kGroupRows, lines.end)};
    }
};

// What is taken off the scores of the queries of a step, and their delta: two of each for a lane.
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

EA_DEVICE void store_query_sums(const QuerySums& sums, uint32_t shifts, uint32_t deltas, int lane) {
    EA_UNROLL
    for (int k = 0; k < 2; ++k) {
        store_shared_32(shifts + (k * kWarp + lane) * 4, as_bits(sums.shift[k]));
        store_shared_32(deltas + (k * kWarp + lane) * 4, as_bits(sums.delta[k]));
    }
}

template <class G>
EA_DEVICE void load_own_keys(const BackwardInputs& in, const Place& at) {
    barrier_arrive_expect(G::kKeysFull, 2 * G::kValue);
    for (int part = 0; part < G::kRows / kGroupRows; ++part) {
        const uint32_t offset = part * G::kOwnBytes;
        const int row = at.lines.begin + part * kGroupRows;
        load_panels<G::kHead, kGroupRows>(G::kKey + offset, in.key, G::kKeysFull, row, at.h, at.b);
        load_panels<G::kHead, kGroupRows>(G::kValue + offset, in.value, G::kKeysFull, row, at.h, at.b);
    }
}

// A consumer's flag, of the sm80 kernel's tiles; kHalves: both consumers share it.
template <class G>
struct KeyFlags {
    static constexpr int kFlagRows = sm80::KeyGradient<typename G::T, G::kHead, false>::kRows;
    static constexpr bool kHalves = kFlagRows == G::kRows;

    static EA_DEVICE int64_t of(const KernelParams& p, const Place& at, int consumer) {
        const int line = at.lines.begin + (kHalves ? 0 : consumer * kGroupRows);
        return flag_of<kFlagRows>(p.call.mask.indptr != nullptr, static_cast<int>(p.call.mask.block_k),
                                  static_cast<int>(p.call.Nk), at.b * p.call.Hkv + at.h, at.lines.begin, line, false);
    }
};

// The step of a walk without a list as far from the end as this one is from the beginning: where parts of dQ are added
// up in turns, a tile of keys begins with queries that the tiles before it do not see, or are done with first.
EA_DEVICE void from_the_end(HeadStep& step, Span queries, int width) {
    if (step.first >= step.end) return;
    step.first = queries.begin / width * width + (queries.end - 1) / width * width - step.first;
    step.end = smaller(step.first + width, queries.end);
}

// The producer, one warp. A tile that no query sees has one step, with no query in it.
template <class G>
EA_DEVICE void produce_queries(const KernelParams& p, const BackwardInputs& in) {
    static_assert(G::kQueries == 2 * kWarp, "a lane loads the sums of two queries");
    const int lane = thread_index() % kWarp;
    Slot<G::kStages> slot;
    int keys_parity = 0;
    draw_tiles(in.work, [&](int tile) {
        const Place at = sm80::key_place<G>(p, tile);
        if (at.lines.begin >= at.lines.end) {
            for (int consumer = 0; p.flags && lane == 0 && consumer < kConsumers; ++consumer)
                write_consumer_flag<KeyFlags<G>::kHalves>(p.flags, KeyFlags<G>::of(p, at, consumer), consumer, false);
            return;
        }
        const Span alive{at.lines.begin, smaller(at.lines.end, key_count(p, at.b))};
        Reach seen = reach(alive.begin, alive.end - 1, -p.high, -p.low, static_cast<int>(p.call.Nq));
        if (alive.end <= alive.begin) seen.any.end = seen.any.begin;
        GroupWalk<G::kQueries> walk(p, at.b, at.h, at.lines.begin, seen.any);
        HeadStep next{{0, 0, -1, 0}, at.h * p.group};
        bool more = walk.next(p, next);
        barrier_wait(G::kKeysEmpty, keys_parity ^ 1);
        keys_parity ^= 1;
        if (lane == 0) load_own_keys<G>(in, at);
        do {
            HeadStep step = next;
            if (G::kOnePass && p.turns) from_the_end(step, seen.any, G::kQueries);
            more = more && walk.next(p, next);
            const QuerySums sums = load_query_sums(p, at.b, step.head, step, lane);
            barrier_wait(slot.of(G::kEmpty, 8), slot.parity ^ 1);
            const uint32_t full = slot.of(G::kFull, 8), shifts = slot.of(G::kSums, 2 * G::kSumBytes);
            if (lane == 0) {
                load_pair<G, G::kQueries>(in.query, slot.of(G::kQuerySlots, G::kTileBytes), in.grad_out,
                                          slot.of(G::kGradOutSlots, G::kTileBytes), full, step.first, step.head, at.b);
            }
            store_query_sums(sums, shifts, shifts + G::kSumBytes, lane);
            send_step<G::kOnePass>(G::line(slot), step, more, step.head, tile, lane, at.b, at.lines.begin);
            release(full, lane);
            slot.advance();
        } while (more);
    });
    barrier_wait(slot.of(G::kEmpty, 8), slot.parity ^ 1);
    send_end(G::line(slot), lane);
    warp_sync();
    for (int arrival = 0; lane == 0 && arrival < 2; ++arrival) barrier_arrive(slot.of(G::kFull, 8));
}

template <class G>
EA_DEVICE Bits<G::kN> visible_to_keys(const KernelParams& p, const Step& step, Span alive, int lane) {
    return visible_bits<G::kN>([&](float (&s)[1][G::kN][4]) {
        hide_transposed(s, p, step, alive.begin + group_warp_row() + lane / 4, alive, -p.high, -p.low, lane);
    });
}

// Scores become weights: of hidden pairs 0.
template <class G>
EA_DEVICE void weigh(float (&s)[1][G::kN][4], const KernelParams& p, Bits<G::kN> visible, uint32_t shifts, int lane) {
    EA_UNROLL
    for (int n = 0; n < G::kN; ++n) {
        const Words2 words = load_shared_64(shifts + n * 32 + lane % 4 * 8);
        const float shift[2] = {as_float(words.x), as_float(words.y)};
        EA_UNROLL
        for (int e = 0; e < 4; ++e)
            s[0][n][e] = power_of_2(multiply_add_scalar(s[0][n][e], p.score_scale, -shift[e % 2]));
    }
    if (visible != kEveryPair<G::kN>) drop(s, visible);
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

// Starts P^T and dS^T of a consumer's own keys: these rounded, and dV += P^T dO under way.
template <class G>
EA_DEVICE void find_gradients(uint32_t (&weights)[G::kN / 2][4], uint32_t (&gradients)[G::kN / 2][4],
                              float (&dv)[1][G::kHead / 8][4], const KernelParams& p, const Step& step, Span alive,
                              bool full, const Slot<G::kStages>& slot) {
    using T = typename G::T;
    const int lane = thread_index() % kWarp;
    const uint32_t queries = slot.of(G::kQuerySlots, G::kTileBytes),
                   grad_out = slot.of(G::kGradOutSlots, G::kTileBytes);
    const uint32_t shifts = slot.of(G::kSums, 2 * G::kSumBytes), deltas = shifts + G::kSumBytes;
    const Bits<G::kN> visible = full ? kEveryPair<G::kN> : visible_to_keys<G>(p, step, alive, lane);
    float s[1][G::kN][4], dp[1][G::kN][4];
    group_fence(s[0], dp[0]);
    group_multiply_transposed<T, G::kHead, G::kQueries>(s[0], G::kKey + G::own(), queries);
    group_commit();
    group_multiply_transposed<T, G::kHead, G::kQueries>(dp[0], G::kValue + G::own(), grad_out);
    group_commit();
    group_wait<1>(s[0]);
    weigh<G>(s, p, visible, shifts, lane);
    pack_a<T>(weights, s[0]);
    group_fence(weights, dv[0]);
    group_multiply_rows<T, G::kHead, G::kQueries>(dv[0], weights, grad_out);
    group_commit();
    group_wait<1>(dp[0]);
    weigh_gradients<G>(dp, s, deltas, lane);
    pack_a<T>(gradients, dp[0]);
}

// Adds a step to dK and dV of a consumer's own keys.
template <class G>
EA_DEVICE void add_queries(float (&dk)[1][G::kHead / 8][4], float (&dv)[1][G::kHead / 8][4], const KernelParams& p,
                           const Step& step, Span alive, bool full, const Slot<G::kStages>& slot) {
    uint32_t weights[G::kN / 2][4], gradients[G::kN / 2][4];
    find_gradients<G>(weights, gradients, dv, p, step, alive, full, slot);
    group_fence(gradients, dk[0]);
    group_multiply_rows<typename G::T, G::kHead, G::kQueries>(dk[0], gradients, slot.of(G::kQuerySlots, G::kTileBytes));
    group_commit();
    group_wait<0>(dk[0], dv[0], weights, gradients);
}

// Where this thread's elements (n, 0..3) of the weights under way lie.
EA_DEVICE uint32_t weight_address(uint32_t base, int n) { return base + (n * kGroup + thread_index() % kGroup) * 16; }

// Adds a step to dV of shared keys and hands the weights over.
template <class G>
EA_DEVICE void add_values(float (&dv)[1][G::kHead / 8][4], const KernelParams& p, const Step& step, Span alive,
                          bool full, const Slot<G::kStages>& slot, int parity) {
    using T = typename G::T;
    const int lane = thread_index() % kWarp;
    const Bits<G::kN> visible = full ? kEveryPair<G::kN> : visible_to_keys<G>(p, step, alive, lane);
    float s[1][G::kN][4];
    group_fence(s[0]);
    group_multiply_transposed<T, G::kHead, G::kQueries>(s[0], G::kKey, slot.of(G::kQuerySlots, G::kTileBytes));
    group_commit();
    group_wait<0>(s[0]);
    weigh<G>(s, p, visible, slot.of(G::kSums, 2 * G::kSumBytes), lane);
    barrier_wait(G::kWeightsEmpty, parity ^ 1);
    EA_UNROLL
    for (int n = 0; n < G::kN; ++n)
        store_shared_128(weight_address(G::kWeights, n),
                         {as_bits(s[0][n][0]), as_bits(s[0][n][1]), as_bits(s[0][n][2]), as_bits(s[0][n][3])});
    release(G::kWeightsFull, lane);
    uint32_t weights[G::kN / 2][4];
    pack_a<T>(weights, s[0]);
    group_fence(weights, dv[0]);
    group_multiply_rows<T, G::kHead, G::kQueries>(dv[0], weights, slot.of(G::kGradOutSlots, G::kTileBytes));
    group_commit();
    group_wait<0>(dv[0], weights);
}

// Adds a step to dK of shared keys with the weights that are handed over.
template <class G>
EA_DEVICE void add_keys(float (&dk)[1][G::kHead / 8][4], const Slot<G::kStages>& slot, int parity) {
    using T = typename G::T;
    const int lane = thread_index() % kWarp;
    float dp[1][G::kN][4], weights[1][G::kN][4];
    group_fence(dp[0]);
    group_multiply_transposed<T, G::kHead, G::kQueries>(dp[0], G::kValue, slot.of(G::kGradOutSlots, G::kTileBytes));
    group_commit();
    barrier_wait(G::kWeightsFull, parity);
    EA_UNROLL
    for (int n = 0; n < G::kN; ++n) {
        const Words4 words = load_shared_128(weight_address(G::kWeights, n));
        weights[0][n][0] = as_float(words.x), weights[0][n][1] = as_float(words.y);
        weights[0][n][2] = as_float(words.z), weights[0][n][3] = as_float(words.w);
    }
    release(G::kWeightsEmpty, lane);
    group_wait<0>(dp[0]);
    weigh_gradients<G>(dp, weights, slot.of(G::kSums, 2 * G::kSumBytes) + G::kSumBytes, lane);
    uint32_t gradients[G::kN / 2][4];
    pack_a<T>(gradients, dp[0]);
    group_fence(gradients, dk[0]);
    group_multiply_rows<T, G::kHead, G::kQueries>(dk[0], gradients, slot.of(G::kQuerySlots, G::kTileBytes));
    group_commit();
    group_wait<0>(dk[0], gradients);
}

// Every warp of the consumer comes here with its sums.
template <class G>
EA_DEVICE void meet_over_keys(const KernelParams& p, const Place& at, bool suspect) {
    meet<KeyFlags<G>::kHalves>(p.flags, KeyFlags<G>::of(p, at, consumer_index()), suspect);
}

// Rounds and writes dK or dV of a consumer's rows, through its tile of K or V.
template <class G>
EA_DEVICE void store_sums(float (&sums)[1][G::kHead / 8][4], uint32_t tile, const TensorView& target, const Place& at,
                          Span rows, float factor, int64_t width, bool aligned) {
    scale_by(sums, factor);
    store_panels<typename G::T, G::kHead>(sums, tile, head_pointer(target, at.b, at.h), target.row_stride, rows.begin,
                                          rows.end, static_cast<int>(width), aligned);
}

// In one pass: until the part of dQ of the step before is written, and that the part of this one is there. Every step
// and the end come here. Named barriers: they take no register.
EA_DEVICE void await_writer() { named_sync(written_of(consumer_index()), kGroup + kWarp); }
EA_DEVICE void tell_writer() { named_arrive(part_of(consumer_index()), kGroup + kWarp); }

// The consumers, each with keys of its own; add(dk, dv, place, step, keys, sight, slot) takes in a step.
template <class G, class Add>
EA_DEVICE void consume_own(const KernelParams& p, Add add) {
    const int lane = thread_index() % kWarp;
    Slot<G::kStages> slot;
    int keys_parity = 0;
    EA_KEEP_LOOP
    for (int tile = await_tile<G>(slot); tile != kNoMore; tile = await_tile<G>(slot)) {
        const Place at = sm80::key_place<G>(p, tile);
        const Span rows = G::rows(at.lines), alive{rows.begin, smaller(rows.end, key_count(p, at.b))};
        float dk[1][G::kHead / 8][4], dv[1][G::kHead / 8][4];
        clear(dk);
        clear(dv);
        barrier_wait(G::kKeysFull, keys_parity);
        keys_parity ^= 1;
        bool more;
        EA_KEEP_LOOP
        do {
            const Step step = await_step<G>(slot);
            add(dk, dv, at, step, alive, sight_of_keys<G>(p, step, alive, rows), slot);
            more = more_follow<G>(slot);
            release(slot.of(G::kEmpty, 8), lane);
            slot.advance();
        } while (more);
        const int row = rows.begin + group_warp_row() + lane / 4;
        if (G::kOnePass) named_sync(kMeetingOfBoth, kConsumers * kGroup);  // both multiply by the keys of both
        meet_over_keys<G>(p, at, suspicious(dk, row, rows.end) || suspicious(dv, row, rows.end));
        store_sums<G>(dk, G::kKey + G::own(), p.call.dk, at, rows, p.scale, p.call.D, p.dk_aligned);
        store_sums<G>(dv, G::kValue + G::own(), p.call.dv, at, rows, 1.0f, p.call.Dv, p.dv_aligned);
        async_proxy_fence();  // the next tile is copied to where the results have been
        release(G::kKeysEmpty, lane);
    }
    if constexpr (G::kOnePass) {
        await_writer();
        tell_writer();
    }
}

// The consumers with shared keys: the first gathers dV, the second dK.
template <class G>
EA_DEVICE void consume_shared(const KernelParams& p) {
    const int lane = thread_index() % kWarp;
    const bool gathers_values = consumer_index() == 0;
    Slot<G::kStages> slot;
    int keys_parity = 0, weights_parity = 0;
    EA_KEEP_LOOP
    for (int tile = await_tile<G>(slot); tile != kNoMore; tile = await_tile<G>(slot)) {
        const Place at = sm80::key_place<G>(p, tile);
        const Span rows = G::rows(at.lines), alive{rows.begin, smaller(rows.end, key_count(p, at.b))};
        float sums[1][G::kHead / 8][4];
        clear(sums);
        barrier_wait(G::kKeysFull, keys_parity);
        keys_parity ^= 1;
        bool more;
        EA_KEEP_LOOP
        do {
            const Step step = await_step<G>(slot);
            const Sight sight = sight_of_keys<G>(p, step, alive, rows);
            if (sight.any) {
                if (gathers_values) {
                    add_values<G>(sums, p, step, alive, sight.all, slot, weights_parity);
                } else {
                    add_keys<G>(sums, slot, weights_parity);
                }
                weights_parity ^= 1;
            }
            more = more_follow<G>(slot);
            release(slot.of(G::kEmpty, 8), lane);
            slot.advance();
        } while (more);
        meet_over_keys<G>(p, at, suspicious(sums, rows.begin + group_warp_row() + lane / 4, rows.end));
        if (gathers_values) {  // each group is done with its own of the two tiles
            store_sums<G>(sums, G::kKey, p.call.dv, at, rows, 1.0f, p.call.Dv, p.dv_aligned);
        } else {
            store_sums<G>(sums, G::kValue, p.call.dk, at, rows, p.scale, p.call.D, p.dk_aligned);
        }
        async_proxy_fence();  // the next tile is copied to where the results have been
        release(G::kKeysEmpty, lane);
    }
}

template <class G>
EA_DEVICE void init_barriers() {
    if (thread_index() == 0) {
        barrier_init(G::kKeysFull, 1);
        barrier_init(G::kKeysEmpty, kConsumerWarps);
        barrier_init(G::kWeightsFull, kConsumerWarps / kConsumers);
        barrier_init(G::kWeightsEmpty, kConsumerWarps / kConsumers);
        init_slots<G>(2);  // copies and sums
    }
}

// Grid: any; p.flags as in sm80, whose attention_key_gradient_safe does the suspicious tiles again.
template <class G>
EA_KERNEL(kBlockThreads, 1)
attention_key_gradient(EA_PARAMETER KernelParams p, EA_PARAMETER BackwardInputs in) {
    if constexpr (kHopper) {
        init_barriers<G>();
        const auto add = [&](auto& dk, auto& dv, const Place&, const Step& step, Span alive, Sight sight,
                             const Slot<G::kStages>& slot) {
            if (sight.any) add_queries<G>(dk, dv, p, step, alive, sight.all, slot);
        };
        const auto consume = [&] {
            if constexpr (G::kShared) {
                consume_shared<G>(p);
            } else {
                consume_own<G>(p, add);
            }
        };
        share_work<G>([&] { produce_queries<G>(p, in); }, consume);
    }
}

}  // namespace
}  // namespace sm90
}  // namespace efficient_attn
