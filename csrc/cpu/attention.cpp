// The operators of attention, compiled once for each instruction set (operators.h).
#include "attention_backward_bands.h"
#include "attention_decode.h"
#include "attention_statistics.h"
#include "attention_weights.h"
#include "operators.h"
#include "peak.h"

namespace efficient_attn {
namespace {

template <class T, class A>
struct Types {
    using Storage = T;
    using Accumulator = A;
};

#if defined(__AVX512BF16__)
template <class F>
inline auto with_types(const AttentionParams&, F f) {
    return f(Types<BFloat16, float>{});
}

template <class F>
inline int64_t with_accumulator(const AttentionParams&, F f) {
    return f(float{});
}
#else
template <class F>
inline auto with_types(const AttentionParams& p, F f) {
    switch (p.dtype) {
        case kFloat64:
            return f(Types<double, double>{});
        case kBFloat16:
            return f(Types<BFloat16, float>{});
        case kFloat16:
            return f(Types<Float16, float>{});
        default:
            return f(Types<float, float>{});
    }
}

// What a type needs, by the accumulation type of the call.
template <class F>
inline int64_t with_accumulator(const AttentionParams& p, F f) {
    return p.dtype == kFloat64 ? f(double{}) : f(float{});
}
#endif

// In which phase the forward works on its tiles.
int tiles_phase(const AttentionParams& p) { return shares_values(p) ? 1 : 0; }

int64_t forward_shared(const AttentionParams& p) {
    if (!is_decode(p)) return shares_values(p) ? shared_values_bytes(p) : 0;
    return with_accumulator(p, [&](auto a) {
        const DecodeCut cut(p);
        return decode_merges(p) * cut.spans * DecodePartial<decltype(a)>::elements(p, cut) *
               static_cast<int64_t>(sizeof(a));
    });
}
int64_t forward_bytes(const AttentionParams& p) {
    return with_accumulator(p, [&](auto a) {
        using A = decltype(a);
        if (p.weights.data) return WeightsTile<A>::bytes(p);
        return is_decode(p) ? DecodeTile<A>::bytes(p) : forward_tile_bytes<A>(p);
    });
}
int64_t forward_tasks(const AttentionParams& p, int phase) {
    if (is_decode(p)) {
        const int64_t spans = DecodeCut(p).spans;
        return decode_merges(p) * (phase == 0 ? spans : spans > 1);
    }
    if (phase != tiles_phase(p)) return phase == 0 ? value_pieces(p) : 0;
    if (!p.weights.data) return forward_task_count(p);
    return with_accumulator(p, [&](auto a) { return weights_task_count<decltype(a)>(p); });
}
double forward_cost(const AttentionParams& p, int phase, int64_t task) {
    const bool differ = p.mask.indptr && !is_decode(p) && !p.weights.data && !p.copies_keys && phase == tiles_phase(p);
    return differ ? query_tile_cost(p, task) : -1;
}
bool forward_is_short(const AttentionParams& p, int phase) { return phase == 1 && is_decode(p) && merges_quickly(p); }
void forward_run(const AttentionParams& p, int phase, int64_t task, char* memory, char* shared) {
    with_types(p, [&](auto types) {
        using T = typename decltype(types)::Storage;
        using A = typename decltype(types)::Accumulator;
        if (!is_decode(p)) {
            const int last = tiles_phase(p);
            if (phase < last) return pack_values_task<T>(p, task, shared);
            const TileRegisters tiles(kPairProducts<T>);
            char* values = last > 0 ? shared : nullptr;
            if (p.copies_keys) return forward_run_task<T, A>(p, task, memory);
            return p.weights.data ? weights_task<T, A>(p, task, memory, values)
                                  : forward_task<T, A>(p, task, memory, values);
        }
        A* partials = reinterpret_cast<A*>(shared);
        phase == 0 ? decode_span<T, A>(p, task, memory, partials) : decode_merge<T, A>(p, task, memory, partials);
    });
}

void forward_prepare(AttentionParams& p) {
    join_rows(p);
    if (is_decode(p) || p.weights.data) return;
    with_types(p, [&](auto types) {
        using Of = decltype(types);
        measure_copies<typename Of::Storage, typename Of::Accumulator>(p);
    });
}
void backward_prepare(AttentionParams& p) {
    join_rows(p);
    with_types(p, [&](auto types) {
        using T = typename decltype(types)::Storage;
        using A = typename decltype(types)::Accumulator;
        measure_bands<A>(p);
        measure_backward_copies<T, A>(p, key_span<A>(p));
    });
}
int64_t backward_shared(const AttentionParams& p) {
    return with_accumulator(p, [&](auto a) { return BackwardShared<decltype(a)>::bytes(p); });
}
int64_t backward_bytes(const AttentionParams& p) {
    return with_accumulator(p, [&](auto a) {
        using A = decltype(a);
        return max_of(BackwardTile<A>::bytes(p), ForwardTile<A>::bytes(p));
    });
}
int64_t backward_tasks(const AttentionParams& p, int phase) {
    if (phase == 0) return p.B * p.Hq * row_tiles(p);
    if (phase == 2) return p.dbias.data && !bias_is_full(p) ? bias_tiling(p).count : 0;
    return with_accumulator(p, [&](auto a) {
        const Pipeline line = Pipeline::of<decltype(a)>(p);
        return line.heads * (has_bands(p) ? band_runs(p) : line.spans);
    });
}
void backward_run(const AttentionParams& p, int phase, int64_t task, char* memory, char* shared_memory) {
    with_types(p, [&](auto types) {
        using T = typename decltype(types)::Storage;
        using A = typename decltype(types)::Accumulator;
        const BackwardShared<A> shared(p, shared_memory);
        if (phase == 0) rows_task<T, A>(p, task, memory, shared);
        if (phase == 0 && !p.weights.data) return;
        const TileRegisters tiles(kPairProducts<T>);
        if (phase == 0) return weight_gradients_task<T, A>(p, task, memory, shared);
        if (phase == 1 && has_bands(p)) return run_task<T, A>(p, task, memory, shared);
        if (phase == 1) return span_task<T, A>(p, task, memory, shared);
        bias_task<T, A>(p, task, memory, shared);
    });
}

int64_t no_shared_bytes(const StatisticsParams&) { return 0; }
int64_t statistics_bytes(const StatisticsParams& p) {
    return with_accumulator(p.attention, [&](auto a) { return StatisticsTile<decltype(a)>::bytes(p); });
}
int64_t statistics_tasks(const StatisticsParams& p, int) {
    return p.attention.B * p.attention.Hq * statistics_chunks(p);
}
void statistics_run(const StatisticsParams& p, int, int64_t task, char* memory, char*) {
    with_types(p.attention, [&](auto types) {
        statistics_task<typename decltype(types)::Storage, typename decltype(types)::Accumulator>(p, task, memory);
    });
}

}  // namespace

const Operator<AttentionParams> EA_OF_THIS_SET(forward) = {
    2, forward_prepare, forward_shared, forward_bytes, forward_tasks, forward_cost, forward_is_short, forward_run};
const Operator<AttentionParams> EA_OF_THIS_SET(backward) = {
    3, backward_prepare, backward_shared, backward_bytes, backward_tasks, nullptr, nullptr, backward_run};
const Operator<StatisticsParams> EA_OF_THIS_SET(statistics) = {
    1, nullptr, no_shared_bytes, statistics_bytes, statistics_tasks, nullptr, nullptr, statistics_run};

int64_t EA_OF_THIS_SET(fma_loop)(int64_t steps) { return fma_loop(steps); }

}  // namespace efficient_attn
