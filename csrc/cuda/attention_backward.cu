// A unit of the backward: -DEFFICIENT_ATTN_DTYPE=kBFloat16 -DEFFICIENT_ATTN_HEAD=64 -DEFFICIENT_ATTN_EXTRAS=false
#include "cuda/attention_backward.h"
#include "cuda/units.h"

namespace efficient_attn {

template <>
void attention_backward_unit<EFFICIENT_ATTN_DTYPE, EFFICIENT_ATTN_HEAD, EFFICIENT_ATTN_EXTRAS>(const KernelParams& k,
                                                                                               Launch& launch) {
    launch_attention_backward<Element<EFFICIENT_ATTN_DTYPE>, EFFICIENT_ATTN_HEAD, EFFICIENT_ATTN_EXTRAS>(k, launch);
}

template <>
uint32_t attention_backward_bytes<EFFICIENT_ATTN_DTYPE, EFFICIENT_ATTN_HEAD, EFFICIENT_ATTN_EXTRAS>() {
    using T = Element<EFFICIENT_ATTN_DTYPE>;
    return std::max(sm80::KeyGradient<T, EFFICIENT_ATTN_HEAD, EFFICIENT_ATTN_EXTRAS>::kSharedBytes,
                    sm80::QueryGradient<T, EFFICIENT_ATTN_HEAD, EFFICIENT_ATTN_EXTRAS, 1>::kSharedBytes);
}

}  // namespace efficient_attn
