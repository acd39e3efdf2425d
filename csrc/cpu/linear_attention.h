// Linear attention on a CPU, in the letters of backends/reference_linear.py:
//
//     [n_i out_i, n_i] = sum_j (a_i . b_j) v'_j      a = phi(q), b = phi(k), v' = [v, 1]
//
// summed over all keys or over j <= i + offset (Katharopoulos et al., "Transformers are RNNs", ICML 2020). Features are
// made from the rows of a chunk when it is read and live in the cache only.
//
// The timeline. Key j stands at place j and query i at place i + offset; a query sees the keys at its own place and
// before. Places are cut into chunks of kChunk and chunks into segments. A causal query sees a state, the sum of
// b_j v'_j^T over all chunks before its own, and the lower triangle of its own chunk. The state is P + L: P the sum of
// whole segments, L what its own segment has so far. So long sums are sums of short ones, and the order of additions
// depends on the sizes alone. Two schedules give the same bits:
//
//     walk      one task for each (batch, key/value head) takes the segments in turn and carries P along;
//     stored    phase 1 sums every segment, phase 2 turns the sums into P, phase 3 takes every segment as a task of
//               its own: one sequence with one head keeps all threads busy. Without causality always this one, with
//               P the sum over all segments.
//
// Row-major tiles, [kChunk][width rounded up to whole vectors], keys and queries alike. All matrix products are
// multiply_accumulate of microkernels.h.
#pragma once

#include "../common/block_mask.h"
#include "convert.h"
#include "microkernels.h"

namespace efficient_attn {
namespace {
namespace linear {

using Params = LinearAttentionParams;

constexpr int kForwardPhases = 4;       // pack the projection, sum the segments, combine the sums, and the results
constexpr int kBackwardPhases = 6;      // the same; without causality twice: for the queries, then for the keys
constexpr int64_t kChunk = 64;          // places; at most 64: a chunk's rows are the bits of one word
constexpr int64_t kSegmentRows = 1024;  // a segment has at least so many places,
constexpr int64_t kSegments = 64;       // and a timeline at most so many segments
constexpr int64_t kTerms = 64;          // summed in one go, in registers

struct Plan {
    int64_t group, offset, segment_chunks, chunks, segments;
    int64_t Fp, Dp, Dvp, Dvr;  // F, D, Dv and Dv + 1 rounded up to whole vectors
    bool stored;
};

// How much of a task a stored schedule does twice, in percent: it reads the keys once more to sum them.
constexpr int64_t kStoredCost = 130;

template <class A>
inline Plan make_plan(const Params& p) {
    Plan s;
    s.group = p.Hq / max_of(1, p.Hkv);
    s.offset = p.is_causal ? max_of(-p.Nq, min_of(p.causal_offset, p.Nk)) : 0;  // beyond these, nothing changes
    const int64_t length = max_of(p.Nk, p.Nq + s.offset);
    s.chunks = ceil_div(length, kChunk);
    // Four features a row of state for each row read: the stored states stay a quarter of the values.
    const int64_t rows = max_of(max_of(kSegmentRows, 4 * p.F), ceil_div(length, kSegments));
    s.segment_chunks = ceil_div(rows, kChunk);
    s.segments = max_of(1, ceil_div(s.chunks, s.segment_chunks));
    s.Fp = round_up(p.F, kLanes<A>);
    s.Dp = round_up(p.D, kLanes<A>);
    s.Dvp = round_up(p.Dv, kLanes<A>);
    s.Dvr = round_up(p.Dv + 1, kLanes<A>);
    const int64_t walks = p.B * p.Hkv, rounds = ceil_div(walks, p.threads) * p.threads;
    s.stored = !p.is_causal || (s.segments > 1 && rounds * 100 > walks * kStoredCost);
    return s;
}

inline uint64_t low_bits(int64_t n) { return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

// One chunk: row r of a tile is key `key + r` and query `query + r`; the bits say which of them exist and are visible.
struct Chunk {
    int64_t key, query;
    int64_t keys, query_begin, query_end;  // rows [0, keys) and [query_begin, query_end)
    uint64_t key_bits, query_bits;
    int64_t begin = 0;  // keys before this row belong to an earlier piece
    bool has_queries() const { return query_begin < query_end; }
    int64_t first_query() const { return query + query_begin; }
    int64_t last_query() const { return query + query_end; }
};

inline Chunk chunk_at(const Params& p, const Plan& s, int64_t b, int64_t index) {
    Chunk c;
    c.key = index * kChunk;
    c.query = c.key - s.offset;
    c.keys = max_of(0, min_of(kChunk, p.Nk - c.key));
    c.query_begin = min_of(kChunk, max_of(0, -c.query));
    c.query_end = max_of(c.query_begin, min_of(kChunk, p.Nq - c.query));
    c.query_bits = low_bits(c.query_end) & ~low_bits(c.query_begin);
    c.key_bits = low_bits(c.keys);
    if (p.key_mask) {
        const uint8_t* mask = p.key_mask + b * p.Nk + c.key;
        for (int64_t r = 0; r < c.keys; ++r)
            if (!mask[r]) c.key_bits &= ~(uint64_t{1} << r);
    }
    return c;
}

inline Range segment_chunks(const Plan& s, int64_t segment) {
    return {segment * s.segment_chunks, min_of((segment + 1) * s.segment_chunks, s.chunks)};
}

// Hands out pieces of a thread's memory, each on a cache line; with no memory it only counts.
struct Carver {
    char* base;
    int64_t used = 0;

    template <class X>
    X* take(int64_t count) {
        X* piece = base ? reinterpret_cast<X*>(base + used) : nullptr;
        used += round_up(count * static_cast<int64_t>(sizeof(X)), 64);
        return piece;
    }
};

// --- rows in and out ---

template <class A, class F>
inline void with_storage(int dtype, F f) {
    if constexpr (sizeof(A) == 8) {
        f(double{});
    } else {
        if (dtype == kBFloat16) return f(BFloat16{});
        if (dtype == kFloat16) return f(Float16{});
        f(float{});
    }
}

inline int64_t row_place(const TensorView& t, int64_t b, int64_t h, int64_t row) {
    return b * t.batch_stride + h * t.head_stride + row * t.row_stride;
}

// out[r] = row first + r where bit r is set, else 0; padded with 0 to `padded` elements.
template <class A>
inline void read_rows(int dtype, const TensorView& t, int64_t b, int64_t h, int64_t first, uint64_t bits, int64_t width,
                      int64_t padded, A* out) {
    with_storage<A>(dtype, [&](auto storage) {
        using T = decltype(storage);
        const T* source = static_cast<const T*>(t.data) + row_place(t, b, h, 0);
        for (int64_t r = 0; r < kChunk; ++r) {
            A* row = out + r * padded;
            const bool present = bits >> r & 1;
            if (present) widen_row(source + (first + r) * t.row_stride, width, row);
            for (int64_t d = present ? width : 0; d < padded; ++d) row[d] = 0;
        }
    });
}

template <class T, class A>
inline void narrow_row(const A* source, int64_t n, A factor, T* out) {
    for (int64_t k = 0; k < n; ++k) out[k] = narrow<T>(source[k] * factor);
}
#if defined(__F16C__)
inline void narrow_row(const float* source, int64_t n, float factor, Float16* out) {
    int64_t k = 0;
    for (; k + 8 <= n; k += 8) {
        const __m256 x = _mm256_mul_ps(_mm256_loadu_ps(source + k), _mm256_set1_ps(factor));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
    for (; k < n; ++k) out[k] = narrow<Float16>(source[k] * factor);
}
#endif

// Rows [begin, end) of a tile, times factor[r] if there are factors; 0 where the bit is not set.
template <class A>
inline void write_rows(int dtype, const TensorView& t, int64_t b, int64_t h, int64_t first, int64_t begin, int64_t end,
                       uint64_t bits, int64_t width, const A* tile, int64_t padded, const A* factor) {
    with_storage<A>(dtype, [&](auto storage) {
        using T = decltype(storage);
        T* target = static_cast<T*>(t.data) + row_place(t, b, h, 0);
        for (int64_t r = begin; r < end; ++r) {
            T* row = target + (first + r) * t.row_stride;
            if (bits >> r & 1) {
                narrow_row(tile + r * padded, width, factor ? factor[r] : A{1}, row);
            } else {
                for (int64_t d = 0; d < width; ++d) row[d] = T{};
            }
        }
    });
}

// Rows [0, count) become 0.
template <class A>
inline void clear_rows(int dtype, const TensorView& t, int64_t b, int64_t h, int64_t count, int64_t width) {
    with_storage<A>(dtype, [&](auto storage) {
        using T = decltype(storage);
        T* target = static_cast<T*>(t.data) + row_place(t, b, h, 0);
        for (int64_t r = 0; r < count; ++r)
            for (int64_t d = 0; d < width; ++d) target[r * t.row_stride + d] = T{};
    });
}

// The rows of the next chunk, fetched into the cache while the products of this one run: the hardware does not look
// that far ahead. A product pulls a few rows for each group of its own.
struct Ahead {
    struct Rows {
        const char* next;
        int64_t stride, bytes, count;
    };
    Rows tensors[5];
    int used = 0;

    void queue(int dtype, const TensorView& t, int64_t b, int64_t h, int64_t begin, int64_t end, int64_t width) {
        if (begin >= end || used == 5) return;
        const int64_t size = dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
        const char* data = static_cast<const char*>(t.data) + row_place(t, b, h, begin) * size;
        tensors[used++] = {data, t.row_stride * size, width * size, end - begin};
    }
    void pull(int64_t rows) {
        for (int k = 0; k < used; ++k) {
            Rows& x = tensors[k];
            for (int64_t r = 0; r < rows && x.count > 0; ++r, --x.count, x.next += x.stride)
                for (int64_t byte = 0; byte < x.bytes; byte += 64) __builtin_prefetch(x.next + byte, 0, 2);
        }
    }
};

// --- products ---

// Which part of a product is wanted, for a lower triangle T[query][key] of a chunk.
enum Part {
    kAll,
    kLowerColumns,  // makes T: columns up to the row's own
    kLowerTerms,    // reads T: terms up to the row's own
    kUpperTerms     // reads T transposed: terms from the row's own
};

// Columns of T that exist beside `rows` rows: whole groups of rows, so that T can be read transposed by groups too.
template <class A>
inline int64_t lower_columns(int64_t rows) {
    return min_of(kChunk, round_up(round_up(rows, kTileRows), kLanes<A>));
}

// c[m][n] (+)= sum_k a[m * m_stride + k * k_stride] * b[k][n]; columns in whole vectors
template <class A, class MStride, class KStride>
inline void product(Part part, int64_t rows, int64_t terms, int64_t columns, const A* a, MStride m_stride,
                    KStride k_stride, const A* b, int64_t ldb, A* c, int64_t ldc, bool add, Ahead* ahead = nullptr) {
    for_row_groups(rows, [&](auto group, int64_t first) {
        constexpr int MR = decltype(group)::value;
        if (ahead) ahead->pull(MR);
        const int64_t begin = part == kUpperTerms ? first : 0;
        const int64_t end = part == kLowerTerms ? min_of(terms, first + MR) : terms;
        const int64_t width = part == kLowerColumns ? lower_columns<A>(first + MR) : columns;
        for_panels<A>(width / kLanes<A>, [&](auto panel, int64_t lane) {
            constexpr int NV = decltype(panel)::value;
            for (int64_t k = begin; k < end || k == begin; k += kTerms) {
                Vec<A> acc[MR][NV];
                clear<A>(acc);
                multiply_accumulate<A>(acc, min_of(kTerms, end - k), a + first * m_stride + k * k_stride, m_stride,
                                       k_stride, b + k * ldb + lane, ldb);
                const bool more = add || k > begin;
                for (int m = 0; m < MR; ++m) {
                    for (int v = 0; v < NV; ++v) {
                        A* place = c + (first + m) * ldc + lane + v * kLanes<A>;
                        store(place, more ? load<A>(place) + acc[m][v] : acc[m][v]);
                    }
                }
            }
        });
    });
}

// T[r][c] = 0 for c > r
template <class A>
inline void clear_upper(int64_t rows, A* T) {
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t lane = r / kLanes<A> * kLanes<A>; lane < lower_columns<A>(r + 1); lane += kLanes<A>) {
            A* place = T + r * kChunk + lane;
            const Mask<A> keep = lane_index<A>() + static_cast<Integer<A>>(lane - r) <= 0;
            store(place, select<A>(keep, load<A>(place), Vec<A>{}));
        }
    }
}

// The rows of a tile that hold NaN or infinity, as bits.
template <class A>
inline uint64_t poisoned_rows(const A* tile, int64_t rows, int64_t padded) {
    uint64_t bits = 0;
    Vec<A> all{};
    for (int64_t k = 0; k < rows * padded; k += kLanes<A>) all += load<A>(tile + k) - load<A>(tile + k);
    A sum = 0;
    for (int lane = 0; lane < kLanes<A>; ++lane) sum += all[lane];
    if (sum == 0) return 0;
    for (int64_t r = 0; r < rows; ++r) {
        A bad = 0;
        for (int64_t d = 0; d < padded; ++d) bad += tile[r * padded + d] - tile[r * padded + d];
        if (!(bad == 0)) bits |= uint64_t{1} << r;
    }
    return bits;
}

// c += T b (kLowerTerms) or c += T^T b (kUpperTerms) for a T with 0 where a pair is not visible. 0 * NaN is NaN: rows
// of b with the poison bit set are taken out and added to the rows that see them, pair by pair.
template <class A>
inline void triangle_product(Part part, int64_t rows, int64_t terms, int64_t columns, const A* T, A* b, int64_t ldb,
                             uint64_t poison, A* saved, A* c, int64_t ldc) {
    for (int64_t k = 0; poison && k < terms * ldb; ++k) {
        saved[k] = b[k];
        if (poison >> (k / ldb) & 1) b[k] = 0;
    }
    if (part == kLowerTerms) {
        product<A>(part, rows, terms, columns, T, kChunk, Unit{}, b, ldb, c, ldc, true);
    } else {
        product<A>(part, rows, terms, columns, T, Unit{}, kChunk, b, ldb, c, ldc, true);
    }
    for (int64_t k = 0; poison && k < terms; ++k) {
        if (!(poison >> k & 1)) continue;
        for (int64_t d = 0; d < ldb; ++d) b[k * ldb + d] = saved[k * ldb + d];
        const int64_t begin = part == kLowerTerms ? k : 0, end = part == kLowerTerms ? rows : min_of(rows, k + 1);
        for (int64_t r = begin; r < end; ++r) {
            const A weight = part == kLowerTerms ? T[r * kChunk + k] : T[k * kChunk + r];
            for (int64_t d = 0; d < columns; ++d) c[r * ldc + d] += weight * b[k * ldb + d];
        }
    }
}

// --- transposes ---

// Lane l of the first result is x[l] where bit h of l is 0, else y[l - h]; of the second x[l + h], else y[l].
template <class A>
EA_INLINE void exchange(Vec<A>& x, Vec<A>& y, int h) {
    Mask<A> low, high;
    for (int l = 0; l < kLanes<A>; ++l) {
        low[l] = l & h ? kLanes<A> + l - h : l;
        high[l] = l & h ? kLanes<A> + l : l + h;
    }
#if defined(__clang__)
    const Vec<A> a = x, b = y;
    for (int l = 0; l < kLanes<A>; ++l) {
        x[l] = l & h ? b[l - h] : a[l];
        y[l] = l & h ? b[l] : a[l + h];
    }
#else
    const Vec<A> first = __builtin_shuffle(x, y, low);
    y = __builtin_shuffle(x, y, high);
    x = first;
#endif
}

template <class A>
EA_INLINE void transpose_block(Vec<A> (&rows)[kLanes<A>]) {
#pragma GCC unroll 8
    for (int h = 1; h < kLanes<A>; h *= 2)
#pragma GCC unroll 16
        for (int i = 0; i < kLanes<A>; ++i)
            if (!(i & h)) exchange<A>(rows[i], rows[i + h], h);
}

// out[column][row] = in[row][column]; rows and columns in whole vectors
template <class A>
inline void transpose(const A* in, int64_t ld_in, int64_t rows, int64_t columns, A* out, int64_t ld_out) {
    constexpr int L = kLanes<A>;
    for (int64_t row = 0; row < rows; row += L) {
        for (int64_t column = 0; column < columns; column += L) {
            Vec<A> block[L];
#pragma GCC unroll 16
            for (int i = 0; i < L; ++i) block[i] = load<A>(in + (row + i) * ld_in + column);
            transpose_block<A>(block);
#pragma GCC unroll 16
            for (int i = 0; i < L; ++i) store(out + (column + i) * ld_out + row, block[i]);
        }
    }
}

// sums[r] = the sum of the lanes of partial[r], for whole vectors of rows
template <class A>
inline void sum_lanes(const A* partial, int64_t rows, A* sums) {
    constexpr int L = kLanes<A>;
    for (int64_t row = 0; row < rows; row += L) {
        Vec<A> block[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) block[i] = load<A>(partial + (row + i) * L);
        transpose_block<A>(block);
#pragma GCC unroll 8
        for (int h = 1; h < L; h *= 2)
#pragma GCC unroll 16
            for (int i = 0; i < L; i += 2 * h) block[i] += block[i + h];
        store(sums + row, block[0]);
    }
}

// --- states ---

template <class A>
inline void fill(A* x, int64_t n, A value) {
    for (int64_t k = 0; k < n; ++k) x[k] = value;
}

template <class A>
inline void copy(const A* x, int64_t n, A* out) {
    for (int64_t k = 0; k < n; ++k) out[k] = x[k];
}

// out = x + y
template <class A>
inline void add(const A* x, const A* y, int64_t n, A* out) {
    for (int64_t k = 0; k < n; k += kLanes<A>) store(out + k, load<A>(x + k) + load<A>(y + k));
}

// records[segment] = the sum of the records before it (`backwards`: after it)
template <class A>
inline void sums_of_others(A* records, int64_t segments, int64_t record, int64_t n, bool backwards) {
    for (int64_t k = 0; k < n; k += kLanes<A>) {
        Vec<A> sum{};
        for (int64_t step = 0; step < segments; ++step) {
            A* place = records + (backwards ? segments - 1 - step : step) * record + k;
            const Vec<A> own = load<A>(place);
            store(place, sum);
            sum += own;
        }
    }
}

// records[0] = the sum of all, in the order in which a walk would add them
template <class A>
inline void sum_of_all(A* records, int64_t segments, int64_t record, int64_t n) {
    for (int64_t k = 0; k < n; k += kLanes<A>) {
        Vec<A> sum{};
        for (int64_t step = 0; step < segments; ++step) sum += load<A>(records + step * record + k);
        store(records + k, sum);
    }
}

}  // namespace linear
}  // namespace
}  // namespace efficient_attn
