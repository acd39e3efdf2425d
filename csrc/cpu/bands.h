// What is found out about a mask before the work begins: rows of the list that say the same; whether it is a band:
// whether a run of queries sees few keys that lie together, as under a window or along a diagonal of blocks (see
// attention_backward_bands.h); and whether keys that an order scatters are copied once for some tiles of queries.
#pragma once

#include "tile.h"

namespace efficient_attn {
namespace {

// Whether two rows of the list name the same blocks.
inline bool are_alike(const MaskView& mask, int64_t row, int64_t other) {
    const Range a = list_entries(mask, mask.indptr, row), b = list_entries(mask, mask.indptr, other);
    if (a.end - a.begin != b.end - b.begin) return false;
    for (int64_t n = 0; n < a.end - a.begin; ++n)
        if (mask.indices[a.begin + n] != mask.indices[b.begin + n]) return false;
    return true;
}

// Blocks of few queries fill no tile. Where as many of them in turn as fill one see the same keys, they become one
// block.
inline void join_rows(AttentionParams& p) {
    MaskView& mask = p.mask;
    if (!mask.indptr || mask.block_q >= kQueries || kQueries % mask.block_q != 0) return;
    for (int64_t e = 0; e < mask.entries; ++e)
        if (mask.tile_ids[e] >= 0) return;  // a tile of bits is of one row
    const int64_t alike = kQueries / mask.block_q, rows = ceil_div(p.Nq, mask.block_q);
    for (int64_t line = 0; line < mask.batch * mask.heads; ++line)
        for (int64_t row = 0; row < rows; ++row)
            if (row % alike != 0 && !are_alike(mask, line * rows + row, line * rows + row - 1)) return;
    mask.rows_alike = alike;
    mask.block_q = kQueries;
}

inline bool has_bands(const AttentionParams& p) { return p.band_keys > 0; }

// What becomes of the keys that two runs share: nothing yet; one of both writes its sums; they are left to the other
// run; that one has stored them.
constexpr int64_t kLeaves = 1, kLeft = 2, kStored = 3;

// The fewest queries that a run may have: so many that the keys of two runs are few beside those of one, and not so
// many that threads are without one.
inline int64_t least_run(const AttentionParams& p) {
    return max_of(128, min_of(512, round_up(ceil_div(p.Nq * p.B * p.Hkv, 8), kQueries)));
}

inline int64_t band_runs(const AttentionParams& p) { return ceil_div(attention_tiling(p).count, p.band_tiles); }

// Keys that the queries of a run see, of all heads of a group, lengths aside. A run that sees none is at the end of
// those before it.
inline Range run_keys(const AttentionParams& p, int64_t b, int64_t kv, int64_t run) {
    const QueryTiling tiling = attention_tiling(p);
    const MaskView& mask = p.mask;
    const int64_t size = p.band_tiles, wanted = run, group = mask.heads > 1 ? p.Hq / p.Hkv : 1;
    AttentionParams whole = p;
    whole.mask.kv_lengths = nullptr;
    for (; run >= 0; --run) {
        const int64_t last = min_of((run + 1) * size, tiling.count) - 1;
        const Range rows{tile_rows(p, tiling, run * size).begin, tile_rows(p, tiling, last).end};
        if (rows.begin >= rows.end) continue;
        Range keys = intersect(any_visible(whole, b, rows.begin, rows.end), {0, p.Nk});
        if (mask.indptr) {
            int64_t begin = p.Nk, end = 0;
            for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
                for (int64_t block = rows.begin / mask.block_q; block <= (rows.end - 1) / mask.block_q; ++block) {
                    const Range e = list_entries(mask, mask.indptr, list_row(p, b, h, block));
                    if (e.begin >= e.end) continue;
                    begin = min_of(begin, mask.indices[e.begin] * mask.block_k);
                    end = max_of(end, (mask.indices[e.end - 1] + int64_t{1}) * mask.block_k);
                }
            keys = intersect(keys, {begin, end});
        }
        if (keys.begin < keys.end) return run == wanted ? keys : Range{keys.end, keys.end};
    }
    return {0, 0};
}

// How many keys runs see at most and share with their neighbours, and how many it is in all. Returns whether they are
// in order, `alone` whether no key is seen by more than two runs.
struct BandSizes {
    int64_t widest, overlap, total;
    bool alone;
};

inline bool measure_runs(const AttentionParams& p, int64_t b, int64_t kv, BandSizes& sizes) {
    Range before{0, 0};
    int64_t end_before_it = 0;
    for (int64_t run = 0; run < band_runs(p); ++run) {
        const Range keys = run_keys(p, b, kv, run);
        if (keys.begin < before.begin || keys.end < before.end) return false;
        sizes.widest = max_of(sizes.widest, keys.end - keys.begin);
        sizes.overlap = max_of(sizes.overlap, before.end - keys.begin);
        sizes.total += keys.end - keys.begin;
        sizes.alone &= keys.begin >= end_before_it;
        end_before_it = before.end;
        before = keys;
    }
    return true;
}

// Decides whether the backward of a call goes by runs, of how many tiles of queries, and how many keys a run sees at
// most and shares with the next. No key is seen by more than two runs: of two sums it is all the same which is added to
// which, so that no run has to wait for another one.
template <class A>
inline void measure_bands(AttentionParams& p) {
    constexpr int64_t memory = 4 * 1024 * 1024;  // of dK and dV of a run
    const MaskView& mask = p.mask;
    p.band_keys = p.band_overlap = 0;
    if (!mask.indptr && (mask.window_left < 0 || mask.window_right < 0)) return;
    // Sums along diagonals have runs in common; spans come to a diagonal one after another.
    if (p.ddiagonals || p.B * p.Hkv * p.Nq * p.Nk == 0) return;
    const int64_t batch = mask.indptr ? mask.batch : 1, heads = mask.indptr && mask.heads > 1 ? p.Hkv : 1;
    const int64_t row = static_cast<int64_t>(sizeof(A)) * (whole_vectors<A>(p.D) + whole_vectors<A>(p.Dv));
    const int64_t tile = attention_tiling(p).tile;
    BandSizes sizes{};
    for (int64_t queries = least_run(p); !sizes.alone; queries *= 2) {
        p.band_tiles = max_of(1, queries / tile);
        sizes = {0, 0, 0, true};
        for (int64_t line = 0; line < batch * heads; ++line)
            if (!measure_runs(p, line / heads, line % heads, sizes)) return;
        const bool narrow = 2 * sizes.total <= batch * heads * band_runs(p) * p.Nk;
        if (sizes.widest == 0 || sizes.widest * row > memory || !narrow) return;
    }
    p.band_keys = sizes.widest;
    p.band_overlap = sizes.overlap;
}

// Keys that the tiles of queries of a call visit, of all lines of its lists and all heads of a group.
inline int64_t visited_keys(const AttentionParams& p) {
    const QueryTiling tiling = attention_tiling(p);
    const int64_t group = p.mask.indptr && p.mask.heads > 1 ? 1 : p.Hq / p.Hkv;
    if (p.mask.indptr) return p.mask.entries * p.mask.block_k * tiling.tiles_per_block * group;
    int64_t visited = 0;
    for (int64_t tile = 0; tile < tiling.count; ++tile) {
        const Range rows = tile_rows(p, tiling, tile), keys = any_visible(p, 0, rows.begin, rows.end);
        visited += keys.end - keys.begin;
    }
    return visited * group;
}

// Whether each tile of queries would copy the keys and values that it sees: an order scatters them, or they are
// narrower than what is multiplied.
template <class T, class A>
inline bool tiles_copy_keys(const AttentionParams& p) {
    return !kPairProducts<T> && !p.key.pages && (p.key.order || sizeof(T) < sizeof(A));
}

// Lines that have runs of their own, and how many bytes a key's copy takes with its value.
inline int64_t lines_of_heads(const AttentionParams& p) { return p.mask.indptr && p.mask.heads > 1 ? p.Hkv : 1; }
inline int64_t lines_of_runs(const AttentionParams& p) {
    return (p.mask.indptr ? p.mask.batch : 1) * lines_of_heads(p);
}
template <class A>
inline int64_t copy_bytes(const AttentionParams& p) {
    return static_cast<int64_t>(sizeof(A)) * (p.D + p.Dv);
}

inline void measure_keys(const AttentionParams& p, BandSizes& sizes) {
    const int64_t heads = lines_of_heads(p);
    for (int64_t line = 0; line < lines_of_runs(p); ++line)
        for (int64_t run = 0; run < band_runs(p); ++run) {
            const Range keys = run_keys(p, line / heads, line % heads, run);
            sizes.widest = max_of(sizes.widest, keys.end - keys.begin);
            sizes.total += keys.end - keys.begin;
        }
}

// Copies are made where one takes the place of so many at least, and stay in the second cache level or near it.
constexpr int64_t kLeastCopies = 2, kCopyMemory = 1024 * 1024;

// Decides whether the forward of a call goes by runs of tiles of queries, whose keys and values are copied once for all
// of them, and how long runs are.
template <class T, class A>
inline void measure_copies(AttentionParams& p) {
    const MaskView& mask = p.mask;
    p.copies_keys = p.band_keys = 0;
    if (!tiles_copy_keys<T, A>(p) || p.B * p.Hkv * p.Nq * p.Nk == 0) return;
    if (!mask.indptr && (mask.window_left < 0 || mask.window_right < 0)) return;
    AttentionParams tried = p;
    int64_t copied = 0;
    for (tried.band_tiles = 2;; tried.band_tiles *= 2) {
        BandSizes sizes{};
        measure_keys(tried, sizes);
        if (sizes.widest * copy_bytes<A>(p) > kCopyMemory || p.B * p.Hkv * band_runs(tried) < 4 * p.threads) break;
        p.band_tiles = tried.band_tiles;
        p.band_keys = sizes.widest;
        copied = sizes.total;
        if (4 * copied <= 5 * lines_of_runs(p) * p.Nk) break;
    }
    p.copies_keys = p.band_keys > 0 && kLeastCopies * copied <= visited_keys(p);
}

// The same of a backward, whose runs or spans of keys are known.
template <class T, class A>
inline void measure_backward_copies(AttentionParams& p, int64_t span) {
    p.copies_keys = 0;
    if (!tiles_copy_keys<T, A>(p) || p.B * p.Hkv * p.Nq * p.Nk == 0) return;
    BandSizes sizes{span, 0, lines_of_runs(p) * p.Nk, true};
    if (has_bands(p)) {
        sizes = {};
        measure_keys(p, sizes);
    }
    p.copies_keys = sizes.widest * copy_bytes<A>(p) <= kCopyMemory && kLeastCopies * sizes.total <= visited_keys(p);
}

}  // namespace
}  // namespace efficient_attn
