// One tile of attention: up to 48 queries by up to 128 keys, in these layouts (w = queries rounded up to whole
// vectors):
//
//     Qt [D][w], dOt [Dv][w]      packed once for each tile of queries
//     S, P, dP, dS [keys][w]      transposed scores: a query is a lane, so softmax needs no horizontal step
//     Ot [Dv][w], dQt [D][w]      accumulators
//
// Keys and values are read in place by broadcast (half precision is widened first), never packed.
#pragma once

#include "../common/block_mask.h"
#include "../common/philox.h"
#include "convert.h"
#include "microkernels.h"

namespace efficient_attn {
namespace {

constexpr int64_t kQueries = 48;  // at most 64: a key's visible queries are the bits of one word
constexpr int64_t kKeys = 128;
constexpr int64_t kRun = 32;  // terms summed in one go: a long sum in float is kept as a sum of short ones

template <class A>
struct Rows {
    const A* data;
    int64_t stride;
};

inline int64_t row_offset(const TensorView& t, int64_t b, int64_t h, int64_t row) {
    return b * t.batch_stride + h * t.head_stride + row * t.row_stride;
}

// Rows [first, first + count) of (b, h), in place or widened into `buffer`.
template <class T, class A>
inline Rows<A> load_rows(const TensorView& t, int64_t b, int64_t h, int64_t first, int64_t count, int64_t width,
                         A* buffer) {
    const T* source = static_cast<const T*>(t.data) + row_offset(t, b, h, first);
    if constexpr (sizeof(T) == sizeof(A)) return {source, t.row_stride};
    for (int64_t r = 0; r < count; ++r) widen_row(source + r * t.row_stride, width, buffer + r * width);
    return {buffer, width};
}

// out[d][r] = factor * row r, element d; lanes beyond `count` are 0.
template <class T, class A>
inline void pack_transposed(const TensorView& t, int64_t b, int64_t h, int64_t first, int64_t count, int64_t width,
                            A factor, int64_t w, A* out) {
    const T* source = static_cast<const T*>(t.data) + row_offset(t, b, h, first);
    for (int64_t r = 0; r < count; ++r)
        for (int64_t d = 0; d < width; ++d) out[d * w + r] = factor * widen<A>(source[r * t.row_stride + d]);
    for (int64_t d = 0; d < width; ++d)
        for (int64_t r = count; r < w; ++r) out[d * w + r] = 0;
}

// out[r][d] = row r, element d, padded with 0 to `padded` elements.
template <class T, class A>
inline void pack_rows(const TensorView& t, int64_t b, int64_t h, int64_t first, int64_t count, int64_t width,
                      int64_t padded, A* out) {
    const T* source = static_cast<const T*>(t.data) + row_offset(t, b, h, first);
    for (int64_t r = 0; r < count; ++r) {
        widen_row(source + r * t.row_stride, width, out + r * padded);
        for (int64_t d = width; d < padded; ++d) out[r * padded + d] = 0;
    }
}

// S[key][query] = sum_d rows[key][d] * columns[d][query]
template <class A>
inline void tile_product(const Rows<A>& rows, int64_t keys, int64_t width, const A* columns, int64_t w, A* S) {
    for_row_groups(keys, [&](auto group, int64_t first) {
        for_panels<A>(w / kLanes<A>, [&](auto panel, int64_t lane) {
            constexpr int MR = decltype(group)::value, NV = decltype(panel)::value;
            for (int64_t d = 0; d < width; d += 2 * kRun) {
                Vec<A> acc[MR][NV];
                clear<A>(acc);
                multiply_accumulate<A>(acc, min_of(2 * kRun, width - d), rows.data + first * rows.stride + d,
                                       rows.stride, Unit{}, columns + d * w + lane, w);
                for (int m = 0; m < MR; ++m) {
                    for (int v = 0; v < NV; ++v) {
                        A* place = S + (first + m) * w + lane + v * kLanes<A>;
                        store(place, d ? load<A>(place) + acc[m][v] : acc[m][v]);
                    }
                }
            }
        });
    });
}

// out[d][query] = out[d][query] * decay[query] + sum_key rows[key][d] * P[key][query]; decay null: 1
template <class A>
inline void accumulate_columns(const Rows<A>& rows, int64_t keys, int64_t width, const A* P, int64_t w, const A* decay,
                               A* out) {
    for_row_groups(width, [&](auto group, int64_t first) {
        for_panels<A>(w / kLanes<A>, [&](auto panel, int64_t lane) {
            constexpr int MR = decltype(group)::value, NV = decltype(panel)::value;
            for (int64_t k = 0; k < keys; k += kRun) {
                Vec<A> acc[MR][NV];
                clear<A>(acc);
                multiply_accumulate<A>(acc, min_of(kRun, keys - k), rows.data + k * rows.stride + first, Unit{},
                                       rows.stride, P + k * w + lane, w);
                for (int m = 0; m < MR; ++m) {
                    for (int v = 0; v < NV; ++v) {
                        A* place = out + (first + m) * w + lane + v * kLanes<A>;
                        const Vec<A> before = load<A>(place);
                        const bool fade = decay && k == 0;
                        store(place,
                              fade ? before * load<A>(decay + lane + v * kLanes<A>) + acc[m][v] : before + acc[m][v]);
                    }
                }
            }
        });
    });
}

// out[key][d] += sum_query P[key][query] * rows[query][d], rows padded to whole vectors
template <class A>
inline void accumulate_rows(const A* P, int64_t keys, int64_t w, int64_t queries, const A* rows, int64_t padded,
                            A* out) {
    for_row_groups(keys, [&](auto group, int64_t first) {
        for_panels<A>(padded / kLanes<A>, [&](auto panel, int64_t lane) {
            constexpr int MR = decltype(group)::value, NV = decltype(panel)::value;
            Vec<A> acc[MR][NV];
            clear<A>(acc);
            multiply_accumulate<A>(acc, queries, P + first * w, w, Unit{}, rows + lane, padded);
            for (int m = 0; m < MR; ++m) {
                for (int v = 0; v < NV; ++v) {
                    A* place = out + (first + m) * padded + lane + v * kLanes<A>;
                    store(place, load<A>(place) + acc[m][v]);
                }
            }
        });
    });
}

// Which queries of the tile see each key, a word a key. Returns false, and writes nothing, when every pair is visible.
inline bool visible_bits(const AttentionParams& p, int64_t b, Range rows, int64_t block_row, Range keys,
                         const uint8_t* tile, int64_t tile_key, uint64_t* bits) {
    const Range all = all_visible(p, b, rows.begin, rows.end);
    if (!tile && keys.begin >= all.begin && keys.end <= all.end) return false;
    const int64_t count = rows.end - rows.begin;
    const uint64_t full = (uint64_t{1} << count) - 1;
    if (tile) {
        transpose_bits(Segment{keys, tile, tile_key}, block_row, count, p.mask.block_k / 8, keys, bits);
    } else {
        for (int64_t j = keys.begin; j < keys.end; ++j) bits[j - keys.begin] = full;
    }
    const MaskView& mask = p.mask;
    const int64_t length = key_count(p, b), centre = mask.window_offset + rows.begin;
    for (int64_t j = keys.begin; j < keys.end; ++j) {
        uint64_t see = j < length ? full : 0;
        const int64_t first = mask.window_right < 0 ? 0 : max_of(0, min_of(count, j - centre - mask.window_right));
        const int64_t last = mask.window_left < 0 ? count : max_of(0, min_of(count, j - centre + mask.window_left + 1));
        see &= ((uint64_t{1} << last) - 1) & ~((uint64_t{1} << first) - 1);
        bits[j - keys.begin] &= see;
    }
    return true;
}

inline bool has_bias(const AttentionParams& p) { return p.bias.data != nullptr; }

// S = S * scale + bias; a bias of -inf clears the pair's bit. Returns whether any pair of the tile is masked.
template <class T, class A>
inline bool add_bias(const AttentionParams& p, int64_t b, int64_t h, Range rows, Range keys, A scale, int64_t w, A* S,
                     bool masked, uint64_t* bits) {
    const int64_t count = rows.end - rows.begin;
    const int64_t start = b * p.bias.stride[0] + h * p.bias.stride[1] + rows.begin * p.bias.stride[2];
    const bool wide = p.bias.dtype != p.dtype;  // float32 beside half precision
    for (int64_t j = keys.begin; j < keys.end; ++j) {
        A* scores = S + (j - keys.begin) * w;
        uint64_t hidden = 0;
        for (int64_t r = 0; r < count; ++r) {
            const int64_t at = start + r * p.bias.stride[2] + j * p.bias.stride[3];
            const A value = wide ? static_cast<A>(static_cast<const float*>(p.bias.data)[at])
                                 : widen<A>(static_cast<const T*>(p.bias.data)[at]);
            scores[r] = scores[r] * scale + value;
            hidden |= static_cast<uint64_t>(value == -kInfinity<A>) << r;
        }
        if (hidden && !masked) {
            masked = true;
            for (int64_t k = 0; k < keys.end - keys.begin; ++k) bits[k] = (uint64_t{1} << count) - 1;
        }
        if (hidden) bits[j - keys.begin] &= ~hidden;
    }
    return masked;
}

// S[key][query] = value where the pair's bit is 0
template <class A>
inline void fill_masked(const uint64_t* bits, int64_t keys, int64_t w, A value, A* S) {
    for (int64_t k = 0; k < keys; ++k) {
        for (int64_t lane = 0; lane < w; lane += kLanes<A>) {
            A* place = S + k * w + lane;
            store(place, select<A>(lanes_from_bits<A>(bits[k] >> lane), load<A>(place), broadcast<A>(value)));
        }
    }
}

template <class A>
inline bool is_finite(A x) {
    return x - x == 0;
}

template <class A>
inline bool row_is_finite(const A* row, int64_t width) {
    A sum = 0;
    for (int64_t d = 0; d < width; ++d) sum += row[d] - row[d];
    return sum == 0;
}

// Rows of a partly masked tile that hold NaN or infinity: a product with weight 0 would spread them to queries that do
// not see them. They are taken out (`rows` then points at a copy without them) and added pair by pair afterwards.
struct Poison {
    int64_t count;
    uint8_t index[kKeys];
};

template <class A>
inline Poison find_poison(const Rows<A>& rows, int64_t count, int64_t width) {
    Poison poison{0, {}};
    for (int64_t k = 0; k < count; ++k)
        if (!row_is_finite(rows.data + k * rows.stride, width)) poison.index[poison.count++] = static_cast<uint8_t>(k);
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

// accumulate_columns for a tile in which some pairs are masked.
template <class A>
inline void accumulate_columns_masked(const Rows<A>& rows, int64_t keys, int64_t width, const A* P, int64_t w,
                                      const A* decay, const uint64_t* bits, A* buffer, A* out) {
    const Poison poison = find_poison(rows, keys, width);
    if (!poison.count) return accumulate_columns(rows, keys, width, P, w, decay, out);
    accumulate_columns(without_poison(rows, poison, keys, width, buffer), keys, width, P, w, decay, out);
    for (int64_t n = 0; n < poison.count; ++n) {
        const int64_t k = poison.index[n];
        for (int64_t r = 0; r < w && r < 64; ++r)
            if (bits[k] >> r & 1)
                for (int64_t d = 0; d < width; ++d) out[d * w + r] += P[k * w + r] * rows.data[k * rows.stride + d];
    }
}

// accumulate_rows for a tile in which some pairs are masked; poisoned rows of queries are taken out of `rows` for good.
template <class A>
inline void accumulate_rows_masked(const A* P, int64_t keys, int64_t w, int64_t queries, A* rows, int64_t padded,
                                   const uint64_t* bits, A* out) {
    const Poison poison = find_poison(Rows<A>{rows, padded}, queries, padded);
    for (int64_t n = 0; n < poison.count; ++n) {
        A* row = rows + poison.index[n] * padded;
        for (int64_t k = 0; k < keys; ++k)
            if (bits[k] >> poison.index[n] & 1)
                for (int64_t d = 0; d < padded; ++d) out[k * padded + d] += P[k * w + poison.index[n]] * row[d];
        for (int64_t d = 0; d < padded; ++d) row[d] = 0;
    }
    accumulate_rows(P, keys, w, queries, rows, padded, out);
}

// A bump allocator over a thread's memory; every piece starts on a cache line.
struct Arena {
    char* next;

    template <class X>
    X* take(int64_t count) {
        X* piece = reinterpret_cast<X*>(next);
        next += round_up(count * static_cast<int64_t>(sizeof(X)), 64);
        return piece;
    }
};

// Calls visit(keys, segment) for the pieces, of at most kKeys keys, that the queries `rows` see inside `limits`.
template <class Visit>
inline void for_each_chunk(const AttentionParams& p, int64_t b, int64_t h, int64_t block, Range rows, Range limits,
                           Visit visit) {
    for_each_segment(p, b, h, block, rows, [&](const Segment& segment) {
        const Range inside = intersect(segment.keys, limits);
        for (int64_t key = inside.begin; key < inside.end; key += kKeys)
            visit(Range{key, min_of(key + kKeys, inside.end)}, segment);
    });
}

}  // namespace
}  // namespace efficient_attn
