// A unit of the forward: -DEFFICIENT_ATTN_DTYPE=kBFloat16 -DEFFICIENT_ATTN_HEAD=64 -DEFFICIENT_ATTN_EXTRAS=false
#include "cuda/attention_forward.h"
#include "cuda/units.h"

namespace efficient_attn {

template <>
void attention_forward_unit<EFFICIENT_ATTN_DTYPE, EFFICIENT_ATTN_HEAD, EFFICIENT_ATTN_EXTRAS>(const KernelParams& k,
                                                                                              Launch& launch) {
    launch_attention_forward<Element<EFFICIENT_ATTN_DTYPE>, EFFICIENT_ATTN_HEAD, EFFICIENT_ATTN_EXTRAS>(k, launch);
}

template <>
uint32_t attention_forward_bytes<EFFICIENT_ATTN_DTYPE, EFFICIENT_ATTN_HEAD, EFFICIENT_ATTN_EXTRAS>() {
    return sm80::Forward<Element<EFFICIENT_ATTN_DTYPE>, EFFICIENT_ATTN_HEAD, EFFICIENT_ATTN_EXTRAS>::kSharedBytes;
}

}  // namespace efficient_attn
