// dQ and the gradient of the bias on tensor cores of compute capability 8.0 and newer. With the names of
// attention_key_gradient.h:
//
//     dS = P (Z (dO V^T) - delta)      dQ = scale dS K      dbias = dS, summed over what the bias broadcasts over
//
// dQ: one block of threads owns kRows queries of one head and walks the keys as the forward does. dbias: one block owns
// a tile of the bias and walks every batch element, head, query or key that shares it. No sum is shared between blocks.
//
// Shared memory: Q and dO [kRows, kHead], then two slots of K and V [kKeys, kHead].
#pragma once

#include "cuda/gradients.h"

namespace efficient_attn {
namespace sm80 {
namespace {

// kColumnParts: so many warps share 16 rows, each with its part of the columns of dQ.
template <class T_, int kHead_, bool kExtras_, int kColumnParts_>
struct QueryGradient {
    using T = T_;
    static constexpr int kHead = kHead_;
    static constexpr bool kExtras = kExtras_;
    static constexpr int kColumnParts = kColumnParts_, kColumns = kHead / 8 / kColumnParts;  // columns in units of 8
    static constexpr int kRows = kGradientRows, kKeys = 32, kWarps = 4 * kColumnParts, kThreads = kWarps * kWarp,
                         kN = kKeys / 8;
    static constexpr int kBlocksAtOnce = kWarps == 4 ? 2 : 1;
    static constexpr uint32_t kQuery = 0, kGradOut = kRows * kHead * 2, kSlots = 2 * kGradOut;
    static constexpr uint32_t kTileBytes = kKeys * kHead * 2, kSlotBytes = 2 * kTileBytes;
    static constexpr uint32_t kSharedBytes = kSlots + 2 * kSlotBytes;

    float dq[1][kColumns][4];

    // The first row and column (in units of 8) of this warp.
    static EA_DEVICE int first_row() { return thread_index() / kWarp / kColumnParts * 16; }
    static EA_DEVICE int first_column() { return thread_index() / kWarp % kColumnParts * kColumns; }
};

template <class G>
EA_DEVICE void load_rows(const KernelParams& p, int b, int h, Span rows) {
    const AttentionParams& c = p.call;
    load_tile<G::kRows, G::kHead, G::kThreads>(G::kQuery, head_pointer(c.query, b, h), c.query.row_stride, rows.begin,
                                               rows.end, static_cast<int>(c.D), p.query_aligned);
    load_tile<G::kRows, G::kHead, G::kThreads>(G::kGradOut, head_pointer(c.grad_out, b, h), c.grad_out.row_stride,
                                               rows.begin, rows.end, static_cast<int>(c.Dv), p.grad_out_aligned);
}

template <class G>
EA_DEVICE void load_keys(const KernelParams& p, int b, int h, const Step& step, int slot) {
    const uint32_t base = G::kSlots + slot * G::kSlotBytes;
    const AttentionParams& c = p.call;
    const int kv = h / p.group;
    load_tile<G::kKeys, G::kHead, G::kThreads>(base, head_pointer(c.key, b, kv), c.key.row_stride, step.first, step.end,
                                               static_cast<int>(c.D), p.key_aligned);
    load_tile<G::kKeys, G::kHead, G::kThreads>(base + G::kTileBytes, head_pointer(c.value, b, kv), c.value.row_stride,
                                               step.first, step.end, static_cast<int>(c.Dv), p.value_aligned);
}

// dS of the warp's 16 rows and the keys of a slot.
template <class G>
EA_DEVICE void pair_gradients(float (&ds)[1][G::kN][4], const KernelParams& p, const Place& at, const RowSums& sums,
                              const Reach& sees, const Step& step, int slot) {
    using T = typename G::T;
    const int lane = thread_index() % kWarp, warp_row = G::first_row();
    const int row = at.lines.begin + warp_row + lane / 4, column = step.first + lane % 4 * 2;
    const uint32_t keys = G::kSlots + slot * G::kSlotBytes, values = keys + G::kTileBytes;
    const bool biased = G::kExtras && p.call.bias.data;
    float s[1][G::kN][4];
    clear(s);
    clear(ds);
    multiply_transposed<T, G::kHead>(s, G::kQuery, warp_row, keys, lane);
    multiply_transposed<T, G::kHead>(ds, G::kGradOut, warp_row, values, lane);
    if (G::kExtras) scale_by(s, p.score_scale);
    if (!sight_of(sees, step, G::kKeys).all || biased) hide(s, p, step, row, at.lines, p.low, p.high, lane);
    if (biased) add_bias<T, true>(s, p, at.b, at.h, row, column, true);
    if constexpr (G::kExtras) {
        if (p.call.dropout_p > 0) {
            drop(ds, draw_kept<true, 1, G::kN>(p, at.b, at.h, row, column));
            scale_by(ds, p.keep_scale);
        }
    }
    each(ds, [&](float& x, int m, int n, int e) {
        const float unit = G::kExtras ? 1.0f : p.score_scale;
        const float weight = power_of_2(multiply_add_scalar(s[m][n][e], unit, -sums.shift[e / 2]));
        x = score_gradient(weight, x, sums.delta[e / 2]);
    });
}

// Walks the keys. Reading kMarks: weights are 1 for visible pairs and dq counts the NaN and infinities that a row sees.
template <class G, bool kSafe>
EA_DEVICE void gather_keys(G& g, const KernelParams& p, const Place& at, Reading reading) {
    using T = typename G::T;
    const int lane = thread_index() % kWarp, warp_row = G::first_row();
    const int row = at.lines.begin + warp_row + lane / 4;
    const bool active = at.lines.begin + warp_row < at.lines.end, marks = kSafe && reading == kMarks;
    const Reach sees = reach(at.lines.begin, at.lines.end - 1, p.low, p.high, key_count(p, at.b));
    clear(g.dq);

    Walk<G::kKeys, kByQuery> walk(p, at.b, at.h, at.lines.begin, sees.any);
    Step next;
    bool more = walk.next(p, next);
    if (kSafe) block_sync();  // the pass before may still be reading what is loaded now
    if (more) {
        load_rows<G>(p, at.b, at.h, at.lines);
        load_keys<G>(p, at.b, at.h, next, 0);
        copy_async_commit();
    }
    const RowSums sums = load_sums(p, at.b, at.h, row, at.lines.end);
    for (int slot = 0; more; slot ^= 1) {
        const Step step = next;
        more = walk.next(p, next);
        await_slot();
        if (more) {
            load_keys<G>(p, at.b, at.h, next, slot ^ 1);
            copy_async_commit();
        }
        if (!active) continue;
        float ds[1][G::kN][4];
        if (marks) {
            clear(ds);
            hide(ds, p, step, row, at.lines, p.low, p.high, lane);
            if (G::kExtras && p.call.bias.data)
                add_bias<T, true>(ds, p, at.b, at.h, row, step.first + lane % 4 * 2, false);
            visible_ones(ds);
        } else {
            pair_gradients<G>(ds, p, at, sums, sees, step, slot);
        }
        multiply<T, G::kHead, kSafe>(g.dq, ds, G::kSlots + slot * G::kSlotBytes, G::first_column() / 2, reading, lane);
    }
}

template <class G>
EA_DEVICE void store_query_gradients(G& g, const KernelParams& p, const Place& at) {
    const int lane = thread_index() % kWarp, warp_row = G::first_row();
    if (G::kColumnParts > 1) block_sync();  // results pass through rows that another warp may still be reading
    if (at.lines.begin + warp_row >= at.lines.end) return;
    scale_by(g.dq, p.scale);
    store_rows<typename G::T, G::kHead>(g.dq, G::kQuery, head_pointer(p.call.dq, at.b, at.h), p.call.dq.row_stride,
                                        at.lines.begin, warp_row, at.lines.end, G::first_column(),
                                        static_cast<int>(p.call.D), p.dq_aligned, lane);
}

// Grid: a block of threads for each tile. p.flags: where to say which tiles are suspicious, or null.
template <class G>
EA_KERNEL(G::kThreads, G::kBlocksAtOnce)
attention_query_gradient(EA_PARAMETER KernelParams p) {
    const Place at = query_place<G::kRows>(p, block_index());
    bool suspect = false;
    if (at.lines.begin < at.lines.end) {
        G g;
        gather_keys<G, false>(g, p, at, kAsIs);
        suspect = suspicious(g.dq, at.lines.begin + G::first_row() + thread_index() % kWarp / 4, at.lines.end);
        store_query_gradients(g, p, at);
    }
    write_flag(p, suspect);
}

// The suspicious tiles again, as in the forward. Grid: any.
template <class G>
EA_KERNEL(G::kThreads, 1)
attention_query_gradient_safe(EA_PARAMETER KernelParams p, int64_t tiles) {
    each_flagged(p, tiles, [&](int64_t index) {
        const Place at = query_place<G::kRows>(p, index);
        const int lane = thread_index() % kWarp, row = at.lines.begin + G::first_row() + lane / 4;
        G g;
        EA_KEEP_LOOP
        for (int pass = kFinite; pass <= kMarks; ++pass) {
            gather_keys<G, true>(g, p, at, static_cast<Reading>(pass));
            if (pass == kFinite) {
                store_query_gradients(g, p, at);
            } else {
                store_marks<typename G::T>(g.dq, head_pointer(p.call.dq, at.b, at.h), p.call.dq.row_stride, row,
                                           at.lines.end, G::first_column() * 8 + lane % 4 * 2, p.call.D);
            }
        }
    });
}

// --- the gradient of the bias ---

// The tiles of dbias [size 0, size 1, queries, keys]; a sum over queries or keys is one tile that walks them all.
struct BiasTiles {
    Tiling queries, keys;
    int query_tiles, key_tiles;  // of the whole sequences
    bool sum_queries, sum_keys;

    EA_DEVICE int64_t per_head() const { return int64_t{sum_queries ? 1 : query_tiles} * (sum_keys ? 1 : key_tiles); }
};

template <class G>
EA_DEVICE BiasTiles bias_tiles(const KernelParams& p) {
    const AttentionParams& c = p.call;
    BiasTiles t;
    t.queries = tiling<G::kRows>(c.mask.indptr != nullptr, static_cast<int>(c.mask.block_q));
    t.keys = tiling<G::kKeys>(c.mask.indptr != nullptr, static_cast<int>(c.mask.block_k));
    t.query_tiles = ceil_div(c.Nq, t.queries.block) * t.queries.tiles_per_block;
    t.key_tiles = ceil_div(c.Nk, t.keys.block) * t.keys.tiles_per_block;
    t.sum_queries = c.dbias.size[2] == 1 && c.Nq > 1;
    t.sum_keys = c.dbias.size[3] == 1 && c.Nk > 1;
    return t;
}

// Adds dS of one tile of queries and the keys that it sees among `keys` to `sum`.
template <class G>
EA_DEVICE void add_tile(float (&sum)[1][G::kN][4], const KernelParams& p, const Place& at, Span keys) {
    const int warp_row = G::first_row();
    const Reach sees = reach(at.lines.begin, at.lines.end - 1, p.low, p.high, key_count(p, at.b));
    Walk<G::kKeys, kByQuery> walk(p, at.b, at.h, at.lines.begin, intersect(sees.any, keys));
    Step step;
    if (!walk.next(p, step)) return;
    load_rows<G>(p, at.b, at.h, at.lines);
    const RowSums sums = load_sums(p, at.b, at.h, at.lines.begin + warp_row + thread_index() % kWarp / 4, at.lines.end);
    do {
        load_keys<G>(p, at.b, at.h, step, 0);
        copy_async_commit();
        copy_async_wait<0>();
        block_sync();
        if (at.lines.begin + warp_row < at.lines.end) {
            float ds[1][G::kN][4];
            pair_gradients<G>(ds, p, at, sums, sees, step, 0);
            each(ds, [&](float x, int m, int n, int e) { sum[m][n][e] += x; });
        }
        block_sync();  // every warp is done with the tiles
    } while (walk.next(p, step));
}

EA_DEVICE void store_bias(const KernelParams& p, int64_t place, float value) {
    if (p.call.dbias.dtype == kFloat32) {
        store_global(static_cast<float*>(p.call.dbias.data) + place, value);
    } else {
        const uint32_t bits = p.call.dtype == kBFloat16 ? pack<BFloat16>(value, 0.0f) : pack<Float16>(value, 0.0f);
        store_global(static_cast<uint16_t*>(p.call.dbias.data) + place, static_cast<uint16_t>(bits));
    }
}

// Writes the tile of dbias, summed over its rows or columns where these are one.
template <class G>
EA_DEVICE void store_tile(float (&sum)[1][G::kN][4], const KernelParams& p, const BiasTiles& tiles, int64_t head,
                          Span rows, Span keys) {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp, row = rows.begin + warp * 16 + lane / 4;
    const int64_t width = p.call.dbias.size[3], base = head * p.call.dbias.size[2] * width;
    if (tiles.sum_keys) {
        EA_UNROLL
        for (int half = 0; half < 2; ++half) {
            float total = 0.0f;
            EA_UNROLL
            for (int k = 0; k < 2 * G::kN; ++k) total += sum[0][k / 2][half * 2 + k % 2];
            total = quad_sum(total);
            if (lane % 4 == 0 && row + half * 8 < rows.end) store_bias(p, base + row + half * 8, total);
        }
    } else if (tiles.sum_queries) {
        static_assert(2 * G::kN == kWarp / 4, "of a thread's columns one for each of the lanes that share them");
        float own = 0.0f;
        EA_UNROLL
        for (int k = 0; k < 2 * G::kN; ++k) {  // a column: its rows of this warp, then the warps in order
            float total = sum[0][k / 2][k % 2] + sum[0][k / 2][2 + k % 2];
            EA_UNROLL
            for (int mask = 4; mask < kWarp; mask *= 2) total += shuffle_xor(total, mask);
            own = lane / 4 == k ? total : own;
        }
        const int column = lane / 8 * 8 + lane % 4 * 2 + lane / 4 % 2;
        store_shared_32(static_cast<uint32_t>(warp * G::kKeys + column) * 4, as_bits(own));
        block_sync();
        if (warp == 0) {
            float total = 0.0f;
            for (int w = 0; w < G::kWarps; ++w)
                total += as_float(load_shared_32(static_cast<uint32_t>(w * G::kKeys + lane) * 4));
            if (keys.begin + lane < keys.end) store_bias(p, base + keys.begin + lane, total);
        }
    } else {
        each(sum, [&](float x, int, int n, int e) {
            const int i = row + e / 2 * 8, j = keys.begin + n * 8 + lane % 4 * 2 + e % 2;
            if (i < rows.end && j < keys.end) store_bias(p, base + i * width + j, x);
        });
    }
}

// Grid: a block of threads for each tile of dbias.
template <class G>
EA_KERNEL(G::kThreads, G::kBlocksAtOnce)
attention_bias_gradient(EA_PARAMETER KernelParams p) {
    static_assert(G::kKeys == kWarp && G::kColumnParts == 1, "a lane sums a column; a warp owns its rows alone");
    const AttentionParams& c = p.call;
    const BiasTiles tiles = bias_tiles<G>(p);
    const int64_t head = block_index() / tiles.per_head(), rest = block_index() % tiles.per_head();
    const int query_tile = static_cast<int>(tiles.sum_keys ? rest : tiles.sum_queries ? 0 : rest / tiles.key_tiles);
    const int key_tile = static_cast<int>(tiles.sum_keys ? 0 : tiles.sum_queries ? rest : rest % tiles.key_tiles);
    const Span all_keys{0, static_cast<int>(c.Nk)};
    const Span keys = tiles.sum_keys ? all_keys : tiles.keys.lines(key_tile, static_cast<int>(c.Nk));
    const int own_b = static_cast<int>(head / c.dbias.size[1]), own_h = static_cast<int>(head % c.dbias.size[1]);
    const int last_b = c.dbias.size[0] == 1 ? static_cast<int>(c.B) : own_b + 1;
    const int last_h = c.dbias.size[1] == 1 ? static_cast<int>(c.Hq) : own_h + 1;
    const int last_tile = tiles.sum_queries ? tiles.query_tiles : query_tile + 1;
    float sum[1][G::kN][4];
    clear(sum);
    for (int b = own_b; b < last_b; ++b)
        for (int h = own_h; h < last_h; ++h)
            for (int tile = query_tile; tile < last_tile; ++tile) {
                const Place at{b, h, tiles.queries.lines(tile, static_cast<int>(c.Nq))};
                if (at.lines.begin < at.lines.end && keys.begin < keys.end) add_tile<G>(sum, p, at, keys);
            }
    store_tile<G>(sum, p, tiles, head, tiles.queries.lines(query_tile, static_cast<int>(c.Nq)), keys);
}

}  // namespace
}  // namespace sm80
}  // namespace efficient_attn
