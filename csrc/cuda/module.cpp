// The Python module efficient_attn._cuda: pointers, strides as packed words, a device and a stream. No PyTorch.
#include <pybind11/pybind11.h>

#include "common/words.h"
#include "cuda/launch.h"
#include "cuda/plan.h"
#include "cuda/units.h"

namespace py = pybind11;

namespace efficient_attn {
namespace {

KernelParams params(const std::string& words, bool backward, uintptr_t seed = 0, uintptr_t flags = 0) {
    const AttentionParams p = read_params(words, backward);
    if (p.dtype != kBFloat16 && p.dtype != kFloat16)
        throw std::invalid_argument("efficient_attn: the CUDA kernels multiply bfloat16 and float16");
    KernelParams k = kernel_params(p, reinterpret_cast<const int64_t*>(seed));
    k.flags = reinterpret_cast<int32_t*>(flags);
    return k;
}

// flags: flag_count of them, or null.
void attention_forward(const std::string& words, uintptr_t seed, uintptr_t flags, int device, uintptr_t stream) {
    const KernelParams k = params(words, false, seed, flags);
    const py::gil_scoped_release no_python;
    Launch launch(device, stream);
    choose_instance(
        k.call, [&](auto dtype, auto head, auto extras) { attention_forward_unit<dtype, head, extras>(k, launch); });
}

// part_out, part_lse: workspace for `splits` parts, or null if there is one only.
void attention_decode(const std::string& words, uintptr_t part_out, uintptr_t part_lse, int64_t splits, int device,
                      uintptr_t stream) {
    const DecodeParams d = decode_params(params(words, false), reinterpret_cast<float*>(part_out),
                                         reinterpret_cast<float*>(part_lse), splits);
    const py::gil_scoped_release no_python;
    Launch launch(device, stream);
    d.base.call.dtype == kBFloat16 ? attention_decode_unit<kBFloat16>(d, launch)
                                   : attention_decode_unit<kFloat16>(d, launch);
}

// query_sums: query_sum_count zeros, or null. bias_sums: the gradient of the bias is written in float32.
void attention_backward(const std::string& words, uintptr_t seed, uintptr_t flags, uintptr_t delta, bool bias_sums,
                        uintptr_t query_sums, int device, uintptr_t stream) {
    KernelParams k = params(words, true, seed, flags);
    if (bias_sums) k.call.dbias.dtype = kFloat32;
    k.delta = reinterpret_cast<float*>(delta);
    k.query_sums = reinterpret_cast<float*>(query_sums);
    const py::gil_scoped_release no_python;
    Launch launch(device, stream);
    choose_instance(
        k.call, [&](auto dtype, auto head, auto extras) { attention_backward_unit<dtype, head, extras>(k, launch); });
}

template <bool kBackward>
void linear_attention(const std::string& words, int64_t processors, uintptr_t workspace, int device, uintptr_t stream) {
    const LinearAttentionParams p = read_linear_params(words, kBackward);
    const py::gil_scoped_release no_python;
    Launch launch(device, stream);
    (kBackward ? linear_attention_backward : linear_attention_forward)(p, processors,
                                                                       reinterpret_cast<float*>(workspace), launch);
}

template <int kHead>
uint32_t shared_bytes_of() {  // the same for both dtypes
    return std::max(
        {attention_forward_bytes<kBFloat16, kHead, false>(), attention_forward_bytes<kBFloat16, kHead, true>(),
         attention_backward_bytes<kBFloat16, kHead, false>(), attention_backward_bytes<kBFloat16, kHead, true>()});
}

// What kernels for heads of up to `widest` ask for, where the GPU is not one of sm90/.
uint32_t shared_bytes(int64_t widest) {
    return widest <= 64 ? shared_bytes_of<64>() : widest <= 128 ? shared_bytes_of<128>() : shared_bytes_of<256>();
}

}  // namespace
}  // namespace efficient_attn

PYBIND11_MODULE(_cuda, module) {
    using namespace efficient_attn;
    module.attr("__doc__") = "The CUDA kernels of efficient-attn; backends/cuda calls them.";
    module.attr("architectures") = EFFICIENT_ATTN_CUDA_ARCHS;
    py::register_exception<CudaError>(module, "CudaError",
                                      py::module_::import("efficient_attn.errors").attr("CudaError"));
    module.def("attention_forward", &attention_forward);
    module.def("attention_decode", &attention_decode);
    module.def("attention_backward", &attention_backward);
    module.def("linear_attention_forward", &linear_attention<false>);
    module.def("linear_attention_backward", &linear_attention<true>);
    module.def("linear_attention_workspace", [](const std::string& words, bool backward, int64_t processors) {
        return linear_attention_workspace(read_linear_params(words, backward), backward, processors);
    });
    module.def("decode_splits", [](const std::string& words, int64_t processors) {
        return decode_splits(read_params(words, false), processors);
    });
    module.def("shared_bytes", &shared_bytes);
    module.def("most_shared_bytes", [](int device) { return Launch(device, 0).most_shared_bytes(); });
    module.def("query_sum_count", [](const std::string& words, int device) {
        return query_sum_count(read_params(words, true), Launch(device, 0).capability());
    });
    module.def("flag_count", [](const std::string& words, bool backward) {
        return flag_count(read_params(words, backward), backward);
    });
}
