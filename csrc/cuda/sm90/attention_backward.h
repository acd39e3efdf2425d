// dQ, dK and dV in one pass on Hopper, for heads of 65 to 128: five products a step instead of the seven of
// attention_key_gradient.h and attention_query_gradient.h. dQ = scale dS K is then a sum over blocks of threads, each
// with its keys, which is added up in global memory in whatever order they come. So its bits may differ from run to
// run, and only a caller who asks for it gets this kernel.
//
// It is the kernel of dK and dV and more: the two consumers write dS^T of their keys to shared memory, and multiply the
// dS of both by half of the columns of K each. What they get goes through shared memory to the sums of these columns.
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

// Adds half of dQ of the step in a slot to its sums.
template <class G>
EA_DEVICE void add_to_sums(const float (&dq)[kPanel / 8][4], const KernelParams& p, int b,
                           const Slot<G::kStages>& slot) {
    const int lane = thread_index() % kWarp;
    const uint32_t partial = G::kPartials + consumer_index() * G::kPartialBytes;
    const bool adds = thread_index() % kGroup == 0;
    if (adds) bulk_wait_read();
    named_sync(meeting_of(consumer_index()), kGroup);  // the sum before no longer reads
    // Registers are scarce: the other chunks lie behind the first two.
    const int row = group_warp_row() + lane / 4;
    const uint32_t line = partial + row * (kPanel * 4);
    const uint32_t chunks[2] = {line + sum_chunk(row, lane % 4), line + sum_chunk(row, 4 + lane % 4)};
    EA_UNROLL
    for (int k = 0; k < kPanel / 8; ++k) {
        const int n = k / 2 * 2, half = k % 2;
        store_shared_128(chunks[n / 2 % 2] + n / 4 * 128 + half * (8 * kPanel * 4),
                         {as_bits(dq[n][2 * half]), as_bits(dq[n][2 * half + 1]), as_bits(dq[n + 1][2 * half]),
                          as_bits(dq[n + 1][2 * half + 1])});
    }
    async_proxy_fence();
    named_sync(meeting_of(consumer_index()), kGroup);
    const uint32_t words = slot.of(G::kSteps, kLineBytes);
    const Step step = read_step(words);  // again: registers are scarce
    const int head = read_head(words);
    if (!adds) return;
    bulk_add(query_sums(p, b, head, consumer_index(), step.first), partial, (step.end - step.first) * kPanel * 4);
    bulk_commit();
}

// Adds a step to dK and dV of the consumer's keys, and half of dQ.
template <class G>
EA_DEVICE void add_step(float (&dk)[1][G::kHead / 8][4], float (&dv)[1][G::kHead / 8][4], const KernelParams& p, int b,
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
    add_to_sums<G>(dq, p, b, slot);  // while dK is multiplied
    group_wait<0>(dk[0], gradients);
}

// Grid: any; p.flags as for attention_key_gradient. p.query_sums: zeros before.
template <class G>
EA_KERNEL(kBlockThreads, 1)
attention_backward(EA_PARAMETER KernelParams p, EA_PARAMETER BackwardInputs in) {
    if constexpr (kHopper) {
        init_barriers<G>();
        const auto consume = [&] {
            const auto add = [&](auto& dk, auto& dv, const Place& at, const Step& step, Span alive, Sight sight,
                                 const Slot<G::kStages>& slot) {
                if (step.first < step.end) add_step<G>(dk, dv, p, at.b, step, alive, sight.any && sight.all, slot);
            };
            consume_own<G>(p, add);
            if (thread_index() % kGroup == 0) bulk_wait();
        };
        share_work<G>([&] { produce_queries<G>(p, in); }, consume);
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
