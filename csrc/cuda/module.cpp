// The Python module efficient_attn._cuda: pointers, strides as packed words, a device and a stream. No PyTorch.
#include <pybind11/pybind11.h>

#include "common/words.h"
#include "cuda/launch.h"
#include "cuda/units.h"

namespace py = pybind11;

namespace efficient_attn {
namespace {

Request request(const std::string& words, bool backward, uintptr_t seed, uintptr_t flags, int device,
                uintptr_t stream) {
    Request r{};
    r.call = read_params(words, backward);
    if (r.call.dtype != kBFloat16 && r.call.dtype != kFloat16)
        throw std::invalid_argument("efficient_attn: the CUDA kernels multiply bfloat16 and float16");
    r.seed = reinterpret_cast<const int64_t*>(seed);
    r.flags = reinterpret_cast<int32_t*>(flags);
    r.device = device;
    r.stream = stream;
    return r;
}

void forward(const std::string& words, uintptr_t seed, uintptr_t flags, int device, uintptr_t stream) {
    const Request r = request(words, false, seed, flags, device, stream);
    const py::gil_scoped_release no_python;
    serve_call(kForward, r);
}

// part_out, part_lse: workspace for `splits` parts, or null if there is one only.
void decode(const std::string& words, uintptr_t part_out, uintptr_t part_lse, int64_t splits, int device,
            uintptr_t stream) {
    Request r = request(words, false, 0, 0, device, stream);
    r.part_out = reinterpret_cast<float*>(part_out);
    r.part_lse = reinterpret_cast<float*>(part_lse);
    r.splits = splits;
    const py::gil_scoped_release no_python;
    serve_call(kDecode, r);
}

void backward(const std::string& words, uintptr_t seed, uintptr_t flags, uintptr_t delta, bool bias_sums,
              uintptr_t query_sums, int device, uintptr_t stream) {
    Request r = request(words, true, seed, flags, device, stream);
    if (bias_sums) r.call.dbias.dtype = kFloat32;
    r.delta = reinterpret_cast<float*>(delta);
    r.query_sums = reinterpret_cast<float*>(query_sums);
    const py::gil_scoped_release no_python;
    serve_call(kBackward, r);
}

void linear(Part part, const std::string& words, int64_t processors, uintptr_t workspace, int device,
            uintptr_t stream) {
    const LinearRequest r{read_linear_params(words, part == kBackward), processors, reinterpret_cast<float*>(workspace),
                          device, stream};
    const py::gil_scoped_release no_python;
    serve_linear_call(part, r);
}

void linear_forward(const std::string& words, int64_t processors, uintptr_t workspace, int device, uintptr_t stream) {
    linear(kForward, words, processors, workspace, device, stream);
}

void linear_backward(const std::string& words, int64_t processors, uintptr_t workspace, int device, uintptr_t stream) {
    linear(kBackward, words, processors, workspace, device, stream);
}

}  // namespace
}  // namespace efficient_attn

PYBIND11_MODULE(_cuda, module) {
    using namespace efficient_attn;
    module.attr("__doc__") = "The CUDA kernels of efficient-attn; backends/cuda.py calls them.";
    module.attr("architectures") = EFFICIENT_ATTN_CUDA_ARCHS;
    py::register_exception<CudaError>(module, "CudaError",
                                      py::module_::import("efficient_attn.errors").attr("CudaError"));
    module.def("attention_forward", &forward);
    module.def("attention_decode", &decode);
    module.def("attention_backward", &backward);
    module.def("linear_attention_forward", &linear_forward);
    module.def("linear_attention_backward", &linear_backward);
    module.def("linear_workspace", [](const std::string& words, bool backward, int64_t processors) {
        return linear_workspace_wanted(read_linear_params(words, backward), backward, processors);
    });
    module.def("decode_splits", [](const std::string& words, int64_t processors) {
        return decode_splits_wanted(read_params(words, false), processors);
    });
    module.def("shared_bytes", &shared_bytes_wanted);
    module.def("most_shared_bytes", [](int device) { return Launch(device, 0).most_shared_bytes(); });
    module.def("query_sum_count", [](const std::string& words, int device) {
        return query_sums_wanted(read_params(words, true), Launch(device, 0).capability());
    });
    module.def("flag_count", [](const std::string& words, bool backward) {
        return flags_wanted(read_params(words, backward), backward);
    });
}
