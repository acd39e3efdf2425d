// Reading a mask: which keys a range of queries can see, by arithmetic, and which blocks are listed for it.
#pragma once

#include <cstdint>

#include "params.h"

namespace efficient_attn {
namespace {

struct Range {
    int64_t begin, end;
};

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// How many of the tensor's keys are valid.
inline int64_t key_count(const AttentionParams& p, int64_t b) {
    return p.mask.kv_lengths ? max_of(0, min_of(p.mask.kv_lengths[b], p.key_rows)) : p.key_rows;
}

// Whether lengths hide keys one by one: an order may put the keys beyond a length anywhere.
inline bool hides_single_keys(const AttentionParams& p) { return p.mask.kv_lengths && p.key.order; }

// Keys that window and length let query i see, or may.
inline Range visible_keys(const AttentionParams& p, int64_t b, int64_t i) {
    const MaskView& mask = p.mask;
    const int64_t centre = i + mask.window_offset;
    const int64_t begin = mask.window_left < 0 ? 0 : max_of(0, centre - mask.window_left);
    int64_t end = p.key.order ? p.Nk : key_count(p, b);
    if (mask.window_right >= 0) end = min_of(end, centre + mask.window_right + 1);
    return {begin, max_of(begin, end)};
}

// Keys that at least one of the queries [i0, i1) sees, as one range.
inline Range any_visible(const AttentionParams& p, int64_t b, int64_t i0, int64_t i1) {
    const int64_t begin = visible_keys(p, b, i0).begin;
    return {begin, max_of(begin, visible_keys(p, b, i1 - 1).end)};
}

// Keys that all of the queries [i0, i1) see.
inline Range all_visible(const AttentionParams& p, int64_t b, int64_t i0, int64_t i1) {
    if (hides_single_keys(p)) return {0, 0};
    const int64_t begin = visible_keys(p, b, i1 - 1).begin;
    return {begin, max_of(begin, visible_keys(p, b, i0).end)};
}

inline Range intersect(Range a, Range b) {
    const int64_t begin = max_of(a.begin, b.begin);
    return {begin, max_of(begin, min_of(a.end, b.end))};
}

// The row of the list of a block of queries.
inline int64_t list_row(const AttentionParams& p, int64_t b, int64_t h, int64_t block) {
    const MaskView& mask = p.mask;
    const int64_t alike = max_of(1, mask.rows_alike), rows = ceil_div(p.Nq, mask.block_q / alike);
    return ((mask.batch == 1 ? 0 : b) * mask.heads + (mask.heads == 1 ? 0 : h)) * rows + block * alike;
}

// The entries of a row, kept inside the arrays whatever they hold.
inline Range list_entries(const MaskView& mask, const int64_t* indptr, int64_t row) {
    const int64_t begin = max_of(0, min_of(indptr[row], mask.entries));
    return {begin, max_of(begin, min_of(indptr[row + 1], mask.entries))};
}

// How the queries are cut into tiles: a tile never crosses a block of the list.
struct QueryTiling {
    int64_t block, tiles_per_block, tile, count;
};

inline QueryTiling query_tiling(const AttentionParams& p, int64_t largest) {
    if (!p.mask.indptr) return {largest, 1, largest, ceil_div(p.Nq, largest)};
    const int64_t block = p.mask.block_q;
    const int64_t parts = ceil_div(block, largest);
    const int64_t tile = round_up(ceil_div(block, parts), 16);
    return {block, ceil_div(block, tile), tile, ceil_div(p.Nq, block) * ceil_div(block, tile)};
}

// Queries of a tile; empty when a ragged last block ends before it.
inline Range tile_rows(const AttentionParams& p, const QueryTiling& tiling, int64_t tile) {
    const int64_t block = tile / tiling.tiles_per_block;
    const int64_t begin = block * tiling.block + (tile % tiling.tiles_per_block) * tiling.tile;
    const int64_t end = min_of(begin + tiling.tile, min_of((block + 1) * tiling.block, p.Nq));
    return {begin, max_of(begin, end)};
}

// A run of keys under one rule: every pair listed (tile null), or as the bit tile of the block that starts at tile_key.
struct Segment {
    Range keys;
    const uint8_t* tile;
    int64_t tile_key;
};

inline const uint8_t* bit_tile(const MaskView& mask, int32_t id) {
    if (id < 0 || id >= mask.tile_count) return nullptr;
    return mask.tiles + static_cast<int64_t>(id) * mask.block_q * (mask.block_k / 8);
}

// The first of the entries [begin, end), ascending, that reaches beyond block `block`.
inline int64_t first_entry(const int32_t* indices, Range entries, int64_t block) {
    int64_t begin = entries.begin, end = entries.end;
    while (begin < end) {
        const int64_t middle = begin + (end - begin) / 2;
        if (indices[middle] < block) {
            begin = middle + 1;
        } else {
            end = middle;
        }
    }
    return begin;
}

// Calls visit(Segment) for the keys inside `limits` that the queries `rows` (inside query block `block`) may see,
// ascending; neighbouring full blocks become one segment.
template <class Visit>
inline void for_each_segment(const AttentionParams& p, int64_t b, int64_t h, int64_t block, Range rows, Range limits,
                             Visit visit) {
    limits = intersect(limits, any_visible(p, b, rows.begin, rows.end));
    if (limits.begin >= limits.end) return;
    const MaskView& mask = p.mask;
    if (!mask.indptr) {
        visit(Segment{limits, nullptr, 0});
        return;
    }
    Segment pending{{0, 0}, nullptr, 0};
    const Range entries = list_entries(mask, mask.indptr, list_row(p, b, h, block));
    for (int64_t e = first_entry(mask.indices, entries, limits.begin / mask.block_k); e < entries.end; ++e) {
        const int64_t key = mask.indices[e] * mask.block_k;
        if (key >= limits.end) break;
        const Range keys = intersect({key, key + mask.block_k}, limits);
        if (key < 0 || keys.begin >= keys.end) continue;
        const uint8_t* tile = bit_tile(mask, mask.tile_ids[e]);
        if (!tile && !pending.tile && pending.keys.end == keys.begin) {
            pending.keys.end = keys.end;
            continue;
        }
        if (pending.keys.begin < pending.keys.end) visit(pending);
        pending = {keys, tile, key};
    }
    if (pending.keys.begin < pending.keys.end) visit(pending);
}

// bits[j - keys.begin] bit (i - i0): what a bit tile says of query i and key j. `tile_row` is query i0's row of the
// tile.
inline void transpose_bits(const Segment& segment, int64_t tile_row, int64_t rows, int64_t row_bytes, Range keys,
                           uint64_t* bits) {
    for (int64_t first = segment.tile_key + ((keys.begin - segment.tile_key) & ~int64_t{7}); first < keys.end;
         first += 8) {
        const uint8_t* column = segment.tile + tile_row * row_bytes + (first - segment.tile_key) / 8;
        uint64_t out[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        for (int64_t r0 = 0; r0 < rows; r0 += 8) {
            uint64_t x = 0;  // eight queries, a byte each
            for (int64_t r = r0; r < min_of(r0 + 8, rows); ++r)
                x |= static_cast<uint64_t>(column[r * row_bytes]) << (8 * (r - r0));
            uint64_t t = (x ^ (x >> 7)) & 0x00AA00AA00AA00AAull;  // transpose 8 x 8 bits (Hacker's Delight, 7-3)
            x ^= t ^ (t << 7);
            t = (x ^ (x >> 14)) & 0x0000CCCC0000CCCCull;
            x ^= t ^ (t << 14);
            t = (x ^ (x >> 28)) & 0x00000000F0F0F0F0ull;
            x ^= t ^ (t << 28);
            for (int j = 0; j < 8; ++j) out[j] |= ((x >> (8 * j)) & 0xFF) << r0;
        }
        for (int64_t j = max_of(first, keys.begin); j < min_of(first + 8, keys.end); ++j)
            bits[j - keys.begin] = out[j - first];
    }
}

}  // namespace
}  // namespace efficient_attn
