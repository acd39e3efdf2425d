// dQ, dK and dV in one pass on Hopper, for heads of 65 to 128: five products a step instead of the seven of
// attention_key_gradient.h and attention_query_gradient.h. dQ = scale dS K is then a sum over blocks of threads, each
// with its keys, which is added up in global memory.
//
// It is the kernel of dK and dV and more: the two consumers write dS^T of their keys to shared memory, and multiply the
// dS of both by half of the columns of K each. What they get goes to shared memory, from where a warp for each
// consumer, beside the producer's, adds it to the sums of these columns.
//
// The sums of 64 queries have a turn for each half of the columns: tile after tile of the keys that they see adds its
// part, in the order of the keys. That is the order in which the tiles of a head are drawn, so that a tile waits for
// earlier tickets only; whoever holds one runs (see Work), and the earliest waits for nobody: no order of execution can
// stop it. Two parts are in order by what bulk_wait, sums_fence and pass_turn do behind the first, and await_turn and
// sums_fence before the second. A list would have its own order of tiles for each row, so it is left to the kernels of
// seven products. Without turns (only for a caller who asks for it) parts come in any order, and bits may differ from
// run to run.
//
// The sums are float32 [B, Hq, 2, Nq, 64], the columns of a head in two halves. The row of query i is 16 chunks of four
// columns; with m and t from 0 to 3, chunk (4 m + t) ^ (4 (i % 2)) holds the columns 16 m + 2 t + 0, 1, 8 and 9: what
// one thread has of that row, and without bank conflicts.
#pragma once

#include "cuda/sm80/attention_query_gradient.h"
#include "cuda/sm90/attention_key_gradient.h"

namespace efficient_attn {
namespace sm90 {
namespace {

template <class T>
using Backward = KeyGradient<T, 128, true>;

// Where 4 m + t of query i lies in its row, in bytes, and the sums of a half of a head from query i on.
EA_DEVICE uint32_t sum_chunk(int i, int chunk) { return static_cast<uint32_t>(chunk ^ (i % 2 * 4)) * 16; }

EA_DEVICE float* query_sums(const KernelParams& p, int b, int h, int half, int i) {
    return p.query_sums + (((static_cast<int64_t>(b) * p.call.Hq + h) * 2 + half) * p.call.Nq + i) * kPanel;
}

// Writes dS^T of the consumer's keys to its rows of a tile [keys, queries].
template <class G>
EA_DEVICE void store_gradients(const uint32_t (&gradients)[G::kN / 2][4], uint32_t tile, int lane) {
    const int row = consumer_index() * kGroupRows + group_warp_row() + lane / 4;
    const uint32_t first = tile + chunk_offset<kPanel>(row, 0) + lane % 4 * 4;  // of chunk 0; registers are scarce
    EA_UNROLL
    for (int k = 0; k < 2 * G::kN; ++k)
        store_shared_32((first ^ static_cast<uint32_t>(k / 2 << 4)) + k % 2 * (8 * 128), gradients[k / 4][k % 4]);
}

// dq = dS K for the consumer's half of the columns; of dS^T there is the tile [keys, queries].
template <class G>
EA_DEVICE void multiply_by_keys(float (&dq)[kPanel / 8][4], uint32_t tile) {
    const uint64_t a = matrix_descriptor(tile, 0, kPattern);
    const uint64_t b = matrix_descriptor(G::kKey + consumer_index() * (kGroupRows * 128), 0, kPattern);
    EA_UNROLL
    for (int k = 0; k < G::kRows / 16; ++k) {
        const uint32_t owner = k * 16 / kGroupRows, row = k * 16 % kGroupRows;
        group_multiply<typename G::T, kPanel, true, true>(dq, matrix_further(a, k * 2 * kPattern),
                                                          matrix_further(b, owner * G::kOwnBytes + row * 128), k > 0);
    }
}

// Hands half of dQ of the step in a slot over to who writes it.
template <class G>
EA_DEVICE void hand_over(const float (&dq)[kPanel / 8][4]) {
    const int lane = thread_index() % kWarp;
    await_writer();
    // Registers are scarce: the other chunks lie behind the first two.
    const int row = group_warp_row() + lane / 4;
    const uint32_t line = G::kPartials + consumer_index() * G::kPartialBytes + row * (kPanel * 4);
    const uint32_t chunks[2] = {line + sum_chunk(row, lane % 4), line + sum_chunk(row, 4 + lane % 4)};
    EA_UNROLL
    for (int k = 0; k < kPanel / 8; ++k) {
        const int n = k / 2 * 2, half = k % 2;
        store_shared_128(chunks[n / 2 % 2] + n / 4 * 128 + half * (8 * kPanel * 4),
                         {as_bits(dq[n][2 * half]), as_bits(dq[n][2 * half + 1]), as_bits(dq[n + 1][2 * half]),
                          as_bits(dq[n + 1][2 * half + 1])});
    }
    async_proxy_fence();
    tell_writer();
}

// The turn of the sums of a half of a head from query i on, and its number for the tile of keys that begins at
// `first_key`: how many tiles before it these queries see.
EA_DEVICE int32_t* query_turn(const KernelParams& p, int b, int h, int half, int i) {
    const int64_t line = (static_cast<int64_t>(b) * p.call.Hq + h) * 2 + half;
    return p.turns + line * ceil_div(p.call.Nq, kTurnQueries) + i / kTurnQueries;
}
template <class G>
EA_DEVICE int turn_number(const KernelParams& p, int first_key, int i) {
    return first_key / G::kRows - larger(0, i + p.low) / G::kRows;
}

// Adds half of dQ of a step to its sums; by one thread.
template <class G>
EA_DEVICE void add_part(const KernelParams& p, const Step& step, int b, int head, int first_key, int consumer) {
    static_assert(G::kQueries == kTurnQueries, "a step has one turn");
    const uint32_t partial = G::kPartials + consumer * G::kPartialBytes;
    float* sums = query_sums(p, b, head, consumer, step.first);
    const int bytes = (step.end - step.first) * kPanel * 4;
    if (!p.turns) {
        bulk_add(sums, partial, bytes);
        bulk_commit();
        return bulk_wait_read();
    }
    int32_t* turn = query_turn(p, b, head, consumer, step.first);
    await_turn(turn, turn_number<G>(p, first_key, step.first));
    sums_fence();
    bulk_add(sums, partial, bytes);
    bulk_commit();
    bulk_wait();
    sums_fence();
    pass_turn(turn);
}

// The warp that writes for a consumer. The producer sends the line of a step once consumers have let go of the second
// step before; then this warp has read that of the fourth one before, whose line it is.
template <class G>
EA_DEVICE void write_parts(const KernelParams& p, int consumer) {
    const int lane = thread_index() % kWarp;
    Slot<G::kStages> slot;
    EA_KEEP_LOOP
    while (true) {
        named_arrive(written_of(consumer), kGroup + kWarp);
        named_sync(part_of(consumer), kGroup + kWarp);
        const uint32_t line = G::line(slot);
        if (read_tile(line) == kNoMore) break;
        const Step step = read_step(line);
        const Words2 place = read_batch_and_line(line);
        const int b = static_cast<int>(place.x), first_key = static_cast<int>(place.y), head = read_head(line);
        if (lane == 0 && step.first < step.end) add_part<G>(p, step, b, head, first_key, consumer);
        warp_sync();
        slot.advance();
    }
    if (lane == 0) bulk_wait();
}

// Adds a step to dK and dV of the consumer's keys, and half of dQ.
template <class G>
EA_DEVICE void add_step(float (&dk)[1][G::kHead / 8][4], float (&dv)[1][G::kHead / 8][4], const KernelParams& p,
                        const Step& step, Span alive, bool full, const Slot<G::kStages>& slot) {
    static_assert(G::kStages == 2, "two tiles of dS in turns, as the slots are");
    const uint32_t tile = slot.of(G::kGradients, G::kGradientBytes);
    const int lane = thread_index() % kWarp;
    uint32_t weights[G::kN / 2][4], gradients[G::kN / 2][4];
    find_gradients<G>(weights, gradients, dv, p, step, alive, full, slot);
    store_gradients<G>(gradients, tile, lane);
    async_proxy_fence();
    named_sync(kMeetingOfBoth, kConsumers * kGroup);  // and the tile of the step before is free
    float dq[kPanel / 8][4];
    group_fence(gradients, dk[0], dq);
    multiply_by_keys<G>(dq, tile);
    group_commit();
    group_multiply_rows<typename G::T, G::kHead, G::kQueries>(dk[0], gradients, slot.of(G::kQuerySlots, G::kTileBytes));
    group_commit();
    group_wait<1>(dq, dv[0], weights);
    hand_over<G>(dq);  // while dK is multiplied
    group_wait<0>(dk[0], gradients);
}

// Grid: any; p.flags as for attention_key_gradient. p.query_sums, p.turns: zeros before.
template <class G>
EA_KERNEL(kBlockThreads, 1)
attention_backward(EA_PARAMETER KernelParams p, EA_PARAMETER BackwardInputs in) {
    if constexpr (kHopper) {
        init_barriers<G>();
        const auto consume = [&] {
            const auto add = [&](auto& dk, auto& dv, const Place&, const Step& step, Span alive, Sight sight,
                                 const Slot<G::kStages>& slot) {
                if (step.first < step.end) {
                    add_step<G>(dk, dv, p, step, alive, sight.any && sight.all, slot);
                } else {
                    await_writer();
                    tell_writer();
                }
            };
            consume_own<G>(p, add);
        };
        const auto write = [&](int consumer) {
            if (consumer < kConsumers) write_parts<G>(p, consumer);
        };
        share_work<G>([&] { produce_queries<G>(p, in); }, consume, write);
    }
}

constexpr int kRoundingThreads = 128;

// dQ from its sums. Grid: a block of threads for each tile of sm80's query gradient, with its flag.
template <class T>
EA_KERNEL(kRoundingThreads, 1)
attention_round_queries(EA_PARAMETER KernelParams p) {
    constexpr int kRows = sm80::QueryGradient<T, 128, false, 1>::kRows;
    const Place at = query_place<kRows>(p, block_index());
    const int width = static_cast<int>(p.call.D);
    bool suspect = false;
    for (int k = thread_index(); k < (at.lines.end - at.lines.begin) * 32; k += kRoundingThreads) {
        const int i = at.lines.begin + k / 32, half = k / 16 % 2, chunk = k % 16;
        const float* row = query_sums(p, at.b, at.h, half, i);
        const Words4 words = load_global(reinterpret_cast<const Words4*>(row + sum_chunk(i, chunk) / 4));
        const float sums[4] = {as_float(words.x), as_float(words.y), as_float(words.z), as_float(words.w)};
        uint16_t* target = head_pointer(p.call.dq, at.b, at.h) + i * p.call.dq.row_stride;
        EA_UNROLL
        for (int e = 0; e < 4; ++e) {
            const int d = half * kPanel + chunk / 4 * 16 + chunk % 4 * 2 + e / 2 * 8 + e % 2;
            suspect |= !finite(sums[e]);
            if (d < width) store_global(target + d, static_cast<uint16_t>(pack<T>(sums[e] * p.scale, 0.0f)));
        }
    }
    write_flag(p, suspect);
}

}  // namespace
}  // namespace sm90
}  // namespace efficient_attn
