// What the backward kernels of Hopper share.
#pragma once

#include "cuda/gradients.h"
#include "cuda/sm90/groups.h"

namespace efficient_attn {
namespace sm90 {
namespace {

// What a kernel reads by tensor copies, and its work.
struct BackwardInputs {
    TensorMap query, key, value, grad_out;
    Work work;
};

constexpr int kConsumers = 2, kConsumerWarps = kConsumers * kGroup / kWarp, kBlockThreads = (1 + kConsumers) * kGroup;

// This thread's consumer, and the first row of its warp in the group's tile.
EA_DEVICE int consumer_index() { return thread_index() / kGroup - 1; }
EA_DEVICE int group_warp_row() { return thread_index() % kGroup / kWarp * 16; }

// The tile that a slot's step is of, once it has arrived.
template <class G>
EA_DEVICE int await_tile(const Slot<G::kStages>& slot) {
    barrier_wait(slot.of(G::kFull, 8), slot.parity);
    return read_tile(G::line(slot));
}

// The step in a slot, once it has arrived.
template <class G>
EA_DEVICE Step await_step(const Slot<G::kStages>& slot) {
    barrier_wait(slot.of(G::kFull, 8), slot.parity);
    return read_step(G::line(slot));
}

// Whether more follow it. Asked for behind the step: registers are scarce.
template <class G>
EA_DEVICE bool more_follow(const Slot<G::kStages>& slot) {
    return read_more(G::line(slot));
}

// Starts copying what a step's slot holds of two tensors.
template <class G, int kRows>
EA_DEVICE void load_pair(const TensorMap& first, uint32_t first_tile, const TensorMap& second, uint32_t second_tile,
                         uint32_t full, int row, int h, int b) {
    barrier_arrive_expect(full, 2 * G::kTileBytes);
    load_panels<G::kHead, kRows>(first_tile, first, full, row, h, b);
    load_panels<G::kHead, kRows>(second_tile, second, full, row, h, b);
}

// Makes the barriers of the slots, which so many arrivals fill.
template <class G>
EA_DEVICE void init_slots(int filled_by) {
    for (uint32_t stage = 0; stage < G::kStages; ++stage) {
        barrier_init(G::kFull + stage * 8, filled_by);
        barrier_init(G::kEmpty + stage * 8, kConsumerWarps);
    }
    barrier_init_fence();
}

// s = A B^T of a group: A [64, kHead] and B [kN, kHead] are tiles. Not complete before a group_wait.
template <class T, int kHead, int kN>
EA_DEVICE void group_multiply_transposed(float (&s)[kN / 8][4], uint32_t a, uint32_t b) {
    const uint64_t a_matrix = matrix_descriptor(a, 0, kPattern), b_matrix = matrix_descriptor(b, 0, kPattern);
    EA_UNROLL
    for (int k = 0; k < kHead / 16; ++k) {
        const uint32_t panel = k * 16 / kPanel, inside = k * 16 % kPanel * 2;
        group_multiply<T, kN, false>(s, matrix_further(a_matrix, panel * (kGroupRows * 128) + inside),
                                     matrix_further(b_matrix, panel * (kN * 128) + inside), k > 0);
    }
}

// c += A B of a group: A [64, kK] in registers, B a tile [kK, kHead]. Not complete before a group_wait.
template <class T, int kHead, int kK>
EA_DEVICE void group_multiply_rows(float (&c)[kHead / 8][4], const uint32_t (&a)[kK / 16][4], uint32_t b) {
    const uint64_t matrix = matrix_descriptor(b, kK * 128, kPattern);
    EA_UNROLL
    for (int k = 0; k < kK / 16; ++k)
        group_multiply<T, kHead, true>(c, a[k], matrix_further(matrix, k * (16 * 128)), true);
}

// A bit for each of a thread's elements of kN times eight columns.
template <int kN>
using Bits = std::conditional_t<(kN > 8), uint64_t, uint32_t>;
template <int kN>
constexpr Bits<kN> kEveryPair = ~Bits<kN>{0};

// Which pairs `hide` lets be seen, a bit each as is_kept reads them: known before there are scores, whose registers are
// free until then.
template <int kN, class Hide>
EA_DEVICE Bits<kN> visible_bits(Hide hide) {
    static_assert(kN <= 16, "one bit an element");
    float s[1][kN][4];
    clear(s);
    hide(s);
    Bits<kN> visible = 0;
    each(s, [&](float x, int, int n, int e) { visible |= static_cast<Bits<kN>>(x == 0.0f) << (n * 4 + e); });
    return visible;
}

// Rounds a group's rows to T and writes those below `end`, through the group's own tile in shared memory. `first` is
// the group's first row in the tensor.
template <class T, int kHead>
EA_DEVICE void store_panels(float (&c)[1][kHead / 8][4], uint32_t tile, uint16_t* base, int64_t row_stride, int first,
                            int end, int width, bool aligned) {
    const int lane = thread_index() % kWarp;
    EA_UNROLL
    for (int panel = 0; panel < kHead / kPanel; ++panel) {
        float part[1][kPanel / 8][4];
        each(part, [&](float& x, int, int n, int e) { x = c[0][panel * (kPanel / 8) + n][e]; });
        store_rows<T, kPanel>(part, tile + panel * (kGroupRows * 128), base + panel * kPanel, row_stride, first,
                              group_warp_row(), end, 0, width - panel * kPanel, aligned, lane);
    }
}

constexpr int kMeetingOfBoth = 5;  // the named barrier of both consumers

// In one pass, those of a consumer and the warp that writes for it: a part of dQ is there, and it is written.
EA_DEVICE int part_of(int consumer) { return 6 + consumer; }
EA_DEVICE int written_of(int consumer) { return 8 + consumer; }

// The flag of the sm80 kernel's tile of kRows lines in which a consumer's lines begin, of an axis of `count`. Their
// tile begins at line `begin`; -1: its block of the list has no such lines.
template <int kRows>
EA_DEVICE int64_t flag_of(bool listed, int block, int count, int64_t head, int begin, int line, bool last_first) {
    const Tiling tiles = tiling<kRows>(listed, block);
    const int in_head = ceil_div(count, tiles.block) * tiles.tiles_per_block;
    const int tile = line / tiles.block * tiles.tiles_per_block + line % tiles.block / kRows;
    if (listed ? line / block != begin / block : tile >= in_head) return -1;
    return head * in_head + (last_first ? in_head - 1 - tile : tile);
}

// By one thread: whether the lines of a consumer are suspicious, into the flag of that number (below 0: none), or where
// both consumers share the flag, into a half of it.
template <bool kHalves>
EA_DEVICE void write_consumer_flag(int32_t* flags, int64_t place, int consumer, bool suspect) {
    if (place < 0) return;
    if (kHalves) {
        store_global(reinterpret_cast<uint16_t*>(flags + place) + consumer, static_cast<uint16_t>(suspect));
    } else {
        store_global(flags + place, suspect ? 1 : 0);
    }
}

// Every warp of a consumer is done with its tiles in shared memory; with its flag.
template <bool kHalves>
EA_DEVICE void meet(int32_t* flags, int64_t place, bool suspect) {
    const int consumer = consumer_index();
    if (!flags) return named_sync(meeting_of(consumer), kGroup);
    suspect = named_any(meeting_of(consumer), kGroup, suspect);
    if (thread_index() % kGroup == 0) write_consumer_flag<kHalves>(flags, place, consumer, suspect);
}

}  // namespace
}  // namespace sm90
}  // namespace efficient_attn
