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
// Under a shift (linear_attention_features.h) S is relative to it, as in the forward, and so is G, whose queries have a
// shift of the same time or later: backwards in time it falls, and sums are rescaled again. Factors are 1 or less in
// both.
//
// Floating-point operations a row and head: 10 F Dv; causal adds 3 kChunk (F + Dv), a stored schedule 4 F Dv.
#pragma once

#include "linear_attention_backward_rows.h"

namespace efficient_attn {
namespace {
namespace linear {

// Backwards in time: the shift of keys and queries, and what the sums over queries are relative to, becomes that of a
// piece, the larger one of `shift` and t.first.
template <class A>
inline void fall_to(const Params& p, const Plan& s, const A* shift, BackwardTile<A>& t, A* record) {
    larger_shift(s, t.first, shift, t.own);
    join_sums<A>(p, s, record, nullptr, t.own, record);
    set_shift(p, s, t.own, t.map);
    set_shift(p, s, t.own, t.key_map);
}

// --- phase 1: the sums of one segment ---

template <class A>
inline void begin_sums(const Params& p, const Plan& s, const A* shift, A* record) {
    fill<A>(record, backward_sums(s), 0);
    if (moves(p)) copy(shift, s.Fp, record + backward_sums(s));
}

// The keys of a piece, mapped, to the sums that are relative to its shift.
template <class A>
inline void add_piece_of_keys(const Params& p, const Plan& s, const Chunk& rows, const A* u, const A* shift,
                              BackwardTile<A>& t, A* record, Ahead* ahead) {
    if (shift) {
        join_sums<A>(p, s, record, nullptr, shift, record);
        set_shift(p, s, shift, t.key_map);
    }
    if (u) map_keys(p, s, rows, t.key_map, u, t.b, static_cast<A*>(nullptr));
    add_outer(p, s, rows.begin, rows.keys, t.v, t.b, record, ahead);
}

template <class A>
inline void sum_keys(const Params& p, const Plan& s, int64_t b, int64_t kv, Range chunks, BackwardTile<A>& t,
                     A* record) {
    for (int64_t index = chunks.begin; index < chunks.end; ++index) {
        const Chunk c = chunk_at(p, s, b, index);
        if (!c.key_bits) continue;
        read_keys(p, s, c, b, kv, t.key_map, t.b);
        read_v(p, s, c, b, kv, t.v);
        Ahead ahead;
        if (index + 1 < chunks.end) queue_keys(p, chunk_at(p, s, b, index + 1), b, kv, ahead);
        each_piece(p, s, c, b * p.Hkv + kv, t.key_map, t.b, false, false, t,
                   [&](const Chunk& rows, const A* u, const A* shift) {
                       add_piece_of_keys(p, s, rows, u, shift, t, record, &ahead);
                   });
    }
}

// The record ends relative to the shift with which the segment began, t.first.
template <class A>
inline void sum_queries(const Params& p, const Plan& s, int64_t b, int64_t kv, Range chunks, BackwardTile<A>& t,
                        A* record) {
    const int64_t unit = b * p.Hkv + kv;
    for (int64_t index = chunks.end - 1; index >= chunks.begin; --index) {
        const Chunk c = chunk_at(p, s, b, index);
        if (!c.has_queries() && !moves(p)) continue;
        if (moves(p) && !is_calm<A>(p, s, unit, index)) read_keys(p, s, c, b, kv, t.key_map, t.b);
        Ahead ahead;
        each_piece(p, s, c, unit, t.key_map, t.b, false, true, t, [&](const Chunk& rows, const A*, const A* shift) {
            if (shift) fall_to(p, s, shift, t, record);
            for (int64_t g = 0; rows.has_queries() && g < s.group; ++g) {
                const int64_t h = kv * s.group + g;
                read_queries(p, s, rows, b, h, t.map, t.a, static_cast<A*>(nullptr));
                read_u(p, s, rows, b, h, t.map, t.u, t.dv);
                if (index > chunks.begin) queue_queries(p, chunk_at(p, s, b, index - 1), b, h, ahead);
                add_outer(p, s, rows.query_begin, rows.query_end, t.u, t.a, record, &ahead);
            }
        });
    }
    if (moves(p)) join_sums<A>(p, s, record, nullptr, t.first, record);
}

// --- phase 3: the gradients of one segment ---

template <class A>
inline void query_gradients(const Params& p, const Plan& s, int64_t b, int64_t kv, int64_t segment, const A* prefix,
                            BackwardTile<A>& t, A* sums) {
    const Range chunks = segment_chunks(s, segment);
    const int64_t unit = b * p.Hkv + kv, n = backward_sums(s);
    if (p.is_causal) {
        if (moves(p)) take_shift(p, s, shifts_of<A>(p, s, unit), t.own);
        begin_sums(p, s, t.own, t.local);
    }
    for (int64_t index = chunks.begin; index < chunks.end; ++index) {
        const Chunk c = chunk_at(p, s, b, index);
        const bool keys = p.is_causal && c.key_bits;
        if (keys) {
            read_keys(p, s, c, b, kv, t.key_map, t.b);
            read_v(p, s, c, b, kv, t.v);
        }
        if (keys && c.has_queries()) transpose(t.v, s.Dvr, kChunk, s.Dvr, t.vt, kChunk);
        bool apart = false;
        if (moves(p)) {
            take_shift(p, s, shift_before<A>(p, s, unit, index), t.own);
            apart = keys && !same_shift(s, t.own, prefix + n);
        }
        each_piece(p, s, c, unit, t.key_map, t.b, apart, false, t, [&](const Chunk& rows, const A* u, const A* shift) {
            if (shift) {
                join_sums<A>(p, s, t.local, nullptr, shift, t.local);
                larger_shift(s, prefix + n, shift, t.own);
                set_shift(p, s, t.own, t.map);
                set_shift(p, s, t.own, t.key_map);
            }
            if (keys) map_keys(p, s, rows, t.key_map, u, t.b, static_cast<A*>(nullptr));
            const uint64_t poison = keys ? poisoned_rows(t.b, rows.keys, s.Fp) : 0;
            if (p.is_causal && rows.has_queries()) join_sums<A>(p, s, prefix, t.local, t.own, t.state);
            for (int64_t g = 0; rows.has_queries() && g < s.group; ++g) {
                const int64_t h = kv * s.group + g, end = rows.query_end;
                if (sums || p.feature_map != kIdentity) read_queries(p, s, rows, b, h, t.map, t.a, t.slope);
                read_u(p, s, rows, b, h, t.map, t.u, t.dv);
                Ahead ahead;
                if (index + 1 < chunks.end) {
                    const Chunk next = chunk_at(p, s, b, index + 1);
                    queue_queries(p, next, b, h, ahead);
                    if (p.is_causal && g == 0) queue_keys(p, next, b, kv, ahead);
                }
                product<A>(kAll, end, p.Dv + 1, s.Fp, t.u, s.Dvr, Unit{}, p.is_causal ? t.state : prefix, s.Fp,
                           t.gradient, s.Fp, false, &ahead);
                if (keys) {
                    triangle_of_gradients(p, s, end, t);
                    triangle_product<A>(kLowerTerms, end, rows.keys, s.Fp, t.W, t.b, s.Fp, poison, t.saved, t.gradient,
                                        s.Fp);
                }
                if (sums) add_outer(p, s, 0, end, t.u, t.a, sums);
                const A* dx = input_gradient(p, s, end, t.map, t.slope, false, t.gradient, t.dx);
                write_rows<A>(p.feature_dtype, p.dq, b, h, c.query, rows.query_begin, end, rows.query_bits, p.D, dx,
                              p.projection ? s.Dp : s.Fp, nullptr);
            }
            if (!keys) return;
            const bool mapped = !shift || same_shift(s, shift, t.own);
            add_piece_of_keys<A>(p, s, rows, mapped ? nullptr : u, shift, t, t.local, nullptr);
        });
    }
}

template <class A>
inline void key_gradients(const Params& p, const Plan& s, int64_t b, int64_t kv, int64_t segment, const A* suffix,
                          BackwardTile<A>& t) {
    const Range chunks = segment_chunks(s, segment);
    const int64_t unit = b * p.Hkv + kv, n = backward_sums(s);
    if (p.is_causal) {
        begin_sums(p, s, suffix + n, t.local);
    } else {
        transpose(suffix, s.Fp, s.Dvr, s.Fp, t.across, s.Dvr);
    }
    if (moves(p)) shift_of_earlier(p, s, unit, segment, t.first);
    for (int64_t index = chunks.end - 1; index >= chunks.begin; --index) {
        const Chunk c = chunk_at(p, s, b, index);
        if (c.keys > 0) {
            read_keys(p, s, c, b, kv, t.key_map, t.b);
            read_v(p, s, c, b, kv, t.v);
        }
        each_piece(p, s, c, unit, t.key_map, t.b, false, true, t, [&](const Chunk& rows, const A* u, const A* shift) {
            const bool queries = p.is_causal && rows.has_queries(), keys = rows.keys > rows.begin;
            if (shift) fall_to(p, s, shift, t, t.local);
            const A* state = p.is_causal ? t.state : suffix;
            if (keys) {
                if (p.is_causal) {
                    join_sums<A>(p, s, suffix, t.local, t.local + n, t.state);
                    transpose(t.state, s.Fp, s.Dvr, s.Fp, t.across, s.Dvr);
                }
                map_keys(p, s, rows, t.key_map, u, t.b, t.key_slope);
                Ahead ahead;
                if (index > chunks.begin) queue_keys(p, chunk_at(p, s, b, index - 1), b, kv, ahead);
                product<A>(kAll, rows.keys, p.Dv + 1, s.Fp, t.v, s.Dvr, Unit{}, state, s.Fp, t.gradient, s.Fp, false,
                           &ahead);
                product<A>(kAll, rows.keys, p.F, s.Dvp, t.b, s.Fp, Unit{}, t.across, s.Dvr, t.dv, s.Dvr, false);
                if (queries) {
                    transpose(t.b, s.Fp, kChunk, s.Fp, t.bt, kChunk);
                    transpose(t.v, s.Dvr, kChunk, s.Dvr, t.vt, kChunk);
                }
            }
            for (int64_t g = 0; queries && g < s.group; ++g) {
                const int64_t h = kv * s.group + g, end = rows.query_end;
                read_queries(p, s, rows, b, h, t.map, t.a, static_cast<A*>(nullptr));
                read_u(p, s, rows, b, h, t.map, t.u, t.saved);
                if (keys) {
                    product<A>(kLowerColumns, end, p.F, kChunk, t.a, s.Fp, Unit{}, t.bt, kChunk, t.T, kChunk, false);
                    clear_upper(end, t.T);
                    triangle_of_gradients(p, s, end, t);
                    triangle_product<A>(kUpperTerms, rows.keys, end, s.Fp, t.W, t.a, s.Fp,
                                        poisoned_rows(t.a, end, s.Fp), t.saved, t.gradient, s.Fp);
                    triangle_product<A>(kUpperTerms, rows.keys, end, s.Dvp, t.T, t.u, s.Dvr,
                                        poisoned_rows(t.u, end, s.Dvr), t.saved, t.dv, s.Dvr);
                }
                Ahead ahead;
                if (index > chunks.begin) queue_queries(p, chunk_at(p, s, b, index - 1), b, h, ahead);
                add_outer(p, s, rows.query_begin, end, t.u, t.a, t.local, &ahead);
            }
            if (!keys) return;
            const A* dx = input_gradient(p, s, rows.keys, t.key_map, t.key_slope, true, t.gradient, t.dx);
            write_rows<A>(p.feature_dtype, p.dk, b, kv, c.key, rows.begin, rows.keys, rows.key_bits, p.D, dx,
                          p.projection ? s.Dp : s.Fp, nullptr);
            write_rows<A>(p.value_dtype, p.dv, b, kv, c.key, rows.begin, rows.keys, rows.key_bits, p.Dv, t.dv, s.Dvr,
                          nullptr);
        });
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

// P of a walk over all segments: nothing, relative to the shift of no keys (of queries, that of all).
template <class A>
inline void begin_prefix(const Params& p, const Plan& s, int64_t unit, bool of_queries, BackwardTile<A>& t) {
    if (moves(p)) shift_of_earlier(p, s, unit, of_queries ? s.segments : 0, t.own);
    begin_sums(p, s, t.own, t.prefix);
}

// P += L behind a segment.
template <class A>
inline void carry_prefix(const Params& p, const Plan& s, int64_t unit, int64_t segment, bool of_queries,
                         BackwardTile<A>& t) {
    if (moves(p)) shift_of_earlier(p, s, unit, of_queries ? segment : segment + 1, t.own);
    join_sums<A>(p, s, t.prefix, t.local, t.own, t.prefix);
}

template <class A>
inline BackwardTile<A> make_tile(const Params& p, const Plan& s, const Site<A>& site, const A* packed, char* memory) {
    Carver carver{memory};
    BackwardTile<A> t(p, s, carver);
    const A* shift = has_shift(p) && !p.is_causal ? shifts_of<A>(p, s, site.unit) : nullptr;
    select_head<A>(p, s, site.kv, packed, shift, t.map);
    select_head<A>(p, s, site.kv, packed, shift, t.key_map);
    return t;
}

template <class A>
inline void sum_task(const Params& p, const Plan& s, const Site<A>& site, bool of_queries, BackwardTile<A>& t) {
    A* record = of_queries ? site.query_sums : site.key_sums;
    if (moves(p)) {
        shift_of_earlier(p, s, site.unit, of_queries ? site.segment + 1 : 0, t.own);
        shift_of_earlier(p, s, site.unit, site.segment, t.first);
    }
    begin_sums(p, s, t.own, record);
    (of_queries ? sum_queries<A> : sum_keys<A>)(p, s, site.b, site.kv, segment_chunks(s, site.segment), t, record);
}

// Each record becomes the sum of those before it, relative to the shift of the keys before (of queries: of those after
// it, relative to that of the keys up to its end), as a walk makes it.
template <class A>
inline void combine_task(const Params& p, const Plan& s, const Site<A>& site, bool of_queries, char* memory) {
    A* records = of_queries ? site.all_queries : site.all_keys;
    const int64_t record = backward_record(s);
    if (!p.is_causal) return sum_of_all<A>(records, s.segments, record, backward_sums(s));
    if (!moves(p)) return sums_of_others<A>(records, s.segments, record, backward_sums(s), of_queries);
    Carver carver{memory};
    BackwardTile<A> t(p, s, carver);
    begin_prefix(p, s, site.unit, of_queries, t);
    for (int64_t step = 0; step < s.segments; ++step) {
        const int64_t segment = of_queries ? s.segments - 1 - step : step;
        A* own = records + segment * record;
        copy(own, record, t.local);
        copy(t.prefix, record, own);
        carry_prefix(p, s, site.unit, segment, of_queries, t);
    }
}

// Without causality the sums over queries are taken on the way: their rows are read once.
template <class A>
inline void query_task(const Params& p, const Plan& s, const Site<A>& site, BackwardTile<A>& t) {
    for (int64_t g = 0; site.segment == 0 && g < s.group; ++g)  // queries before the first key see nothing
        clear_rows<A>(p.feature_dtype, p.dq, site.b, site.kv * s.group + g, min_of(p.Nq, max_of(0, -s.offset)), p.D);
    A* const none = nullptr;
    if (!p.is_causal) {
        fill<A>(site.query_sums, backward_sums(s), 0);
        return query_gradients(p, s, site.b, site.kv, site.segment, site.all_keys, t, site.query_sums);
    }
    if (s.stored) return query_gradients(p, s, site.b, site.kv, site.segment, site.key_sums, t, none);
    begin_prefix(p, s, site.unit, false, t);
    for (int64_t segment = 0; segment < s.segments; ++segment) {
        query_gradients(p, s, site.b, site.kv, segment, t.prefix, t, none);
        carry_prefix(p, s, site.unit, segment, false, t);
    }
}

template <class A>
inline void key_task(const Params& p, const Plan& s, const Site<A>& site, BackwardTile<A>& t) {
    if (s.stored) {
        const A* suffix = p.is_causal ? site.query_sums : site.all_queries;
        return key_gradients(p, s, site.b, site.kv, site.segment, suffix, t);
    }
    begin_prefix(p, s, site.unit, true, t);
    for (int64_t segment = s.segments - 1; segment >= 0; --segment) {
        key_gradients(p, s, site.b, site.kv, segment, t.prefix, t);
        if (moves(p)) join_sums<A>(p, s, t.local, nullptr, t.first, t.local);
        carry_prefix(p, s, site.unit, segment, true, t);
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
        if (combine) return combine_task(p, s, site, second || phase == 4, memory);
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
