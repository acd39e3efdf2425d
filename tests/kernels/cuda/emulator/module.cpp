// The Python module _cuda_emulator: the interface of efficient_attn._cuda, served by the emulator on CPU tensors.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "common/words.h"
#include "cuda/attention_backward.h"
#include "cuda/attention_decode.h"
#include "cuda/attention_forward.h"
#include "cuda/linear_attention_backward.h"
#include "cuda/linear_attention_forward.h"

namespace py = pybind11;

namespace efficient_attn {
namespace {

int from_environment(const char* name, int otherwise) {
    const char* text = std::getenv(name);
    return text ? std::atoi(text) : otherwise;
}

uint64_t schedule = static_cast<uint64_t>(from_environment("EFFICIENT_ATTN_CUDA_EMULATOR_SCHEDULE", 0));
int emulated_capability = from_environment("EFFICIENT_ATTN_CUDA_EMULATOR_CAPABILITY", 80);
int emulated_multiprocessors = 3;
// Of the blocks of a launch that wait for one another: how many run at once, and which one goes on.
int blocks_together = 3;
emulator::Policy policy = emulator::kAny;

#ifdef EFFICIENT_ATTN_EMULATOR_SMALL
constexpr int kWidest = 64;
#else
constexpr int kWidest = kWidestLinear;
#endif

// Whether a kernel with this argument has tiles that wait for others.
template <class X>
bool waits(const X& argument) {
    if constexpr (std::is_same_v<X, sm90::BackwardInputs>) {
        return argument.work.given == 0;
    } else {
        return false;
    }
}

struct EmulatorLaunch {
    int capability() const { return emulated_capability; }
    int multiprocessors() const { return emulated_multiprocessors; }

    TensorMap tensor_map(const TensorView& view, int64_t B, int64_t H, int64_t N, int64_t D, int rows) const {
        const auto bytes = [](int64_t size, int64_t stride) { return size == 1 ? 16 : stride * 2; };
        const emulator::TensorMapFields fields{
            static_cast<const uint8_t*>(view.data),
            {D, N, H, B},
            {bytes(N, view.row_stride), bytes(H, view.head_stride), bytes(B, view.batch_stride)},
            {64, rows, 1, 1}};
        emulator::check_tensor_map(fields);
        TensorMap map{};
        std::memcpy(&map, &fields, sizeof fields);
        return map;
    }

    template <class... Parameters>
    void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, uint32_t shared_bytes,
                    const std::common_type_t<Parameters>&... arguments) {
        const int together = (... || waits(arguments)) ? blocks_together : 0;
        emulator::launch([&] { kernel(arguments...); }, blocks, threads, shared_bytes, schedule, together, policy);
    }
};

void allow(const TensorView& view, int64_t B, int64_t H, int64_t N, int64_t D, bool written) {
    const int64_t sizes[] = {B, H, N, D}, strides[] = {view.batch_stride, view.head_stride, view.row_stride, 1};
    emulator::allow(view.data, sizes, strides, 4, 2, written);
}

int bytes_of(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

void allow_inputs(const AttentionParams& p) {
    allow(p.query, p.B, p.Hq, p.Nq, p.D, false);
    allow(p.key, p.B, p.Hkv, p.Nk, p.D, false);
    allow(p.value, p.B, p.Hkv, p.Nk, p.Dv, false);
    const MaskView& m = p.mask;
    if (m.indptr) {
        const int64_t lines = m.batch * m.heads;
        emulator::allow(m.indptr, (lines * ((p.Nq + m.block_q - 1) / m.block_q) + 1) * 8, false);
        emulator::allow(m.indices, m.entries * 4, false);
        emulator::allow(m.tile_ids, m.entries * 4, false);
        emulator::allow(m.tiles, m.tile_count * m.block_q * m.block_k / 8, false);
        emulator::allow(m.t_indptr, (lines * ((p.Nk + m.block_k - 1) / m.block_k) + 1) * 8, false);
        emulator::allow(m.t_indices, m.entries * 4, false);
        emulator::allow(m.t_tile_ids, m.entries * 4, false);
    }
    emulator::allow(m.kv_lengths, p.B * 4, false);
    const int64_t pairs[] = {p.B, p.Hq, p.Nq, p.Nk};
    if (p.bias.data) emulator::allow(p.bias.data, pairs, p.bias.stride, 4, bytes_of(p.bias.dtype), false);
}

struct Allowed {
    ~Allowed() { emulator::forget(); }
};

// f(dtype, head, extras) as choose_instance, of which a small build has only some.
template <class Function>
void choose(const AttentionParams& p, Function f) {
#ifdef EFFICIENT_ATTN_EMULATOR_SMALL
    const std::integral_constant<int, kBFloat16> dtype;
    const std::integral_constant<int, EFFICIENT_ATTN_EMULATOR_SMALL> head;
    has_extras(p) ? f(dtype, head, std::true_type{}) : f(dtype, head, std::false_type{});
#else
    choose_instance(p, f);
#endif
}

KernelParams params(const AttentionParams& p, uintptr_t seed, uintptr_t flags) {
    KernelParams k = kernel_params(p, reinterpret_cast<const int64_t*>(seed));
    k.flags = reinterpret_cast<int32_t*>(flags);
    return k;
}

// The counters and orders of a call, and that kernels may read them.
void schedule_with(KernelParams& k, bool backward, uintptr_t counters, uintptr_t query_order, uintptr_t key_order) {
    const AttentionParams& p = k.call;
    const MaskView& m = p.mask;
    k.counters = reinterpret_cast<int32_t*>(counters);
    const int64_t count = counter_count(p, backward, emulated_capability, EmulatorLaunch().multiprocessors());
    if (counters) emulator::allow_counters(k.counters, count);
    k.query_order = reinterpret_cast<const int32_t*>(query_order);
    k.key_order = reinterpret_cast<const int32_t*>(key_order);
    const auto allow_order = [&](const int32_t* order, int64_t heads, int64_t count, int64_t block) {
        const int64_t lists = m.batch * (m.heads == 1 ? 1 : heads);
        if (order) emulator::allow(order, lists * ((count + block - 1) / block) * 4, false);
    };
    allow_order(k.query_order, p.Hq, p.Nq, m.block_q);
    allow_order(k.key_order, p.Hkv, p.Nk, m.block_k);
}

// The tiles of Hopper's kernels in the order of their tickets: of the forward (as of dQ), or of dK and dV.
py::list tiles_in_order(const std::string& words, bool keys, int rows, uintptr_t order) {
    KernelParams k = params(read_params(words, false), 0, 0);
    Allowed allowed;
    schedule_with(k, false, 0, keys ? 0 : order, keys ? order : 0);
    const sm90::Work work = keys ? key_work(k, rows) : query_work(k, rows, k.group);
    py::list found;
    emulator::launch(
        [&] {
            if (emulator::thread_index() != 0) return;
            for (int ticket = 0; ticket < work.tiles; ++ticket) found.append(sm90::tile_of(work, ticket));
        },
        1, 32, 0, 0);
    return found;
}

// The last arguments are the number of the GPU and its stream, of which there are none here.
void attention_forward(const std::string& words, uintptr_t seed, uintptr_t flags, uintptr_t counters, uintptr_t order,
                       int, uintptr_t) {
    const AttentionParams p = read_params(words, false);
    Allowed allowed;
    allow_inputs(p);
    emulator::allow(reinterpret_cast<void*>(seed), 8, false);
    allow(p.out, p.B, p.Hq, p.Nq, p.Dv, true);
    emulator::allow(p.lse, p.B * p.Hq * p.Nq * 4, true);
    if (flags) emulator::allow_workspace(reinterpret_cast<void*>(flags), flag_count(p, false) * 4);
    KernelParams k = params(p, seed, flags);
    EmulatorLaunch launch;
    schedule_with(k, false, counters, order, 0);
    choose(p, [&](auto dtype, auto head, auto extras) {
        launch_attention_forward<Element<dtype>, head, extras>(k, launch);
    });
    emulator::check_all_written();
}

// part_out, part_lse: workspace for `splits` parts, or null if there is one only.
void attention_decode(const std::string& words, uintptr_t part_out, uintptr_t part_lse, int64_t splits, int,
                      uintptr_t) {
    const AttentionParams p = read_params(words, false);
    Allowed allowed;
    allow_inputs(p);
    allow(p.out, p.B, p.Hq, p.Nq, p.Dv, true);
    const int64_t rows = p.B * p.Hq * p.Nq;
    emulator::allow(p.lse, rows * 4, true);
    emulator::allow(reinterpret_cast<void*>(part_out), splits * rows * p.Dv * 4, true);
    emulator::allow(reinterpret_cast<void*>(part_lse), splits * rows * 4, true);
    const DecodeParams d =
        decode_params(params(p, 0, 0), reinterpret_cast<float*>(part_out), reinterpret_cast<float*>(part_lse), splits);
    EmulatorLaunch launch;
#ifdef EFFICIENT_ATTN_EMULATOR_SMALL
    launch_decode_head<BFloat16, EFFICIENT_ATTN_EMULATOR_SMALL>(d, launch);
#else
    p.dtype == kBFloat16 ? launch_attention_decode<BFloat16>(d, launch) : launch_attention_decode<Float16>(d, launch);
#endif
    emulator::check_all_written();
}

void attention_backward(const std::string& words, uintptr_t seed, uintptr_t flags, uintptr_t delta, bool bias_sums,
                        uintptr_t query_sums, uintptr_t turns, uintptr_t counters, uintptr_t query_order,
                        uintptr_t key_order, int, uintptr_t) {
    AttentionParams p = read_params(words, true);
    if (bias_sums) p.dbias.dtype = kFloat32;
    KernelParams k = params(p, seed, flags);
    k.delta = reinterpret_cast<float*>(delta);
    k.query_sums = reinterpret_cast<float*>(query_sums);
    k.turns = reinterpret_cast<int32_t*>(turns);
    Allowed allowed;
    allow_inputs(p);
    emulator::allow(reinterpret_cast<void*>(seed), 8, false);
    allow(p.out, p.B, p.Hq, p.Nq, p.Dv, false);
    allow(p.grad_out, p.B, p.Hq, p.Nq, p.Dv, false);
    const int64_t rows = p.B * p.Hq * p.Nq;
    emulator::allow(p.lse, rows * 4, false);
    emulator::allow(p.grad_lse, rows * 4, false);
    emulator::allow(k.delta, rows * 4, true);
    if (k.query_sums) emulator::allow_sums(k.query_sums, query_sum_count(p, emulated_capability) * 4);
    if (k.turns) emulator::allow_turns(k.turns, turn_count(p, emulated_capability));
    allow(p.dq, p.B, p.Hq, p.Nq, p.D, true);
    allow(p.dk, p.B, p.Hkv, p.Nk, p.D, true);
    allow(p.dv, p.B, p.Hkv, p.Nk, p.Dv, true);
    const int64_t* size = p.dbias.size;
    emulator::allow(p.dbias.data, size[0] * size[1] * size[2] * size[3] * bytes_of(p.dbias.dtype), true);
    if (flags) emulator::allow_workspace(reinterpret_cast<void*>(flags), flag_count(p, true) * 4);
    schedule_with(k, true, counters, query_order, key_order);
    EmulatorLaunch launch;
    choose(p, [&](auto dtype, auto head, auto extras) {
        launch_attention_backward<Element<dtype>, head, extras>(k, launch);
    });
    emulator::check_all_written();
}

void allow(const TensorView& view, int dtype, int64_t B, int64_t H, int64_t N, int64_t D, bool written) {
    const int64_t sizes[] = {B, H, N, D}, strides[] = {view.batch_stride, view.head_stride, view.row_stride, 1};
    emulator::allow(view.data, sizes, strides, 4, bytes_of(dtype), written);
}

void allow_linear_inputs(const LinearAttentionParams& p) {
    allow(p.query, p.feature_dtype, p.B, p.Hq, p.Nq, p.F, false);
    allow(p.key, p.feature_dtype, p.B, p.Hkv, p.Nk, p.F, false);
    allow(p.value, p.value_dtype, p.B, p.Hkv, p.Nk, p.Dv, false);
    emulator::allow(p.key_mask, p.B * p.Nk, false);
}

int64_t linear_attention_workspace(const std::string& words, bool backward, int64_t processors) {
    const LinearAttentionParams p = read_linear_params(words, backward);
    return backward ? linear_attention_backward_workspace(p, processors)
                    : linear_attention_forward_workspace(p, processors);
}

// Features are given: query and key hold them, whatever the feature map of the words.
void linear_attention_forward(const std::string& words, int64_t processors, uintptr_t workspace, int, uintptr_t) {
    const LinearAttentionParams p = read_linear_params(words, false);
    Allowed allowed;
    allow_linear_inputs(p);
    allow(p.out, p.value_dtype, p.B, p.Hq, p.Nq, p.Dv, true);
    emulator::allow(p.normaliser, p.B * p.Hq * p.Nq * 4, true);
    emulator::allow_workspace(reinterpret_cast<void*>(workspace),
                              linear_attention_forward_workspace(p, processors) * 4);
    EmulatorLaunch launch;
    launch_linear_attention_forward<kWidest>(p, processors, reinterpret_cast<float*>(workspace), launch);
    emulator::check_all_written();
}

void linear_attention_backward(const std::string& words, int64_t processors, uintptr_t workspace, int, uintptr_t) {
    const LinearAttentionParams p = read_linear_params(words, true);
    Allowed allowed;
    allow_linear_inputs(p);
    allow(p.out, p.value_dtype, p.B, p.Hq, p.Nq, p.Dv, false);
    allow(p.grad_out, p.value_dtype, p.B, p.Hq, p.Nq, p.Dv, false);
    emulator::allow(p.normaliser, p.B * p.Hq * p.Nq * 4, false);
    emulator::allow(p.grad_normaliser, p.B * p.Hq * p.Nq * 4, false);
    allow(p.dq, p.feature_dtype, p.B, p.Hq, p.Nq, p.F, true);
    allow(p.dk, p.feature_dtype, p.B, p.Hkv, p.Nk, p.F, true);
    allow(p.dv, p.value_dtype, p.B, p.Hkv, p.Nk, p.Dv, true);
    emulator::allow_workspace(reinterpret_cast<void*>(workspace),
                              linear_attention_backward_workspace(p, processors) * 4);
    EmulatorLaunch launch;
    launch_linear_attention_backward<kWidest>(p, processors, reinterpret_cast<float*>(workspace), launch);
    emulator::check_all_written();
}

py::dict counted() {
    const emulator::Counters& c = emulator::counters();
    py::dict result;
    for (int operation = 1; operation < emulator::kOperations; ++operation) {
        py::dict entry;
        entry["calls"] = c.calls[operation];
        entry["conflicts"] = c.conflicts[operation];
        result[emulator::operation_name(operation)] = entry;
    }
    result["barriers"] = c.barriers;
    result["blocks"] = c.blocks;
    result["launches"] = c.launches;
    return result;
}

}  // namespace
}  // namespace efficient_attn

PYBIND11_MODULE(_cuda_emulator, module) {
    using namespace efficient_attn;
    module.attr("__doc__") = "The CUDA kernels on a CPU, one fiber a thread: a test instrument.";
    module.def("attention_forward", &attention_forward);
    module.def("attention_decode", &attention_decode);
    module.def("attention_backward", &attention_backward);
    module.def("decode_splits", [](const std::string& words, int64_t processors) {
        return decode_splits(read_params(words, false), processors);
    });
    module.def("linear_attention_forward", &linear_attention_forward);
    module.def("linear_attention_backward", &linear_attention_backward);
    module.def("linear_attention_workspace", &linear_attention_workspace);
    module.def("query_sum_count", [](const std::string& words, int) {
        return query_sum_count(read_params(words, true), emulated_capability);
    });
    module.def("turn_count",
               [](const std::string& words, int) { return turn_count(read_params(words, true), emulated_capability); });
    module.def("tiles_in_order", &tiles_in_order);
    module.def("counter_count", [](const std::string& words, bool backward, int) {
        const AttentionParams p = read_params(words, backward);
        return counter_count(p, backward, emulated_capability, EmulatorLaunch().multiprocessors());
    });
    module.def("flag_count", [](const std::string& words, bool backward) {
        return flag_count(read_params(words, backward), backward);
    });
    module.def("set_schedule", [](uint64_t seed) { schedule = seed; }, "The seed of the order in which threads run.");
    module.def(
        "set_capability", [](int capability) { emulated_capability = capability; }, "80 or 90: which kernels run.");
    module.def(
        "set_multiprocessors", [](int count) { emulated_multiprocessors = count; },
        "How many blocks of threads share Hopper's work; 3.");
    module.def(
        "set_together",
        [](int count, int chosen) { blocks_together = count, policy = static_cast<emulator::Policy>(chosen); },
        "Of the blocks that wait for one another: how many run at once (3), and which goes on, see emulator.h (0).");
    module.def("counters", &counted);
    module.def("reset_counters", [] { emulator::counters() = {}; });
}
