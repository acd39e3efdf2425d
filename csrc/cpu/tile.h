// One tile of attention: up to 64 queries by up to 128 keys, in these layouts (w = queries rounded up to whole
// vectors):
//
//     Qt [D][w], dOt [Dv][w]      packed once for each tile of queries
//     S, P, dP, dS [keys][w]      transposed scores: a query is a lane, so softmax needs no horizontal step
//     Ot [Dv][w], dQt [D][w]      accumulators
//
// Keys and values are read in place by broadcast (half precision is widened first), never packed; where the processor
// multiplies pairs of bfloat16, queries, values and weights are packed as pairs (pairs.h).
#pragma once

#include "../common/philox.h"
#include "microkernels.h"
#include "pack.h"
#include "pairs.h"
#include "score_modifiers.h"

namespace efficient_attn {
namespace {

constexpr int64_t kQueries = 64;  // at most 64: a key's visible queries are the bits of one word
constexpr int64_t kKeys = 128;

constexpr int64_t kFewQueries = 32, kNarrowWindow = 512;

// The tiles of queries of a call. Under a narrow window they are smaller: all keys that any of its queries sees are
// multiplied with all of them.
inline QueryTiling attention_tiling(const AttentionParams& p) {
    const MaskView& mask = p.mask;
    const bool narrow = !mask.indptr && mask.window_left >= 0 && mask.window_right >= 0 &&
                        mask.window_left + mask.window_right < kNarrowWindow;
    return query_tiling(p, narrow ? kFewQueries : kQueries);
}

// Terms summed in one go: fewer where a product is rounded before it is added.
#if defined(__FMA__) || defined(__aarch64__)
constexpr int64_t kTerms = 64;
#else
constexpr int64_t kTerms = 8;
#endif

inline bool has_order(const AttentionParams& p) { return p.query.order || p.key.order; }

// The tensors' own query and key that row i and key j of a call are.
inline int64_t query_of(const AttentionParams& p, int64_t b, int64_t h, int64_t i) {
    return ordered_row(p.query, b, h, i);
}
inline int64_t key_of(const AttentionParams& p, int64_t b, int64_t h, int64_t j) {
    return p.key.order ? ordered_row(p.key, b, h / (p.Hq / p.Hkv), j) : j;
}

// Where lse and its gradient have row i.
inline int64_t lse_row(const AttentionParams& p, int64_t b, int64_t h, int64_t i) {
    return (b * p.Hq + h) * p.query_rows + query_of(p, b, h, i);
}

// keep[j - keys.begin] bit (i - queries.begin): whether dropout keeps the pair (i, j); at most 64 queries.
inline void kept_bits(const AttentionParams& p, int64_t b, int64_t h, Range queries, Range keys, uint64_t* keep) {
    if (has_order(p)) {
        int64_t rows[kQueries];
        for (int64_t i = queries.begin; i < queries.end; ++i)
            rows[i - queries.begin] = p.dropout_query + query_of(p, b, h, i);
        for (int64_t j = keys.begin; j < keys.end; ++j)
            keep[j - keys.begin] =
                dropout_bits_of_rows(p.dropout_seed, p.dropout_p, b, p.dropout_head + h, rows,
                                     queries.end - queries.begin, p.dropout_key + key_of(p, b, h, j));
        return;
    }
    dropout_bits(p.dropout_seed, p.dropout_p, b, p.dropout_head + h, p.dropout_query + queries.begin,
                 queries.end - queries.begin, p.dropout_key + keys.begin, p.dropout_key + keys.end, keep);
}

// S[key][query] = sum_d rows[key][d] * columns[d][query]
template <class A>
inline void score_tile(const Rows<A>& rows, int64_t keys, int64_t width, const A* columns, int64_t w, A* S) {
    product<A, Into::kReplace, kTerms>(keys, w / kLanes<A>, width, rows.data, rows.stride, Unit{}, columns, w, S, w);
}

// out[d][query] = out[d][query] * fade[query] + sum_key rows[key][d] * P[key][query]; fade null: 1
template <class A>
inline void accumulate_columns(const Rows<A>& rows, int64_t keys, int64_t width, const A* P, int64_t w, const A* fade,
                               A* out) {
    if (fade) {
        product<A, Into::kFade, kTerms>(width, w / kLanes<A>, keys, rows.data, Unit{}, rows.stride, P, w, out, w, fade);
    } else {
        product<A, Into::kAdd, kTerms>(width, w / kLanes<A>, keys, rows.data, Unit{}, rows.stride, P, w, out, w);
    }
}

// out[key][d] += sum_query P[key][query] * rows[query][d]; rows and out are whole vectors wide
template <class A>
inline void accumulate_rows(const A* P, int64_t keys, int64_t w, int64_t queries, const Rows<A>& rows, int64_t padded,
                            A* out) {
    product<A, Into::kAdd, kTerms>(keys, padded / kLanes<A>, queries, P, w, Unit{}, rows.data, rows.stride, out,
                                   padded);
}

// out[m][n] (into) sum_k a[m][k] * b[k][n] of pairs; k < depth, pairs of a side by side or `pair_stride` elements
// apart.
template <Into kInto, class A>
inline void pair_product(int64_t rows, int64_t lanes, int64_t depth, const BFloat16* a, int64_t row_stride,
                         int64_t pair_stride, const Pair* b, A* out, const A* factor = nullptr) {
#if defined(__AMX_BF16__)
    (void)pair_stride;
    tile_product<kInto>(rows, lanes, depth, a, row_stride, b, out, factor);
#else
    constexpr int64_t terms = 512;  // pairs: the widest head, and every tile, in one go, as a scale goes with one only
    product<A, kInto, terms>(rows, lanes / kLanes<A>, depth, a, row_stride, pair_stride, b, lanes, out, lanes, factor);
#endif
}

// The same products of pairs. A score is times the scale of its column if there is one.
template <class T, class A>
inline void score_tile(const Rows<T>& rows, int64_t keys, int64_t width, const Pair* columns, int64_t w, const A* scale,
                       A* S) {
    if (scale) {
        pair_product<Into::kScale>(keys, w, pair_depth(width), rows.data, rows.stride, 2, columns, S, scale);
    } else {
        pair_product<Into::kReplace>(keys, w, pair_depth(width), rows.data, rows.stride, 2, columns, S);
    }
}
template <class A>
inline void accumulate_columns(const LeftFactor& rows, int64_t keys, int64_t width, const Pair* P, int64_t w,
                               const A* fade, A* out) {
    if (fade) {
        pair_product<Into::kFade>(width, w, pair_depth(keys), rows.data, rows.column_stride, rows.pair_stride, P, out,
                                  fade);
    } else {
        pair_product<Into::kAdd>(width, w, pair_depth(keys), rows.data, rows.column_stride, rows.pair_stride, P, out);
    }
}
template <class A>
inline void accumulate_rows(const BFloat16* P, int64_t keys, int64_t w, int64_t queries, const Pair* rows,
                            int64_t padded, A* out) {
    pair_product<Into::kAdd>(keys, padded, pair_depth(queries), P, w, 2, rows, out);
}

// How the tiles of keys and values are read: in place in pairs, or as A.
template <class T, class A>
using Operand = typename Choose<kPairProducts<T>, T, A>::type;

template <class T, class A>
inline Rows<Operand<T, A>> load_operand(const TensorView& t, int64_t b, int64_t h, Range rows, int64_t width,
                                        A* buffer) {
    const int64_t count = rows.end - rows.begin;
    if constexpr (kPairProducts<T>) {
        return load_paired_rows<T>(t, b, h, rows.begin, count, width, reinterpret_cast<T*>(buffer));
    } else {
        return load_rows<T>(t, b, h, rows.begin, count, width, buffer);
    }
}

// Rows of a tensor, copied once for several tiles; data null: a tile reads or copies its own.
template <class A>
struct CopiedRows {
    A* data = nullptr;
    Range rows{0, 0};

    Rows<A> at(int64_t row, int64_t width) const { return {data + (row - rows.begin) * width, width}; }
};

template <class T, class A>
inline CopiedRows<A> copy_rows(const TensorView& t, int64_t b, int64_t h, Range rows, int64_t width, A* place) {
    if constexpr (kPairProducts<T>) return {};
    gather_rows<T>(t, b, h, rows.begin, rows.end - rows.begin, width, width, place);
    return {place, rows};
}

template <class T, class A>
inline Rows<Operand<T, A>> load_operand(const TensorView& t, int64_t b, int64_t h, Range rows, int64_t width,
                                        const CopiedRows<A>& copied, A* buffer) {
    if constexpr (!kPairProducts<T>)
        if (copied.data) return copied.at(rows.begin, width);
    return load_operand<T>(t, b, h, rows, width, buffer);
}

inline bool has_bias(const AttentionParams& p) { return p.bias.data != nullptr; }

// Scores are kept in units of the exponent of two, or of e where there is a bias, which as finite as it comes must stay
// finite; this is what one of them is worth in natural units.
inline bool is_natural(const AttentionParams& p) { return has_bias(p) || p.diagonals.data; }
inline double score_unit(const AttentionParams& p) { return is_natural(p) ? 1.0 : kLn2; }

// What products of queries and keys are multiplied with: with a soft cap they become what `cap_scores` takes.
inline double score_scale(const AttentionParams& p) {
    if (p.softcap > 0) return p.scale * (2 * kLog2e / p.softcap);
    return is_natural(p) ? p.scale : p.scale * kLog2e;
}

// Whether every product is one of pairs: kernels of an instruction set that multiplies them serve bfloat16 alone.
constexpr bool kMultipliesPairs = kPairProducts<BFloat16>;

// A weight below 2^-100, where the largest of its row is 1, counts as 0: next to the smallest normal number its
// products with values are no normal ones, each of which costs a processor some hundred cycles (as ALiBi's do, far from
// a query).
constexpr float kLeastWeight = -100.0f;
template <bool kNatural>
EA_INLINE Vec<float> drop_tiny(Vec<float> difference) {
    constexpr float least = kNatural ? kLeastWeight * static_cast<float>(kLn2) : kLeastWeight;
    return select<float>(difference < least, broadcast(-kInfinity<float>), difference);
}
template <bool kNatural>
EA_INLINE Vec<double> drop_tiny(Vec<double> difference) {
    return difference;
}

// What a difference of scores means as a factor.
template <bool kNatural, class V>
EA_INLINE V exponential(V difference) {
    difference = drop_tiny<kNatural>(difference);
    return kNatural ? exp(difference) : exp2(difference);
}

// The log-sum-exp of a row whose largest score is `top` and whose weights exp(s - top) sum up to `total`.
template <class A>
inline void store_lse(const AttentionParams& p, int64_t b, int64_t h, int64_t i, A top, double total) {
    if (!p.lse) return;
    static_cast<A*>(p.lse)[lse_row(p, b, h, i)] =
        total == 0 ? -kInfinity<A> : static_cast<A>(static_cast<double>(top) * score_unit(p) + __builtin_log(total));
}

inline uint64_t low_bits(int64_t count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

// Whether some pair may be hidden, by other means than a bias.
inline bool may_hide_pairs(const AttentionParams& p) {
    return p.mask.indptr || p.mask.kv_lengths || p.mask.window_left >= 0 || p.mask.window_right >= 0;
}

// Segments of keys side by side, at most kKeys of them, that are multiplied in one go.
struct Chunk {
    Range keys;
    int64_t count;
    Segment segments[kKeys / 16];  // a block of the list has at least 16 keys
};

// Which queries of the tile see each key, a word a key. Returns false, and writes nothing, when every pair is visible.
inline bool visible_bits(const AttentionParams& p, int64_t b, int64_t h, Range rows, int64_t block_row,
                         const Chunk& chunk, uint64_t* bits) {
    const Range keys = chunk.keys, all = all_visible(p, b, rows.begin, rows.end);
    bool listed = true;
    for (int64_t n = 0; n < chunk.count; ++n) listed &= !chunk.segments[n].tile;
    const bool inside = keys.begin >= all.begin && keys.end <= all.end;
    if (listed && inside) return false;
    const int64_t count = rows.end - rows.begin;
    const uint64_t full = low_bits(count);
    for (int64_t n = 0; n < chunk.count; ++n) {
        const Segment& segment = chunk.segments[n];
        uint64_t* part = bits + segment.keys.begin - keys.begin;
        if (segment.tile) {
            transpose_bits(segment, block_row, count, p.mask.block_k / 8, segment.keys, part);
        } else {
            for (int64_t k = 0; k < segment.keys.end - segment.keys.begin; ++k) part[k] = full;
        }
    }
    if (inside) return true;
    const MaskView& mask = p.mask;
    const int64_t length = key_count(p, b), centre = mask.window_offset + rows.begin;
    const bool alone = hides_single_keys(p);
    for (int64_t j = keys.begin; j < keys.end; ++j) {
        uint64_t see = (alone ? key_of(p, b, h, j) : j) < length ? full : 0;
        const int64_t first = mask.window_right < 0 ? 0 : max_of(0, min_of(count, j - centre - mask.window_right));
        const int64_t last = mask.window_left < 0 ? count : max_of(0, min_of(count, j - centre + mask.window_left + 1));
        see &= low_bits(last) & ~low_bits(first);
        bits[j - keys.begin] &= see;
    }
    return true;
}

// Calls f with an element of the bias's type: the call's own, or float32 beside half precision.
template <class T, class F>
inline void with_bias_type(const AttentionParams& p, F f) {
    if constexpr (sizeof(T) == 2)
        if (p.bias.dtype != p.dtype) return f(float{});
    f(T{});
}

// What a (B, H, Nq, Nk) array holds for the pairs of the tile, [keys][w], into `out`; a stride of 0 broadcasts. Along
// the keys it is contiguous or broadcast (backends/words.py sees to it).
template <class T, class A>
inline void load_pairs(const void* array, const int64_t* stride, int64_t b, int64_t h, Range rows, Range keys,
                       int64_t w, A* scratch, A* out) {
    const bool by_key = stride[3] != 0;
    const T* data = static_cast<const T*>(array) + keys.begin * stride[3];
    const TensorView view{const_cast<T*>(data), stride[0], stride[1], stride[2]};
    const int64_t count = rows.end - rows.begin, n = keys.end - keys.begin;
    pack_transposed<T>(view, b, h, rows.begin, count, by_key ? n : 1, Unscaled{}, w, scratch, out);
    for (int64_t k = 1; k < n && !by_key; ++k)
        for (int64_t lane = 0; lane < w; ++lane) out[k * w + lane] = out[lane];
}

// The same of the bias where queries or keys have an order.
template <class E, class A>
inline void gather_bias(const AttentionParams& p, int64_t b, int64_t h, Range rows, Range keys, int64_t w, A* out) {
    const int64_t* stride = p.bias.stride;
    const E* data = static_cast<const E*>(p.bias.data) + b * stride[0] + h * stride[1];
    fill_zero(out, (keys.end - keys.begin) * w);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
        const E* row = data + query_of(p, b, h, i) * stride[2];
        for (int64_t j = keys.begin; j < keys.end; ++j)
            out[(j - keys.begin) * w + i - rows.begin] = widen<A>(row[key_of(p, b, h, j) * stride[3]]);
    }
}

// Adds a tile of a bias to S; one of -inf clears the pair's bit. Returns whether any pair of the tile is masked.
template <class A>
inline bool add_hiding(Range rows, Range keys, int64_t w, const A* bias, A* S, bool masked, uint64_t* bits) {
    const int64_t n = keys.end - keys.begin;
    for (int64_t k = 0; k < n; ++k) {
        uint64_t hidden = 0;
        for (int64_t lane = 0; lane < w; lane += kLanes<A>) {
            A* place = S + k * w + lane;
            const Vec<A> value = load(bias + k * w + lane);
            store(place, load<A>(place) + value);
            hidden |= bits_from_lanes<A>(value == -kInfinity<A>) << lane;
        }
        if (hidden && !masked) {
            masked = true;
            for (int64_t other = 0; other < n; ++other) bits[other] = low_bits(rows.end - rows.begin);
        }
        if (hidden) bits[k] &= ~hidden;
    }
    return masked;
}

// Adds what there is of biases to S, and clears the bits of pairs that they hide. Returns whether any pair is masked.
template <class T, class A>
inline bool add_biases(const AttentionParams& p, int64_t b, int64_t h, Range rows, Range keys, int64_t w, A* S,
                       bool masked, uint64_t* bits, A* scratch, A* bias) {
    if (has_bias(p)) {
        with_bias_type<T>(p, [&](auto element) {
            using E = decltype(element);
            if (has_order(p)) {
                gather_bias<E>(p, b, h, rows, keys, w, bias);
            } else {
                load_pairs<E>(p.bias.data, p.bias.stride, b, h, rows, keys, w, scratch, bias);
            }
        });
        masked = add_hiding(rows, keys, w, bias, S, masked, bits);
    }
    if (!p.diagonals.data) return masked;
    if (!p.diagonals.hides) {
        add_diagonals(p, b, h, rows.begin, keys, w, S);
        return masked;
    }
    fill_zero(bias, (keys.end - keys.begin) * w);
    add_diagonals(p, b, h, rows.begin, keys, w, bias);
    return add_hiding(rows, keys, w, bias, S, masked, bits);
}

// S[key][query] = value where the pair's bit is 0
template <class A>
inline void fill_masked(const uint64_t* bits, int64_t keys, int64_t w, A value, A* S) {
    for (int64_t k = 0; k < keys; ++k) {
        if ((~bits[k] & low_bits(w)) == 0) continue;
        for (int64_t lane = 0; lane < w; lane += kLanes<A>) {
            A* place = S + k * w + lane;
            store(place, select<A>(lanes_from_bits<A>(bits[k] >> lane), load<A>(place), broadcast<A>(value)));
        }
    }
}

template <class A>
inline bool row_is_finite(const A* row, int64_t width) {
    Vec<A> sum = {};
    int64_t d = 0;
    for (; d + kLanes<A> <= width; d += kLanes<A>) sum += load(row + d) - load(row + d);
    A rest = 0;
    for (; d < width; ++d) rest += row[d] - row[d];
    return rest == 0 && bits_from_lanes<A>(sum == Vec<A>{}) == low_bits(kLanes<A>);
}

// Rows of a partly masked tile that hold NaN or infinity: a product with weight 0 would spread them to queries that do
// not see them. They are taken out (`rows` then points at a copy without them) and added pair by pair afterwards.
struct Poison {
    int64_t count;
    uint8_t index[kKeys];
};

// `bits`, if given, says who sees each row: rows that all queries of `full` see may stay.
template <class X>
inline Poison find_poison(const Rows<X>& rows, int64_t count, int64_t width, const uint64_t* bits = nullptr,
                          uint64_t full = 0) {
    Poison poison{0, {}};
    for (int64_t k = 0; k < count; ++k)
        if ((!bits || (bits[k] & full) != full) && !row_is_finite(rows.data + k * rows.stride, width))
            poison.index[poison.count++] = static_cast<uint8_t>(k);
    return poison;
}

template <class A>
inline Rows<A> without_poison(const Rows<A>& rows, const Poison& poison, int64_t count, int64_t width, A* buffer) {
    for (int64_t k = 0; k < count; ++k)
        for (int64_t d = 0; d < width; ++d) buffer[k * width + d] = rows.data[k * rows.stride + d];
    for (int64_t n = 0; n < poison.count; ++n)
        for (int64_t d = 0; d < width; ++d) buffer[poison.index[n] * width + d] = 0;
    return {buffer, width};
}

// Rows packed as pairs of rows, without those of `poison`.
inline void clear_poison(const Poison& poison, int64_t padded, const LeftFactor& rows) {
    for (int64_t n = 0; n < poison.count; ++n)
        for (int64_t d = 0; d < padded; ++d) rows.at(poison.index[n], d) = BFloat16{0};
}
inline void clear_poison(const Poison& poison, int64_t padded, Pair* pairs) {
    clear_poison(poison, padded, LeftFactor{&pairs->first, 2, 2 * padded});
}

// What the taken out rows add to accumulate_columns for the queries that see them.
template <class X, class A>
inline void add_poison_to_columns(const Rows<X>& rows, const Poison& poison, int64_t width, const A* P, int64_t w,
                                  const uint64_t* bits, A* out) {
    for (int64_t n = 0; n < poison.count; ++n) {
        const int64_t k = poison.index[n];
        for (int64_t r = 0; r < w && r < 64; ++r)
            if (bits[k] >> r & 1)
                for (int64_t d = 0; d < width; ++d)
                    out[d * w + r] += P[k * w + r] * widen<A>(rows.data[k * rows.stride + d]);
    }
}

// And to accumulate_rows; bits null: every pair is visible.
template <class X, class A>
inline void add_poison_to_rows(const Rows<X>& rows, const Poison& poison, int64_t width, const A* P, int64_t keys,
                               int64_t w, const uint64_t* bits, int64_t padded, A* out) {
    for (int64_t n = 0; n < poison.count; ++n) {
        const int64_t r = poison.index[n];
        for (int64_t k = 0; k < keys; ++k)
            if (!bits || bits[k] >> r & 1)
                for (int64_t d = 0; d < width; ++d)
                    out[k * padded + d] += P[k * w + r] * widen<A>(rows.data[r * rows.stride + d]);
    }
}

// accumulate_columns for a tile in which some pairs are masked.
template <class A>
inline void accumulate_columns_masked(const Rows<A>& rows, int64_t keys, int64_t width, const A* P, int64_t w,
                                      const A* fade, const uint64_t* bits, uint64_t full, A* buffer, A* out) {
    const Poison poison = find_poison(rows, keys, width, bits, full);
    if (!poison.count) return accumulate_columns(rows, keys, width, P, w, fade, out);
    accumulate_columns(without_poison(rows, poison, keys, width, buffer), keys, width, P, w, fade, out);
    add_poison_to_columns(rows, poison, width, P, w, bits, out);
}

// accumulate_rows for a tile in which some pairs are masked.
template <class A>
inline void accumulate_rows_masked(const A* P, int64_t keys, int64_t w, int64_t queries, const Rows<A>& rows,
                                   int64_t padded, const uint64_t* bits, A* buffer, A* out) {
    const Poison poison = find_poison(rows, queries, padded);
    if (!poison.count) return accumulate_rows(P, keys, w, queries, rows, padded, out);
    accumulate_rows(P, keys, w, queries, without_poison(rows, poison, queries, padded, buffer), padded, out);
    add_poison_to_rows(rows, poison, padded, P, keys, w, bits, padded, out);
}

// Calls visit(chunk) for the chunks of keys that the queries `rows` see inside `limits`. Chunks end at multiples of
// kKeys, so that sums are grouped alike however the keys are divided among passes. Small blocks side by side are one
// chunk; larger ones are not, since little is gained and a row's sums would be grouped by what its neighbours see.
template <class Visit>
inline void for_each_chunk(const AttentionParams& p, int64_t b, int64_t h, int64_t block, Range rows, Range limits,
                           Visit visit) {
    const bool joins = p.mask.block_k <= 32;
    Chunk chunk{{0, 0}, 0, {}};
    for_each_segment(p, b, h, block, rows, limits, [&](const Segment& segment) {
        for (int64_t key = segment.keys.begin, end; key < segment.keys.end; key = end) {
            end = min_of((key / kKeys + 1) * kKeys, segment.keys.end);
            if (chunk.count && (!joins || key != chunk.keys.end || key % kKeys == 0)) {
                visit(static_cast<const Chunk&>(chunk));
                chunk.count = 0;
            }
            if (!chunk.count) chunk.keys.begin = key;
            chunk.keys.end = end;
            chunk.segments[chunk.count++] = {{key, end}, segment.tile, segment.tile_key};
        }
    });
    if (chunk.count) visit(static_cast<const Chunk&>(chunk));
}

}  // namespace
}  // namespace efficient_attn
