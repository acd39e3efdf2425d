// The kernels are compiled in units, unit.cu once for each, so that ninja builds them side by side (setup.py lists
// them). select.cu finds the unit of a call.
#pragma once

#include <cstdint>

#include "common/params.h"

namespace efficient_attn {

// A call as it comes from Python; all pointers are the device's.
struct Request {
    AttentionParams call;
    const int64_t* seed;         // null: call.dropout_seed
    int32_t* flags;              // flag_count of them; null: none
    float *delta, *query_sums;   // backward only; query_sum_count of the latter, zeros, or null
    float *part_out, *part_lse;  // decode only, `splits` of them; null where there is one
    int64_t splits;
    int device;
    uintptr_t stream;
};

struct LinearRequest {
    LinearAttentionParams call;
    int64_t processors;
    float* workspace;  // linear_workspace_wanted floats
    int device;
    uintptr_t stream;
};

enum Part : int { kForward, kBackward, kDecode };

// The kernels of one part for elements of dtype, heads of up to kHead, and bias, dropout and odd scales or none; those
// of kDecode for all heads and with bias.
template <int kPart, int kDType, int kHead, bool kExtras>
void serve_unit(const Request&);

void serve_call(Part part, const Request&);

// What kernels for elements of 16 bits and heads of up to `widest` ask for, where the GPU is not one of sm90/.
uint32_t shared_bytes_wanted(int64_t widest);

int64_t decode_splits_wanted(const AttentionParams&, int64_t processors);
int64_t query_sums_wanted(const AttentionParams&, int capability);
int64_t flags_wanted(const AttentionParams&, bool backward);

void serve_linear_call(Part part, const LinearRequest&);

int64_t linear_workspace_wanted(const LinearAttentionParams&, bool backward, int64_t processors);

}  // namespace efficient_attn
