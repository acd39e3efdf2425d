// Feature maps of linear attention, on the rows of one chunk, and their derivatives.
//
//     u = root W x with a projection W, else x;  params.h says what phi(u) is.  d/dx = root W^T d/du (+ the term below)
//
// Performer's softmax features (Choromanski et al., ICLR 2021), with x' = root x, for a key
//     b_f = exp(u_f - |x'|^2 / 2 - shift_f),  causal: exp(min(u_f - |x'|^2 / 2, limit)),
// and for a query, whose own constant cancels, a_f = exp(u_f + shift_f - max_f(u_f + shift_f)). shift_f is the largest
// exponent among the visible keys. The forward finds it on the way: the state of a segment is kept relative to the
// largest exponent so far and rescaled when that grows, as in online softmax.
#pragma once

#include "linear_attention.h"

namespace efficient_attn {
namespace {
namespace linear {

// The projection as the products read it, and what a thread needs to map rows.
template <class A>
struct Features {
    const A *columns, *rows;  // root W^T [D][Fp], and root W [F][Dp] (backward); null: no projection
    A *x, *row_shift;         // the rows read [kChunk][Dp] (projection only), what is taken off the exponents of a row
    A *key_offset, *query_offset;  // shift, or 0, in the F real features; the rest gives a feature of 0
};

inline bool takes_exponent(const Params& p) { return p.feature_map == kExponential; }

inline int64_t packed_size(const Params& p, const Plan& s, bool backward) {
    return p.projection ? p.projection_heads * (p.D * s.Fp + (backward ? p.F * s.Dp : 0)) : 0;
}

template <class A>
inline Features<A> carve_features(const Params& p, const Plan& s, Carver& carver) {
    Features<A> f{};
    f.x = carver.take<A>(p.projection ? kChunk * s.Dp : 0);
    f.row_shift = carver.take<A>(kChunk);
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

// Aim at the projection of a key/value head and at its shift (null: none).
template <class A>
inline void select_head(const Params& p, const Plan& s, int64_t kv, const A* packed, const A* shift, Features<A>& f) {
    const int64_t head = p.projection_heads == 1 ? 0 : kv;
    if (p.projection) {
        f.columns = packed + head * p.D * s.Fp;
        f.rows = packed + p.projection_heads * p.D * s.Fp + head * p.F * s.Dp;
    }
    for (int64_t k = 0; k < s.Fp; ++k) {
        f.key_offset[k] = k >= p.F ? kInfinity<A> : shift ? shift[k] : 0;
        f.query_offset[k] = k >= p.F ? -kInfinity<A> : shift ? shift[k] : 0;
    }
}

// phi[r] = f(u[r]) in the rows and columns that exist, 0 elsewhere; slope likewise, if it is wanted.
template <class A, class F>
EA_INLINE void map_rows(const Params& p, const Plan& s, uint64_t bits, A* phi, A* slope, F f) {
    for (int64_t r = 0; r < kChunk; ++r) {
        A *row = phi + r * s.Fp, *slopes = slope ? slope + r * s.Fp : nullptr;
        const int64_t width = bits >> r & 1 ? p.F : 0;
        for (int64_t k = 0; k < width; k += kLanes<A>) {
            Vec<A> d;
            store(row + k, f(load<A>(row + k), r, k, d));
            if (slopes) store(slopes + k, d);
        }
        for (int64_t k = width; k < s.Fp; ++k) row[k] = 0;
        for (int64_t k = width; slopes && k < s.Fp; ++k) slopes[k] = 0;
    }
}

template <class A>
inline void project(const Params& p, const Plan& s, const Features<A>& f, A* u) {
    if (p.projection) product<A>(kAll, kChunk, p.D, s.Fp, f.x, s.Dp, Unit{}, f.columns, s.Fp, u, s.Fp, false);
}

template <class A>
inline void map_plain(const Params& p, const Plan& s, uint64_t bits, A* phi, A* slope) {
    if (p.feature_map == kElu) {
        map_rows<A>(p, s, bits, phi, slope, [](Vec<A> u, int64_t, int64_t, Vec<A>& d) {
            const Vec<A> low = exp(select<A>(u > 0, Vec<A>{}, u));
            d = select<A>(u > 0, broadcast<A>(1), low);
            return select<A>(u > 0, u + A{1}, low);
        });
    } else if (p.feature_map == kRelu) {
        const A gain = static_cast<A>(p.gain), floor = static_cast<A>(p.floor);
        map_rows<A>(p, s, bits, phi, slope, [=](Vec<A> u, int64_t, int64_t, Vec<A>& d) {
            d = select<A>(u > 0, broadcast<A>(gain), Vec<A>{});
            return select<A>(u <= 0, Vec<A>{}, u) * gain + floor;
        });
    }
}

template <class A>
inline void read_inputs(const Params& p, const Plan& s, const TensorView& t, int64_t b, int64_t h, int64_t first,
                        uint64_t bits, const Features<A>& f, A* phi) {
    A* x = p.projection ? f.x : phi;
    read_rows<A>(static_cast<int>(p.feature_dtype), t, b, h, first, bits, p.D, p.projection ? s.Dp : s.Fp, x);
    project(p, s, f, phi);
}

// phi = a of the chunk's queries of head h, slope = da/du (null: not wanted).
template <class A>
inline void read_queries(const Params& p, const Plan& s, const Chunk& c, int64_t b, int64_t h, const Features<A>& f,
                         A* phi, A* slope) {
    read_inputs(p, s, p.query, b, h, c.query, c.query_bits, f, phi);
    if (!takes_exponent(p)) return map_plain(p, s, c.query_bits, phi, slope);
    for (int64_t r = c.query_begin; r < c.query_end; ++r) {
        A* u = phi + r * s.Fp;
        Vec<A> best = broadcast(-kInfinity<A>);
        for (int64_t k = 0; k < s.Fp; k += kLanes<A>) {
            const Vec<A> raised = load<A>(u + k) + load<A>(f.query_offset + k);
            store(u + k, raised);
            best = larger(raised, best);
        }
        A top = best[0];
        for (int lane = 1; lane < kLanes<A>; ++lane) top = best[lane] > top ? best[lane] : top;
        f.row_shift[r] = top;  // the row's own constant
    }
    map_rows<A>(p, s, c.query_bits, phi, slope,
                [&](Vec<A> u, int64_t r, int64_t, Vec<A>& d) { return d = exp(u - f.row_shift[r]); });
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
        for (int64_t d = 0; d < s.Dp; d += kLanes<A>) {
            const Vec<A> x = load<A>(f.x + r * s.Dp + d);
            sum += x * x;
        }
        f.row_shift[r] = sum_of_lanes<A>(sum) * half;
    }
}

// phi = b of the chunk's keys, slope = db/du (null: not wanted), under a shift that is known.
template <class A>
inline void read_keys(const Params& p, const Plan& s, const Chunk& c, int64_t b, int64_t kv, const Features<A>& f,
                      A* phi, A* slope) {
    read_inputs(p, s, p.key, b, kv, c.key, c.key_bits, f, phi);
    if (!takes_exponent(p)) return map_plain(p, s, c.key_bits, phi, slope);
    take_norms(p, s, c, f);
    const A limit = p.is_causal ? static_cast<A>(p.limit) : kInfinity<A>;
    map_rows<A>(p, s, c.key_bits, phi, slope, [&](Vec<A> u, int64_t r, int64_t k, Vec<A>& d) {
        const Vec<A> exponent = u - f.row_shift[r] - load<A>(f.key_offset + k);
        const Vec<A> feature = exp(select<A>(exponent > limit, broadcast(limit), exponent));
        d = select<A>(exponent > limit, Vec<A>{}, feature);
        return feature;
    });
}

// Like read_keys while the shift is being found: `top` rises to the chunk's largest exponents, and what the state
// [F][Dvp] and z [Fp] hold is rescaled to it.
template <class A>
inline void read_keys_raising(const Params& p, const Plan& s, const Chunk& c, int64_t b, int64_t kv,
                              const Features<A>& f, A* phi, A* state, A* z, A* top) {
    read_inputs(p, s, p.key, b, kv, c.key, c.key_bits, f, phi);
    take_norms(p, s, c, f);
    for (int64_t k = 0; k < s.Fp; k += kLanes<A>) {
        const Vec<A> before = load<A>(top + k);
        Vec<A> best = before;
        for (int64_t r = 0; r < c.keys; ++r)
            if (c.key_bits >> r & 1) best = larger(load<A>(phi + r * s.Fp + k) - f.row_shift[r], best);
        store(top + k, best);
        const Vec<A> base = select<A>(best == -kInfinity<A>, Vec<A>{}, best);  // no visible key so far
        store(f.key_offset + k, base);
        const Vec<A> shrink = exp(before - base);
        store(z + k, load<A>(z + k) * shrink);
        for (int64_t lane = 0; lane < kLanes<A> && k + lane < p.F; ++lane) {
            const A factor = shrink[lane];
            A* row = state + (k + lane) * s.Dvp;
            for (int64_t d = 0; factor != 1 && d < s.Dvp; d += kLanes<A>) store(row + d, load<A>(row + d) * factor);
        }
    }
    map_rows<A>(p, s, c.key_bits, phi, static_cast<A*>(nullptr), [&](Vec<A> u, int64_t r, int64_t k, Vec<A>&) {
        return exp(u - f.row_shift[r] - load<A>(f.key_offset + k));
    });
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
    if (!takes_exponent(p) || !from_key) return dx;
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
