// A unit of the kernels for few queries: -DEFFICIENT_ATTN_DTYPE=kBFloat16
#include "cuda/attention_decode.h"
#include "cuda/units.h"

namespace efficient_attn {

template <>
void attention_decode_unit<EFFICIENT_ATTN_DTYPE>(const DecodeParams& d, Launch& launch) {
    launch_attention_decode<Element<EFFICIENT_ATTN_DTYPE>>(d, launch);
}

}  // namespace efficient_attn
