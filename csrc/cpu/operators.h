// The operators of each instruction set. attention.cpp and linear_attention.cpp define them, units that are compiled
// once for each set with its flags, as EFFICIENT_ATTN_ISA.
//
// Everything else there has internal linkage, and nothing of the standard library is instantiated: an inline function
// compiled for AVX-512 must never be the copy that the linker keeps for everybody.
#pragma once

#include "../common/params.h"

namespace efficient_attn {

#define EA_OPERATORS(set)                                                                     \
    extern const Operator<AttentionParams> forward_##set, backward_##set;                     \
    extern const Operator<StatisticsParams> statistics_##set;                                 \
    extern const Operator<LinearAttentionParams> linear_forward_##set, linear_backward_##set; \
    int64_t fma_loop_##set(int64_t steps) /* peak.h; returns the operations done */

EA_OPERATORS(baseline);
EA_OPERATORS(avx2);
EA_OPERATORS(avx512);
EA_OPERATORS(avx512_bf16);  // attention on bfloat16 alone, like the next
EA_OPERATORS(amx_bf16);

#undef EA_OPERATORS

// In a unit: the operator's name with the set's at its end.
#define EA_JOIN_(a, b) a##b
#define EA_JOIN(a, b) EA_JOIN_(a, b)
#define EA_OF_THIS_SET(name) EA_JOIN(name##_, EFFICIENT_ATTN_ISA)

}  // namespace efficient_attn
