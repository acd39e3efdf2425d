// Linear attention, backward (see linear_attention.h for the timeline and its schedules):
//
//     u_i = [dout_i / n_i, dn_i - dout_i . out_i / n_i]       dout counts as 0 where n_i = 0
//     da_i = sum_j (u_i . v'_j) b_j     db_j = sum_i (v'_j . u_i) a_i     dv_j = sum_i (b_j . a_i) u_i
//
// where i sees j. Two kinds of walk, each over states with one row for each element of v' or u, [Dv + 1][Fp]:
//
//     queries  forwards in time    S = sum_j v'_j b_j^T,   dA = U S + tril(U V'^T) B
//     keys     backwards in time   G = sum_i u_i a_i^T,    dB = V' G + tril(U V'^T)^T A,   dV = B G^T + tril(A B^T)^T U
//
// Floating-point operations a row and head: 10 F Dv; causal adds 3 kChunk (F + Dv), a stored schedule 4 F Dv.
#pragma once

#include "linear_attention_features.h"

namespace efficient_attn {
namespace {
namespace linear {

inline int64_t backward_record(const Plan& s) { return s.Dvr * s.Fp; }

template <class A>
struct BackwardTile {
    Features<A> map, key_map;
    A *a, *slope, *b, *key_slope, *bt;   // [kChunk][Fp], bt [Fp][kChunk]
    A *v, *vt, *u, *T, *W;               // v' and u [kChunk][Dvr], vt [Dvr][kChunk], A B^T and U V'^T
    A *gradient, *dx, *dv, *saved;       // [kChunk] x Fp, Dp, Dvr, and the wider of Fp and Dvr
    A *prefix, *local, *state, *across;  // records: P, L, P + L, and G^T [Fp][Dvr]

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
        across = carver.take<A>(backward_record(s));
    }
};

// u of the chunk's queries of one head; `scratch` [kChunk][Dvr] takes out.
template <class A>
inline void read_u(const Params& p, const Plan& s, const Chunk& c, int64_t b, int64_t h, A* u, A* scratch) {
    read_rows<A>(p.value_dtype, p.grad_out, b, h, c.query, c.query_bits, p.Dv, s.Dvr, u);
    read_rows<A>(p.value_dtype, p.out, b, h, c.query, c.query_bits, p.Dv, s.Dvr, scratch);
    const int64_t place = (b * p.Hq + h) * p.Nq + c.query;
    const A* normaliser = static_cast<const A*>(p.normaliser) + place;
    const A* grad_normaliser = p.grad_normaliser ? static_cast<const A*>(p.grad_normaliser) + place : nullptr;
    for (int64_t r = c.query_begin; r < c.query_end; ++r) {
        A *row = u + r * s.Dvr, *out = scratch + r * s.Dvr;
        const A n = normaliser[r], inverse = 1 / n;
        Vec<A> sum{};
        for (int64_t d = 0; d < s.Dvr; d += kLanes<A>) {
            const Vec<A> x = n == 0 ? Vec<A>{} : load<A>(row + d) * inverse;
            store(row + d, x);
            sum -= x * load<A>(out + d);
        }
        row[p.Dv] = sum_of_lanes<A>(sum) + (grad_normaliser ? grad_normaliser[r] : 0);
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

// record [Dv + 1][Fp] += X^T Y for rows of v' and b, or of u and a
template <class A>
inline void add_outer(const Params& p, const Plan& s, int64_t rows, const A* x, const A* y, A* record,
                      Ahead* ahead = nullptr) {
    product<A>(kAll, p.Dv + 1, rows, s.Fp, x, Unit{}, s.Dvr, y, s.Fp, record, s.Fp, true, ahead);
}

// W = tril(U V'^T)
template <class A>
inline void triangle_of_gradients(const Params& p, const Plan& s, int64_t rows, BackwardTile<A>& t) {
    product<A>(kLowerColumns, rows, p.Dv + 1, kChunk, t.u, s.Dvr, Unit{}, t.vt, kChunk, t.W, kChunk, false);
    clear_upper(rows, t.W);
}

// --- phase 1: the sums of one segment ---

template <class A>
inline void sum_keys(const Params& p, const Plan& s, int64_t b, int64_t kv, Range chunks, BackwardTile<A>& t,
                     A* record) {
    for (int64_t index = chunks.begin; index < chunks.end; ++index) {
        const Chunk c = chunk_at(p, s, b, index);
        if (!c.key_bits) continue;
        read_keys(p, s, c, b, kv, t.key_map, t.b, static_cast<A*>(nullptr));
        read_v(p, s, c, b, kv, t.v);
        Ahead ahead;
        if (index + 1 < chunks.end) queue_keys(p, chunk_at(p, s, b, index + 1), b, kv, ahead);
        add_outer(p, s, c.keys, t.v, t.b, record, &ahead);
    }
}

template <class A>
inline void sum_queries(const Params& p, const Plan& s, int64_t b, int64_t kv, Range chunks, BackwardTile<A>& t,
                        A* record) {
    for (int64_t index = chunks.end - 1; index >= chunks.begin; --index) {
        const Chunk c = chunk_at(p, s, b, index);
        if (!c.has_queries()) continue;
        for (int64_t g = 0; g < s.group; ++g) {
            const int64_t h = kv * s.group + g;
            read_queries(p, s, c, b, h, t.map, t.a, static_cast<A*>(nullptr));
            read_u(p, s, c, b, h, t.u, t.dv);
            Ahead ahead;
            if (index > chunks.begin) queue_queries(p, chunk_at(p, s, b, index - 1), b, h, ahead);
            add_outer(p, s, c.query_end, t.u, t.a, record, &ahead);
        }
    }
}

// --- phase 3: the gradients of one segment ---

template <class A>
inline void query_gradients(const Params& p, const Plan& s, int64_t b, int64_t kv, int64_t segment, const A* prefix,
                            BackwardTile<A>& t, A* sums) {
    const Range chunks = segment_chunks(s, segment);
    if (p.is_causal) fill<A>(t.local, backward_record(s), 0);
    for (int64_t index = chunks.begin; index < chunks.end; ++index) {
        const Chunk c = chunk_at(p, s, b, index);
        const bool keys = p.is_causal && c.key_bits;
        uint64_t poison = 0;
        if (keys) {
            read_keys(p, s, c, b, kv, t.key_map, t.b, static_cast<A*>(nullptr));
            read_v(p, s, c, b, kv, t.v);
            poison = poisoned_rows(t.b, c.keys, s.Fp);
        }
        if (keys && c.has_queries()) transpose(t.v, s.Dvr, kChunk, s.Dvr, t.vt, kChunk);
        if (p.is_causal && c.has_queries()) add(prefix, t.local, backward_record(s), t.state);
        for (int64_t g = 0; c.has_queries() && g < s.group; ++g) {
            const int64_t h = kv * s.group + g, rows = c.query_end;
            read_u(p, s, c, b, h, t.u, t.dv);
            Ahead ahead;
            if (index + 1 < chunks.end) {
                const Chunk next = chunk_at(p, s, b, index + 1);
                queue_queries(p, next, b, h, ahead);
                if (p.is_causal && g == 0) queue_keys(p, next, b, kv, ahead);
            }
            product<A>(kAll, rows, p.Dv + 1, s.Fp, t.u, s.Dvr, Unit{}, p.is_causal ? t.state : prefix, s.Fp, t.gradient,
                       s.Fp, false, &ahead);
            if (keys) {
                triangle_of_gradients(p, s, rows, t);
                triangle_product<A>(kLowerTerms, rows, c.keys, s.Fp, t.W, t.b, s.Fp, poison, t.saved, t.gradient, s.Fp);
            }
            if (sums || p.feature_map != kIdentity) read_queries(p, s, c, b, h, t.map, t.a, t.slope);
            if (sums) add_outer(p, s, rows, t.u, t.a, sums);
            const A* dx = input_gradient(p, s, rows, t.map, t.slope, false, t.gradient, t.dx);
            write_rows<A>(p.feature_dtype, p.dq, b, h, c.query, c.query_begin, rows, c.query_bits, p.D, dx,
                          p.projection ? s.Dp : s.Fp, nullptr);
        }
        if (keys) add_outer(p, s, c.keys, t.v, t.b, t.local);
    }
}

template <class A>
inline void key_gradients(const Params& p, const Plan& s, int64_t b, int64_t kv, int64_t segment, const A* suffix,
                          BackwardTile<A>& t) {
    const Range chunks = segment_chunks(s, segment);
    if (p.is_causal) {
        fill<A>(t.local, backward_record(s), 0);
    } else {
        transpose(suffix, s.Fp, s.Dvr, s.Fp, t.across, s.Dvr);
    }
    for (int64_t index = chunks.end - 1; index >= chunks.begin; --index) {
        const Chunk c = chunk_at(p, s, b, index);
        const bool queries = p.is_causal && c.has_queries(), keys = c.keys > 0;
        if (keys) {
            if (p.is_causal) {
                add(suffix, t.local, backward_record(s), t.state);
                transpose(t.state, s.Fp, s.Dvr, s.Fp, t.across, s.Dvr);
            }
            read_keys(p, s, c, b, kv, t.key_map, t.b, t.key_slope);
            read_v(p, s, c, b, kv, t.v);
            const A* state = p.is_causal ? t.state : suffix;
            Ahead ahead;
            if (index > chunks.begin) queue_keys(p, chunk_at(p, s, b, index - 1), b, kv, ahead);
            product<A>(kAll, c.keys, p.Dv + 1, s.Fp, t.v, s.Dvr, Unit{}, state, s.Fp, t.gradient, s.Fp, false, &ahead);
            product<A>(kAll, c.keys, p.F, s.Dvp, t.b, s.Fp, Unit{}, t.across, s.Dvr, t.dv, s.Dvr, false);
            if (queries) {
                transpose(t.b, s.Fp, kChunk, s.Fp, t.bt, kChunk);
                transpose(t.v, s.Dvr, kChunk, s.Dvr, t.vt, kChunk);
            }
        }
        for (int64_t g = 0; queries && g < s.group; ++g) {
            const int64_t h = kv * s.group + g, rows = c.query_end;
            read_queries(p, s, c, b, h, t.map, t.a, static_cast<A*>(nullptr));
            read_u(p, s, c, b, h, t.u, t.saved);
            if (keys) {
                product<A>(kLowerColumns, rows, p.F, kChunk, t.a, s.Fp, Unit{}, t.bt, kChunk, t.T, kChunk, false);
                clear_upper(rows, t.T);
                triangle_of_gradients(p, s, rows, t);
                triangle_product<A>(kUpperTerms, c.keys, rows, s.Fp, t.W, t.a, s.Fp, poisoned_rows(t.a, rows, s.Fp),
                                    t.saved, t.gradient, s.Fp);
                triangle_product<A>(kUpperTerms, c.keys, rows, s.Dvp, t.T, t.u, s.Dvr, poisoned_rows(t.u, rows, s.Dvr),
                                    t.saved, t.dv, s.Dvr);
            }
            Ahead ahead;
            if (index > chunks.begin) queue_queries(p, chunk_at(p, s, b, index - 1), b, h, ahead);
            add_outer(p, s, rows, t.u, t.a, t.local, &ahead);
        }
        if (!keys) continue;
        const A* dx = input_gradient(p, s, c.keys, t.key_map, t.key_slope, true, t.gradient, t.dx);
        write_rows<A>(p.feature_dtype, p.dk, b, kv, c.key, 0, c.keys, c.key_bits, p.D, dx, p.projection ? s.Dp : s.Fp,
                      nullptr);
        write_rows<A>(p.value_dtype, p.dv, b, kv, c.key, 0, c.keys, c.key_bits, p.Dv, t.dv, s.Dvr, nullptr);
    }
}

// --- tasks ---

// What a task works on. A stored schedule keeps records: the sums over keys of every (batch, head) and segment, then
// the sums over queries.
template <class A>
struct Site {
    int64_t unit, b, kv, segment;
    A *key_sums, *query_sums;   // of this task's segment
    A *all_keys, *all_queries;  // of this (batch, head): where the sum over all segments lies

    Site(const Params& p, const Plan& s, int64_t task, A* records) {
        const int64_t record = backward_record(s), behind = p.B * p.Hkv * s.segments * record;
        unit = s.stored ? task / s.segments : task;
        segment = s.stored ? task % s.segments : 0;
        b = unit / p.Hkv;
        kv = unit % p.Hkv;
        key_sums = records + task * record;
        query_sums = key_sums + behind;
        all_keys = records + unit * s.segments * record;
        all_queries = all_keys + behind;
    }
};

template <class A>
inline BackwardTile<A> make_tile(const Params& p, const Plan& s, const Site<A>& site, const A* packed, char* memory) {
    Carver carver{memory};
    BackwardTile<A> t(p, s, carver);
    const A* shift = p.key_shift ? static_cast<const A*>(p.key_shift) + site.unit * p.F : nullptr;
    select_head<A>(p, s, site.kv, packed, shift, t.map);
    select_head<A>(p, s, site.kv, packed, shift, t.key_map);
    return t;
}

template <class A>
inline void sum_task(const Params& p, const Plan& s, const Site<A>& site, bool of_queries, BackwardTile<A>& t) {
    A* record = of_queries ? site.query_sums : site.key_sums;
    fill<A>(record, backward_record(s), 0);
    (of_queries ? sum_queries<A> : sum_keys<A>)(p, s, site.b, site.kv, segment_chunks(s, site.segment), t, record);
}

template <class A>
inline void combine_task(const Params& p, const Plan& s, const Site<A>& site, bool of_queries) {
    A* records = of_queries ? site.all_queries : site.all_keys;
    const int64_t record = backward_record(s);
    if (p.is_causal) return sums_of_others<A>(records, s.segments, record, record, of_queries);
    sum_of_all<A>(records, s.segments, record, record);
}

// Without causality the sums over queries are taken on the way: their rows are read once.
template <class A>
inline void query_task(const Params& p, const Plan& s, const Site<A>& site, BackwardTile<A>& t) {
    for (int64_t g = 0; site.segment == 0 && g < s.group; ++g)  // queries before the first key see nothing
        clear_rows<A>(p.feature_dtype, p.dq, site.b, site.kv * s.group + g, min_of(p.Nq, max_of(0, -s.offset)), p.D);
    A* const none = nullptr;
    if (!p.is_causal) {
        fill<A>(site.query_sums, backward_record(s), 0);
        return query_gradients(p, s, site.b, site.kv, site.segment, site.all_keys, t, site.query_sums);
    }
    if (s.stored) return query_gradients(p, s, site.b, site.kv, site.segment, site.key_sums, t, none);
    fill<A>(t.prefix, backward_record(s), 0);
    for (int64_t segment = 0; segment < s.segments; ++segment) {
        query_gradients(p, s, site.b, site.kv, segment, t.prefix, t, none);
        add(t.prefix, t.local, backward_record(s), t.prefix);
    }
}

template <class A>
inline void key_task(const Params& p, const Plan& s, const Site<A>& site, BackwardTile<A>& t) {
    if (s.stored) {
        const A* suffix = p.is_causal ? site.query_sums : site.all_queries;
        return key_gradients(p, s, site.b, site.kv, site.segment, suffix, t);
    }
    fill<A>(t.prefix, backward_record(s), 0);
    for (int64_t segment = s.segments - 1; segment >= 0; --segment) {
        key_gradients(p, s, site.b, site.kv, segment, t.prefix, t);
        add(t.prefix, t.local, backward_record(s), t.prefix);
    }
}

// Causal, phases 1 to 3 work for keys and for queries side by side. Else 1 to 3 are the queries', whose gradients need
// the sums over keys, and 4 and 5 the keys'.
template <class A>
struct Backward {
    static int64_t shared_bytes(const Params& p) {
        const Plan s = make_plan<A>(p);
        const int64_t records = s.stored ? 2 * p.B * p.Hkv * s.segments * backward_record(s) : 0;
        return static_cast<int64_t>(sizeof(A)) * (packed_size(p, s, true) + records);
    }
    static int64_t thread_bytes(const Params& p) {
        Carver carver{nullptr};
        BackwardTile<A>(p, make_plan<A>(p), carver);
        return carver.used;
    }
    static int64_t task_count(const Params& p, int phase) {
        const Plan s = make_plan<A>(p);
        const int64_t units = p.B * p.Hkv, all = s.stored ? units * s.segments : units, sides = p.is_causal ? 2 : 1;
        switch (phase) {
            case 0:
                return p.projection ? p.projection_heads : 0;
            case 1:
                return s.stored ? sides * all : 0;
            case 2:
                return s.stored ? sides * units : 0;
            case 3:
                return sides * all;
            case 4:
                return p.is_causal ? 0 : units;
            default:
                return p.is_causal ? 0 : all;
        }
    }
    static void run_task(const Params& p, int phase, int64_t task, char* memory, char* shared) {
        const Plan s = make_plan<A>(p);
        A *packed = reinterpret_cast<A*>(shared), *records = packed + packed_size(p, s, true);
        if (phase == 0) return pack_projection(p, s, task, packed, true);
        const bool combine = phase == 2 || phase == 4;
        const int64_t side = p.B * p.Hkv * (s.stored && !combine ? s.segments : 1);
        const bool second = task >= side;
        const int64_t own = second ? task - side : task;
        const Site<A> site(p, s, combine ? own * s.segments : own, records);
        if (combine) return combine_task(p, s, site, second || phase == 4);
        BackwardTile<A> t = make_tile(p, s, site, packed, memory);
        if (phase == 1) return sum_task(p, s, site, second, t);
        // The gradients of the keys take longer, so they come first.
        const bool of_queries = p.is_causal ? second : phase == 3;
        of_queries ? query_task(p, s, site, t) : key_task(p, s, site, t);
    }
};

}  // namespace linear
}  // namespace
}  // namespace efficient_attn
