// What the backward kernels of compute capability 9.0 share.
//
// A block of threads is three warpgroups. One warp of the first reads the mask, loads what is walked through a ring of
// stages and says of each stage which step of the walk it holds; the two other groups (128 threads, 64 rows of a wgmma)
// multiply. A stage is full when its bytes and words have arrived and empty when every warp that multiplies has said
// so. The grid is persistent: a block takes every so manyth tile, and the ring goes on from one tile to the next.
//
// A tile [rows, kHead] in shared memory is kHead / 64 panels [rows, 64], each swizzled by 128 bytes: as TMA writes
// them, wgmma reads them and chunk_offset<64> addresses them.
#pragma once

#include "cuda/gradients.h"

namespace efficient_attn {
namespace sm90 {
namespace {

constexpr int kGroupThreads = 128, kGroupRows = 64, kGroups = 2;
constexpr int kPanel = 64, kRowBytes = kPanel * 2, kEightRows = 8 * kRowBytes;  // of a panel
constexpr int kBlockThreads = (1 + kGroups) * kGroupThreads;
constexpr int kMultiplyingWarps = kGroups * kGroupThreads / kWarp;
constexpr int kLoadingRegisters = 40, kMultiplyingRegisters = 232;  // 40 + 2 x 232 <= 504, what a block is given

// Which of the two groups that multiply this thread is in.
EA_DEVICE int group_index() { return thread_index() / kGroupThreads - 1; }  // -1: the group that loads
EA_DEVICE int group_warp_row() { return thread_index() % kGroupThreads / kWarp * 16; }

// A place in a ring of stages, and the parity of the round it is in.
template <int kStages>
struct Turn {
    int stage = 0;
    uint32_t parity = 0;

    EA_DEVICE void advance() {
        if (++stage < kStages) return;
        stage = 0;
        parity ^= 1;
    }
};

// Barriers of a ring whose first one lies at `base`: full and empty of every stage.
template <int kStages>
struct Ring {
    static constexpr uint32_t kBytes = 2 * kStages * 8;

    static EA_DEVICE uint32_t full(uint32_t base, int stage) { return base + stage * 8; }
    static EA_DEVICE uint32_t empty(uint32_t base, int stage) { return base + (kStages + stage) * 8; }

    static EA_DEVICE void init(uint32_t base, int fills, int empties) {
        for (int stage = 0; stage < kStages; ++stage) {
            barrier_init(full(base, stage), fills);
            barrier_init(empty(base, stage), empties);
        }
    }
    static EA_DEVICE void wait_full(uint32_t base, const Turn<kStages>& turn) {
        barrier_wait(full(base, turn.stage), turn.parity);
    }
    static EA_DEVICE void wait_empty(uint32_t base, const Turn<kStages>& turn) {
        barrier_wait(empty(base, turn.stage), turn.parity ^ 1);
    }
    // The warp is done with the stage.
    static EA_DEVICE void release(uint32_t base, const Turn<kStages>& turn) {
        warp_sync();
        if (thread_index() % kWarp == 0) barrier_arrive(empty(base, turn.stage));
    }
};

// What the loading warp says of a stage. A tile that sees nothing has one step, and that is empty.
struct Message {
    Step step;
    bool last;  // of its tile
};

constexpr uint32_t kMessageBytes = kWarp * 4;  // a word for each lane; five say something

EA_DEVICE void post(uint32_t address, const Step& step, bool last, int head) {
    const int lane = thread_index() % kWarp, rest = step.offset * 2 + last;
    const int word = lane == 0 ? step.first : lane == 1 ? step.end : lane == 2 ? step.tile : lane == 3 ? rest : head;
    store_shared_32(address + lane * 4, static_cast<uint32_t>(word));
}

EA_DEVICE Message read_message(uint32_t address) {
    const Words4 words = load_shared_128(address);
    const int rest = static_cast<int>(words.w);
    return {{static_cast<int>(words.x), static_cast<int>(words.y), static_cast<int>(words.z), rest / 2}, rest % 2 == 1};
}

// The query head of the step.
EA_DEVICE int read_head(uint32_t address) { return static_cast<int>(load_shared_32(address + 16)); }

// A block's tiles are first_tile, first_tile + tile_stride, ..
EA_DEVICE int first_tile() { return static_cast<int>(block_index()); }
EA_DEVICE int tile_stride() { return static_cast<int>(block_count()); }

// Tile number `index`, the longest under a causal mask first: of keys the first ones, of queries the last.
struct TilePlace {
    int head, tile;
};

EA_DEVICE TilePlace longest_first(int index, int heads, int count, bool last_first) {
    const int tile = index / heads;
    return {index % heads, last_first ? count - 1 - tile : tile};
}

// The flag of the sm80 kernel's tile that holds the lines of a group: of tiles of kRows lines along an axis of `count`.
// `begin`: of the block's tile, `line`: of the group; -1 where the block of the list ends before.
template <int kRows>
EA_DEVICE int64_t flag_place(bool listed, int block, int count, int64_t head, int begin, int line, bool last_first) {
    const Tiling tiles = tiling<kRows>(listed, block);
    const int in_head = ceil_div(count, tiles.block) * tiles.tiles_per_block;
    const int tile = line / tiles.block * tiles.tiles_per_block + line % tiles.block / kRows;
    if (listed ? line / block != begin / block : tile >= in_head) return -1;
    return head * in_head + (last_first ? in_head - 1 - tile : tile);
}

// Named barriers: of one group, and of both.
EA_DEVICE int group_barrier() { return 1 + group_index(); }
constexpr int kBothGroups = 3;

// Writes the flag of one group's lines, or of both groups' where they share a flag.
template <bool kTogether>
EA_DEVICE void store_flag(int32_t* flags, int64_t place, bool suspect) {
    if (!flags) return;
    suspect = kTogether ? named_any(kBothGroups, kGroups * kGroupThreads, suspect)
                        : named_any(group_barrier(), kGroupThreads, suspect);
    const int thread = thread_index() - kGroupThreads;
    if (thread % (kTogether ? kGroups * kGroupThreads : kGroupThreads) == 0 && place >= 0)
        store_global(flags + place, suspect ? 1 : 0);
}

// Whether a group has visible pairs in a step of `width`, and whether all of them are visible.
struct Sight {
    bool any, all;
};

EA_DEVICE Sight sight_of(const Reach& sees, const Step& step, int width) {
    return {step.first < sees.any.end && step.end > sees.any.begin, step.tile < 0 && step.first >= sees.all.begin &&
                                                                        step.end <= sees.all.end &&
                                                                        step.end == step.first + width};
}

// Starts loading kRows rows from `row` on, by one thread; zeros beyond the tensor.
template <int kRows, int kHead>
EA_DEVICE void load_panels(uint32_t tile, const TensorMap& map, uint32_t barrier, int row, int h, int b) {
    EA_UNROLL
    for (int panel = 0; panel < kHead / kPanel; ++panel)
        tensor_load(tile + panel * (kRows * kRowBytes), map, barrier, panel * kPanel, row, h, b);
}

// s = A B^T of a group: A [64, kHead] and B [kN, kHead] are tiles. Not complete before a group_wait.
template <class T, int kHead, int kN>
EA_DEVICE void group_multiply_transposed(float (&s)[kN / 8][4], uint32_t a, uint32_t b) {
    const uint64_t a_matrix = matrix_descriptor(a, 0, kEightRows), b_matrix = matrix_descriptor(b, 0, kEightRows);
    EA_UNROLL
    for (int k = 0; k < kHead / 16; ++k) {
        const uint32_t panel = k * 16 / kPanel, inside = k * 16 % kPanel * 2;
        group_multiply<T, kN, false>(s, matrix_further(a_matrix, panel * (kGroupRows * kRowBytes) + inside),
                                     matrix_further(b_matrix, panel * (kN * kRowBytes) + inside), k > 0);
    }
}

// c += A B of a group: A [64, kK] in registers, B a tile [kK, kHead]. Not complete before a group_wait.
template <class T, int kHead, int kK>
EA_DEVICE void group_multiply_rows(float (&c)[kHead / 8][4], const uint32_t (&a)[kK / 16][4], uint32_t b) {
    const uint64_t matrix = matrix_descriptor(b, kK * kRowBytes, kEightRows);
    EA_UNROLL
    for (int k = 0; k < kK / 16; ++k)
        group_multiply<T, kHead, true>(c, a[k], matrix_further(matrix, k * (16 * kRowBytes)), true);
}

// Which pairs `hide` lets be seen, a bit each as is_kept reads them: known before there are scores, whose registers are
// free until then.
template <int kN, class Hide>
EA_DEVICE uint32_t visible_bits(Hide hide) {
    static_assert(kN * 4 <= 32, "one bit an element");
    float s[1][kN][4];
    clear(s);
    hide(s);
    uint32_t visible = 0;
    each(s, [&](float x, int, int n, int e) { visible |= static_cast<uint32_t>(x == 0.0f) << (n * 4 + e); });
    return visible;
}

template <int kN>
EA_DEVICE void hide_by(float (&s)[1][kN][4], uint32_t visible) {
    each(s, [&](float& x, int m, int n, int e) { x = is_kept<kN>(visible, m, n, e) ? x : -infinity(); });
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
        store_rows<T, kPanel>(part, tile + panel * (kGroupRows * kRowBytes), base + panel * kPanel, row_stride, first,
                              group_warp_row(), end, 0, width - panel * kPanel, aligned, lane);
    }
}

}  // namespace
}  // namespace sm90
}  // namespace efficient_attn
