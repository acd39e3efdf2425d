// Feature maps of linear attention, on the rows of one chunk, and their derivatives.
//
//     u = root W x with a projection W, else x;  params.h says what phi(u) is.  d/dx = root W^T d/du (+ the term below)
//
// Positive maps are exponentials, phi(u) = e^E(u) g(u): Performer's softmax features (Choromanski et al., ICLR 2021)
// have E = u, for a key u - |x'|^2 / 2 with x' = root x, and g = 1; elu(u) + 1 has E = min(u, 0) and g = max(u, 0) + 1.
// Their range is far beyond that of float, so they are kept relative to a shift, one number for each feature,
//
//     b_f = e^(E_f - shift_f) g_f         a_f = e^(E_f + shift_f - c) g_f with the row's own constant c, the largest
//                                         exponent of the row, which cancels in out
//
// shift_f is the exponent of a key that the query sees: then n >= 1 or so, whatever the exponents. It begins with that
// of the first key there is, `base`. Where a key's exponent exceeds the shift by more than `limit`, the shift rises to
// the largest exponent so far and sums are rescaled, as in online softmax. So no row depends on a key that it does not
// see.
#pragma once

#include <limits>

#include "linear_attention.h"

namespace efficient_attn {
namespace {
namespace linear {

// The projection as the products read it, and what a thread needs to map rows.
template <class A>
struct Features {
    const A *columns, *rows;       // root W^T [D][Fp], and root W [F][Dp] (backward); null: no projection
    A* x;                          // the rows read [kChunk][Dp] (projection only)
    A *row_shift, *norm;           // what is taken off the exponents of a query, c, and of a key, |x'|^2 / 2
    A* u;                          // the keys' u [kChunk][Fp], kept where the shift moves within a chunk
    A *key_offset, *query_offset;  // shift, or 0, in the F real features; the rest gives a feature of 0
};

inline bool has_shift(const Params& p) { return p.feature_map == kExponential || p.feature_map == kElu; }
inline bool takes_norm(const Params& p) { return p.feature_map == kExponential && p.projection; }

// What key_shift holds for one (batch, key/value head): shifts [rows][F], first `base` and then what each chunk of keys
// left behind (without causality one row, that of all keys), and c of the queries, [group][Nq].
inline int64_t shift_rows(const Params& p) { return p.is_causal ? ceil_div(p.Nk, kChunk) + 1 : 1; }

template <class A>
inline A* shifts_of(const Params& p, const Plan& s, int64_t unit) {
    return static_cast<A*>(p.key_shift) + unit * (shift_rows(p) * p.F + s.group * p.Nq);
}

template <class A>
inline A* constants_of(const Params& p, const Plan& s, int64_t b, int64_t h) {
    return shifts_of<A>(p, s, b * p.Hkv + h / s.group) + shift_rows(p) * p.F + h % s.group * p.Nq;
}

inline int64_t packed_size(const Params& p, const Plan& s, bool backward) {
    return p.projection ? p.projection_heads * (p.D * s.Fp + (backward ? p.F * s.Dp : 0)) : 0;
}

template <class A>
inline Features<A> carve_features(const Params& p, const Plan& s, Carver& carver) {
    Features<A> f{};
    f.x = carver.take<A>(p.projection ? kChunk * s.Dp : 0);
    f.row_shift = carver.take<A>(kChunk);
    f.norm = carver.take<A>(kChunk);
    f.u = carver.take<A>(has_shift(p) ? kChunk * s.Fp : 0);
    f.key_offset = carver.take<A>(s.Fp);
    f.query_offset = carver.take<A>(s.Fp);
    return f;
}

// packed: for each projection head root W^T, and behind all of these root W for the backward.
template <class A>
inline void pack_projection(const Params& p, const Plan& s, int64_t head, A* packed, bool backward) {
    const A* W = static_cast<const A*>(p.projection) + head * p.F * p.D;
    const A root = static_cast<A>(p.root);
    A* columns = packed + head * p.D * s.Fp;
    for (int64_t d = 0; d < p.D; ++d)
        for (int64_t f = 0; f < s.Fp; ++f) columns[d * s.Fp + f] = f < p.F ? root * W[f * p.D + d] : 0;
    if (!backward) return;
    A* rows = packed + p.projection_heads * p.D * s.Fp + head * p.F * s.Dp;
    for (int64_t f = 0; f < p.F; ++f)
        for (int64_t d = 0; d < s.Dp; ++d) rows[f * s.Dp + d] = d < p.D ? root * W[f * p.D + d] : 0;
}

// The shift of keys and queries (null: 0).
template <class A>
inline void set_shift(const Params& p, const Plan& s, const A* shift, Features<A>& f) {
    for (int64_t k = 0; k < s.Fp; ++k) {
        f.key_offset[k] = k >= p.F ? kInfinity<A> : shift ? shift[k] : 0;
        f.query_offset[k] = k >= p.F ? -kInfinity<A> : shift ? shift[k] : 0;
    }
}

// Aim at the projection of a key/value head and at its shift (null: none).
template <class A>
inline void select_head(const Params& p, const Plan& s, int64_t kv, const A* packed, const A* shift, Features<A>& f) {
    const int64_t head = p.projection_heads == 1 ? 0 : kv;
    if (p.projection) {
        f.columns = packed + head * p.D * s.Fp;
        f.rows = packed + p.projection_heads * p.D * s.Fp + head * p.F * s.Dp;
    }
    set_shift(p, s, shift, f);
}

// phi[r] = f(u[r]) in the rows and columns that exist, 0 elsewhere; slope likewise, if it is wanted. phi may be u.
template <class A, class F>
EA_INLINE void map_rows(const Params& p, const Plan& s, uint64_t bits, const A* u, A* phi, A* slope, F f) {
    for (int64_t r = 0; r < kChunk; ++r) {
        A *row = phi + r * s.Fp, *slopes = slope ? slope + r * s.Fp : nullptr;
        const int64_t width = bits >> r & 1 ? p.F : 0;
        for (int64_t k = 0; k < width; k += kLanes<A>) {
            Vec<A> d;
            store(row + k, f(load<A>(u + r * s.Fp + k), r, k, d));
            if (slopes) store(slopes + k, d);
        }
        for (int64_t k = width; k < s.Fp; ++k) row[k] = 0;
        for (int64_t k = width; slopes && k < s.Fp; ++k) slopes[k] = 0;
    }
}

template <class A>
inline void project(const Params& p, const Plan& s, int64_t rows, const Features<A>& f, A* u) {
    if (p.projection) product<A>(kAll, rows, p.D, s.Fp, f.x, s.Dp, Unit{}, f.columns, s.Fp, u, s.Fp, false);
}

template <class A>
inline void map_relu(const Params& p, const Plan& s, uint64_t bits, A* phi, A* slope) {
    const A gain = static_cast<A>(p.gain), floor = static_cast<A>(p.floor);
    map_rows<A>(p, s, bits, phi, phi, slope, [=](Vec<A> u, int64_t, int64_t, Vec<A>& d) {
        d = select<A>(u > 0, broadcast<A>(gain), Vec<A>{});
        return select<A>(u <= 0, Vec<A>{}, u) * gain + floor;
    });
}

template <class A>
inline void read_inputs(const Params& p, const Plan& s, const TensorView& t, int64_t b, int64_t h, int64_t first,
                        uint64_t bits, const Features<A>& f, A* phi, int64_t rows = kChunk) {
    A* x = p.projection ? f.x : phi;
    read_rows<A>(static_cast<int>(p.feature_dtype), t, b, h, first, bits, p.D, p.projection ? s.Dp : s.Fp, x);
    project(p, s, rows, f, phi);
}

// phi = a of the chunk's queries of head h, slope = da/du (null: not wanted).
template <class A>
inline void read_queries(const Params& p, const Plan& s, const Chunk& c, int64_t b, int64_t h, const Features<A>& f,
                         A* phi, A* slope) {
    read_inputs(p, s, p.query, b, h, c.query, c.query_bits, f, phi);
    if (p.feature_map == kRelu) return map_relu(p, s, c.query_bits, phi, slope);
    if (!has_shift(p)) return;
    const bool elu = p.feature_map == kElu;
    for (int64_t r = c.query_begin; r < c.query_end; ++r) {
        A* u = phi + r * s.Fp;
        Vec<A> best = broadcast(-kInfinity<A>);
        for (int64_t k = 0; k < s.Fp; k += kLanes<A>) {
            const Vec<A> x = load<A>(u + k);
            best = larger((elu ? select<A>(x > 0, Vec<A>{}, x) : x) + load<A>(f.query_offset + k), best);
        }
        A top = best[0];
        for (int lane = 1; lane < kLanes<A>; ++lane) top = best[lane] > top ? best[lane] : top;
        f.row_shift[r] = top == -kInfinity<A> ? 0 : top;  // the row's own constant
    }
    map_rows<A>(p, s, c.query_bits, phi, phi, slope, [&](Vec<A> u, int64_t r, int64_t k, Vec<A>& d) {
        const Vec<A> raise = load<A>(f.query_offset + k) - f.row_shift[r];
        if (!elu) return d = exp(u + raise);
        d = exp(select<A>(u > 0, Vec<A>{}, u) + raise);
        return d * select<A>(u > 0, u + A{1}, broadcast<A>(1));
    });
}

inline void queue_keys(const Params& p, const Chunk& next, int64_t b, int64_t kv, Ahead& ahead) {
    ahead.queue(p.feature_dtype, p.key, b, kv, next.key, next.key + next.keys, p.D);
    ahead.queue(p.value_dtype, p.value, b, kv, next.key, next.key + next.keys, p.Dv);
}

template <class A>
inline void take_norms(const Params& p, const Plan& s, const Chunk& c, const Features<A>& f) {
    const A half = static_cast<A>(p.root * p.root / 2);
    for (int64_t r = 0; r < c.keys; ++r) {
        Vec<A> sum{};
        for (int64_t d = 0; takes_norm(p) && d < s.Dp; d += kLanes<A>) {
            const Vec<A> x = load<A>(f.x + r * s.Dp + d);
            sum += x * x;
        }
        f.norm[r] = sum_of_lanes<A>(sum) * half;
    }
}

// phi = u of the chunk's keys, and what their norms take off.
template <class A>
inline void read_keys(const Params& p, const Plan& s, const Chunk& c, int64_t b, int64_t kv, const Features<A>& f,
                      A* phi, int64_t rows = kChunk) {
    read_inputs(p, s, p.key, b, kv, c.key, c.key_bits, f, phi, rows);
    if (has_shift(p)) take_norms(p, s, c, f);
}

// phi = b of the chunk's keys under key_offset, slope = db/du (null: not wanted), from their u, which phi may be.
template <class A>
inline void map_keys(const Params& p, const Plan& s, const Chunk& c, const Features<A>& f, const A* u, A* phi,
                     A* slope) {
    if (p.feature_map == kRelu) return map_relu(p, s, c.key_bits, phi, slope);
    if (p.feature_map == kElu)
        return map_rows<A>(p, s, c.key_bits, u, phi, slope, [&](Vec<A> x, int64_t, int64_t k, Vec<A>& d) {
            d = exp(select<A>(x > 0, Vec<A>{}, x) - load<A>(f.key_offset + k));
            return d * select<A>(x > 0, x + A{1}, broadcast<A>(1));
        });
    if (p.feature_map == kExponential)
        map_rows<A>(p, s, c.key_bits, u, phi, slope, [&](Vec<A> x, int64_t r, int64_t k, Vec<A>& d) {
            return d = exp(x - f.norm[r] - load<A>(f.key_offset + k));
        });
}

// --- the shift of the keys ---

template <class A>
EA_INLINE Vec<A> key_exponent(const Params& p, const Features<A>& f, const A* u, int64_t r, int64_t place) {
    const Vec<A> x = load<A>(u + place);
    return p.feature_map == kElu ? select<A>(x > 0, Vec<A>{}, x) : x - f.norm[r];
}

// The first row from `begin` on with an exponent that exceeds the shift [Fp] by more than the limit, or kChunk. What is
// not finite moves no shift.
template <class A>
inline int64_t next_rise(const Params& p, const Plan& s, const Chunk& c, const Features<A>& f, const A* u,
                         const A* shift, int64_t begin) {
    const A limit = static_cast<A>(p.limit);
    for (int64_t r = begin; r < c.keys; ++r) {
        if (!(c.key_bits >> r & 1)) continue;
        Mask<A> found{};
        for (int64_t k = 0; k < s.Fp; k += kLanes<A>) {
            const Vec<A> e = key_exponent<A>(p, f, u, r, r * s.Fp + k);
            found |= (e - load<A>(shift + k) > limit) & (e < kInfinity<A>);
        }
        if (bits_from_lanes<A>(found)) return r;
    }
    return kChunk;
}

// The shift rises to the largest exponents of the rows up to `row`.
template <class A>
inline void raise_shift(const Params& p, const Plan& s, const Chunk& c, const Features<A>& f, const A* u, int64_t row,
                        A* shift) {
    for (int64_t r = 0; r <= row; ++r) {
        if (!(c.key_bits >> r & 1)) continue;
        for (int64_t k = 0; k < s.Fp; k += kLanes<A>) {
            const Vec<A> e = key_exponent<A>(p, f, u, r, r * s.Fp + k), now = load<A>(shift + k);
            store(shift + k, select<A>((e > now) & (e < kInfinity<A>), e, now));
        }
    }
}

// Rows [begin, end) of a chunk.
inline Chunk rows_of(Chunk c, int64_t begin, int64_t end) {
    const uint64_t rows = low_bits(end) & ~low_bits(begin);
    c.key_bits &= rows;
    c.query_bits &= rows;
    c.keys = min_of(c.keys, end);
    c.query_begin = min_of(max_of(c.query_begin, begin), end);
    c.query_end = max_of(c.query_begin, min_of(c.query_end, end));
    c.begin = min_of(begin, c.keys);
    return c;
}

// The exponents of the first key that is there, finite; 0 where there is none. [Fp]
template <class A>
inline void first_exponents(const Params& p, const Plan& s, int64_t b, int64_t kv, const Features<A>& f, A* scratch,
                            A* base) {
    fill<A>(base, s.Fp, 0);
    int64_t first = 0;
    while (p.key_mask && first < p.Nk && !p.key_mask[b * p.Nk + first]) ++first;
    if (first == p.Nk) return;
    const Chunk c{first, 0, 1, 0, 0, 1, 0, 0};
    read_keys(p, s, c, b, kv, f, scratch, 1);
    for (int64_t k = 0; k < p.F; k += kLanes<A>) {
        const Vec<A> e = key_exponent<A>(p, f, scratch, 0, k);
        for (int64_t lane = 0; lane < kLanes<A> && k + lane < p.F; ++lane) {
            const A x = e[lane];
            base[k + lane] = x == -kInfinity<A> ? -std::numeric_limits<A>::max() : x - x == 0 ? x : 0;
        }
    }
}

template <class A>
inline bool same_shift(const Plan& s, const A* x, const A* y) {
    Mask<A> differ{};
    for (int64_t k = 0; k < s.Fp; k += kLanes<A>) differ |= load<A>(x + k) != load<A>(y + k);
    return !bits_from_lanes<A>(differ);
}

// From the gradient of the features to that of the inputs, [kChunk][Fp] -> [kChunk][D, rounded up]. `from_key`: the
// exponent of a softmax feature holds -|x'|^2 / 2, whose part is -root^2 x sum_f du_f; f.x are still the key's rows.
template <class A>
inline const A* input_gradient(const Params& p, const Plan& s, int64_t rows, const Features<A>& f, const A* slope,
                               bool from_key, A* gradient, A* dx) {
    if (p.feature_map != kIdentity)
        for (int64_t k = 0; k < rows * s.Fp; k += kLanes<A>)
            store(gradient + k, load<A>(gradient + k) * load<A>(slope + k));
    if (!p.projection) return gradient;
    product<A>(kAll, rows, p.F, s.Dp, gradient, s.Fp, Unit{}, f.rows, s.Dp, dx, s.Dp, false);
    if (!takes_norm(p) || !from_key) return dx;
    for (int64_t r = 0; r < rows; ++r) {
        Vec<A> sum{};
        for (int64_t k = 0; k < s.Fp; k += kLanes<A>) sum += load<A>(gradient + r * s.Fp + k);
        const A weight = sum_of_lanes<A>(sum) * static_cast<A>(p.root * p.root);
        for (int64_t d = 0; d < s.Dp; d += kLanes<A>)
            store(dx + r * s.Dp + d, load<A>(dx + r * s.Dp + d) - load<A>(f.x + r * s.Dp + d) * weight);
    }
    return dx;
}

}  // namespace linear
}  // namespace
}  // namespace efficient_attn
