// The kernels of linear attention, one unit.
#include "cuda/linear_attention_backward.h"
#include "cuda/linear_attention_forward.h"
#include "cuda/units.h"

namespace efficient_attn {

void linear_attention_forward(const LinearAttentionParams& p, int64_t processors, float* workspace, Launch& launch) {
    launch_linear_attention_forward(p, processors, workspace, launch);
}

void linear_attention_backward(const LinearAttentionParams& p, int64_t processors, float* workspace, Launch& launch) {
    launch_linear_attention_backward(p, processors, workspace, launch);
}

int64_t linear_attention_workspace(const LinearAttentionParams& p, bool backward, int64_t processors) {
    return backward ? linear_attention_backward_workspace(p, processors)
                    : linear_attention_forward_workspace(p, processors);
}

}  // namespace efficient_attn
