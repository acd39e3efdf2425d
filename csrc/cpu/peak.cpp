// The fused multiply-adds of peak.h on several threads at once.
#include "dispatch.h"

namespace efficient_attn {

int64_t run_fma_loops(const Kernels& kernels, int threads, int64_t steps) {
    int64_t operations = 0;
#if defined(_OPENMP)
#pragma omp parallel for schedule(static, 1) num_threads(threads) reduction(+ : operations)
#endif
    for (int thread = 0; thread < threads; ++thread) operations += kernels.fma_loop(steps);
    return operations;
}

}  // namespace efficient_attn
