// The kernels are compiled in units, so that ninja builds them side by side (setup.py lists them): attention_forward.cu
// and attention_backward.cu once for each instance (choose_instance in plan.h), attention_decode.cu for each dtype,
// linear_attention.cu once. All pointers are the device's.
#pragma once

#include "cuda/launch.h"
#include "cuda/params.h"

namespace efficient_attn {

// For elements of dtype, heads of up to kHead, and bias, dropout and odd scales or none.
template <int kDType, int kHead, bool kExtras>
void attention_forward_unit(const KernelParams&, Launch&);
template <int kDType, int kHead, bool kExtras>
void attention_backward_unit(const KernelParams&, Launch&);

// Shared memory that their kernels ask for, where the GPU is not one of sm90/.
template <int kDType, int kHead, bool kExtras>
uint32_t attention_forward_bytes();
template <int kDType, int kHead, bool kExtras>
uint32_t attention_backward_bytes();

// For all heads, and with bias.
template <int kDType>
void attention_decode_unit(const DecodeParams&, Launch&);

// workspace: linear_attention_workspace floats.
void linear_attention_forward(const LinearAttentionParams&, int64_t processors, float* workspace, Launch&);
void linear_attention_backward(const LinearAttentionParams&, int64_t processors, float* workspace, Launch&);
int64_t linear_attention_workspace(const LinearAttentionParams&, bool backward, int64_t processors);

}  // namespace efficient_attn
