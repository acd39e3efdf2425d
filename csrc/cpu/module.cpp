// The Python module efficient_attn._cpu. A call arrives as one bytes object of 8-byte words, in the order in which
// backends/cpu.py packs them and common/words.h takes them off.
#include <pybind11/pybind11.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

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

// A call of some microseconds is done before a second thread is awake.
int worth_threads(int threads, int64_t rows, int64_t products) {
    constexpr double few = 1e5;
    return threads < 1 || static_cast<double>(rows) * static_cast<double>(products) < few ? 1 : threads;
}

void call(const Operator<AttentionParams>& op, const std::string& words, int threads, bool backward) {
    const AttentionParams p = read_params(words, backward);
    py::gil_scoped_release release;
    if (!run(op, p, worth_threads(threads, p.B * p.Hq * p.Nq, p.Nk * (p.D + p.Dv)))) throw std::bad_alloc();
}

void call_statistics(const std::string& words, int threads) {
    const StatisticsParams p = read_statistics_params(words);
    const AttentionParams& a = p.attention;
    py::gil_scoped_release release;
    if (!run(kernels().statistics, p, worth_threads(threads, a.B * a.Hq * a.Nq, 2 * a.Nk * a.D)))
        throw std::bad_alloc();
}

void call_linear(const Operator<LinearAttentionParams>& op, const std::string& words, int threads, bool backward) {
    const LinearAttentionParams p = read_linear_params(words, backward);
    py::gil_scoped_release release;
    if (!run(op, p, worth_threads(threads, p.B * p.Hq * (p.Nq + p.Nk), p.F * (p.D + p.Dv)))) throw std::bad_alloc();
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
    module.def("attention_forward",
               [](const std::string& w, int threads) { call(kernels().forward, w, threads, false); });
    module.def("attention_backward",
               [](const std::string& w, int threads) { call(kernels().backward, w, threads, true); });
    module.def("attention_statistics", &call_statistics);
    module.def("linear_attention_forward",
               [](const std::string& w, int threads) { call_linear(kernels().linear_forward, w, threads, false); });
    module.def("linear_attention_backward",
               [](const std::string& w, int threads) { call_linear(kernels().linear_backward, w, threads, true); });
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
