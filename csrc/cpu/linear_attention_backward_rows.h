// Linear attention, backward: what its walks read and keep (linear_attention_backward.h), and the shift of positive
// features in it (linear_attention_features.h).
#pragma once

#include "linear_attention_features.h"

namespace efficient_attn {
namespace {
namespace linear {

// A record is a state and the shift [Fp] that it is relative to.
inline int64_t backward_sums(const Plan& s) { return s.Dvr * s.Fp; }
inline int64_t backward_record(const Plan& s) { return backward_sums(s) + s.Fp; }

template <class A>
struct BackwardTile {
    Features<A> map, key_map;
    A *a, *slope, *b, *key_slope, *bt;   // [kChunk][Fp], bt [Fp][kChunk]
    A *v, *vt, *u, *T, *W;               // v' and u [kChunk][Dvr], vt [Dvr][kChunk], A B^T and U V'^T
    A *gradient, *dx, *dv, *saved;       // [kChunk] x Fp, Dp, Dvr, and the wider of Fp and Dvr
    A *prefix, *local, *state, *across;  // records: P, L, P + L, and G^T [Fp][Dvr]
    A *own, *first, *ups;                // shifts: a segment's own keys', where it began [Fp], one a piece [kChunk][Fp]

    BackwardTile(const Params& p, const Plan& s, Carver& carver) {
        map = carve_features<A>(p, s, carver);
        key_map = carve_features<A>(p, s, carver);
        a = carver.take<A>(kChunk * s.Fp);
        slope = carver.take<A>(kChunk * s.Fp);
        b = carver.take<A>(kChunk * s.Fp);
        key_slope = carver.take<A>(kChunk * s.Fp);
        bt = carver.take<A>(kChunk * s.Fp);
        v = carver.take<A>(kChunk * s.Dvr);
        vt = carver.take<A>(kChunk * s.Dvr);
        u = carver.take<A>(kChunk * s.Dvr);
        T = carver.take<A>(kChunk * kChunk);
        W = carver.take<A>(kChunk * kChunk);
        gradient = carver.take<A>(kChunk * s.Fp);
        dx = carver.take<A>(kChunk * s.Dp);
        dv = carver.take<A>(kChunk * s.Dvr);
        saved = carver.take<A>(kChunk * max_of(s.Fp, s.Dvr));
        prefix = carver.take<A>(backward_record(s));
        local = carver.take<A>(backward_record(s));
        state = carver.take<A>(backward_record(s));
        across = carver.take<A>(backward_sums(s));
        own = carver.take<A>(s.Fp);
        first = carver.take<A>(s.Fp);
        ups = carver.take<A>(has_shift(p) && p.is_causal ? kChunk * s.Fp : 0);
    }
};

// u of the chunk's queries of one head, whose features were read before: n is relative to c of the forward, which need
// not be that of `map` to the last bit. `scratch` [kChunk][Dvr] takes out.
template <class A>
inline void read_u(const Params& p, const Plan& s, const Chunk& c, int64_t b, int64_t h, const Features<A>& map, A* u,
                   A* scratch) {
    read_rows<A>(p.value_dtype, p.grad_out, b, h, c.query, c.query_bits, p.Dv, s.Dvr, u);
    read_rows<A>(p.value_dtype, p.out, b, h, c.query, c.query_bits, p.Dv, s.Dvr, scratch);
    const int64_t place = (b * p.Hq + h) * p.Nq + c.query;
    const A* normaliser = static_cast<const A*>(p.normaliser) + place;
    const A* grad_normaliser = p.grad_normaliser ? static_cast<const A*>(p.grad_normaliser) + place : nullptr;
    const A* constants = has_shift(p) ? constants_of<A>(p, s, b, h) + c.query : nullptr;
    for (int64_t r = c.query_begin; r < c.query_end; ++r) {
        A *row = u + r * s.Dvr, *out = scratch + r * s.Dvr;
        A n = normaliser[r], rise = 1;
        if (constants && constants[r] != map.row_shift[r]) rise = exp(broadcast<A>(map.row_shift[r] - constants[r]))[0];
        n /= rise;
        Vec<A> sum{};
        for (int64_t d = 0; d < s.Dvr; d += kLanes<A>) {
            const Vec<A> x = n == 0 ? Vec<A>{} : load<A>(row + d) / n;
            store(row + d, x);
            sum -= x * load<A>(out + d);
        }
        row[p.Dv] = sum_of_lanes<A>(sum) + (grad_normaliser ? grad_normaliser[r] * rise : 0);
    }
}

inline void queue_queries(const Params& p, const Chunk& next, int64_t b, int64_t h, Ahead& ahead) {
    ahead.queue(p.value_dtype, p.grad_out, b, h, next.first_query(), next.last_query(), p.Dv);
    ahead.queue(p.value_dtype, p.out, b, h, next.first_query(), next.last_query(), p.Dv);
    ahead.queue(p.feature_dtype, p.query, b, h, next.first_query(), next.last_query(), p.D);
}

// v' of the chunk's keys: the values and a 1.
template <class A>
inline void read_v(const Params& p, const Plan& s, const Chunk& c, int64_t b, int64_t kv, A* v) {
    read_rows<A>(p.value_dtype, p.value, b, kv, c.key, c.key_bits, p.Dv, s.Dvr, v);
    for (int64_t r = 0; r < c.keys; ++r) v[r * s.Dvr + p.Dv] = c.key_bits >> r & 1 ? 1 : 0;
}

// record [Dv + 1][Fp] += X^T Y for rows [begin, end) of v' and b, or of u and a
template <class A>
inline void add_outer(const Params& p, const Plan& s, int64_t begin, int64_t end, const A* x, const A* y, A* record,
                      Ahead* ahead = nullptr) {
    product<A>(kAll, p.Dv + 1, end - begin, s.Fp, x + begin * s.Dvr, Unit{}, s.Dvr, y + begin * s.Fp, s.Fp, record,
               s.Fp, true, ahead);
}

// W = tril(U V'^T)
template <class A>
inline void triangle_of_gradients(const Params& p, const Plan& s, int64_t rows, BackwardTile<A>& t) {
    product<A>(kLowerColumns, rows, p.Dv + 1, kChunk, t.u, s.Dvr, Unit{}, t.vt, kChunk, t.W, kChunk, false);
    clear_upper(rows, t.W);
}

// --- shifts ---

inline bool moves(const Params& p) { return p.is_causal && has_shift(p); }

// The shift of a segment's own keys when it begins (`chunk` is its first) or before a later chunk, and after a chunk.
template <class A>
inline const A* shift_before(const Params& p, const Plan& s, int64_t unit, int64_t chunk) {
    const bool begins = chunk % s.segment_chunks == 0;
    return shifts_of<A>(p, s, unit) + (begins ? 0 : min_of(chunk, shift_rows(p) - 1)) * p.F;
}
template <class A>
inline const A* shift_after(const Params& p, const Plan& s, int64_t unit, int64_t chunk) {
    return chunk + 1 < shift_rows(p) ? shifts_of<A>(p, s, unit) + (chunk + 1) * p.F
                                     : shift_before<A>(p, s, unit, chunk);
}

template <class A>
inline void take_shift(const Params& p, const Plan& s, const A* shift, A* out) {
    copy(shift, p.F, out);
    fill<A>(out + p.F, s.Fp - p.F, 0);
}

template <class A>
inline void larger_shift(const Plan& s, const A* x, const A* y, A* out) {
    for (int64_t k = 0; k < s.Fp; ++k) out[k] = x[k] > y[k] ? x[k] : y[k];
}

// The shift with which a segment begins: of all keys before it.
template <class A>
inline void shift_of_earlier(const Params& p, const Plan& s, int64_t unit, int64_t segment, A* out) {
    take_shift(p, s, shifts_of<A>(p, s, unit), out);
    for (int64_t k = 0; k < segment; ++k) {
        const int64_t last = min_of((k + 1) * s.segment_chunks, s.chunks) - 1;
        const A* shift = shift_after<A>(p, s, unit, last);
        for (int64_t f = 0; f < p.F; ++f) out[f] = shift[f] > out[f] ? shift[f] : out[f];
    }
}

// Whether the shift stays the same over a chunk.
template <class A>
inline bool is_calm(const Params& p, const Plan& s, int64_t unit, int64_t chunk) {
    const A *before = shift_before<A>(p, s, unit, chunk), *after = shift_after<A>(p, s, unit, chunk);
    bool calm = true;
    for (int64_t f = 0; f < p.F; ++f) calm &= before[f] == after[f];
    return calm;
}

// e^-|from - to|: a sum is carried in time to a larger shift, and backwards to a smaller one.
template <class A>
EA_INLINE Vec<A> ratio(Vec<A> from, Vec<A> to) {
    return exp(select<A>(from > to, to - from, from - to));
}

// out = x + y relative to `shift`, or y null: x; out may be x. Never inlined, so that every schedule has the same bits.
template <class A>
EA_NOINLINE void join_sums(const Params& p, const Plan& s, const A* x, const A* y, const A* shift, A* out) {
    const int64_t n = backward_sums(s);
    if (!moves(p)) return add(x, y, n, out);
    const bool calm = same_shift(s, x + n, shift) && (!y || same_shift(s, y + n, shift));
    if (calm && y) add(x, y, n, out);
    for (int64_t k = 0; !calm && k < s.Fp; k += kLanes<A>) {
        const Vec<A> target = load<A>(shift + k);
        const Vec<A> keep = ratio<A>(load<A>(x + n + k), target),
                     take = ratio<A>(y ? load<A>(y + n + k) : target, target);
        for (int64_t d = k; d < n; d += s.Fp) {
            const Vec<A> kept = load<A>(x + d) * keep;
            store(out + d, y ? kept + load<A>(y + d) * take : kept);
        }
    }
    if (shift != out + n) copy(shift, s.Fp, out + n);
}

// f(rows, u, shift) for the pieces of a chunk, in time or backwards, as in the forward: `shift` is that of the
// segment's own keys in the piece. u as the forward's; `keep` as there. The keys were read if they are there and the
// shift moves.
template <class A, class F>
inline void each_piece(const Params& p, const Plan& s, const Chunk& c, int64_t unit, const Features<A>& f, const A* b,
                       bool keep, bool backwards, BackwardTile<A>& t, F visit) {
    if (!moves(p)) return visit(c, b, static_cast<const A*>(nullptr));
    const int64_t index = c.key / kChunk;
    const A* before = shift_before<A>(p, s, unit, index);
    take_shift(p, s, before, t.ups);
    const bool calm = is_calm<A>(p, s, unit, index);
    if (calm && !keep) return visit(c, b, t.ups);
    copy(b, kChunk * s.Fp, f.u);
    int64_t begins[kChunk + 1] = {0}, pieces = 1;
    for (int64_t row = 0; !calm && (row = next_rise<A>(p, s, c, f, f.u, t.ups + (pieces - 1) * s.Fp, row)) < kChunk;) {
        if (row > begins[pieces - 1]) {
            copy(t.ups + (pieces - 1) * s.Fp, s.Fp, t.ups + pieces * s.Fp);
            begins[pieces++] = row;
        }
        raise_shift<A>(p, s, c, f, f.u, row, t.ups + (pieces - 1) * s.Fp);
    }
    begins[pieces] = kChunk;
    for (int64_t n = 0; n < pieces; ++n) {
        const int64_t k = backwards ? pieces - 1 - n : n;
        visit(rows_of(c, begins[k], begins[k + 1]), f.u, t.ups + k * s.Fp);
    }
}

}  // namespace linear
}  // namespace
}  // namespace efficient_attn
