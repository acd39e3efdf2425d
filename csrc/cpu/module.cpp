// The Python module efficient_attn._cpu. A call arrives as one bytes object of 8-byte words, in the order in which
// backends/cpu.py packs them and common/words.h takes them off.
#include <pybind11/pybind11.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

#include "common/words.h"
#include "dispatch.h"

namespace py = pybind11;

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
    py::gil_scoped_release release;
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

void call(const std::string& words, int threads, bool backward) {
    const AttentionParams p = read_params(words, backward);
    check_order(p.query, p.B, p.Hq, p.Nq, p.query_rows);
    check_order(p.key, p.B, p.Hkv, p.Nk, p.key_rows);
    call(p, threads, backward);
}

// Calls that are made again and again: all of their arguments but where the tensors lie. None has an order.
class AttentionForward {
  public:
    explicit AttentionForward(const std::string& words) : params_(read_params(words, false)) {}

    void run(uintptr_t query, uintptr_t key, uintptr_t value, uintptr_t out, uintptr_t lse, uintptr_t weights,
             int threads) const {
        AttentionParams p = params_;
        p.query.data = reinterpret_cast<void*>(query);
        p.key.data = reinterpret_cast<void*>(key);
        p.value.data = reinterpret_cast<void*>(value);
        p.out.data = reinterpret_cast<void*>(out);
        p.lse = reinterpret_cast<void*>(lse);
        p.weights.data = reinterpret_cast<void*>(weights);
        call(p, threads, false);
    }

  private:
    AttentionParams params_;
};

class AttentionBackward {
  public:
    explicit AttentionBackward(const std::string& words) : params_(read_params(words, true)) {}

    void run(uintptr_t query, uintptr_t key, uintptr_t value, uintptr_t out, uintptr_t lse, uintptr_t grad_out,
             uintptr_t grad_weights, uintptr_t dq, uintptr_t dk, uintptr_t dv, int threads) const {
        AttentionParams p = params_;
        p.query.data = reinterpret_cast<void*>(query);
        p.key.data = reinterpret_cast<void*>(key);
        p.value.data = reinterpret_cast<void*>(value);
        p.out.data = reinterpret_cast<void*>(out);
        p.lse = reinterpret_cast<void*>(lse);
        p.grad_out.data = reinterpret_cast<void*>(grad_out);
        p.weights.data = reinterpret_cast<void*>(grad_weights);
        p.dq.data = reinterpret_cast<void*>(dq);
        p.dk.data = reinterpret_cast<void*>(dk);
        p.dv.data = reinterpret_cast<void*>(dv);
        call(p, threads, true);
    }

  private:
    AttentionParams params_;
};

void call_statistics(const std::string& words, int threads) {
    const StatisticsParams p = read_statistics_params(words);
    py::gil_scoped_release release;
    if (!run(kernels(), &Kernels::statistics, p, worth_threads(threads, p.attention, false))) throw std::bad_alloc();
}

void call_linear(const std::string& words, int threads, bool backward) {
    const LinearAttentionParams p = read_linear_params(words, backward);
    py::gil_scoped_release release;
    const double products = static_cast<double>(p.B * p.Hq * (p.Nq + p.Nk)) * static_cast<double>(p.F * (p.D + p.Dv));
    const auto op = backward ? &Kernels::linear_backward : &Kernels::linear_forward;
    if (!run(kernels(), op, p, worth_threads(threads, products / products_per_nanosecond()))) throw std::bad_alloc();
}

// A request that may be refused: memory works the same without.
void prefer_huge_pages(uintptr_t begin, uintptr_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = uintptr_t{1} << 21;
    const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)begin, (void)bytes;
#endif
}

}  // namespace
}  // namespace efficient_attn

PYBIND11_MODULE(_cpu, module) {
    using namespace efficient_attn;
    module.attr("__doc__") = "CPU kernels of efficient-attn: plain pointers and strides, no PyTorch.";
    kernels();  // a wrong EFFICIENT_ATTN_ISA fails the import, not the first call
    module.def("attention_forward", [](const std::string& words, int threads) { call(words, threads, false); });
    module.def("attention_backward", [](const std::string& words, int threads) { call(words, threads, true); });
    module.def("attention_statistics", &call_statistics);
    module.def("linear_attention_forward",
               [](const std::string& words, int threads) { call_linear(words, threads, false); });
    module.def("linear_attention_backward",
               [](const std::string& words, int threads) { call_linear(words, threads, true); });
    py::class_<AttentionForward>(module, "AttentionForward", "A forward of which only the pointers are still to come.")
        .def(py::init<const std::string&>())
        .def("run", &AttentionForward::run);
    py::class_<AttentionBackward>(module, "AttentionBackward", "The same of a backward.")
        .def(py::init<const std::string&>())
        .def("run", &AttentionBackward::run);
    module.def("prefer_huge_pages", &prefer_huge_pages,
               "Asks the system to back the whole pages of so many bytes from an address on by huge pages.");
    module.def(
        "fma_loop",
        [](int threads, int64_t steps) {
            py::gil_scoped_release release;
            return run_fma_loops(kernels(), threads, steps);
        },
        "Fused multiply-adds without memory on so many threads at once, for benchmarks; returns the operations done.");
    module.def(
        "instruction_set", [] { return kernels().name; },
        "The instruction set in use: baseline, avx2, avx512, avx512_bf16 or amx_bf16.");
    module.def(
        "instruction_sets",
        [] {
            py::list names;
            for (const char* name : {"baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"})
                if (find_kernels(name)) names.append(name);
            return names;
        },
        "The instruction sets that this build has and this processor runs.");
}
