// What is found out about a mask before the work begins: rows of the list that say the same, and whether it is a band:
// whether a run of queries sees few keys that lie together, as under a window or along a diagonal of blocks (see
// attention_backward_bands.h).
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

// How many tiles of queries are a run: so many queries that the keys of two runs are few beside those of one, and not
// so many that threads are without one.
inline int64_t run_tiles(const AttentionParams& p, const QueryTiling& tiling) {
    const int64_t queries = max_of(128, min_of(512, round_up(ceil_div(p.Nq * p.B * p.Hkv, 8), kQueries)));
    return max_of(1, queries / tiling.tile);
}

inline int64_t band_runs(const AttentionParams& p) {
    const QueryTiling tiling = attention_tiling(p);
    return ceil_div(tiling.count, run_tiles(p, tiling));
}

// Keys that the queries of a run see, of all heads of a group, lengths aside. A run that sees none has those before it.
inline Range run_keys(const AttentionParams& p, int64_t b, int64_t kv, int64_t run) {
    const QueryTiling tiling = attention_tiling(p);
    const MaskView& mask = p.mask;
    const int64_t size = run_tiles(p, tiling), group = mask.heads > 1 ? p.Hq / p.Hkv : 1;
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
        if (keys.begin < keys.end) return keys;
    }
    return {0, 0};
}

// Decides whether the backward of a call goes by runs, and how many keys a run sees at most and leaves to the next.
template <class A>
inline void measure_bands(AttentionParams& p) {
    constexpr int64_t memory = 2 * 1024 * 1024;  // of dK and dV of a run
    const MaskView& mask = p.mask;
    p.band_keys = p.band_overlap = 0;
    if (!mask.indptr && (mask.window_left < 0 || mask.window_right < 0)) return;
    // Sums along diagonals have runs in common; spans come to a diagonal one after another.
    if (p.ddiagonals || p.B * p.Hkv * p.Nq * p.Nk == 0) return;
    const int64_t runs = band_runs(p), heads = mask.indptr && mask.heads > 1 ? p.Hkv : 1;
    int64_t widest = 0, overlap = 0, total = 0;
    for (int64_t b = 0; b < (mask.indptr ? mask.batch : 1); ++b)
        for (int64_t kv = 0; kv < heads; ++kv) {
            Range before{0, 0};
            for (int64_t run = 0; run < runs; ++run) {
                const Range keys = run_keys(p, b, kv, run);
                if (keys.begin < before.begin || keys.end < before.end) return;
                widest = max_of(widest, keys.end - keys.begin);
                overlap = max_of(overlap, before.end - keys.begin);
                total += keys.end - keys.begin;
                before = keys;
            }
        }
    const int64_t lines = (mask.indptr ? mask.batch : 1) * heads;
    const int64_t row = static_cast<int64_t>(sizeof(A)) * (whole_vectors<A>(p.D) + whole_vectors<A>(p.Dv));
    if (widest == 0 || widest * row > memory || 2 * total > lines * runs * p.Nk) return;
    p.band_keys = widest;
    p.band_overlap = overlap;
}

}  // namespace
}  // namespace efficient_attn
