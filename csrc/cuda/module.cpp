// The Python module efficient_attn._cuda: pointers, strides as packed words, a device and a stream. No PyTorch, and of
// Python only the stable ABI: one build serves every CPython from 3.11 on.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

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

// flags: flag_count of them, or null; counters: counter_count zeros, or null; order: the list's blocks with the longest
// first, or null.
void attention_forward(const std::string& words, uintptr_t seed, uintptr_t flags, uintptr_t counters, uintptr_t order,
                       int device, uintptr_t stream) {
    KernelParams k = params(words, false, seed, flags);
    k.counters = reinterpret_cast<int32_t*>(counters);
    k.query_order = reinterpret_cast<const int32_t*>(order);
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

// query_sums: query_sum_count zeros, or null; turns: turn_count zeros, or null. bias_sums: the gradient of the bias is
// written in float32.
void attention_backward(const std::string& words, uintptr_t seed, uintptr_t flags, uintptr_t delta, bool bias_sums,
                        uintptr_t query_sums, uintptr_t turns, uintptr_t counters, uintptr_t query_order,
                        uintptr_t key_order, int device, uintptr_t stream) {
    KernelParams k = params(words, true, seed, flags);
    if (bias_sums) k.call.dbias.dtype = kFloat32;
    k.delta = reinterpret_cast<float*>(delta);
    k.query_sums = reinterpret_cast<float*>(query_sums);
    k.turns = reinterpret_cast<int32_t*>(turns);
    k.counters = reinterpret_cast<int32_t*>(counters);
    k.query_order = reinterpret_cast<const int32_t*>(query_order);
    k.key_order = reinterpret_cast<const int32_t*>(key_order);
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

int64_t turns_of(const std::string& words, int device) {
    return turn_count(read_params(words, true), Launch(device, 0).capability());
}

int64_t counters_of(const std::string& words, bool backward, int device) {
    const Launch launch(device, 0);
    return counter_count(read_params(words, backward), backward, launch.capability(), launch.multiprocessors());
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

struct Wrong {};  // a Python exception is set

// An argument as a call takes it. Other Python threads run while the call does, but not while arguments are read.
template <class X>
X from_python(PyObject* object) {
    if constexpr (std::is_same_v<X, std::string>) {
        char* bytes = nullptr;
        Py_ssize_t size = 0;
        if (PyBytes_AsStringAndSize(object, &bytes, &size) < 0) throw Wrong();
        return std::string(bytes, static_cast<size_t>(size));
    } else if constexpr (std::is_same_v<X, bool>) {
        const int truth = PyObject_IsTrue(object);
        if (truth < 0) throw Wrong();
        return truth != 0;
    } else if constexpr (std::is_unsigned_v<X>) {
        const unsigned long long value = PyLong_AsUnsignedLongLong(object);
        if (value == static_cast<unsigned long long>(-1) && PyErr_Occurred()) throw Wrong();
        return static_cast<X>(value);
    } else {
        const long long value = PyLong_AsLongLong(object);
        if (value == -1 && PyErr_Occurred()) throw Wrong();
        if (static_cast<long long>(static_cast<X>(value)) != value) {
            PyErr_SetString(PyExc_OverflowError, "efficient_attn: a number that does not fit");
            throw Wrong();
        }
        return static_cast<X>(value);
    }
}

struct WithoutPython {
    WithoutPython() : state(PyEval_SaveThread()) {}
    ~WithoutPython() { PyEval_RestoreThread(state); }
    PyThreadState* state;
};

template <auto kFunction>
struct Wrapped;

// A call as Python makes it: positional arguments alone.
template <class R, class... A, R (*kFunction)(A...)>
struct Wrapped<kFunction> {
    static PyObject* call(PyObject*, PyObject* arguments) {
        if (PyTuple_Size(arguments) != static_cast<Py_ssize_t>(sizeof...(A)))
            return PyErr_Format(PyExc_TypeError, "efficient_attn: takes %zu arguments, got %zd", sizeof...(A),
                                PyTuple_Size(arguments));
        try {
            return apply(arguments, std::index_sequence_for<A...>());
        } catch (const Wrong&) {
        } catch (const CudaError& error) {
            PyErr_SetString(cuda_error, error.what());
        } catch (const std::invalid_argument& error) {
            PyErr_SetString(PyExc_ValueError, error.what());
        } catch (const std::exception& error) {
            PyErr_SetString(PyExc_RuntimeError, error.what());
        }
        return nullptr;
    }

    template <size_t... I>
    static PyObject* apply(PyObject* arguments, std::index_sequence<I...>) {
        // Braces: read from the first to the last.
        const std::tuple<std::decay_t<A>...> given{from_python<std::decay_t<A>>(PyTuple_GetItem(arguments, I))...};
        if constexpr (std::is_void_v<R>) {
            run(given);
            Py_INCREF(Py_None);
            return Py_None;
        } else {
            return PyLong_FromLongLong(static_cast<long long>(run(given)));
        }
    }

    static R run(const std::tuple<std::decay_t<A>...>& given) {
        const WithoutPython unlocked;
        return std::apply(kFunction, given);
    }
};

template <auto kFunction>
constexpr PyMethodDef method(const char* name) {
    return {name, &Wrapped<kFunction>::call, METH_VARARGS, nullptr};
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
    method<&turns_of>("turn_count"),
    method<&flags_of>("flag_count"),
    method<&counters_of>("counter_count"),
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
