// Attention forward for a few queries (decoding with a key/value cache): bound by the reading of K and V, so that they
// are read once for all query heads of a group, and split along the keys, so that one sequence uses every core.
//
// Phases:
//     0  partial results      one (batch, key/value head, some of its query heads, span of keys)
//     1  merge                one (batch, key/value head, some of its query heads): the spans in order
//
// Rows are pairs (query head, query), at most 64 of them: S [keys][w] has a row in each lane, O [rows][Dv] an
// accumulator. The cut depends on the sizes alone, so the bits do not depend on the threads.
#pragma once

#include "attention_forward.h"

namespace efficient_attn {
namespace {

constexpr int64_t kDecodeQueries = 16;
constexpr int64_t kDecodeSpan = 1024;  // keys of one task

// Without a query, a key or a head there is nothing to cut.
inline bool is_decode(const AttentionParams& p) {
    return p.Nq <= kDecodeQueries && p.Nq * p.Nk * p.Hkv > 0 && !p.weights.data;
}

// How the work is cut. Heads with lists of their own are walked one by one.
struct DecodeCut {
    int64_t heads, head_parts, spans;

    explicit DecodeCut(const AttentionParams& p) {
        const int64_t group = p.Hq / p.Hkv;
        heads = p.mask.indptr && p.mask.heads > 1 ? 1 : min_of(group, kQueries / p.Nq);
        head_parts = ceil_div(group, heads);
        spans = ceil_div(p.Nk, kDecodeSpan);
    }
};

struct DecodeTask {
    int64_t b, kv, h, heads, span;
};

inline DecodeTask decode_task(const AttentionParams& p, const DecodeCut& cut, int64_t task) {
    const int64_t span = task % cut.spans, part = task / cut.spans % cut.head_parts;
    const int64_t kv = task / cut.spans / cut.head_parts % p.Hkv, b = task / cut.spans / cut.head_parts / p.Hkv;
    const int64_t first = part * cut.heads;
    return {b, kv, kv * (p.Hq / p.Hkv) + first, min_of(cut.heads, p.Hq / p.Hkv - first), span};
}

// What a span of keys leaves behind: O [rows][Dv, whole vectors], top and total [rows, whole vectors].
template <class A>
struct DecodePartial {
    A *O, *top, *total;

    static int64_t elements(const AttentionParams& p, const DecodeCut& cut) {
        const int64_t rows = cut.heads * p.Nq;
        return round_up(rows * whole_vectors<A>(p.Dv) + 2 * whole_vectors<A>(rows), 64 / sizeof(A));
    }
    DecodePartial(const AttentionParams& p, const DecodeCut& cut, A* shared, int64_t task) {
        const int64_t rows = cut.heads * p.Nq;
        O = shared + task * elements(p, cut);
        top = O + rows * whole_vectors<A>(p.Dv);
        total = top + whole_vectors<A>(rows);
    }
};

template <class A>
struct DecodeTile {
    A *Q, *S, *fade, *K_buffer, *V_buffer, *buffer;
    uint64_t *bits, *part, *keep;

    DecodeTile(const AttentionParams& p, char* memory) {
        const int64_t D = whole_vectors<A>(p.D), Dv = whole_vectors<A>(p.Dv);
        Arena arena{memory};
        Q = arena.take<A>(kQueries * D);
        S = arena.take<A>(kKeys * kQueries);
        fade = arena.take<A>(kQueries);
        K_buffer = arena.take<A>(kKeys * D);
        V_buffer = arena.take<A>(kKeys * Dv);
        buffer = arena.take<A>(kKeys * Dv);
        bits = arena.take<uint64_t>(kKeys);
        part = arena.take<uint64_t>(kKeys);
        keep = arena.take<uint64_t>(kKeys);
        end = arena.next;
    }
    static int64_t bytes(const AttentionParams& p) { return DecodeTile(p, kNoMemory).end - kNoMemory; }

  private:
    char* end;
};

// S[key][row] = sum_d K[key][d] Q[row][d], kKeyRows keys by MR rows at a time; both are whole vectors wide.
constexpr int kKeyRows = kTileRows / 2;

template <class T, class A, int MR, int kCount>
EA_NOINLINE void dot_tile(const T* K, int64_t k_stride, const A* Q, int64_t width, int64_t w, A* S) {
    Vec<A> acc[kCount][MR];
    clear<A>(acc);
    for (int64_t d = 0; d < width; d += kLanes<A>) {
        Vec<A> q[MR];
#pragma GCC unroll 4
        for (int r = 0; r < MR; ++r) q[r] = load(Q + r * width + d);
#pragma GCC unroll 4
        for (int k = 0; k < kCount; ++k) {
            const Vec<A> key = load_widened<A>(K + k * k_stride + d);
#pragma GCC unroll 4
            for (int r = 0; r < MR; ++r) acc[k][r] += key * q[r];
        }
    }
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k)
        store_sums<A>(acc[k][0], acc[k][MR > 1], MR > 2 ? acc[k][MR - 2] : Vec<A>{}, MR > 2 ? acc[k][MR - 1] : Vec<A>{},
                      MR, S + k * w);
}

// Rows that will be wanted soon: fetched a few at a time beside the arithmetic, since no hardware prefetcher follows
// the turns between K and V.
struct Ahead {
    const char *K, *V;
    int64_t K_stride, V_stride, K_bytes, V_bytes;

    EA_INLINE void fetch(int64_t first, int64_t count) const {
        for (int64_t k = first; k < first + count; ++k) {
            for (int64_t byte = 0; byte < K_bytes; byte += 64) __builtin_prefetch(K + k * K_stride + byte, 0, 2);
            for (int64_t byte = 0; byte < V_bytes; byte += 64) __builtin_prefetch(V + k * V_stride + byte, 0, 2);
        }
    }
};

template <class T, class A, int MR>
inline void dot_rows(const T* K, int64_t k_stride, int64_t keys, const A* Q, int64_t width, int64_t w,
                     const Ahead* ahead, A* S) {
    int64_t k = 0;
    for (; k + kKeyRows <= keys; k += kKeyRows) {
        if (ahead) ahead->fetch(k, kKeyRows);
        dot_tile<T, A, MR, kKeyRows>(K + k * k_stride, k_stride, Q, width, w, S + k * w);
    }
    for (; k < keys; ++k) dot_tile<T, A, MR, 1>(K + k * k_stride, k_stride, Q, width, w, S + k * w);
}

template <class T, class A>
inline void dot_scores(const T* K, int64_t k_stride, int64_t keys, const A* Q, int64_t rows, int64_t width, int64_t w,
                       const Ahead& ahead, A* S) {
    int64_t r = 0;
    auto first = [&] { return r == 0 ? &ahead : nullptr; };
    for (; r + 4 <= rows; r += 4) dot_rows<T, A, 4>(K, k_stride, keys, Q + r * width, width, w, first(), S + r);
    if (rows & 2) {
        dot_rows<T, A, 2>(K, k_stride, keys, Q + r * width, width, w, first(), S + r);
        r += 2;
    }
    if (rows & 1) dot_rows<T, A, 1>(K, k_stride, keys, Q + r * width, width, w, first(), S + r);
}

// The values of these keys and the keys that come next.
template <class T>
inline Ahead rows_ahead(const AttentionParams& p, int64_t b, int64_t kv, Range keys) {
    const T *K = row_pointer<T>(p.key, b, kv, keys.begin), *V = row_pointer<T>(p.value, b, kv, keys.begin);
    const int64_t size = static_cast<int64_t>(sizeof(T)), step = p.key.row_stride * size;
    const bool more = keys.end + (keys.end - keys.begin) <= p.Nk;
    return {reinterpret_cast<const char*>(K) + (more ? (keys.end - keys.begin) * step : 0),
            reinterpret_cast<const char*>(V),
            step,
            p.value.row_stride * size,
            more ? p.D * size : 0,
            p.Dv * size};
}

// Adds the bias to S; one of -inf hides the pair in `part`. Returns whether it hid any.
template <class T, class A>
inline bool add_decode_bias(const AttentionParams& p, int64_t b, int64_t h, Range keys, int64_t w, A* S,
                            uint64_t* part) {
    bool hidden = false;
    with_bias_type<T>(p, [&](auto element) {
        using E = decltype(element);
        const int64_t* stride = p.bias.stride;
        for (int64_t i = 0; i < p.Nq; ++i) {
            const E* row = static_cast<const E*>(p.bias.data) + b * stride[0] + h * stride[1] + i * stride[2];
            for (int64_t j = keys.begin; j < keys.end; ++j) {
                const A value = widen<A>(row[j * stride[3]]);
                S[(j - keys.begin) * w + i] += value;
                if (value == -kInfinity<A>) {
                    part[j - keys.begin] &= ~(uint64_t{1} << i);
                    hidden = true;
                }
            }
        }
    });
    return hidden;
}

// Bits of every row of the task, a word a key. Returns false when every pair is visible; `bits` then is not meant.
template <class T, class A>
inline bool decode_visibility(const AttentionParams& p, const DecodeTask& task, Range keys, const Segment& segment,
                              int64_t w, DecodeTile<A>& t) {
    const int64_t n = keys.end - keys.begin;
    const Range queries{0, p.Nq};
    if (!has_bias(p) && !visible_bits(p, task.b, queries, 0, keys, segment.tile, segment.tile_key, t.part))
        return false;
    bool masked = false;
    for (int64_t k = 0; k < n; ++k) t.bits[k] = 0;
    for (int64_t g = 0; g < task.heads; ++g) {
        const bool some = visible_bits(p, task.b, queries, 0, keys, segment.tile, segment.tile_key, t.part);
        for (int64_t k = 0; k < n && !some; ++k) t.part[k] = low_bits(p.Nq);
        const bool hidden = has_bias(p) && add_decode_bias<T>(p, task.b, task.h + g, keys, w, t.S + g * p.Nq, t.part);
        masked |= some || hidden;
        for (int64_t k = 0; k < n; ++k) t.bits[k] |= t.part[k] << (g * p.Nq);
    }
    return masked;
}

template <class A>
inline void decode_dropout(const AttentionParams& p, const DecodeTask& task, Range keys, int64_t w, DecodeTile<A>& t) {
    const int64_t n = keys.end - keys.begin;
    for (int64_t k = 0; k < n; ++k) t.keep[k] = 0;
    for (int64_t g = 0; g < task.heads; ++g) {
        kept_bits(p, task.b, task.h + g, {0, p.Nq}, keys, t.part);
        for (int64_t k = 0; k < n; ++k) t.keep[k] |= (t.part[k] & low_bits(p.Nq)) << (g * p.Nq);
    }
    fill_masked(t.keep, n, w, A{0}, t.S);
}

// O[row][d] = O[row][d] fade[row] + sum_key S[key][row] V[key][d]
template <class T, class A>
inline void add_decode_values(const AttentionParams& p, const DecodeTask& task, Range keys, int64_t rows, int64_t w,
                              bool masked, DecodeTile<A>& t, A* O) {
    const int64_t n = keys.end - keys.begin, Dv = whole_vectors<A>(p.Dv);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t d = 0; d < Dv; ++d) O[r * Dv + d] *= t.fade[r];
    if (!masked && Dv == p.Dv) {
        product<A, Into::kAdd, 32>(rows, Dv / kLanes<A>, n, t.S, Unit{}, w,
                                   row_pointer<T>(p.value, task.b, task.kv, keys.begin), p.value.row_stride, O, Dv);
        return;
    }
    Rows<A> V = load_padded_rows<T>(p.value, task.b, task.kv, keys.begin, n, p.Dv, t.V_buffer);
    const Poison poison = masked ? find_poison(V, n, p.Dv) : Poison{};
    const Rows<A> whole = V;
    if (poison.count) V = without_poison(V, poison, n, Dv, t.buffer);
    product<A, Into::kAdd, 32>(rows, Dv / kLanes<A>, n, t.S, Unit{}, w, V.data, V.stride, O, Dv);
    for (int64_t m = 0; m < poison.count; ++m) {
        const int64_t k = poison.index[m];
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t d = 0; d < Dv && (t.bits[k] >> r & 1); ++d)
                O[r * Dv + d] += t.S[k * w + r] * whole.data[k * whole.stride + d];
    }
}

// Phase 0.
template <class T, class A>
inline void decode_span(const AttentionParams& p, int64_t index, char* memory, A* shared) {
    const DecodeCut cut(p);
    const DecodeTask task = decode_task(p, cut, index);
    const DecodePartial<A> result(p, cut, shared, index);
    const int64_t rows = task.heads * p.Nq, w = whole_vectors<A>(rows), D = whole_vectors<A>(p.D);
    const Range queries{0, p.Nq}, span{task.span * kDecodeSpan, min_of((task.span + 1) * kDecodeSpan, p.Nk)};
    DecodeTile<A> t(p, memory);
    const Scaled<A> scale = Scaled<A>(score_scale(p));
    for (int64_t r = 0; r < rows; ++r) {
        A* row = t.Q + r * D;
        widen_row(row_pointer<T>(p.query, task.b, task.h + r / p.Nq, r % p.Nq), p.D, row);
        for (int64_t d = p.D; d < D; ++d) row[d] = 0;
        for (int64_t d = 0; d < D; d += kLanes<A>) store(row + d, scale(load(row + d)));
    }
    for (int64_t r = 0; r < w; ++r) result.top[r] = -kInfinity<A>, result.total[r] = 0;
    fill_zero(t.S, kKeys * w);  // lanes without a row stay finite
    fill_zero(result.O, rows * whole_vectors<A>(p.Dv));

    for_each_chunk(p, task.b, task.h, 0, queries, span, [&](Range keys, const Segment& segment) {
        const int64_t n = keys.end - keys.begin;
        const Ahead ahead = rows_ahead<T>(p, task.b, task.kv, keys);
        if (D == p.D) {
            const T* K = row_pointer<T>(p.key, task.b, task.kv, keys.begin);
            dot_scores(K, p.key.row_stride, n, t.Q, rows, D, w, ahead, t.S);
        } else {
            const Rows<A> K = load_padded_rows<T>(p.key, task.b, task.kv, keys.begin, n, p.D, t.K_buffer);
            dot_scores(K.data, K.stride, n, t.Q, rows, D, w, ahead, t.S);
        }
        const bool masked = decode_visibility<T>(p, task, keys, segment, w, t);
        if (masked) fill_masked(t.bits, n, w, -kInfinity<A>, t.S);
        online_softmax_update(p, n, w, t.S, result.top, result.total, t.fade);
        if (p.dropout_p > 0) decode_dropout(p, task, keys, w, t);
        add_decode_values<T>(p, task, keys, rows, w, masked, t, result.O);
    });
}

// Phase 1.
template <class T, class A>
inline void decode_merge(const AttentionParams& p, int64_t index, char* memory, A* shared) {
    const DecodeCut cut(p);
    const DecodeTask task = decode_task(p, cut, index * cut.spans);
    const int64_t Dv = whole_vectors<A>(p.Dv);
    A* sum = reinterpret_cast<A*>(memory);
    for (int64_t r = 0; r < task.heads * p.Nq; ++r) {
        A top = -kInfinity<A>;
        for (int64_t s = 0; s < cut.spans; ++s) {
            const A other = DecodePartial<A>(p, cut, shared, index * cut.spans + s).top[r];
            top = other > top ? other : top;
        }
        double total = 0;
        fill_zero(sum, Dv);
        for (int64_t s = 0; s < cut.spans; ++s) {
            const DecodePartial<A> part(p, cut, shared, index * cut.spans + s);
            if (part.total[r] == 0) continue;
            const Vec<A> below = broadcast(part.top[r] - top), weight = has_bias(p) ? exp(below) : exp2(below);
            total += static_cast<double>(part.total[r]) * static_cast<double>(weight[0]);
            for (int64_t d = 0; d < Dv; d += kLanes<A>)
                store(sum + d, load(sum + d) + load(part.O + r * Dv + d) * weight);
        }
        const A divisor = total == 0 ? 1 : static_cast<A>(total * (1.0 - p.dropout_p));
        for (int64_t d = 0; d < Dv; ++d) sum[d] /= divisor;
        const int64_t h = task.h + r / p.Nq, i = r % p.Nq;
        narrow_row(sum, p.Dv, row_pointer<T>(p.out, task.b, h, i));
        static_cast<A*>(p.lse)[(task.b * p.Hq + h) * p.Nq + i] =
            total == 0 ? -kInfinity<A>
                       : static_cast<A>(static_cast<double>(top) * score_unit(p) + __builtin_log(total));
    }
}

inline int64_t decode_merges(const AttentionParams& p) { return p.B * p.Hkv * DecodeCut(p).head_parts; }

}  // namespace
}  // namespace efficient_attn
