// Attention forward on Hopper (wgmma, TMA), as sm80/attention_forward.h defines it, with the same tiles.
//
// After FlashAttention-3 (Shah et al., 2024): the warpgroups of a block of threads have different tasks. One of them,
// the producer, walks the keys that a tile of 128 queries sees and has them copied into slots in shared memory; it
// alone reads lists of blocks. Two consumers with 64 queries each multiply. They hear of each step through its slot:
// which keys it holds, which bit tile, whether it is the last. Barriers tell when a slot is full and when it is empty
// again.
//
// A consumer starts the scores of a step together with the sum over the values of the step before, so that its softmax
// runs while tensor cores work; and the two consumers take turns in starting (ping-pong), so that one's softmax falls
// into the other's products. A block of threads works off many tiles, the long ones first.
//
// Shared memory: Q of each consumer, K and V slots, all as panels of 64 columns (128 bytes a row, swizzled); a line of
// 128 bytes for the step in each slot; barriers. A consumer's output passes through the memory of its Q, or for heads
// of up to 64 through its own, so that the next Q arrives meanwhile.
#pragma once

#include "cuda/sm90/groups.h"

namespace efficient_attn {
namespace sm90 {
namespace {

// What a kernel reads by tensor copies, and its work.
struct ForwardInputs {
    TensorMap query, key, value;
    Work work;
};

// kWide: steps of more keys, of which no list is cut.
template <class T_, int kHead_, bool kWide_ = false>
struct Forward {
    using T = T_;
    static constexpr int kHead = kHead_;
    static constexpr bool kWide = kWide_, kOutputApart = kHead == 64;  // of wider heads the output has no room
    static constexpr int kConsumers = 2, kRows = kForwardRows;
    static constexpr int kKeys = kWide ? wide_step(kHead) : kHead == 256 ? 64 : 128;
    static_assert(kRows == kConsumers * kGroupRows);
    static constexpr int kThreads = (1 + kConsumers) * kGroup, kStages = kHead == 64              ? 4
                                                                         : kHead == 128 && !kWide ? 3
                                                                                                  : 2;
    static constexpr int kProducerRegisters = kHead == 64 ? 56 : 40, kConsumerRegisters = kHead == 64 ? 224 : 232;
    static constexpr bool kTurns = kHead <= 128;
    static constexpr uint32_t kQueryBytes = kGroupRows * kHead * 2, kTileBytes = kKeys * kHead * 2;
    static constexpr uint32_t kQuery = 0, kKeySlots = kConsumers * kQueryBytes;
    static constexpr uint32_t kValueSlots = kKeySlots + kStages * kTileBytes;
    static constexpr uint32_t kSteps = kValueSlots + kStages * kTileBytes;
    static constexpr uint32_t kOutput = kSteps + kStages * kLineBytes;
    static constexpr uint32_t kQueryFull = kOutput + (kOutputApart ? kConsumers * kQueryBytes : 0);
    static constexpr uint32_t kQueryEmpty = kQueryFull + kConsumers * 8;  // of each consumer
    static constexpr uint32_t kKeyFull = kQueryEmpty + kConsumers * 8, kKeyEmpty = kKeyFull + kStages * 8;
    static constexpr uint32_t kValueFull = kKeyEmpty + kStages * 8, kValueEmpty = kValueFull + kStages * 8;
    static constexpr uint32_t kSharedBytes = kValueEmpty + kStages * 8;

    float out[1][kHead / 8][4];       // not yet divided by `total`
    float top[1][2], total[1][2];     // see online_softmax
    uint32_t weights[kKeys / 16][4];  // of the step whose values are still to be added, as A operands
};

// Named barriers: 0 is block_sync's.
EA_DEVICE int turn_of(int consumer) { return 1 + consumer; }

// --- the producer ---

template <class F>
EA_DEVICE void load_queries(const ForwardInputs& in, const Place& at, int parity) {
    EA_KEEP_LOOP
    for (int consumer = 0; consumer < F::kConsumers; ++consumer) {
        const uint32_t full = F::kQueryFull + consumer * 8;
        barrier_wait(F::kQueryEmpty + consumer * 8, parity ^ 1);
        barrier_arrive_expect(full, F::kQueryBytes);
        load_panels<F::kHead, kGroupRows>(F::kQuery + consumer * F::kQueryBytes, in.query, full,
                                          at.lines.begin + consumer * kGroupRows, at.h, at.b);
    }
}

// By one warp. A tile without visible keys has one step, with no key in it.
template <class F>
EA_DEVICE void produce(const KernelParams& p, const ForwardInputs& in) {
    const int lane = thread_index() % kWarp;
    Slot<F::kStages> slot;
    int query_parity = 0;
    draw_tiles(in.work, [&](int tile) {
        const Place at = query_place<F::kRows>(p, tile);
        if (at.lines.begin >= at.lines.end) {
            if (p.flags && lane == 0) store_global(p.flags + tile, 0);
            return;
        }
        const int kv = at.h / p.group;
        const Reach sees = reach(at.lines.begin, at.lines.end - 1, p.low, p.high, key_count(p, at.b));
        Walk<F::kKeys, kByQuery> walk(p, at.b, at.h, at.lines.begin, sees.any);
        Step next{0, 0, -1, 0};
        bool more = walk.next(p, next), first = true;
        do {
            const Step step = next;
            more = more && walk.next(p, next);
            barrier_wait(slot.of(F::kKeyEmpty, 8), slot.parity ^ 1);
            send_step(slot.of(F::kSteps, kLineBytes), step, more, at.h, tile, lane);
            warp_sync();
            if (lane == 0) {
                const uint32_t key_full = slot.of(F::kKeyFull, 8), value_full = slot.of(F::kValueFull, 8);
                barrier_arrive_expect(key_full, F::kTileBytes);
                load_panels<F::kHead, F::kKeys>(slot.of(F::kKeySlots, F::kTileBytes), in.key, key_full, step.first, kv,
                                                at.b);
                barrier_wait(slot.of(F::kValueEmpty, 8), slot.parity ^ 1);
                barrier_arrive_expect(value_full, F::kTileBytes);
                load_panels<F::kHead, F::kKeys>(slot.of(F::kValueSlots, F::kTileBytes), in.value, value_full,
                                                step.first, kv, at.b);
                if (first) load_queries<F>(in, at, query_parity);
            }
            first = false;
            slot.advance();
        } while (more);
        query_parity ^= 1;
    });
    barrier_wait(slot.of(F::kKeyEmpty, 8), slot.parity ^ 1);
    send_end(slot.of(F::kSteps, kLineBytes), lane);
    release(slot.of(F::kKeyFull, 8), lane);
}

// --- the consumers ---

// Which of the two, this thread's lane, and the first row of its warp in the tile.
struct Consumer {
    int index, lane, row;
};

// The tile that a slot's step is of, once it has arrived.
template <class F>
EA_DEVICE int receive_tile(const Slot<F::kStages>& slot) {
    barrier_wait(slot.of(F::kKeyFull, 8), slot.parity);
    return read_tile(slot.of(F::kSteps, kLineBytes));
}

// The step in a slot, once its keys are there; says whether more follow.
template <class F>
EA_DEVICE bool receive(Step& step, const Slot<F::kStages>& slot) {
    barrier_wait(slot.of(F::kKeyFull, 8), slot.parity);
    const uint32_t line = slot.of(F::kSteps, kLineBytes);
    step = read_step(line);
    return read_more(line);
}

// Starts s = Q K^T.
template <class F>
EA_DEVICE void start_scores(float (&s)[1][F::kKeys / 8][4], int consumer, const Slot<F::kStages>& slot) {
    const uint64_t queries = matrix_descriptor(F::kQuery + consumer * F::kQueryBytes, 0, kPattern);
    const uint64_t keys = matrix_descriptor(slot.of(F::kKeySlots, F::kTileBytes), 0, kPattern);
    group_fence(s[0]);
    EA_UNROLL
    for (int k = 0; k < F::kHead / 16; ++k) {
        const uint32_t panel = k / 4, column = k % 4 * 32;
        group_multiply<typename F::T, F::kKeys, false>(s[0], matrix_further(queries, panel * kGroupRows * 128 + column),
                                                       matrix_further(keys, panel * F::kKeys * 128 + column), k > 0);
    }
    group_commit();
}

// Starts out += P V.
template <class F>
EA_DEVICE void start_sums(F& f, const Slot<F::kStages>& slot) {
    const uint64_t values = matrix_descriptor(slot.of(F::kValueSlots, F::kTileBytes), F::kKeys * 128, kPattern);
    group_fence(f.out[0], f.weights);
    EA_UNROLL
    for (int k = 0; k < F::kKeys / 16; ++k)
        group_multiply<typename F::T, F::kHead, true>(f.out[0], f.weights[k], matrix_further(values, k * 2 * kPattern),
                                                      true);
    group_commit();
}

template <class F>
EA_DEVICE void mask_scores(float (&s)[1][F::kKeys / 8][4], const KernelParams& p, const Place& at, const Step& step,
                           const Consumer& c) {
    // Whether all pairs are visible, asked without what would have to be kept in registers from step to step.
    const int first = at.lines.begin + c.index * kGroupRows, last = first + kGroupRows - 1;
    const bool whole = step.tile < 0 && step.end == step.first + F::kKeys && step.first >= last + p.low &&
                       step.first + F::kKeys <= first + p.high + 1;
    if (whole) return;
    const int row = at.lines.begin + c.row + c.lane / 4;
    if constexpr (F::kWide) {
        hide_outside(s, step, row, at.lines, p.low, p.high, c.lane);
    } else {
        hide(s, p, step, row, at.lines, p.low, p.high, c.lane);
    }
}

// Walks the steps of a tile.
template <class F>
EA_DEVICE void attend(F& f, const KernelParams& p, const Place& at, const Consumer& c, Slot<F::kStages>& keys,
                      Slot<F::kStages>& values) {
    float s[1][F::kKeys / 8][4], fade[1][2];
    clear(f.out);
    EA_UNROLL
    for (int r = 0; r < 2; ++r) f.top[0][r] = -infinity(), f.total[0][r] = 0.0f;

    Step step;
    bool more = receive<F>(step, keys);
    start_scores<F>(s, c.index, keys);
    group_wait<0>(s[0]);
    release(keys.of(F::kKeyEmpty, 8), c.lane);
    keys.advance();
    mask_scores<F>(s, p, at, step, c);
    online_softmax(s, f.top, f.total, fade, p.score_scale);
    pack_a<typename F::T>(f.weights, s[0]);

    EA_KEEP_LOOP
    while (more) {
        more = receive<F>(step, keys);
        if (F::kTurns) named_sync(turn_of(c.index), F::kConsumers * kGroup);
        start_scores<F>(s, c.index, keys);
        barrier_wait(values.of(F::kValueFull, 8), values.parity);
        start_sums(f, values);
        if (F::kTurns) named_arrive(turn_of(1 - c.index), F::kConsumers * kGroup);
        group_wait<1>(s[0]);
        release(keys.of(F::kKeyEmpty, 8), c.lane);
        keys.advance();
        mask_scores<F>(s, p, at, step, c);
        const bool fades = online_softmax(s, f.top, f.total, fade, p.score_scale);
        // Waiting for the next keys here keeps ptxas from moving the group_wait to before the softmax.
        if (more) barrier_wait(keys.of(F::kKeyFull, 8), keys.parity);
        group_wait<0>(f.out[0], f.weights);
        release(values.of(F::kValueEmpty, 8), c.lane);
        values.advance();
        if (warp_any(fades)) each(f.out, [&](float& x, int m, int, int e) { x *= fade[m][e / 2]; });
        pack_a<typename F::T>(f.weights, s[0]);
    }

    barrier_wait(values.of(F::kValueFull, 8), values.parity);
    start_sums(f, values);
    group_wait<0>(f.out[0], f.weights);
    release(values.of(F::kValueEmpty, 8), c.lane);
    values.advance();
}

// Divides by the sums and writes out and lse; each consumer has half of the tile's flag.
template <class F>
EA_DEVICE void store_output(F& f, const KernelParams& p, const Place& at, int tile, const Consumer& c) {
    const int row = at.lines.begin + c.row + c.lane / 4;
    if (p.flags) {
        const bool suspect = named_any(meeting_of(c.index), kGroup, suspicious(f.out, row, at.lines.end));
        if (thread_index() % kGroup == 0)
            store_global(reinterpret_cast<uint16_t*>(p.flags + tile) + c.index, static_cast<uint16_t>(suspect));
    } else {
        named_sync(meeting_of(c.index), kGroup);  // every warp is done with Q
    }
    float factor[1][2];
    finish_softmax(f.top, f.total, factor, p, at, row, c.lane);
    each(f.out, [&](float& x, int m, int, int e) { x *= factor[m][e / 2]; });
    constexpr uint32_t target = F::kOutputApart ? F::kOutput : F::kQuery;
    store_rows<typename F::T, F::kHead>(f.out, target, head_pointer(p.call.out, at.b, at.h), p.call.out.row_stride,
                                        at.lines.begin, c.row, at.lines.end, 0, static_cast<int>(p.call.Dv),
                                        p.out_aligned, c.lane);
    if (!F::kOutputApart) async_proxy_fence();  // Q of the next tile is copied to where the output has been
}

template <class F>
EA_DEVICE void consume(const KernelParams& p) {
    const int lane = thread_index() % kWarp, index = thread_index() / kGroup - 1;
    const Consumer c{index, lane, thread_index() / kWarp * 16 - kGroupRows};
    Slot<F::kStages> keys, values;
    int query_parity = 0;
    if (F::kTurns && index == 1) named_arrive(turn_of(0), F::kConsumers * kGroup);
    EA_KEEP_LOOP
    for (int tile = receive_tile<F>(keys); tile != kNoMore; tile = receive_tile<F>(keys)) {
        const Place at = query_place<F::kRows>(p, tile);
        F f;
        barrier_wait(F::kQueryFull + index * 8, query_parity);
        query_parity ^= 1;
        attend(f, p, at, c, keys, values);
        if (F::kOutputApart) release(F::kQueryEmpty + index * 8, lane);
        store_output(f, p, at, tile, c);
        if (!F::kOutputApart) release(F::kQueryEmpty + index * 8, lane);
    }
    if (F::kTurns && index == 0) named_sync(turn_of(0), F::kConsumers * kGroup);  // the last turn given
}

template <class F>
EA_DEVICE void forward(const KernelParams& p, const ForwardInputs& in) {
    if constexpr (kHopper) {
        constexpr int kConsumerWarps = F::kConsumers * kGroup / kWarp;
        if (thread_index() == 0) {
            for (uint32_t consumer = 0; consumer < F::kConsumers; ++consumer) {
                barrier_init(F::kQueryFull + consumer * 8, 1);
                barrier_init(F::kQueryEmpty + consumer * 8, kGroup / kWarp);
            }
            for (uint32_t stage = 0; stage < F::kStages; ++stage) {
                barrier_init(F::kKeyFull + stage * 8, 1);
                barrier_init(F::kKeyEmpty + stage * 8, kConsumerWarps);
                barrier_init(F::kValueFull + stage * 8, 1);
                barrier_init(F::kValueEmpty + stage * 8, kConsumerWarps);
            }
            barrier_init_fence();
            tensor_prefetch(in.query);
            tensor_prefetch(in.key);
            tensor_prefetch(in.value);
        }
        share_work<F>([&] { produce<F>(p, in); }, [&] { consume<F>(p); });
    }
}

// Grid: any; p.flags as in sm80, whose attention_forward_safe does the suspicious tiles again.
template <class F>
EA_KERNEL(F::kThreads, 1)
attention_forward(EA_PARAMETER KernelParams p, EA_PARAMETER ForwardInputs in) {
    forward<F>(p, in);
}

// The same under a name of its own, for profilers.
template <class F>
EA_KERNEL(F::kThreads, 1)
attention_forward_wide(EA_PARAMETER KernelParams p, EA_PARAMETER ForwardInputs in) {
    forward<F>(p, in);
}

}  // namespace
}  // namespace sm90
}  // namespace efficient_attn
