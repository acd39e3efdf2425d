#include "dispatch.h"

#include <cstring>

#include "operators.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace efficient_attn {
namespace {

#define EA_KERNELS(set, linear_set, others) \
    {#set,                                  \
     &forward_##set,                        \
     &backward_##set,                       \
     &statistics_##set,                     \
     &linear_forward_##linear_set,          \
     &linear_backward_##linear_set,         \
     fma_loop_##set,                        \
     others}

// Sets that differ in how they multiply bfloat16 have attention on that type alone.
const Kernels kernels_baseline = EA_KERNELS(baseline, baseline, nullptr);
#if EFFICIENT_ATTN_HAVE_AVX2
const Kernels kernels_avx2 = EA_KERNELS(avx2, avx2, nullptr);
#endif
#if EFFICIENT_ATTN_HAVE_AVX512
const Kernels kernels_avx512 = EA_KERNELS(avx512, avx512, nullptr);
#endif
#if EFFICIENT_ATTN_HAVE_AVX512_BF16
const Kernels kernels_avx512_bf16 = EA_KERNELS(avx512_bf16, avx512, &kernels_avx512);
#endif
#if EFFICIENT_ATTN_HAVE_AMX_BF16
const Kernels kernels_amx_bf16 = EA_KERNELS(amx_bf16, avx512, &kernels_avx512);
#endif

// Whether the processor has tile registers that multiply bfloat16, and the system lets this process have them.
bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & amx_bf16) == 0 || (d & amx_tile) == 0) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

bool can_run(const char* name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!std::strcmp(name, "amx_bf16")) return can_run("avx512_bf16") && may_use_tiles();
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

// Intel's processors multiply pairs in vectors slower than what they widen to float32.
bool pays(const char* name) {
#if defined(__x86_64__)
    return std::strcmp(name, "avx512_bf16") || !__builtin_cpu_is("intel");
#else
    (void)name;
    return true;
#endif
}

}  // namespace

const Kernels* find_kernels(const char* name) {
    const Kernels* best_first[] = {
#if EFFICIENT_ATTN_HAVE_AMX_BF16
        &kernels_amx_bf16,
#endif
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
        if ((name ? !std::strcmp(name, kernels->name) : pays(kernels->name)) && can_run(kernels->name)) return kernels;
    return nullptr;
}

}  // namespace efficient_attn
