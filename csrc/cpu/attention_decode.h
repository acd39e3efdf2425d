// Attention forward for a few queries (decoding with a key/value cache): bound by the reading of K and V, so that they
// are read once for all query heads of a group, and split along the keys, so that one sequence uses every core.
//
// Phases:
//     0  partial results      one (batch, key/value head, some of its query heads, span of keys)
//     1  merge                one (batch, key/value head, some of its query heads): the spans in order; a lone span is
//                             its own result, and there is no such phase
//
// Rows are pairs (query head, query), at most 64 of them, with an accumulator O [rows][Dv]. Few rows have their scores
// side by side, S [rows][kKeys], so that softmax fills its vectors with keys; more have a lane each, S [keys][w]. The
// cut depends on sizes and window alone, so the bits do not depend on the threads.
#pragma once

#include "attention_forward.h"

namespace efficient_attn {
namespace {

constexpr int64_t kDecodeQueries = 16;
constexpr int64_t kDecodeSpan = 1024;  // keys of one task

// Without a query, a key or a head there is nothing to cut. Keys are read where they lie, in rows or on pages. What
// goes on from other results does so tile by tile.
inline bool is_decode(const AttentionParams& p) {
    return p.Nq <= kDecodeQueries && p.Nq * p.Nk * p.Hkv > 0 && !p.weights.data && !p.key.order && !p.continues;
}

// How the work is cut: whole spans, from the first that the window lets any query see to the last. Heads with lists of
// their own are walked one by one.
struct DecodeCut {
    int64_t heads, head_parts, first_span, spans;

    explicit DecodeCut(const AttentionParams& p) {
        const int64_t group = p.Hq / p.Hkv;
        heads = p.mask.indptr && p.mask.heads > 1 ? 1 : min_of(group, kQueries / p.Nq);
        head_parts = ceil_div(group, heads);
        const MaskView& mask = p.mask;
        const int64_t last = mask.window_offset + p.Nq + mask.window_right;  // beyond what the last query sees
        const int64_t begin = mask.window_left < 0 ? 0 : max_of(0, mask.window_offset - mask.window_left);
        const int64_t end = mask.window_right < 0 ? p.Nk : max_of(0, min_of(p.Nk, last));
        first_span = min_of(begin, p.Nk - 1) / kDecodeSpan;
        spans = max_of(1, ceil_div(end, kDecodeSpan) - first_span);
    }
};

// Whether scores lie row by row: where lanes of rows would be half empty.
template <class A>
inline bool has_few_rows(int64_t rows) {
    return rows <= kLanes<A> / 2;
}

struct DecodeTask {
    int64_t b, kv, h, heads, span;
};

inline DecodeTask decode_task(const AttentionParams& p, const DecodeCut& cut, int64_t task) {
    const int64_t span = task % cut.spans, part = task / cut.spans % cut.head_parts;
    const int64_t kv = task / cut.spans / cut.head_parts % p.Hkv, b = task / cut.spans / cut.head_parts / p.Hkv;
    const int64_t first = part * cut.heads;
    return {b, kv, kv * (p.Hq / p.Hkv) + first, min_of(cut.heads, p.Hq / p.Hkv - first), cut.first_span + span};
}

// Which task is done as the `position`th. A page holds the rows of all heads, one head behind another, so that what is
// fetched beyond a head's own rows is what comes next where the heads of a span follow one another.
inline int64_t task_in_order(const AttentionParams& p, const DecodeCut& cut, int64_t position) {
    if (!p.key.pages) return position;
    const int64_t parts = p.Hkv * cut.head_parts, part = position % parts, span = position / parts % cut.spans;
    return (position / parts / cut.spans * parts + part) * cut.spans + span;
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
    A *Q, *S, *fade, *K_buffer, *V_buffer, *buffer;  // Q [rows][D], or [D][w]
    uint64_t *bits, *part, *keep;
    const char **K_rows, **V_rows, **next_rows;  // where each of the keys and values lies, and the keys after them
    Range next{0, 0};                            // which keys these are

    DecodeTile(const AttentionParams& p, char* memory) {
        const int64_t D = whole_vectors<A>(p.D), Dv = whole_vectors<A>(p.Dv);
        Arena arena{memory};
        Q = arena.take<A>(kQueries * D);
        S = arena.take<A>(kKeys * kQueries);
        fade = arena.take<A>(kQueries);
        K_buffer = arena.take<A>(kKeys * D);
        V_buffer = arena.take<A>(kKeys * Dv);
        buffer = arena.take<A>(max_of(kKeys * Dv, transpose_scratch<A>(p.D)));
        bits = arena.take<uint64_t>(kKeys);
        part = arena.take<uint64_t>(kKeys);
        keep = arena.take<uint64_t>(kKeys);
        K_rows = arena.take<const char*>(kKeys);
        V_rows = arena.take<const char*>(kKeys);
        next_rows = arena.take<const char*>(kKeys);
        end = arena.next;
    }
    static int64_t bytes(const AttentionParams& p) { return DecodeTile(p, kNoMemory).end - kNoMemory; }

  private:
    char* end;
};

// rows[r] = where row first + r of the call lies, for r < count.
template <class T>
inline void find_rows(const TensorView& t, int64_t b, int64_t h, int64_t first, int64_t count, const char** rows) {
    const char* data = reinterpret_cast<const char*>(static_cast<const T*>(t.data) + h * t.head_stride);
    const int64_t size = static_cast<int64_t>(sizeof(T)), step = t.row_stride * size, next = t.batch_stride * size;
    if (!t.pages) {
        data += b * next + first * step;
        for (int64_t r = 0; r < count; ++r) rows[r] = data + r * step;
        return;
    }
    const int32_t* page = t.pages + b * t.pages_batch_stride + first / t.page_rows;  // divided once a tile
    const int64_t page_rows = t.page_rows;
    constexpr int kSmallest = 16;  // rows of the smallest page that is usual: whole vectors of places
    int64_t ahead[kSmallest], skipped = first % page_rows;
    for (int i = 0; i < kSmallest; ++i) ahead[i] = i * step;
    for (int64_t r = 0; r < count; ++page, skipped = 0) {
        const char* row = data + *page * next + skipped * step;
        const int64_t end = min_of(r + page_rows - skipped, count);
        for (; r + kSmallest <= end; r += kSmallest, row += kSmallest * step)
            for (int i = 0; i < kSmallest; ++i) rows[r + i] = row + ahead[i];
        for (; r < end; ++r, row += step) rows[r] = row;
    }
}

// S[row][key] = sum_d K[key][d] Q[row][d] for MR rows, kCount keys; both are whole vectors wide.
template <class T, class A, int MR, int kCount>
EA_NOINLINE void dot_tile(const char* const* K, const A* Q, int64_t width, A* S) {
    const T* row[kCount];
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) row[k] = reinterpret_cast<const T*>(K[k]);
    Vec<A> acc[kCount][MR];
    clear<A>(acc);
    for (int64_t d = 0; d < width; d += kLanes<A>) {
        Vec<A> q[MR];
#pragma GCC unroll 4
        for (int r = 0; r < MR; ++r) q[r] = load(Q + r * width + d);
#pragma GCC unroll 8
        for (int k = 0; k < kCount; ++k) {
            const Vec<A> key = load_widened<A>(row[k] + d);
#pragma GCC unroll 4
            for (int r = 0; r < MR; ++r) acc[k][r] += key * q[r];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 2
        for (int k = 0; k < kCount; k += 4) {
            constexpr int one = kCount > 1, two = kCount > 2 ? 2 : 0, three = kCount > 3 ? 3 : 0;
            store_sums<A>(acc[k][r], acc[k + one][r], acc[k + two][r], acc[k + three][r], kCount < 4 ? kCount : 4,
                          S + r * kKeys + k);
        }
    }
}

// Rows that will be wanted soon: fetched a few at a time beside the arithmetic, where no hardware prefetcher follows
// the turns between K and V. Where one does (`followed`), rows behind one another are told to it by the first few.
struct Ahead {
    const char *const *K, *const *V;
    int64_t K_bytes, V_bytes;
    bool followed;

    EA_INLINE void fetch(int64_t first, int64_t count) const {
        if (V_bytes == 0) return;
        fetch_rows(K, K_bytes, first, count);
        fetch_rows(V, V_bytes, first, count);
    }

  private:
    EA_INLINE void fetch_rows(const char* const* rows, int64_t bytes, int64_t first, int64_t count) const {
        constexpr int64_t kTold = 2;
        if (bytes == 0) return;
        if (followed) {
            const char* last = rows[first + count - 1];
            if (first > 0 && last == rows[first - 1] + count * bytes) return;
            if (last == rows[first] + (count - 1) * bytes) count = min_of(count, kTold);
        }
        for (int64_t k = first; k < first + count; ++k)
            for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(rows[k] + byte, 0, 2);
    }
};

template <class T, class A, int MR>
inline void dot_rows(const char* const* K, int64_t keys, const A* Q, int64_t width, const Ahead* ahead, A* S) {
    constexpr int kCount = MR == 1 ? kTileRows : kTileRows / 2;
    int64_t k = 0;
    for (; k + kCount <= keys; k += kCount) {
        if (ahead) ahead->fetch(k, kCount);
        dot_tile<T, A, MR, kCount>(K + k, Q, width, S + k);
    }
    for (; k < keys; ++k) dot_tile<T, A, MR, 1>(K + k, Q, width, S + k);
}

// Calls f(Int<n>, first) over the rows in groups of 4, 2 and 1.
template <class F>
inline void for_few_rows(int64_t rows, F f) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) f(Int<4>{}, r);
    if (rows & 2) f(Int<2>{}, r), r += 2;
    if (rows & 1) f(Int<1>{}, r);
}

template <class T, class A>
inline void dot_scores(const char* const* K, int64_t keys, const A* Q, int64_t rows, int64_t width, const Ahead& ahead,
                       A* S) {
    for_few_rows(rows, [&](auto group, int64_t r) {
        dot_rows<T, A, decltype(group)::value>(K, keys, Q + r * width, width, r == 0 ? &ahead : nullptr, S + r * kKeys);
    });
}

// online_softmax_update for scores that lie row by row.
template <class A, bool kNatural>
EA_NOINLINE void online_softmax_rows(int64_t rows, int64_t keys, A* S, A* top, A* total, A* fade) {
    for (int64_t r = 0; r < rows; ++r) {
        A* s = S + r * kKeys;
        const int64_t whole = whole_vectors<A>(keys);
        for (int64_t k = keys; k < whole; ++k) s[k] = -kInfinity<A>;
        Vec<A> best = broadcast<A>(top[r]);
        for (int64_t k = 0; k < whole; k += kLanes<A>) best = larger(load<A>(s + k), best);
        const Vec<A> reference = broadcast<A>(largest_lane<A>(best)),
                     safe = select<A>(reference == -kInfinity<A>, Vec<A>{}, reference);
        Vec<A> sum[2] = {};
        int64_t k = 0;
        for (; k + 2 * kLanes<A> <= whole; k += 2 * kLanes<A>) {
            const Vec<A> even = exponential<kNatural>(load<A>(s + k) - safe),
                         odd = exponential<kNatural>(load<A>(s + k + kLanes<A>) - safe);
            store(s + k, even);
            store(s + k + kLanes<A>, odd);
            sum[0] += even;
            sum[1] += odd;
        }
        if (k < whole) {
            const Vec<A> last = exponential<kNatural>(load<A>(s + k) - safe);
            store(s + k, last);
            sum[0] += last;
        }
        const Vec<A> shrink = exponential<kNatural>(broadcast<A>(top[r]) - safe);
        A added;
        store_sums<A>(sum[0] + sum[1], Vec<A>{}, Vec<A>{}, Vec<A>{}, 1, &added);
        fade[r] = shrink[0];
        total[r] = total[r] * fade[r] + added;
        top[r] = reference[0];
    }
}

// O[row][d] = O[row][d] fade[row] + sum_key P[row][key] V[key][d] for MR rows, NV vectors; runs of keys are summed by
// themselves, and with few accumulators every second key by itself, so that no sum waits for the one before.
template <class T, class A, int MR, int NV>
EA_NOINLINE void add_values_tile(const A* P, int64_t keys, const char* const* V, int64_t column, const A* fade, A* O,
                                 int64_t ldo) {
    constexpr int kTurns = MR * NV < 8 ? 2 : 1;
    constexpr int64_t kRun = 32 * kTurns;
#pragma GCC unroll 4
    for (int r = 0; r < MR; ++r)
        for (int v = 0; v < NV; ++v) {
            A* place = O + r * ldo + v * kLanes<A>;
            store(place, load<A>(place) * fade[r]);
        }
    for (int64_t first = 0; first < keys; first += kRun) {
        const int64_t end = min_of(first + kRun, keys);
        Vec<A> acc[kTurns][MR][NV];
#pragma GCC unroll 2
        for (int turn = 0; turn < kTurns; ++turn) clear<A>(acc[turn]);
        int64_t k = first;
        for (; k + kTurns <= end; k += kTurns) {
#pragma GCC unroll 2
            for (int turn = 0; turn < kTurns; ++turn) {
                const T* values = reinterpret_cast<const T*>(V[k + turn]) + column;
                Vec<A> row[NV];
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) row[v] = load_widened<A>(values + v * kLanes<A>);
#pragma GCC unroll 4
                for (int r = 0; r < MR; ++r) {
                    const Vec<A> weight = broadcast<A>(P[r * kKeys + k + turn]);
#pragma GCC unroll 4
                    for (int v = 0; v < NV; ++v) acc[turn][r][v] += weight * row[v];
                }
            }
        }
        for (; k < end; ++k) {
            const T* values = reinterpret_cast<const T*>(V[k]) + column;
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                const Vec<A> row = load_widened<A>(values + v * kLanes<A>);
#pragma GCC unroll 4
                for (int r = 0; r < MR; ++r) acc[0][r][v] += broadcast<A>(P[r * kKeys + k]) * row;
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                A* place = O + r * ldo + v * kLanes<A>;
                Vec<A> sum = acc[0][r][v];
                if constexpr (kTurns > 1) sum += acc[1][r][v];
                store(place, load<A>(place) + sum);
            }
        }
    }
}

// The same for any number of rows, and Dv a whole number of vectors.
template <class T, class A>
inline void add_values_rows(const A* P, int64_t rows, int64_t keys, const char* const* V, int64_t Dv, const A* fade,
                            A* O) {
    for_few_rows(rows, [&](auto group, int64_t r) {
        constexpr int MR = decltype(group)::value, NV = MR == 4 && kTileRows < 8 ? 2 : 4;
        int64_t d = 0;
        auto tile = [&](auto vectors) {
            add_values_tile<T, A, MR, decltype(vectors)::value>(P + r * kKeys, keys, V, d, fade + r, O + r * Dv + d,
                                                                Dv);
            d += decltype(vectors)::value * kLanes<A>;
        };
        while (d + NV * kLanes<A> <= Dv) tile(Int<NV>{});
        if (Dv - d >= 2 * kLanes<A>) tile(Int<2>{});
        if (d < Dv) tile(Int<1>{});
    });
}

// Where the score of a key and a row lies.
template <class A>
struct DecodeScores {
    A* S;
    int64_t key_stride, row_stride;

    A& at(int64_t key, int64_t row) const { return S[key * key_stride + row * row_stride]; }
};

// S = value where the pair's bit is 0.
template <class A>
inline void fill_hidden(const uint64_t* bits, int64_t keys, int64_t rows, int64_t w, A value,
                        const DecodeScores<A>& scores) {
    if (scores.row_stride == 1) return fill_masked(bits, keys, w, value, scores.S);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < keys; ++k)
            if (!(bits[k] >> r & 1)) scores.at(k, r) = value;
}

// Whether the processor fetches rows by itself that lie one behind another: Intel's do, and what it is told to fetch as
// well costs a tenth of the time.
inline bool follows_rows() {
#if defined(__x86_64__)
    return __builtin_cpu_is("intel");
#else
    return false;
#endif
}

// Whether these keys and values do.
inline bool is_followed(const AttentionParams& p, const DecodeTask& task, Range keys) {
    const auto is_block = [&](const TensorView& t, int64_t width) {
        return t.row_stride == width && is_run(t, task.b, keys.begin, keys.end - keys.begin);
    };
    return follows_rows() && is_block(p.key, p.D) && is_block(p.value, p.Dv);
}

// Finds the values of these keys, and says to fetch them and the keys that come next.
template <class T, class A>
inline Ahead rows_ahead(const AttentionParams& p, const DecodeTask& task, Range keys, DecodeTile<A>& t) {
    const int64_t n = keys.end - keys.begin, size = static_cast<int64_t>(sizeof(T));
    const bool more = keys.end + n <= p.Nk;
    find_rows<T>(p.value, task.b, task.kv, keys.begin, n, t.V_rows);
    if (more) find_rows<T>(p.key, task.b, task.kv, keys.end, n, t.next_rows);
    t.next = {keys.end, more ? keys.end + n : keys.end};
    if (is_followed(p, task, keys)) return {};
    return {t.next_rows, t.V_rows, more ? p.D * size : 0, p.Dv * size, follows_rows()};
}

// Adds the bias to S; one of -inf hides the pair in `part`. Returns whether it hid any.
template <class T, class A>
inline bool add_decode_bias(const AttentionParams& p, const DecodeTask& task, int64_t g, Range keys,
                            const DecodeScores<A>& scores, uint64_t* part) {
    bool hidden = false;
    with_bias_type<T>(p, [&](auto element) {
        using E = decltype(element);
        const int64_t* stride = p.bias.stride;
        for (int64_t i = 0; i < p.Nq; ++i) {
            const E* row = static_cast<const E*>(p.bias.data) + task.b * stride[0] + (task.h + g) * stride[1] +
                           query_of(p, task.b, task.h + g, i) * stride[2];
            for (int64_t j = keys.begin; j < keys.end; ++j) {
                const A value = widen<A>(row[j * stride[3]]);
                scores.at(j - keys.begin, g * p.Nq + i) += value;
                if (value == -kInfinity<A>) {
                    part[j - keys.begin] &= ~(uint64_t{1} << i);
                    hidden = true;
                }
            }
        }
    });
    return hidden;
}

// The same of a bias by relative position.
template <class A>
inline bool add_decode_diagonals(const AttentionParams& p, const DecodeTask& task, int64_t g, Range keys,
                                 const DecodeScores<A>& scores, uint64_t* part) {
    const A* line = diagonal_line<A>(p, task.b, task.h + g);
    bool hidden = false;
    for (int64_t i = 0; i < p.Nq; ++i)
        for (int64_t j = keys.begin; j < keys.end; ++j) {
            const A value = line[i - j];
            scores.at(j - keys.begin, g * p.Nq + i) += value;
            if (value == -kInfinity<A>) {
                part[j - keys.begin] &= ~(uint64_t{1} << i);
                hidden = true;
            }
        }
    return hidden;
}

// Bits of every row of the task, a word a key. Returns false when every pair is visible; `bits` then is not meant.
template <class T, class A>
inline bool decode_visibility(const AttentionParams& p, const DecodeTask& task, const Chunk& chunk,
                              const DecodeScores<A>& scores, DecodeTile<A>& t) {
    const Range keys = chunk.keys, queries{0, p.Nq};
    const int64_t n = keys.end - keys.begin;
    if (!is_natural(p) && !visible_bits(p, task.b, task.h, queries, 0, chunk, t.part)) return false;
    bool masked = false;
    for (int64_t k = 0; k < n; ++k) t.bits[k] = 0;
    for (int64_t g = 0; g < task.heads; ++g) {
        const bool some = visible_bits(p, task.b, task.h, queries, 0, chunk, t.part);
        for (int64_t k = 0; k < n && !some; ++k) t.part[k] = low_bits(p.Nq);
        bool hidden = has_bias(p) && add_decode_bias<T>(p, task, g, keys, scores, t.part);
        if (p.diagonals.data) hidden |= add_decode_diagonals(p, task, g, keys, scores, t.part);
        masked |= some || hidden;
        for (int64_t k = 0; k < n; ++k) t.bits[k] |= t.part[k] << (g * p.Nq);
    }
    return masked;
}

template <class A>
inline void decode_dropout(const AttentionParams& p, const DecodeTask& task, Range keys, int64_t w,
                           const DecodeScores<A>& scores, DecodeTile<A>& t) {
    const int64_t n = keys.end - keys.begin;
    for (int64_t k = 0; k < n; ++k) t.keep[k] = 0;
    for (int64_t g = 0; g < task.heads; ++g) {
        kept_bits(p, task.b, task.h + g, {0, p.Nq}, keys, t.part);
        for (int64_t k = 0; k < n; ++k) t.keep[k] |= (t.part[k] & low_bits(p.Nq)) << (g * p.Nq);
    }
    fill_hidden(t.keep, n, task.heads * p.Nq, w, A{0}, scores);
}

// O[row][d] = O[row][d] fade[row] + sum_key S[key][row] V[key][d]
template <class T, class A>
inline void add_decode_values(const AttentionParams& p, const DecodeTask& task, Range keys, int64_t rows, int64_t w,
                              bool masked, const DecodeScores<A>& scores, DecodeTile<A>& t, A* O) {
    const int64_t n = keys.end - keys.begin, Dv = whole_vectors<A>(p.Dv);
    const bool few = scores.row_stride != 1, in_place = !masked && Dv == p.Dv;
    auto add = [&](auto values, int64_t stride) {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t d = 0; d < Dv; ++d) O[r * Dv + d] *= t.fade[r];
        product<A, Into::kAdd, 32>(rows, Dv / kLanes<A>, n, t.S, Unit{}, w, values, stride, O, Dv);
    };
    if (in_place && few) return add_values_rows<T>(t.S, rows, n, t.V_rows, Dv, t.fade, O);
    if (in_place && is_run(p.value, task.b, keys.begin, n))
        return add(static_cast<const T*>(row_pointer<T>(p.value, task.b, task.kv, keys.begin)), p.value.row_stride);
    Rows<A> V = load_padded_rows<T>(p.value, task.b, task.kv, keys.begin, n, p.Dv, t.V_buffer);
    const Poison poison = masked ? find_poison(V, n, p.Dv) : Poison{};
    const Rows<A> whole = V;
    if (poison.count) V = without_poison(V, poison, n, Dv, t.buffer);
    if (few) {
        for (int64_t k = 0; k < n; ++k) t.V_rows[k] = reinterpret_cast<const char*>(V.data + k * V.stride);
        add_values_rows<A>(t.S, rows, n, t.V_rows, Dv, t.fade, O);
    } else {
        add(V.data, V.stride);
    }
    for (int64_t m = 0; m < poison.count; ++m) {
        const int64_t k = poison.index[m];
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t d = 0; d < Dv && (t.bits[k] >> r & 1); ++d)
                O[r * Dv + d] += scores.at(k, r) * whole.data[k * whole.stride + d];
    }
}

// The rows of a task, as the scores want them.
template <class T, class A>
inline void load_decode_queries(const AttentionParams& p, const DecodeTask& task, int64_t w, bool few,
                                DecodeTile<A>& t) {
    const int64_t rows = task.heads * p.Nq, D = whole_vectors<A>(p.D);
    const Scaled<A> scale = Scaled<A>(score_scale(p));
    if (!few && task.heads == 1)
        return pack_transposed<T>(p.query, task.b, task.h, 0, p.Nq, p.D, scale, w, t.buffer, t.Q);
    for (int64_t r = 0; r < rows; ++r) {
        A* row = few ? t.Q + r * D : t.buffer;
        widen_row(row_pointer<T>(p.query, task.b, task.h + r / p.Nq, r % p.Nq), p.D, row);
        for (int64_t d = p.D; d < D; ++d) row[d] = 0;
        for (int64_t d = 0; d < D; d += kLanes<A>) store(row + d, scale(load(row + d)));
        for (int64_t d = 0; d < p.D && !few; ++d) t.Q[d * w + r] = row[d];
    }
    for (int64_t d = 0; d < p.D && !few; ++d)
        for (int64_t r = rows; r < w; ++r) t.Q[d * w + r] = 0;
}

template <class T, class A>
inline void decode_scores(const AttentionParams& p, const DecodeTask& task, Range keys, int64_t rows, int64_t w,
                          bool few, DecodeTile<A>& t) {
    const int64_t n = keys.end - keys.begin, D = whole_vectors<A>(p.D);
    const bool found = t.next.begin == keys.begin && keys.end <= t.next.end;
    if (found) {
        const char** const rows = t.K_rows;
        t.K_rows = t.next_rows;
        t.next_rows = rows;
    }
    const Ahead ahead = rows_ahead<T>(p, task, keys, t);
    if (!few) {
        for (int64_t k = 0; k < n; k += 8) ahead.fetch(k, min_of(int64_t{8}, n - k));
        score_tile(load_rows<T>(p.key, task.b, task.kv, keys.begin, n, p.D, t.K_buffer), n, p.D, t.Q, w, t.S);
        cap_scores<A>(p, n * w, t.S, nullptr);
        return;
    }
    if (D == p.D) {
        if (!found) find_rows<T>(p.key, task.b, task.kv, keys.begin, n, t.K_rows);
        dot_scores<T>(t.K_rows, n, t.Q, rows, D, ahead, t.S);
    } else {
        const Rows<A> K = load_padded_rows<T>(p.key, task.b, task.kv, keys.begin, n, p.D, t.K_buffer);
        for (int64_t k = 0; k < n; ++k) t.K_rows[k] = reinterpret_cast<const char*>(K.data + k * K.stride);
        dot_scores<A>(t.K_rows, n, t.Q, rows, D, ahead, t.S);
    }
    for (int64_t r = 0; r < rows; ++r) cap_scores<A>(p, n, t.S + r * kKeys, nullptr);
}

// Row r of a task, summed up over its keys, as it is returned.
template <class T, class A>
inline void store_decoded(const AttentionParams& p, const DecodeTask& task, int64_t r, A top, double total, A* sum) {
    const int64_t h = task.h + r / p.Nq, i = r % p.Nq;
    const A divisor = total == 0 ? 1 : static_cast<A>(total * (1.0 - p.dropout_p));
    for (int64_t d = 0; d < p.Dv; ++d) sum[d] /= divisor;
    narrow_row(sum, p.Dv, row_pointer<T>(p.out, task.b, h, i));
    store_lse<A>(p, task.b, h, i, top, total);
}

// Phase 0.
template <class T, class A>
inline void decode_span(const AttentionParams& p, int64_t index, char* memory, A* shared) {
    const DecodeCut cut(p);
    index = task_in_order(p, cut, index);
    const DecodeTask task = decode_task(p, cut, index);
    const DecodePartial<A> result(p, cut, shared, index);
    const int64_t rows = task.heads * p.Nq, w = whole_vectors<A>(rows), Dv = whole_vectors<A>(p.Dv);
    const Range queries{0, p.Nq}, span{task.span * kDecodeSpan, min_of((task.span + 1) * kDecodeSpan, p.Nk)};
    const bool few = has_few_rows<A>(rows);
    DecodeTile<A> t(p, memory);
    const DecodeScores<A> scores{t.S, few ? 1 : w, few ? kKeys : 1};
    for (int64_t r = 0; r < w; ++r) result.top[r] = -kInfinity<A>, result.total[r] = 0;
    for (int64_t r = 0; r < rows && task.span == cut.first_span; ++r)
        begin_softmax(p, task.h + r / p.Nq, result.top[r], result.total[r]);
    fill_zero(result.O, rows * Dv);

    bool started = false;
    for_each_chunk(p, task.b, task.h, 0, queries, span, [&](const Chunk& chunk) {
        const Range keys = chunk.keys;
        const int64_t n = keys.end - keys.begin;
        if (!started) load_decode_queries<T>(p, task, w, few, t);
        started = true;
        decode_scores<T>(p, task, keys, rows, w, few, t);
        const bool masked = decode_visibility<T>(p, task, chunk, scores, t);
        if (masked) fill_hidden(t.bits, n, rows, w, -kInfinity<A>, scores);
        if (!few) {
            online_softmax_update(p, n, w, t.S, result.top, result.total, t.fade);
        } else if (is_natural(p)) {
            online_softmax_rows<A, true>(rows, n, t.S, result.top, result.total, t.fade);
        } else {
            online_softmax_rows<A, false>(rows, n, t.S, result.top, result.total, t.fade);
        }
        if (p.dropout_p > 0) decode_dropout(p, task, keys, w, scores, t);
        add_decode_values<T>(p, task, keys, rows, w, masked, scores, t, result.O);
    });
    for (int64_t r = 0; r < rows && cut.spans == 1; ++r)
        store_decoded<T>(p, task, r, result.top[r], static_cast<double>(result.total[r]), result.O + r * Dv);
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
            const Vec<A> below = broadcast(part.top[r] - top), weight = is_natural(p) ? exp(below) : exp2(below);
            total += static_cast<double>(part.total[r]) * static_cast<double>(weight[0]);
            for (int64_t d = 0; d < Dv; d += kLanes<A>)
                store(sum + d, load(sum + d) + load(part.O + r * Dv + d) * weight);
        }
        store_decoded<T>(p, task, r, top, total, sum);
    }
}

// Whether joining the spans is done before a second thread would have begun.
inline bool merges_quickly(const AttentionParams& p) {
    return p.B * p.Hq * p.Nq * DecodeCut(p).spans * p.Dv < int64_t{1} << 19;
}

inline int64_t decode_merges(const AttentionParams& p) { return p.B * p.Hkv * DecodeCut(p).head_parts; }

}  // namespace
}  // namespace efficient_attn
