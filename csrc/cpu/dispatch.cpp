#include "dispatch.h"

#include <cstring>

namespace efficient_attn {
namespace {

bool can_run(const char* name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!std::strcmp(name, "avx512_bf16")) return __builtin_cpu_supports("avx512bf16") && can_run("avx512");
    if (!std::strcmp(name, "avx512")) {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl") && can_run("avx2");
    }
    if (!std::strcmp(name, "avx2")) {
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
               __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
    }
#endif
    return !std::strcmp(name, "baseline");
}

}  // namespace

const Kernels* find_kernels(const char* name) {
    const Kernels* best_first[] = {
#if EFFICIENT_ATTN_HAVE_AVX512_BF16
        &kernels_avx512_bf16,
#endif
#if EFFICIENT_ATTN_HAVE_AVX512
        &kernels_avx512,
#endif
#if EFFICIENT_ATTN_HAVE_AVX2
        &kernels_avx2,
#endif
        &kernels_baseline,
    };
    for (const Kernels* kernels : best_first)
        if ((!name || !std::strcmp(name, kernels->name)) && can_run(kernels->name)) return kernels;
    return nullptr;
}

}  // namespace efficient_attn
