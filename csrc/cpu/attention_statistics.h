// What a row of weights P_ij = exp(s_ij - lse_i) looks like, without the n x n of it:
//
//     entropy_i = -sum_j P_ij log P_ij       distance_i = sum_j P_ij |x_i - j|, x_i = i + offset
//     nearby_i  = sum of P_ij, |x_i - j| <= nearby_window         shares_is = sum of P_ij over the keys of set s
//     the largest weights of a row and their keys                 received_j = sum_i r_i P_ij for given r
//     mass_IJ   = sum of P_ij over a block of queries and one of keys
//
// A task is a run of query rows of one (batch, head). It walks the scores of each tile twice, for the softmax and for
// the rest, and owns its rows; what sums over rows goes to a place of its own, so that the bits do not depend on the
// threads.
#pragma once

#include "attention_forward.h"

namespace efficient_attn {
namespace {

constexpr int kUsualTop = 8;  // the default of attention_statistics

template <class A>
struct StatisticsTile {
    ForwardTile<A> forward;
    A *inverse, *entropy, *distance, *nearby, *shares, *position, *weight, *mass, *largest;
    Integer<A>* largest_key;

    StatisticsTile(const StatisticsParams& p, char* memory) : forward(p.attention, memory) {
        Arena arena{memory + ForwardTile<A>::bytes(p.attention)};
        inverse = arena.take<A>(kQueries);
        entropy = arena.take<A>(kQueries);
        distance = arena.take<A>(kQueries);
        nearby = arena.take<A>(kQueries);
        position = arena.take<A>(kQueries);
        mass = arena.take<A>(kQueries);
        shares = arena.take<A>(p.set_count * kQueries);
        weight = arena.take<A>(p.row_weight_count * kQueries);
        largest = arena.take<A>(p.top * kQueries);
        largest_key = arena.take<Integer<A>>(p.top * kQueries);
        end = arena.next;
    }
    static int64_t bytes(const StatisticsParams& p) { return StatisticsTile(p, kNoMemory).end - kNoMemory; }

  private:
    char* end;
};

inline int64_t statistics_chunks(const StatisticsParams& p) {
    return max_of(1, ceil_div(p.attention.Nq, max_of(1, p.chunk_rows)));
}

// Keeps the largest scores of each query, descending; of equal ones the first key stays. Where a key is among the
// largest of some query, all lanes go down the list together. What a place takes follows from what it and the place
// above held, so that no place waits for another.
template <class A>
EA_INLINE void take_place(Mask<A> above, Mask<A> here, Vec<A> next, Mask<A> next_key, Vec<A> score, Mask<A> key,
                          Vec<A>& held, Mask<A>& held_key) {
    held = select<A>(here, select<A>(above, next, score), held);
    held_key = here ? (above ? next_key : key) : held_key;
}

template <class A>
EA_NOINLINE void keep_largest(const A* S, Range keys, int64_t w, int64_t top, A* largest, Integer<A>* largest_key) {
    for (int64_t lane = 0; lane < w; lane += kLanes<A>) {
        const int64_t last = (top - 1) * w + lane;
        for (int64_t k = 0; k < keys.end - keys.begin; ++k) {
            const Vec<A> score = load(S + k * w + lane);
            Vec<A> held = load<A>(largest + last);
            Mask<A> here = score > held;
            if (!bits_from_lanes<A>(here)) continue;
            const Mask<A> key = static_cast<Integer<A>>(keys.begin + k) - Mask<A>{};
            Mask<A> held_key = load_integers<A>(largest_key + last);
            for (int64_t place = last; place >= lane; place -= w) {
                const bool first = place == lane;
                const Vec<A> next = first ? score : load<A>(largest + place - w);
                const Mask<A> next_key = first ? key : load_integers<A>(largest_key + place - w);
                const Mask<A> above = score > next;
                take_place<A>(above, here, next, next_key, score, key, held, held_key);
                store(largest + place, held);
                store_integers<A>(largest_key + place, held_key);
                held = next, held_key = next_key, here = above;
            }
        }
    }
}

// The same, with the lists of a vector of queries in registers.
template <class A, int kTop>
EA_NOINLINE void keep_largest(const A* S, Range keys, int64_t w, A* largest, Integer<A>* largest_key) {
    for (int64_t lane = 0; lane < w; lane += kLanes<A>) {
        Vec<A> held[kTop];
        Mask<A> held_key[kTop];
#pragma GCC unroll 16
        for (int place = 0; place < kTop; ++place) {
            held[place] = load<A>(largest + place * w + lane);
            held_key[place] = load_integers<A>(largest_key + place * w + lane);
        }
        for (int64_t k = 0; k < keys.end - keys.begin; ++k) {
            const Vec<A> score = load(S + k * w + lane);
            if (!bits_from_lanes<A>(score > held[kTop - 1])) continue;
            const Mask<A> key = static_cast<Integer<A>>(keys.begin + k) - Mask<A>{};
#pragma GCC unroll 16
            for (int place = kTop - 1; place > 0; --place)
                take_place<A>(score > held[place - 1], score > held[place], held[place - 1], held_key[place - 1], score,
                              key, held[place], held_key[place]);
            const Mask<A> here = score > held[0];
            held[0] = select<A>(here, score, held[0]);
            held_key[0] = here ? key : held_key[0];
        }
#pragma GCC unroll 16
        for (int place = 0; place < kTop; ++place) {
            store(largest + place * w + lane, held[place]);
            store_integers<A>(largest_key + place * w + lane, held_key[place]);
        }
    }
}

// S becomes P; entropy gains sum P (s - top), in the unit of the scores.
template <class A, bool kNatural>
EA_NOINLINE void weigh(int64_t keys, int64_t w, const A* top, const A* inverse, A* S, A* entropy) {
    for (int64_t lane = 0; lane < w; lane += kLanes<A>) {
        const Vec<A> best = load<A>(top + lane), share = load<A>(inverse + lane);
        const Vec<A> reference = select<A>(best == -kInfinity<A>, Vec<A>{}, best);
        Vec<A> sum = {};
        for (int64_t k = 0; k < keys; ++k) {
            const Vec<A> difference = load<A>(S + k * w + lane) - reference;
            const Vec<A> p = select<A>(share == Vec<A>{}, Vec<A>{}, exponential<kNatural>(difference) * share);
            sum += select<A>(p == Vec<A>{}, Vec<A>{}, p * difference);
            store(S + k * w + lane, p);
        }
        store(entropy + lane, load<A>(entropy + lane) + sum);
    }
}

// received[key] += sum over the tile's queries of weight * P; weight null: 1
template <class A>
EA_NOINLINE void receive(const A* P, int64_t keys, int64_t w, const A* weight, A* received) {
    for (int64_t k = 0; k < keys; k += 4) {
        const int count = static_cast<int>(min_of(4, keys - k));
        Vec<A> sum[4] = {};
        for (int64_t lane = 0; lane < w; lane += kLanes<A>)
            for (int part = 0; part < count; ++part) {
                const Vec<A> p = load(P + (k + part) * w + lane);
                sum[part] += weight ? p * load<A>(weight + lane) : p;
            }
        A sums[4];
        store_sums<A>(sum[0], sum[1], sum[2], sum[3], count, sums);
        for (int part = 0; part < count; ++part) received[k + part] += sums[part];
    }
}

template <class A>
EA_NOINLINE void measure_distance(const A* P, Range keys, int64_t w, const A* position, double window, A* distance,
                                  A* nearby) {
    for (int64_t lane = 0; lane < w; lane += kLanes<A>) {
        const Vec<A> x = load<A>(position + lane), reach = broadcast(static_cast<A>(window));
        Vec<A> far = {}, near = {};
        for (int64_t k = 0; k < keys.end - keys.begin; ++k) {
            const Vec<A> p = load(P + k * w + lane), gap = x - static_cast<A>(keys.begin + k);
            const Vec<A> length = select<A>(gap < Vec<A>{}, -gap, gap);
            far += p * length;
            near += select<A>(length <= reach, p, Vec<A>{});
        }
        store(distance + lane, load<A>(distance + lane) + far);
        store(nearby + lane, load<A>(nearby + lane) + near);
    }
}

template <class A>
EA_NOINLINE void add_columns(const A* P, int64_t keys, int64_t w, A* sums) {
    for (int64_t lane = 0; lane < w; lane += kLanes<A>) {
        Vec<A> sum = {};
        for (int64_t k = 0; k < keys; ++k) sum += load(P + k * w + lane);
        store(sums + lane, load<A>(sums + lane) + sum);
    }
}

// Each key says by a bit of its word which sets it is in; runs of keys of one word are added up together.
template <class A>
inline void share_among_sets(const A* P, const uint32_t* words, int64_t keys, int64_t w, A* shares) {
    for (int64_t k = 0, next; k < keys; k = next) {
        for (next = k + 1; next < keys && words[next] == words[k];) ++next;
        for (uint32_t sets = words[k]; sets; sets &= sets - 1)
            add_columns(P + k * w, next - k, w, shares + __builtin_ctz(sets) * w);
    }
}

// The mass of some keys, all of one column of the map, goes to the map rows of the tile's queries.
template <class A>
inline void add_to_map(const StatisticsParams& p, const A* P, Range keys, Range rows, int64_t w, A* sums, A* map) {
    const int64_t block = p.map_block, columns = ceil_div(p.attention.Nk, block);
    for (int64_t key = keys.begin, end; key < keys.end; key = end) {
        end = min_of((key / block + 1) * block, keys.end);
        fill_zero(sums, w);
        add_columns(P + (key - keys.begin) * w, end - key, w, sums);
        for (int64_t i = rows.begin; i < rows.end; ++i) map[i / block * columns + key / block] += sums[i - rows.begin];
    }
}

template <class A>
inline A* rows_of(void* data, int64_t first) {
    return static_cast<A*>(data) + first;
}

template <class T, class A>
inline void tile_statistics(const StatisticsParams& s, int64_t b, int64_t h, int64_t chunk, Range rows,
                            const StatisticsTile<A>& t) {
    const AttentionParams& p = s.attention;
    ForwardTile<A> f = t.forward;
    const int64_t count = rows.end - rows.begin, w = whole_lanes<T, A>(count), kv = h / (p.Hq / p.Hkv);
    const int64_t head = b * p.Hq + h, first = head * p.Nq + rows.begin;
    const int64_t block = p.mask.indptr ? rows.begin / p.mask.block_q : 0;
    const int64_t block_row = p.mask.indptr ? rows.begin % p.mask.block_q : 0;
    begin_softmax(p, h, w, f);
    softmax_pass<T>(p, b, h, rows, w, f, [](Range, bool) {});

    for (int64_t r = 0; r < w; ++r) {
        t.inverse[r] = r < count && f.total[r] != 0 ? 1 / f.total[r] : 0;
        t.position[r] = static_cast<A>(rows.begin + r + s.position_offset);
        for (int64_t n = 0; n < s.row_weight_count; ++n)
            t.weight[n * w + r] =
                r < count ? static_cast<const A*>(s.row_weights)[(n * p.B * p.Hq + head) * p.Nq + rows.begin + r] : 0;
        for (int64_t k = 0; k < s.top; ++k) t.largest[k * w + r] = -kInfinity<A>, t.largest_key[k * w + r] = -1;
    }
    fill_zero(t.entropy, w);
    fill_zero(t.distance, w);
    fill_zero(t.nearby, w);
    fill_zero(t.shares, s.set_count * w);

    A* received = static_cast<A*>(s.received) + (head * statistics_chunks(s) + chunk) * p.Nk;
    const int64_t received_step =
        p.B * p.Hq * statistics_chunks(s) * p.Nk;  // from one weighting of the rows to the next
    for_each_chunk(p, b, h, block, rows, {0, p.Nk}, [&](const Chunk& chunk) {
        const Range keys = chunk.keys;
        const int64_t n = keys.end - keys.begin;
        score<T>(p, b, kv, keys, w, f);
        bool masked = visible_bits(p, b, h, rows, block_row, chunk, f.bits);
        masked = add_biases<T>(p, b, h, rows, keys, w, f.S, masked, f.bits, f.scratch, f.bias);
        if (masked) fill_masked(f.bits, n, w, -kInfinity<A>, f.S);
        if (s.top == kUsualTop)
            keep_largest<A, kUsualTop>(f.S, keys, w, t.largest, t.largest_key);
        else if (s.top)
            keep_largest(f.S, keys, w, s.top, t.largest, t.largest_key);
        is_natural(p) ? weigh<A, true>(n, w, f.top, t.inverse, f.S, t.entropy)
                      : weigh<A, false>(n, w, f.top, t.inverse, f.S, t.entropy);
        if (s.received) receive<A>(f.S, n, w, nullptr, received + keys.begin);
        for (int64_t weighting = 0; weighting < s.row_weight_count; ++weighting)
            receive(f.S, n, w, t.weight + weighting * w, received + (weighting + 1) * received_step + keys.begin);
        if (s.distance) measure_distance(f.S, keys, w, t.position, s.nearby_window, t.distance, t.nearby);
        if (s.set_count) share_among_sets(f.S, s.key_sets + b * s.key_sets_stride + keys.begin, n, w, t.shares);
        if (s.map_block) {
            const int64_t cells = ceil_div(p.Nq, s.map_block) * ceil_div(p.Nk, s.map_block);
            add_to_map(s, f.S, keys, rows, w, t.mass, static_cast<A*>(s.map) + head * cells);
        }
    });

    const double unit = score_unit(p);
    for (int64_t r = 0; r < count; ++r) {
        const double total = static_cast<double>(f.total[r]), log_total = total == 0 ? 0 : __builtin_log(total);
        rows_of<A>(p.lse, first)[r] =
            total == 0 ? -kInfinity<A> : static_cast<A>(static_cast<double>(f.top[r]) * unit + log_total);
        rows_of<A>(s.entropy, first)[r] = static_cast<A>(log_total - static_cast<double>(t.entropy[r]) * unit);
        if (s.distance) rows_of<A>(s.distance, first)[r] = t.distance[r];
        if (s.distance) rows_of<A>(s.nearby, first)[r] = t.nearby[r];
        for (int64_t set = 0; set < s.set_count; ++set)
            rows_of<A>(s.shares, (first + r) * s.set_count)[set] = t.shares[set * w + r];
        const bool broken = total != total;  // a NaN score: no weight of the row is known
        for (int64_t k = 0; k < s.top; ++k) {
            const A score = t.largest[k * w + r];
            const double weight =
                score == -kInfinity<A> ? 0 : __builtin_exp(static_cast<double>(score - f.top[r]) * unit) / total;
            rows_of<A>(s.top_weights, (first + r) * s.top)[k] = static_cast<A>(broken ? total : weight);
            rows_of<int32_t>(s.top_keys, (first + r) * s.top)[k] =
                broken ? -1 : static_cast<int32_t>(t.largest_key[k * w + r]);
        }
    }
}

template <class T, class A>
inline void statistics_task(const StatisticsParams& s, int64_t task, char* memory) {
    const AttentionParams& p = s.attention;
    const int64_t chunks = statistics_chunks(s), h = task / chunks % p.Hq, b = task / chunks / p.Hq;
    const int64_t chunk = chunks - 1 - task % chunks;  // under a causal mask the last rows are the longest
    const TileRegisters tiles(kPairProducts<T>);
    const StatisticsTile<A> t(s, memory);
    const int64_t last = min_of((chunk + 1) * s.chunk_rows, p.Nq);
    for (int64_t row = chunk * s.chunk_rows, end; row < last; row = end) {
        end = min_of(row + kQueries, last);
        if (p.mask.indptr) end = min_of(end, (row / p.mask.block_q + 1) * p.mask.block_q);
        tile_statistics<T>(s, b, h, chunk, {row, end}, t);
    }
}

}  // namespace
}  // namespace efficient_attn
