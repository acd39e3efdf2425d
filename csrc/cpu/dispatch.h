// Which instruction set serves this process, and how an operator's tasks are spread over threads.
#pragma once

#include "../common/params.h"

namespace efficient_attn {

// The kernels named, or the best that this processor runs if `name` is null; null if the name is unknown or cannot run.
const Kernels* find_kernels(const char* name);

// Runs every phase of an operator, as in &Kernels::forward, on up to `threads` threads. Returns false, with nothing
// done, when memory for the tiles is refused.
template <class Params>
bool run(const Kernels& kernels, const Operator<Params>* Kernels::* op, const Params& p, int threads);

// How many tiles of queries of a forward share one copy of the keys and values that they see; 0: each loads its own.
int64_t tiles_of_a_copy(const Kernels& kernels, const AttentionParams& p, int threads);

// What it costs to let `threads` threads begin and end together, in nanoseconds; measured once for each number.
double crossing(int threads);

// Runs the instruction set's fused multiply-adds on `threads` threads at once; returns the operations done.
int64_t run_fma_loops(const Kernels& kernels, int threads, int64_t steps);

}  // namespace efficient_attn
