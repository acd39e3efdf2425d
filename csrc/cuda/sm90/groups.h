// What the kernels of Hopper share: a producer that has tiles copied into slots, consumers that multiply, and the order
// of their work.
//
// Tiles lie in shared memory as panels of 64 columns, [rows, 64] each with rows of 128 bytes, swizzled as TMA writes
// and wgmma reads them; chunk_offset<64> of tile.h addresses them.
#pragma once

#include "cuda/scores.h"

namespace efficient_attn {
namespace sm90 {
namespace {

constexpr int kGroup = 128;             // threads of a warpgroup
constexpr int kGroupRows = 64;          // of the accumulators of one
constexpr int kPanel = 64;              // columns
constexpr uint32_t kPattern = 8 * 128;  // bytes of eight rows of a panel, after which the swizzle repeats

// A slot of a ring of kStages, and the parity of the phase in which it is filled.
template <int kStages>
struct Slot {
    int index = 0, parity = 0;

    EA_DEVICE void advance() {
        if (++index < kStages) return;
        index = 0;
        parity ^= 1;
    }
    EA_DEVICE uint32_t of(uint32_t first, uint32_t bytes) const { return first + static_cast<uint32_t>(index) * bytes; }
};

// The work of a grid: tiles numbered head by head, in each head the longest under a causal mask first.
struct Work {
    int tiles, tiles_per_head, heads_at_once;
};

// The work of `tiles` tiles of so many heads, `shared` of which read the same `bytes` of global memory.
inline Work work_of(int64_t tiles, int64_t heads, int64_t bytes, int64_t shared = 1) {
    constexpr int64_t kCacheBytes = int64_t{32} << 20;
    return {static_cast<int>(tiles), static_cast<int>(tiles / heads),
            static_cast<int>(bounded(kCacheBytes / bytes, 1, heads / shared) * shared)};
}

// The tiles of one block of threads, f(tile) each. Work lies in sections of heads whose keys and values stay in the L2
// cache; in a section the longest tiles of all heads come first. Blocks take it in turns there and back.
template <class Function>
EA_DEVICE void each_tile(const Work& in, Function f) {
    const int blocks = static_cast<int>(block_count()), block = static_cast<int>(block_index());
    const int heads = in.tiles / in.tiles_per_head, in_section = in.tiles_per_head * in.heads_at_once;
    EA_KEEP_LOOP
    for (int first = 0, turned = 0; first < in.tiles; first += blocks, turned ^= 1) {
        const int work = first + (turned ? blocks - 1 - block : block);
        if (work >= in.tiles) continue;
        const int head = work / in_section * in.heads_at_once, here = smaller(in.heads_at_once, heads - head);
        const int place = work % in_section;
        const int tile = (head + place % here) * in.tiles_per_head + place / here;
        f(tile);
    }
}

// A kernel whose barriers are made: its first warpgroup is the producer, of which one warp works, and the others
// consume.
template <class Shape, class Produce, class Consume>
EA_DEVICE void share_work(Produce produce, Consume consume) {
    block_sync();
    if (thread_index() < kGroup) {
        registers_give<Shape::kProducerRegisters>();
        if (thread_index() < kWarp) produce();
    } else {
        registers_take<Shape::kConsumerRegisters>();
        consume();
    }
}

// Starts copying a tile of rows, panel by panel.
template <int kHead, int kRows>
EA_DEVICE void load_panels(uint32_t tile, const TensorMap& map, uint32_t barrier, int row, int h, int b) {
    EA_KEEP_LOOP
    for (int panel = 0; panel < kHead / kPanel; ++panel)
        tensor_load(tile + panel * kRows * 128, map, barrier, panel * kPanel, row, h, b);
}

// The named barrier of one consumer.
EA_DEVICE int meeting_of(int consumer) { return 3 + consumer; }

// Says that this warp is done with what `barrier` guards.
EA_DEVICE void release(uint32_t barrier, int lane) {
    warp_sync();
    if (lane == 0) barrier_arrive(barrier);
}

// The line of a slot, a word for each lane: which step it holds, whether more follow in the tile, and its query head.
constexpr uint32_t kLineBytes = kWarp * 4;

EA_DEVICE void send_step(uint32_t line, const Step& step, bool more, int head, int lane) {
    const int word = lane == 0   ? step.first
                     : lane == 1 ? step.end
                     : lane == 2 ? step.tile
                     : lane == 3 ? step.offset
                     : lane == 4 ? more
                                 : head;
    store_shared_32(line + lane * 4, static_cast<uint32_t>(word));
}

// Says whether more follow.
EA_DEVICE bool read_step(Step& step, uint32_t line) {
    const Words4 words = load_shared_128(line);
    step = {static_cast<int>(words.x), static_cast<int>(words.y), static_cast<int>(words.z), static_cast<int>(words.w)};
    return load_shared_32(line + 16) != 0;
}

EA_DEVICE int read_head(uint32_t line) { return static_cast<int>(load_shared_32(line + 20)); }

}  // namespace
}  // namespace sm90
}  // namespace efficient_attn
