// What the kernels of Hopper share: a producer that has tiles copied into slots, consumers that multiply, and the order
// of their work.
//
// Tiles lie in shared memory as panels of 64 columns, [rows, 64] each with rows of 128 bytes, swizzled as TMA writes
// and wgmma reads them; chunk_offset<64> of tile.h addresses them.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <type_traits>

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

// The work of a grid: its tiles in the order of tickets. The first ticket of a block of threads is its number; further
// ones it draws from a counter, so that whoever is done goes on, and the tiles that take longest come first. Which
// block does a tile changes no bit of it. Where tiles wait for those of earlier tickets, the first one is drawn too:
// then whoever holds a ticket runs, and the earliest of them waits for nobody.
struct Work {
    int tiles, tiles_per_head, heads_at_once;
    int tiles_per_block;     // of a list
    bool last_first;         // tiles of a head are numbered from its last block on
    int given;               // tickets that are numbers of blocks of threads; 0: every ticket is drawn
    int32_t* counter;        // 0 before; null: there are no more tiles than blocks of threads
    const int32_t* order;    // of each head of the list, its blocks with the longest first; null: as they are numbered
    int heads, order_heads;  // of a batch element, and of these in `order`: all or one
    bool order_batch;        // whether each batch element has an order of its own
};

// The work of `tiles` tiles of so many heads, `shared` of which read the same `bytes` of global memory.
inline Work work_of(int64_t tiles, int64_t heads, int64_t bytes, int64_t shared = 1) {
    constexpr int64_t kCacheBytes = int64_t{32} << 20;
    Work work{};
    work.tiles = static_cast<int>(tiles);
    work.tiles_per_head = static_cast<int>(tiles / heads);
    work.heads_at_once = static_cast<int>(bounded(kCacheBytes / bytes, 1, heads / shared) * shared);
    return work;
}

// How many blocks of threads do the work on so many processors: with more tiles than that they draw from the counter,
// and where tiles wait for earlier ones, always.
inline int64_t share_out(Work& work, int64_t processors, int32_t* counter, bool waits = false) {
    work.given = static_cast<int>(std::min<int64_t>(work.tiles, processors));
    if (work.tiles <= processors && !waits) return work.tiles;
    if (!counter) throw std::logic_error("efficient_attn: tickets are to be drawn, and there is no counter of them");
    const int64_t blocks = work.given;
    work.counter = counter;
    if (waits) work.given = 0;
    return blocks;
}

// The order of a list's blocks, of `heads` heads of a batch element and tiles of at most `rows` lines.
inline void put_in_order(Work& work, const MaskView& mask, const int32_t* order, int64_t heads, int64_t block,
                         int64_t rows) {
    if (!mask.indptr) return;
    // Rows of a list differ at random: a last section of few tiles would leave processors waiting for its longest.
    constexpr int kEnough = 512;
    const auto parts = [](int whole, int part) { return (whole + part - 1) / part; };
    const int all = work.tiles / work.tiles_per_head, least = std::min(all, parts(kEnough, work.tiles_per_head));
    work.heads_at_once = parts(all, parts(all, std::max(work.heads_at_once, least)));
    work.order = order;
    work.tiles_per_block = static_cast<int>((block + rows - 1) / rows);
    work.heads = static_cast<int>(heads);
    work.order_heads = mask.heads == 1 ? 1 : work.heads;
    work.order_batch = mask.batch > 1;
}

// The tile of a ticket. Work lies in sections of heads whose keys and values stay in the L2 cache; in a section the
// longest tiles of all heads come first.
EA_DEVICE int tile_of(const Work& in, int ticket) {
    const int in_section = in.tiles_per_head * in.heads_at_once;
    const int first = ticket / in_section * in.heads_at_once;
    const int here = smaller(in.heads_at_once, in.tiles / in.tiles_per_head - first), place = ticket % in_section;
    const int head = first + place % here, rank = place / here;
    if (!in.order) return head * in.tiles_per_head + rank;
    const int list = (in.order_batch ? head / in.heads * in.order_heads : 0) + head % in.heads % in.order_heads;
    const int blocks = in.tiles_per_head / in.tiles_per_block, part = rank % in.tiles_per_block;
    const int block = load_global(in.order + static_cast<int64_t>(list) * blocks + rank / in.tiles_per_block);
    const int tile = block * in.tiles_per_block + part;
    return head * in.tiles_per_head + (in.last_first ? in.tiles_per_head - 1 - tile : tile);
}

// The tiles of one block of threads, f(tile) each: by the producer's warp, which tells the consumers (see send_step).
template <class Function>
EA_DEVICE void draw_tiles(const Work& in, Function f) {
    int ticket = in.given ? static_cast<int>(block_index()) : draw_ticket(in.counter, in.tiles);
    EA_KEEP_LOOP
    while (ticket < in.tiles) {
        f(tile_of(in, ticket));
        ticket = in.counter ? in.given + draw_ticket(in.counter, in.tiles - in.given) : in.tiles;
    }
}

struct Nobody {
    EA_DEVICE void operator()(int) const {}
};

// A kernel whose barriers are made: the first warp of its first warpgroup is the producer, the others of that one may
// write for a consumer each, write(consumer), and the other warpgroups consume.
template <class Shape, class Produce, class Consume, class Write = Nobody>
EA_DEVICE void share_work(Produce produce, Consume consume, Write write = {}) {
    require_aligned_shared();
    block_sync();
    if (thread_index() < kGroup) {
        registers_give<Shape::kProducerRegisters>();
        if constexpr (std::is_same_v<Write, Nobody>) {
            if (thread_index() < kWarp) produce();
        } else {
            const int warp = uniform(thread_index() / kWarp);
            if (warp == 0) {
                produce();
            } else {
                write(warp - 1);
            }
        }
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

// The line of a slot, a word for each lane: which step it holds, whether more follow in the tile, its query head and
// its tile; tile kNoMore, in a slot with nothing else in it, ends the consumers.
constexpr uint32_t kLineBytes = kWarp * 4;
constexpr int kNoMore = -1;

// With kPlaced also the batch element and first line of the tile, for who writes parts of dQ.
template <bool kPlaced = false>
EA_DEVICE void send_step(uint32_t line, const Step& step, bool more, int head, int tile, int lane, int b = 0,
                         int first_line = 0) {
    const int word = lane == 0              ? step.first
                     : lane == 1            ? step.end
                     : lane == 2            ? step.tile
                     : lane == 3            ? step.offset
                     : lane == 4            ? more
                     : lane == 5            ? head
                     : kPlaced && lane == 8 ? b
                     : kPlaced && lane == 9 ? first_line
                                            : tile;
    store_shared_32(line + lane * 4, static_cast<uint32_t>(word));
}

EA_DEVICE Step read_step(uint32_t line) {
    const Words4 words = load_shared_128(line);
    return {static_cast<int>(words.x), static_cast<int>(words.y), static_cast<int>(words.z), static_cast<int>(words.w)};
}
EA_DEVICE bool read_more(uint32_t line) { return load_shared_32(line + 16) != 0; }

EA_DEVICE void send_end(uint32_t line, int lane) { send_step(line, {0, 0, -1, 0}, false, 0, kNoMore, lane); }

EA_DEVICE int read_tile(uint32_t line) { return uniform(static_cast<int>(load_shared_32(line + 24))); }
EA_DEVICE Words2 read_batch_and_line(uint32_t line) { return load_shared_64(line + 32); }
EA_DEVICE int read_head(uint32_t line) { return static_cast<int>(load_shared_32(line + 20)); }

}  // namespace
}  // namespace sm90
}  // namespace efficient_attn
