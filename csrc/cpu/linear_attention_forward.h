// Linear attention, forward: out and the normaliser (see linear_attention.h for the timeline and its schedules).
//
//     state  S [F][Dvp] = sum_j b_j v_j^T,   z [Fp] = sum_j b_j,   and the shift [Fp] that they are relative to (see
//            linear_attention_features.h); a record is S, z, shift
//     chunk  O = A S + tril(A B^T) V,   n = A z + the row sums of tril(A B^T),   out = O / n
//
// Floating-point operations a row and head: 4 F Dv; causal adds kChunk (F + Dv) for the triangle, and a stored schedule
// another 2 F Dv. A projection costs 2 F D for each time a row is read.
#pragma once

#include <limits>

#include "linear_attention_features.h"

namespace efficient_attn {
namespace {
namespace linear {

inline int64_t forward_sums(const Params& p, const Plan& s) { return p.F * s.Dvp + s.Fp; }
inline int64_t forward_record(const Params& p, const Plan& s) { return forward_sums(p, s) + s.Fp; }

template <class A>
struct ForwardTile {
    Features<A> map;
    A *a, *b, *bt, *v, *T, *O, *saved;  // [kChunk] x Fp, Fp, [Fp][kChunk], Dvp, kChunk, Dvp, Dvp
    A *partial, *n, *inverse;           // the normaliser by lanes [kChunk][lanes], its sums, 1 / n
    A *prefix, *local, *state;          // records: P, L, P + L
    A* base;                            // where every shift begins [Fp]

    ForwardTile(const Params& p, const Plan& s, Carver& carver) {
        map = carve_features<A>(p, s, carver);
        a = carver.take<A>(kChunk * s.Fp);
        b = carver.take<A>(kChunk * s.Fp);
        bt = carver.take<A>(kChunk * s.Fp);
        v = carver.take<A>(kChunk * s.Dvp);
        T = carver.take<A>(kChunk * kChunk);
        O = carver.take<A>(kChunk * s.Dvp);
        saved = carver.take<A>(kChunk * s.Dvp);
        partial = carver.take<A>(kChunk * kLanes<A>);
        n = carver.take<A>(kChunk);
        inverse = carver.take<A>(kChunk);
        prefix = carver.take<A>(forward_record(p, s));
        local = carver.take<A>(forward_record(p, s));
        state = carver.take<A>(forward_record(p, s));
        base = carver.take<A>(s.Fp);
    }
};

// S += B^T V, z += the sum of the rows of B
template <class A>
inline void add_keys(const Params& p, const Plan& s, const Chunk& c, const A* b, const A* v, A* record, Ahead* ahead) {
    product<A>(kAll, p.F, c.keys - c.begin, s.Dvp, b + c.begin * s.Fp, Unit{}, s.Fp, v + c.begin * s.Dvp, s.Dvp, record,
               s.Dvp, true, ahead);
    A* z = record + p.F * s.Dvp;
    for (int64_t k = 0; k < s.Fp; k += kLanes<A>) {
        Vec<A> sum{};
        for (int64_t r = c.begin; r < c.keys; ++r) sum += load<A>(b + r * s.Fp + k);
        store(z + k, load<A>(z + k) + sum);
    }
}

template <class A>
inline void read_values(const Params& p, const Plan& s, const Chunk& c, int64_t b, int64_t kv, A* v) {
    read_rows<A>(p.value_dtype, p.value, b, kv, c.key, c.key_bits, p.Dv, s.Dvp, v);
}

// --- records and their shift ---

template <class A>
inline A* shift_of(const Params& p, const Plan& s, A* record) {
    return record + forward_sums(p, s);
}
template <class A>
inline const A* shift_of(const Params& p, const Plan& s, const A* record) {
    return record + forward_sums(p, s);
}

// The sums of a segment begin with nothing, relative to `base`.
template <class A>
inline void clear_record(const Params& p, const Plan& s, const A* base, A* record) {
    fill<A>(record, forward_sums(p, s), 0);
    if (has_shift(p)) copy(base, s.Fp, shift_of(p, s, record));
}

// out = x + y relative to the larger one of their shifts; out may be x. Never inlined, so that every schedule has the
// same bits of it.
template <class A>
EA_NOINLINE void join_records(const Params& p, const Plan& s, const A* x, const A* y, A* out) {
    const int64_t n = forward_sums(p, s), z = p.F * s.Dvp;
    if (!has_shift(p)) return add(x, y, n, out);
    if (same_shift(s, x + n, y + n)) {
        add(x, y, n, out);
        return copy(x + n, s.Fp, out + n);
    }
    for (int64_t k = 0; k < s.Fp; k += kLanes<A>) {
        const Vec<A> before = load<A>(x + n + k), others = load<A>(y + n + k);
        const Vec<A> top = select<A>(before > others, before, others);
        const Vec<A> keep = exp(before - top), take = exp(others - top);
        store(out + n + k, top);
        store(out + z + k, load<A>(x + z + k) * keep + load<A>(y + z + k) * take);
        for (int64_t lane = 0; lane < kLanes<A> && k + lane < p.F; ++lane) {
            const int64_t row = (k + lane) * s.Dvp;
            for (int64_t d = row; d < row + s.Dvp; d += kLanes<A>)
                store(out + d, load<A>(x + d) * keep[lane] + load<A>(y + d) * take[lane]);
        }
    }
}

// The shift of a record rises for the key at `row`, and what it holds becomes relative to that.
template <class A>
inline void raise_record(const Params& p, const Plan& s, const Chunk& c, const Features<A>& f, const A* u, int64_t row,
                         A* record) {
    A *shift = shift_of(p, s, record), *before = f.key_offset;
    copy(shift, s.Fp, before);
    raise_shift(p, s, c, f, u, row, shift);
    for (int64_t k = 0; k < p.F; ++k) {
        if (before[k] == shift[k]) continue;
        const A factor = exp(broadcast<A>(before[k] - shift[k]))[0];
        record[p.F * s.Dvp + k] *= factor;
        for (int64_t d = 0; d < s.Dvp; ++d) record[k * s.Dvp + d] *= factor;
    }
}

// f(rows, u) for the pieces of a chunk within each of which the shift of `record` stays; it is raised between them. u:
// the keys' own, in `b` where they can be mapped in place, which `keep` or a second piece forbids.
template <class A, class F>
inline void each_piece(const Params& p, const Plan& s, const Chunk& c, const Features<A>& f, const A* b, bool keep,
                       A* record, F visit) {
    int64_t rise = has_shift(p) && c.key_bits ? next_rise(p, s, c, f, b, shift_of(p, s, record), 0) : kChunk;
    if (rise == kChunk && !keep) return visit(c, b);
    copy(b, kChunk * s.Fp, f.u);
    for (int64_t begin = 0; begin < kChunk; begin = rise) {
        if (begin == rise) {
            raise_record<A>(p, s, c, f, f.u, begin, record);
            rise = next_rise<A>(p, s, c, f, f.u, shift_of(p, s, record), begin);
        }
        visit(rows_of(c, begin, rise), f.u);
    }
}

// --- the phases ---

// Phase 1: the sums of one segment.
template <class A>
inline void sum_segment(const Params& p, const Plan& s, int64_t task, const A* packed, A* records, char* memory) {
    Carver carver{memory};
    ForwardTile<A> t(p, s, carver);
    const int64_t unit = task / s.segments, b = unit / p.Hkv, kv = unit % p.Hkv;
    A* record = records + task * forward_record(p, s);
    select_head<A>(p, s, kv, packed, nullptr, t.map);
    if (has_shift(p)) first_exponents(p, s, b, kv, t.map, t.b, t.base);
    clear_record(p, s, t.base, record);
    const Range chunks = segment_chunks(s, task % s.segments);
    for (int64_t index = chunks.begin; index < chunks.end; ++index) {
        const Chunk c = chunk_at(p, s, b, index);
        if (!c.key_bits) continue;
        read_keys(p, s, c, b, kv, t.map, t.b);
        read_values(p, s, c, b, kv, t.v);
        Ahead ahead;
        if (index + 1 < chunks.end) queue_keys(p, chunk_at(p, s, b, index + 1), b, kv, ahead);
        each_piece(p, s, c, t.map, t.b, false, record, [&](const Chunk& rows, const A* u) {
            if (has_shift(p)) set_shift(p, s, shift_of(p, s, record), t.map);
            map_keys(p, s, rows, t.map, u, t.b, static_cast<A*>(nullptr));
            add_keys(p, s, rows, t.b, t.v, record, &ahead);
        });
    }
}

// Phase 2: what the queries of each segment start from, without causality the sum of all and its shift.
template <class A>
inline void combine_segments(const Params& p, const Plan& s, int64_t unit, const A* packed, A* records, char* memory) {
    const int64_t record = forward_record(p, s);
    A* own = records + unit * s.segments * record;
    if (!has_shift(p)) {
        if (p.is_causal) return sums_of_others<A>(own, s.segments, record, forward_sums(p, s), false);
        return sum_of_all<A>(own, s.segments, record, forward_sums(p, s));
    }
    Carver carver{memory};
    ForwardTile<A> t(p, s, carver);
    select_head<A>(p, s, unit % p.Hkv, packed, nullptr, t.map);
    first_exponents(p, s, unit / p.Hkv, unit % p.Hkv, t.map, t.b, t.base);
    clear_record(p, s, t.base, t.prefix);
    for (int64_t k = 0; k < s.segments; ++k) {
        copy(own + k * record, record, t.local);
        if (p.is_causal) copy(t.prefix, record, own + k * record);
        join_records<A>(p, s, t.prefix, t.local, t.prefix);
    }
    if (p.is_causal) return;
    copy(t.prefix, record, own);
    copy(shift_of(p, s, t.prefix), p.F, shifts_of<A>(p, s, unit));
}

// partial[r] += A_r * z, by lanes; and the row sums of T, whose columns beyond the row are 0
template <class A>
inline void add_normaliser(const Plan& s, int64_t rows, const A* a, const A* z, const A* T, A* partial) {
    for (int64_t r = 0; r < rows; ++r) {
        Vec<A> sum{};
        for (int64_t k = 0; k < s.Fp; k += kLanes<A>) sum += load<A>(a + r * s.Fp + k) * load<A>(z + k);
        if (T)
            for (int64_t k = 0; k <= r; k += kLanes<A>) sum += load<A>(T + r * kChunk + k);
        store(partial + r * kLanes<A>, sum);
    }
}

// Below this, 1 / n may be infinite.
template <class A>
constexpr A kTiny = 4 * std::numeric_limits<A>::min();

// A row of sums times 2^64, which is exact; returns n times the same.
template <class A>
inline A raise_row(const Plan& s, A* row, A n) {
    constexpr A factor = 0x1p64;
    for (int64_t d = 0; d < s.Dvp; d += kLanes<A>) store(row + d, load<A>(row + d) * factor);
    return n * factor;
}

// The rows of one query head: `record` is what they see of earlier chunks; with `causal` t.bt and t.v are their own
// chunk.
template <class A>
inline void write_outputs(const Params& p, const Plan& s, const Chunk& c, int64_t b, int64_t h, const A* record,
                          bool triangle, uint64_t poison, ForwardTile<A>& t, Ahead* ahead) {
    const int64_t rows = c.query_end;
    read_queries(p, s, c, b, h, t.map, t.a, static_cast<A*>(nullptr));
    product<A>(kAll, rows, p.F, s.Dvp, t.a, s.Fp, Unit{}, record, s.Dvp, t.O, s.Dvp, false, ahead);
    if (triangle) {
        product<A>(kLowerColumns, rows, p.F, kChunk, t.a, s.Fp, Unit{}, t.bt, kChunk, t.T, kChunk, false);
        clear_upper(rows, t.T);
        triangle_product<A>(kLowerTerms, rows, c.keys, s.Dvp, t.T, t.v, s.Dvp, poison, t.saved, t.O, s.Dvp);
    }
    add_normaliser(s, rows, t.a, record + p.F * s.Dvp, triangle ? t.T : nullptr, t.partial);
    sum_lanes(t.partial, round_up(rows, kLanes<A>), t.n);
    A* normaliser = static_cast<A*>(p.normaliser) + (b * p.Hq + h) * p.Nq;
    if (has_shift(p) && c.has_queries())
        copy(t.map.row_shift + c.query_begin, rows - c.query_begin, constants_of<A>(p, s, b, h) + c.first_query());
    for (int64_t r = c.query_begin; r < rows; ++r) {
        A n = normaliser[c.query + r] = t.n[r];
        if (n < kTiny<A> && n > -kTiny<A> && n != 0) n = raise_row(s, t.O + r * s.Dvp, n);
        t.inverse[r] = n == 0 ? 0 : 1 / n;
    }
    write_rows<A>(p.value_dtype, p.out, b, h, c.query, c.query_begin, rows, c.query_bits, p.Dv, t.O, s.Dvp, t.inverse);
}

// Queries before the first key see nothing.
template <class A>
inline void clear_early_queries(const Params& p, const Plan& s, int64_t b, int64_t h) {
    const int64_t count = min_of(p.Nq, max_of(0, -s.offset));
    clear_rows<A>(p.value_dtype, p.out, b, h, count, p.Dv);
    fill<A>(static_cast<A*>(p.normaliser) + (b * p.Hq + h) * p.Nq, count, 0);
    if (has_shift(p)) fill<A>(constants_of<A>(p, s, b, h), count, 0);
}

// The queries of one segment; prefix is P. Without causality P is all there is.
template <class A>
inline void segment_outputs(const Params& p, const Plan& s, int64_t b, int64_t kv, int64_t segment, const A* prefix,
                            ForwardTile<A>& t) {
    if (p.is_causal) clear_record(p, s, t.base, t.local);
    const bool moving = p.is_causal && has_shift(p);
    const Range chunks = segment_chunks(s, segment);
    for (int64_t index = chunks.begin; index < chunks.end; ++index) {
        const Chunk c = chunk_at(p, s, b, index);
        const bool keys = p.is_causal && c.key_bits, more = index + 1 < chunks.end;
        const Chunk next = chunk_at(p, s, b, index + 1);
        uint64_t poison = 0;
        if (keys) {
            read_keys(p, s, c, b, kv, t.map, t.b);
            read_values(p, s, c, b, kv, t.v);
            poison = poisoned_rows(t.v, c.keys, s.Dvp);
        }
        A* own = shift_of(p, s, t.local);
        const bool apart = moving && keys && !same_shift(s, shift_of(p, s, prefix), own);
        const auto visit = [&](const Chunk& rows, const A* u) {
            const bool outputs = rows.has_queries();
            if (p.is_causal && outputs) join_records<A>(p, s, prefix, t.local, t.state);
            if (moving) set_shift(p, s, outputs ? shift_of(p, s, t.state) : own, t.map);
            if (keys) map_keys(p, s, rows, t.map, u, t.b, static_cast<A*>(nullptr));
            if (keys && outputs) transpose(t.b, s.Fp, kChunk, s.Fp, t.bt, kChunk);
            for (int64_t g = 0; outputs && g < s.group; ++g) {
                Ahead ahead;
                const int64_t h = kv * s.group + g;
                if (more) ahead.queue(p.feature_dtype, p.query, b, h, next.first_query(), next.last_query(), p.D);
                if (more && p.is_causal && g == 0) queue_keys(p, next, b, kv, ahead);
                write_outputs(p, s, rows, b, h, p.is_causal ? t.state : prefix, keys, poison, t, &ahead);
            }
            if (!keys) return;
            if (moving && outputs && !same_shift(s, shift_of(p, s, t.state), own)) {
                set_shift(p, s, own, t.map);
                map_keys(p, s, rows, t.map, u, t.b, static_cast<A*>(nullptr));
            }
            add_keys(p, s, rows, t.b, t.v, t.local, nullptr);
        };
        if (keys) {
            each_piece(p, s, c, t.map, t.b, apart, t.local, visit);
        } else {
            visit(c, t.b);
        }
        if (moving && c.keys > 0) copy(own, p.F, shifts_of<A>(p, s, b * p.Hkv + kv) + (index + 1) * p.F);
    }
}

// Phase 3.
template <class A>
inline void output_task(const Params& p, const Plan& s, int64_t task, const A* packed, const A* records, char* memory) {
    Carver carver{memory};
    ForwardTile<A> t(p, s, carver);
    const int64_t unit = s.stored ? task / s.segments : task, b = unit / p.Hkv, kv = unit % p.Hkv;
    const int64_t record = forward_record(p, s);
    const bool moving = p.is_causal && has_shift(p);
    A* shifts = has_shift(p) ? shifts_of<A>(p, s, unit) : nullptr;
    select_head<A>(p, s, kv, packed, p.is_causal ? nullptr : shifts, t.map);
    if (moving) first_exponents(p, s, b, kv, t.map, t.b, t.base);
    if (moving && (!s.stored || task % s.segments == 0)) copy(t.base, p.F, shifts);
    if (!s.stored || task % s.segments == 0)
        for (int64_t g = 0; g < s.group; ++g) clear_early_queries<A>(p, s, b, kv * s.group + g);
    if (s.stored) {
        const A* prefix = records + (p.is_causal ? task : unit * s.segments) * record;
        return segment_outputs(p, s, b, kv, task % s.segments, prefix, t);
    }
    clear_record(p, s, t.base, t.prefix);
    for (int64_t segment = 0; segment < s.segments; ++segment) {
        segment_outputs(p, s, b, kv, segment, t.prefix, t);
        join_records<A>(p, s, t.prefix, t.local, t.prefix);
    }
}

template <class A>
struct Forward {
    static int64_t shared_bytes(const Params& p) {
        const Plan s = make_plan<A>(p);
        const int64_t records = s.stored ? p.B * p.Hkv * s.segments * forward_record(p, s) : 0;
        return static_cast<int64_t>(sizeof(A)) * (packed_size(p, s, false) + records);
    }
    static int64_t thread_bytes(const Params& p) {
        Carver carver{nullptr};
        ForwardTile<A>(p, make_plan<A>(p), carver);
        return carver.used;
    }
    static int64_t task_count(const Params& p, int phase) {
        const Plan s = make_plan<A>(p);
        const int64_t units = p.B * p.Hkv;
        if (phase == 0) return p.projection ? p.projection_heads : 0;
        if (phase == 3) return s.stored ? units * s.segments : units;
        return !s.stored ? 0 : phase == 1 ? units * s.segments : units;
    }
    static void run_task(const Params& p, int phase, int64_t task, char* memory, char* shared) {
        const Plan s = make_plan<A>(p);
        A *packed = reinterpret_cast<A*>(shared), *records = packed + packed_size(p, s, false);
        if (phase == 0) return pack_projection(p, s, task, packed, false);
        if (phase == 1) return sum_segment<A>(p, s, task, packed, records, memory);
        if (phase == 2) return combine_segments<A>(p, s, task, packed, records, memory);
        output_task<A>(p, s, task, packed, records, memory);
    }
};

}  // namespace linear
}  // namespace
}  // namespace efficient_attn
