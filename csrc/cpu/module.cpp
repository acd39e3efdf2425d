// The Python module efficient_attn._cpu. A call arrives as one bytes object of 8-byte words, in the order in which
// backends/cpu.py packs them and common/words.h takes them off.
#include "common/python.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "common/words.h"
#include "dispatch.h"

namespace efficient_attn {
namespace {

const Kernels& kernels() {
    static const Kernels* chosen = [] {
        const char* name = std::getenv("EFFICIENT_ATTN_ISA");
        if (name && !*name) name = nullptr;
        const Kernels* found = find_kernels(name);
        if (!found) {
            throw std::runtime_error(std::string("EFFICIENT_ATTN_ISA=") + name +
                                     " is not an instruction set that this build has and this processor runs; "
                                     "use one of baseline, avx2, avx512, avx512_bf16, amx_bf16, or unset it");
        }
        return found;
    }();
    return *chosen;
}

// What one thread does in a nanosecond, roughly, by the width of its vectors: multiply-adds, and bytes from its caches.
double products_per_nanosecond() {
    const std::string name = kernels().name;
    return name == "baseline" ? 5 : name == "avx2" ? 15 : 30;
}
constexpr double kBytesPerNanosecond = 20;

// As many threads as there are, or one where the work of `nanoseconds` is done before the others have begun and ended.
int worth_threads(int threads, double nanoseconds) {
    if (threads <= 1) return 1;
    return nanoseconds * (1 - 1.0 / threads) > crossing(threads) ? threads : 1;
}

// Keys that a query meets, about.
double met_keys(const AttentionParams& p) {
    const MaskView& mask = p.mask;
    double keys = static_cast<double>(p.Nk);
    if (mask.window_left >= 0 && mask.window_right >= 0)
        keys = std::min(keys, static_cast<double>(mask.window_left + mask.window_right + 1));
    if (!mask.indptr) return keys;
    const int64_t rows = mask.batch * mask.heads * ((p.Nq + mask.block_q - 1) / mask.block_q);
    return std::min(keys, static_cast<double>(mask.entries * mask.block_k) / static_cast<double>(rows ? rows : 1));
}

int worth_threads(int threads, const AttentionParams& p, bool backward) {
    const double keys = met_keys(p), width = static_cast<double>(p.D + p.Dv);
    const double products = static_cast<double>(p.B * p.Hq * p.Nq) * keys * width * (backward ? 2.5 : 1);
    const double size = p.dtype == kFloat64 ? 8 : p.dtype == kFloat32 ? 4 : 2;
    const double bytes = static_cast<double>(p.B * p.Hkv) * keys * width * size;
    return worth_threads(threads, std::max(products / products_per_nanosecond(), bytes / kBytesPerNanosecond));
}

void call(const AttentionParams& p, int threads, bool backward) {
    const auto op = backward ? &Kernels::backward : &Kernels::forward;
    if (!run(kernels(), op, p, worth_threads(threads, p, backward))) throw std::bad_alloc();
}

// An order may name rows of its tensor only, whatever it holds.
void check_order(const TensorView& t, int64_t B, int64_t H, int64_t count, int64_t rows) {
    for (int64_t b = 0; t.order && b < (t.order_batch_stride ? B : 1); ++b) {
        for (int64_t h = 0; h < (t.order_head_stride ? H : 1); ++h) {
            const int32_t* order = t.order + b * t.order_batch_stride + h * t.order_head_stride;
            int32_t least = 0, most = 0;
            for (int64_t i = 0; i < count; ++i) least = std::min(least, order[i]), most = std::max(most, order[i]);
            if (least < 0 || most >= rows)
                throw std::invalid_argument("efficient_attn: an order names row " +
                                            std::to_string(least < 0 ? least : most) + " of a tensor that has " +
                                            std::to_string(rows) + " rows");
        }
    }
}

template <bool kBackward>
void attention(const std::string& words, int threads) {
    const AttentionParams p = read_params(words, kBackward);
    check_order(p.query, p.B, p.Hq, p.Nq, p.query_rows);
    check_order(p.key, p.B, p.Hkv, p.Nk, p.key_rows);
    call(p, threads, kBackward);
}

void attention_statistics(const std::string& words, int threads) {
    const StatisticsParams p = read_statistics_params(words);
    if (!run(kernels(), &Kernels::statistics, p, worth_threads(threads, p.attention, false))) throw std::bad_alloc();
}

template <bool kBackward>
void linear_attention(const std::string& words, int threads) {
    const LinearAttentionParams p = read_linear_params(words, kBackward);
    const double products = static_cast<double>(p.B * p.Hq * (p.Nq + p.Nk)) * static_cast<double>(p.F * (p.D + p.Dv));
    const auto op = kBackward ? &Kernels::linear_backward : &Kernels::linear_forward;
    if (!run(kernels(), op, p, worth_threads(threads, products / products_per_nanosecond()))) throw std::bad_alloc();
}

// Asks the system to back the whole pages of so many bytes from an address on by huge pages. A request that may be
// refused: memory works the same without.
void prefer_huge_pages(uintptr_t begin, uintptr_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = uintptr_t{1} << 21;
    const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)begin, (void)bytes;
#endif
}

int64_t fma_loop(int threads, int64_t steps) { return run_fma_loops(kernels(), threads, steps); }

const char* instruction_set() { return kernels().name; }

std::vector<const char*> instruction_sets() {
    std::vector<const char*> names;
    for (const char* name : {"baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"})
        if (find_kernels(name)) names.push_back(name);
    return names;
}

// --- Calls that are made again and again: all of their arguments but where the tensors lie. None has an order. ---

// Where the addresses go that such a call is given, in their order.
template <bool kBackward>
auto places(AttentionParams& p) {
    if constexpr (kBackward)
        return std::array{&p.query.data,    &p.key.data,     &p.value.data, &p.out.data, &p.lse,
                          &p.grad_out.data, &p.weights.data, &p.dq.data,    &p.dk.data,  &p.dv.data};
    else
        return std::array{&p.query.data, &p.key.data, &p.value.data, &p.out.data, &p.lse, &p.weights.data};
}

// self: what repeated() made of the rest.
template <bool kBackward>
PyObject* call_again(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
    return guarded([&] {
        AttentionParams p = *static_cast<const AttentionParams*>(PyCapsule_GetPointer(self, nullptr));
        const auto where = places<kBackward>(p);
        check_count(count, where.size() + 1);
        for (size_t i = 0; i < where.size(); ++i)
            *where[i] = reinterpret_cast<void*>(from_python<uintptr_t>(arguments[i]));
        const int threads = from_python<int>(arguments[where.size()]);
        {
            const WithoutPython unlocked;
            call(p, threads, kBackward);
        }
        Py_INCREF(Py_None);
        return Py_None;
    });
}

void forget(PyObject* capsule) { delete static_cast<AttentionParams*>(PyCapsule_GetPointer(capsule, nullptr)); }

// The function of the addresses and of the number of threads.
template <bool kBackward>
PyObject* repeated(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    static PyMethodDef definition = method(kBackward ? "backward" : "forward", &call_again<kBackward>);
    return guarded([&]() -> PyObject* {
        check_count(count, 1);
        auto params = std::make_unique<AttentionParams>(read_params(from_python<std::string>(arguments[0]), kBackward));
        PyObject* self = PyCapsule_New(params.get(), nullptr, &forget);
        if (!self) throw Wrong();
        params.release();
        PyObject* function = PyCFunction_New(&definition, self);
        Py_DECREF(self);  // the function has it
        return function;
    });
}

PyObject* own_exception(const std::exception&) { return nullptr; }

PyMethodDef methods[] = {
    method<&attention<false>>("attention_forward"),
    method<&attention<true>>("attention_backward"),
    method<&attention_statistics>("attention_statistics"),
    method<&linear_attention<false>>("linear_attention_forward"),
    method<&linear_attention<true>>("linear_attention_backward"),
    method("repeated_forward", &repeated<false>),
    method("repeated_backward", &repeated<true>),
    method<&prefer_huge_pages>("prefer_huge_pages"),
    method<&fma_loop>("fma_loop"),
    method<&instruction_set>("instruction_set"),
    method<&instruction_sets>("instruction_sets"),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "_cpu",
    "The CPU kernels of efficient-attn: plain pointers and strides, no PyTorch. backends/cpu calls them.",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace
}  // namespace efficient_attn

PyMODINIT_FUNC PyInit__cpu() {
    using namespace efficient_attn;
    try {
        kernels();  // a wrong EFFICIENT_ATTN_ISA fails the import, not the first call
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_ImportError, error.what());
        return nullptr;
    }
    return PyModule_Create(&definition);
}
