// The Python module efficient_attn._cuda: pointers, strides as packed words, a device and a stream. No PyTorch, and of
// Python only the stable ABI: one build serves every CPython from 3.11 on.
#define Py_LIMITED_API 0x030B0000
#include <algorithm>
#include <string>

#include "common/python.h"
#include "common/words.h"
#include "cuda/launch.h"
#include "cuda/plan.h"
#include "cuda/units.h"

namespace efficient_attn {
namespace {

// --- the calls ---

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
    Launch launch(device, stream);
    choose_instance(
        k.call, [&](auto dtype, auto head, auto extras) { attention_forward_unit<dtype, head, extras>(k, launch); });
}

// part_out, part_lse: workspace for `splits` parts, or null if there is one only.
void attention_decode(const std::string& words, uintptr_t part_out, uintptr_t part_lse, int64_t splits, int device,
                      uintptr_t stream) {
    const DecodeParams d = decode_params(params(words, false), reinterpret_cast<float*>(part_out),
                                         reinterpret_cast<float*>(part_lse), splits);
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
    Launch launch(device, stream);
    choose_instance(
        k.call, [&](auto dtype, auto head, auto extras) { attention_backward_unit<dtype, head, extras>(k, launch); });
}

template <bool kBackward>
void linear_attention(const std::string& words, int64_t processors, uintptr_t workspace, int device, uintptr_t stream) {
    const LinearAttentionParams p = read_linear_params(words, kBackward);
    Launch launch(device, stream);
    (kBackward ? linear_attention_backward : linear_attention_forward)(p, processors,
                                                                       reinterpret_cast<float*>(workspace), launch);
}

int64_t workspace_of_linear(const std::string& words, bool backward, int64_t processors) {
    return linear_attention_workspace(read_linear_params(words, backward), backward, processors);
}

int64_t splits_of(const std::string& words, int64_t processors) {
    return decode_splits(read_params(words, false), processors);
}

int64_t query_sums_of(const std::string& words, int device) {
    return query_sum_count(read_params(words, true), Launch(device, 0).capability());
}

int64_t flags_of(const std::string& words, bool backward) { return flag_count(read_params(words, backward), backward); }

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

int64_t most_shared_bytes(int device) { return Launch(device, 0).most_shared_bytes(); }

// --- Python ---

PyObject* cuda_error = nullptr;  // efficient_attn.errors.CudaError

PyObject* own_exception(const std::exception& error) {
    return dynamic_cast<const CudaError*>(&error) ? cuda_error : nullptr;
}

PyMethodDef methods[] = {
    method<&attention_forward>("attention_forward"),
    method<&attention_decode>("attention_decode"),
    method<&attention_backward>("attention_backward"),
    method<&linear_attention<false>>("linear_attention_forward"),
    method<&linear_attention<true>>("linear_attention_backward"),
    method<&workspace_of_linear>("linear_attention_workspace"),
    method<&splits_of>("decode_splits"),
    method<&shared_bytes>("shared_bytes"),
    method<&most_shared_bytes>("most_shared_bytes"),
    method<&query_sums_of>("query_sum_count"),
    method<&flags_of>("flag_count"),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "_cuda",
    "The CUDA kernels of efficient-attn; backends/cuda calls them.",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace
}  // namespace efficient_attn

PyMODINIT_FUNC PyInit__cuda() {
    using namespace efficient_attn;
    PyObject* errors = PyImport_ImportModule("efficient_attn.errors");
    if (!errors) return nullptr;
    cuda_error = PyObject_GetAttrString(errors, "CudaError");
    Py_DECREF(errors);
    if (!cuda_error) return nullptr;
    PyObject* module = PyModule_Create(&definition);
    if (module && PyModule_AddStringConstant(module, "architectures", EFFICIENT_ATTN_CUDA_ARCHS) < 0) {
        Py_DECREF(module);
        return nullptr;
    }
    return module;
}
