// Attention of few queries over many keys (decoding) on tensor cores of compute capability 8.0 and newer.
//
//     out_i = sum_j e^(s_ij - lse_i) v_j        over the keys, split: each part gives (out, lse), and parts join by lse
//
// The limit is the reading of keys and values, so every one of them is read once for all query heads that share it, by
// enough blocks of threads to fill the GPU (flash decoding, Dao et al., 2023). A block owns one key/value head, the
// queries of one row of the list and one part of the keys; row r of its tile is query r / pack of query head r % pack.
// Keys and values come in turn through a ring of tiles: while one is worked off, kSlots - 1 of them are on their way.
// Of a tile of 64 keys each warp takes 16 rows and, where that leaves warps over, a part of the keys with a softmax of
// its own (of wide values two warps take a half each); at the end the warps' results are joined, and then those of the
// blocks, always in the same order.
//
// Shared memory: Q [kRows, kHead], then the ring of tiles [kStep, kHead]; at the end it holds what the warps join.
#pragma once

#include "cuda/sm80/attention_forward.h"

namespace efficient_attn {
namespace sm80 {
namespace {

template <class T_, int kHead_, int kRows_>
struct Decode {
    using T = T_;
    static constexpr int kHead = kHead_, kRows = kRows_;
    static constexpr int kRowWarps = kRows / 16, kKeyWarps = 4 / kRowWarps, kColumnWarps = kHead == 256 ? 2 : 1;
    static constexpr int kWarps = 4 * kColumnWarps, kThreads = kWarps * kWarp;
    static constexpr int kStep = kDecodeStep, kM = 1;
    static constexpr int kKeys = kStep / kKeyWarps, kColumns = kHead / kColumnWarps;  // of a step and of V, a warp's
    static constexpr int kSlots = kHead == 64 ? 8 : 4;
    static constexpr uint32_t kQuery = 0, kRing = kRows * kHead * 2, kTileBytes = kStep * kHead * 2;
    static constexpr uint32_t kSharedBytes = kRing + kSlots * kTileBytes;

    float out[1][kColumns / 8][4];  // not yet divided by `total`
    float top[1][2], total[1][2];   // as in Forward
};

// What a block of threads works on: the first of its query heads, its queries, and which part of the keys.
struct Part {
    int b, h;
    Span lines;
    int split;
};

EA_DEVICE Part part_of(const DecodeParams& p, int64_t index) {
    const AttentionParams& c = p.base.call;
    const int block = static_cast<int>(c.mask.indptr ? c.mask.block_q : c.Nq), tiles = ceil_div(c.Nq, block);
    const int64_t tile = index / p.splits, line = tile / tiles, lines = c.Hq / p.pack;
    return {static_cast<int>(line / lines), static_cast<int>(line % lines) * p.pack,
            Tiling{block, 1, block}.lines(static_cast<int>(tile % tiles), static_cast<int>(c.Nq)),
            static_cast<int>(index % p.splits)};
}

EA_DEVICE int query_of(const DecodeParams& p, const Part& at, int row) { return at.lines.begin + row / p.pack; }
EA_DEVICE int head_of(const DecodeParams& p, const Part& at, int row) { return at.h + row % p.pack; }
EA_DEVICE int rows_of(const DecodeParams& p, const Part& at) { return (at.lines.end - at.lines.begin) * p.pack; }

template <class D>
EA_DEVICE void load_queries(const DecodeParams& p, const Part& at) {
    const TensorView& query = p.base.call.query;
    constexpr int kChunks = D::kHead / 8;
    const int chunk = thread_index() % kChunks, count = smaller(8, static_cast<int>(p.base.call.D) - chunk * 8);
    for (int row = thread_index() / kChunks; row < D::kRows; row += D::kThreads / kChunks) {
        const bool exists = row < rows_of(p, at) && count > 0;
        const int place = exists ? row : 0;
        const uint16_t* source = head_pointer(query, at.b, head_of(p, at, place)) +
                                 query_of(p, at, place) * query.row_stride + (exists ? chunk * 8 : 0);
        const uint32_t target = D::kQuery + chunk_offset<D::kHead>(row, chunk);
        if (p.base.query_aligned) {
            copy_async(target, source, exists ? count * 2 : 0);
        } else {
            store_shared_128(target, load_elements(source, exists ? count : 0));
        }
    }
}

// Bit 4 n + e: whether that score is of a visible pair.
template <int kN>
EA_DEVICE uint32_t visible_bits(float (&s)[1][kN][4]) {
    static_assert(kN * 4 <= 32, "one bit an element");
    uint32_t bits = 0;
    each(s, [&](float x, int, int n, int e) { bits |= static_cast<uint32_t>(x != -infinity()) << (n * 4 + e); });
    return bits;
}

// out += P V where some pairs are hidden: a weight of 0 does not silence a NaN, so zeros take the place of what is not
// finite, and what sees such a value becomes NaN.
template <class D>
EA_DEVICE void multiply_visible(D& f, const float (&s)[1][D::kKeys / 8][4], uint32_t visible, uint32_t values,
                                int column, int lane) {
    using T = typename D::T;
    constexpr int kN = D::kKeys / 8;
    multiply<T, D::kHead, true>(f.out, s, values, column, kFinite, lane);
    const uint32_t ones = pack<T>(1.0f, 1.0f),
                   b_lane = matrices_at<D::kHead>(lane_down<D::kHead>(values, lane), 0, column);
    EA_UNROLL
    for (int n = 0; n < D::kColumns / 16; ++n) {
        float met[2][4] = {};
        EA_KEEP_LOOP
        for (int k = 0; k < kN / 2; ++k) {
            uint32_t a[4], b[4];
            load_b_transposed<D::kHead>(b, b_lane, k * 16, n);
            EA_UNROLL
            for (int r = 0; r < 4; ++r) {
                const uint32_t bits = visible >> (k * 8 + r * 2);
                a[r] = (bits & 1 ? ones & 0xFFFFu : 0u) | (bits & 2 ? ones & 0xFFFF0000u : 0u);
                b[r] = read_as<T>(b[r], kMarks);
            }
            multiply_add<T>(met[0], a, b[0], b[1]);
            multiply_add<T>(met[1], a, b[2], b[3]);
        }
        EA_UNROLL
        for (int k = 0; k < 8; ++k) {
            float& x = f.out[0][2 * n + k / 4][k % 4];
            x = met[k / 4][k % 4] > 0.0f ? not_a_number() : x;
        }
    }
}

// Adds the bias to the visible scores; `row` and `column`: this thread's first.
template <class T, int kN>
EA_DEVICE void add_packed_bias(float (&s)[1][kN][4], const DecodeParams& p, const Part& at, int row, int column) {
    each(s, [&](float& score, int, int n, int e) {
        if (score == -infinity()) return;
        const int line = row + e / 2 * 8;
        const float bias =
            load_bias<T>(p.base, at.b, head_of(p, at, line), query_of(p, at, line), column + n * 8 + e % 2);
        score = bias == -infinity() ? bias : score + bias;
    });
}

// Walks this block's part of the keys.
template <class D>
EA_DEVICE void attend_part(D& f, const DecodeParams& p, const Part& at) {
    using T = typename D::T;
    const KernelParams& base = p.base;
    const AttentionParams& c = base.call;
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp, kv = at.h / base.group;
    const int warp_row = warp % D::kRowWarps * 16, warp_key = warp % 4 / D::kRowWarps * D::kKeys;
    const int column = warp / 4 * (D::kColumns / 16);
    const int row = warp_row + lane / 4;
    const bool active = warp_row < rows_of(p, at);
    const Reach sees = reach(at.lines.begin, at.lines.end - 1, base.low, base.high, key_count(base, at.b));

    clear(f.out);
    EA_UNROLL
    for (int r = 0; r < 2; ++r) f.top[0][r] = -infinity(), f.total[0][r] = 0.0f;

    Walk<D::kStep, kByQuery> walk(base, at.b, at.h, at.lines.begin, sees.any);
    walk.take_part(base, at.split, p.splits);
    Walk<D::kStep, kByQuery> ahead = walk;
    Step coming{};
    bool more = false;
    // Begins to load tile number `tile`, keys and values in turn: a group of copies, empty where none is left.
    const auto load_next = [&](int tile) {
        const bool is_value = tile % 2 == 1;
        if (!is_value) more = ahead.next(base, coming);
        if (more)
            load_tile<D::kStep, D::kHead, D::kThreads>(
                D::kRing + tile % D::kSlots * D::kTileBytes, head_pointer(is_value ? c.value : c.key, at.b, kv),
                is_value ? c.value.row_stride : c.key.row_stride, coming.first, coming.end,
                static_cast<int>(is_value ? c.Dv : c.D), is_value ? base.value_aligned : base.key_aligned);
        copy_async_commit();
    };
    load_queries<D>(p, at);
    for (int tile = 0; tile < D::kSlots - 1; ++tile) load_next(tile);

    Step step;
    for (int tile = 0; walk.next(base, step); tile += 2) {
        const uint32_t mine = D::kRing + warp_key * D::kHead * 2;
        const uint32_t keys = mine + tile % D::kSlots * D::kTileBytes;
        const uint32_t values = mine + (tile + 1) % D::kSlots * D::kTileBytes;
        copy_async_wait<D::kSlots - 2>();
        block_sync();  // the keys have arrived, and every warp is done with the tile before them
        load_next(tile + D::kSlots - 1);
        float s[1][D::kKeys / 8][4];
        const bool full = sight_of(sees, step, D::kStep).all && !c.bias.data;
        uint32_t visible = 0;
        if (active) {
            clear(s);
            multiply_transposed<T, D::kHead>(s, D::kQuery, warp_row, keys, lane);
            scale_by(s, base.score_scale);
            const Step part = {step.first + warp_key, step.end, step.tile, step.offset + warp_key};
            if (!full) {
                hide_lines(
                    s, base, part, [&](int r) { return query_of(p, at, row + r * 8); }, at.lines, base.low, base.high,
                    lane);
                if (c.bias.data) add_packed_bias<T>(s, p, at, row, part.first + lane % 4 * 2);
                visible = visible_bits(s);
            }
            online_softmax_update(f, s, 1.0f);
        }
        copy_async_wait<D::kSlots - 2>();
        block_sync();  // the values have arrived, and every warp is done with the keys
        load_next(tile + D::kSlots);
        if (!active) continue;
        if (full) {
            multiply<T, D::kHead, false>(f.out, s, values, column, kAsIs, lane);
        } else {
            multiply_visible(f, s, visible, values, column, lane);
        }
    }
}

// --- joining what warps and blocks found ---

// The columns of a row of floats, permuted such that neither a fragment nor a row meets a bank twice.
EA_DEVICE uint32_t float_offset(int row, int column, int width) {
    return static_cast<uint32_t>(row * width + (column ^ ((row & 3) << 3 | (row >> 2 & 1)))) * 4;
}

// Joins the warps that took different keys, and writes the rows: to the workspace, or where no other block shares their
// keys to out and lse.
template <class D>
EA_DEVICE void store_part(D& f, const DecodeParams& p, const Part& at) {
    const AttentionParams& c = p.base.call;
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    const auto statistic = [](int tile, int kind, int row) {
        return static_cast<uint32_t>(tile * 32 + kind * 16 + row) * 4 + D::kQuery;
    };
    const float totals[2] = {quad_sum(f.total[0][0]), quad_sum(f.total[0][1])};
    copy_async_wait<0>();
    block_sync();  // every warp is done with the tiles
    const int half = lane & 1, kind = lane >> 1 & 1;
    if (warp < 4)
        store_shared_32(statistic(warp, kind, lane / 4 + half * 8),
                        as_bits(kind ? (half ? totals[1] : totals[0]) : (half ? f.top[0][1] : f.top[0][0])));
    each(f.out, [&](float x, int, int n, int e) {
        const int row = warp % 4 * 16 + lane / 4 + e / 2 * 8, column = warp / 4 * D::kColumns + n * 8 + lane % 4 * 2;
        store_shared_32(D::kRing + float_offset(row, column + e % 2, D::kHead), as_bits(x));
    });
    block_sync();  // what the warps found is there
    for (int row = warp; row < rows_of(p, at); row += D::kWarps) {
        float weight[D::kKeyWarps], top = -infinity(), total = 0.0f;
        EA_UNROLL
        for (int k = 0; k < D::kKeyWarps; ++k) {
            weight[k] = as_float(load_shared_32(statistic(k * D::kRowWarps + row / 16, 0, row % 16)));
            top = fmaxf(top, weight[k]);
        }
        EA_UNROLL
        for (int k = 0; k < D::kKeyWarps; ++k) {
            weight[k] = power_of_2(weight[k] - (top == -infinity() ? 0.0f : top));
            total += as_float(load_shared_32(statistic(k * D::kRowWarps + row / 16, 1, row % 16))) * weight[k];
        }
        const float factor = total == 0.0f ? 0.0f : 1.0f / total;
        const float lse = total == 0.0f ? -infinity() : top + logarithm_2(total);
        const int i = query_of(p, at, row), h = head_of(p, at, row);
        const int64_t line = (at.b * c.Hq + h) * c.Nq + i, place = at.split * (c.B * c.Hq * c.Nq) + line;
        if (lane == 0) {
            if (p.splits == 1) {
                store_global(static_cast<float*>(c.lse) + line, lse * static_cast<float>(kLn2));
            } else {
                store_global(p.part_lse + place, lse);
            }
        }
        uint16_t* out = head_pointer(c.out, at.b, h) + i * c.out.row_stride;
        for (int column = lane; column < D::kHead; column += kWarp) {
            float sum = 0.0f;
            EA_UNROLL
            for (int k = 0; k < D::kKeyWarps; ++k)
                sum +=
                    as_float(load_shared_32(D::kRing + float_offset(k * D::kRows + row, column, D::kHead))) * weight[k];
            if (column >= c.Dv) continue;
            if (p.splits == 1) {
                store_global(out + column, static_cast<uint16_t>(pack<typename D::T>(sum * factor, 0.0f)));
            } else {
                store_global(p.part_out + place * c.Dv + column, sum * factor);
            }
        }
    }
}

// Grid: splits * tiles of queries * lines, a line being a batch element and `pack` query heads.
template <class D>
EA_KERNEL(D::kThreads, 1)
attention_decode(EA_PARAMETER DecodeParams p) {
    const Part at = part_of(p, block_index());
    D f;
    attend_part(f, p, at);
    store_part(f, p, at);
}

constexpr int kJoinWarps = 4, kJoinThreads = kJoinWarps * kWarp, kJoinColumns = 256;
constexpr uint32_t kJoinShared = kJoinWarps * kJoinColumns * 4;

// Joins the parts of the keys: out = sum_s w_s out_s / sum_s w_s with w_s = 2^lse_s. Grid: a block for each row; warp w
// adds up the parts w, w + kJoinWarps, ..
template <class T>
EA_KERNEL(kJoinThreads, 1)
attention_decode_join(EA_PARAMETER DecodeParams p) {
    const AttentionParams& c = p.base.call;
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp, Dv = static_cast<int>(c.Dv);
    const int64_t row = block_index(), rows = c.B * c.Hq * c.Nq;
    float top = -infinity(), total = 0.0f;
    for (int s = lane; s < p.splits; s += kWarp) top = fmaxf(top, load_global(p.part_lse + s * rows + row));
    EA_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) top = fmaxf(top, shuffle_xor(top, mask));
    const float shift = top == -infinity() ? 0.0f : top;
    for (int s = lane; s < p.splits; s += kWarp) total += power_of_2(load_global(p.part_lse + s * rows + row) - shift);
    EA_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) total += shuffle_xor(total, mask);

    float sum[kJoinColumns / kWarp] = {};
    for (int s = warp; s < p.splits; s += kJoinWarps) {
        const float weight = power_of_2(load_global(p.part_lse + s * rows + row) - shift);
        const float* part = p.part_out + (s * rows + row) * Dv;
        EA_UNROLL
        for (int k = 0; k < kJoinColumns / kWarp; ++k)
            if (k * kWarp + lane < Dv) sum[k] += load_global(part + k * kWarp + lane) * weight;
    }
    EA_UNROLL
    for (int k = 0; k < kJoinColumns / kWarp; ++k)
        store_shared_32(static_cast<uint32_t>(warp * kJoinColumns + k * kWarp + lane) * 4, as_bits(sum[k]));
    block_sync();
    const int64_t head = row / c.Nq;
    uint16_t* out = head_pointer(c.out, static_cast<int>(head / c.Hq), static_cast<int>(head % c.Hq)) +
                    row % c.Nq * c.out.row_stride;
    const float factor = total == 0.0f ? 0.0f : 1.0f / total;
    EA_UNROLL
    for (int k = 0; k < kJoinColumns / kJoinThreads; ++k) {
        const int column = k * kJoinThreads + thread_index();
        float whole = 0.0f;
        EA_UNROLL
        for (int w = 0; w < kJoinWarps; ++w)
            whole += as_float(load_shared_32(static_cast<uint32_t>(w * kJoinColumns + column) * 4));
        if (column < Dv) store_global(out + column, static_cast<uint16_t>(pack<T>(whole * factor, 0.0f)));
    }
    if (thread_index() == 0)
        store_global(static_cast<float*>(c.lse) + row,
                     total == 0.0f ? -infinity() : (top + logarithm_2(total)) * static_cast<float>(kLn2));
}

}  // namespace
}  // namespace sm80
}  // namespace efficient_attn
