// The kernels of linear attention, one unit.
#include "cuda/launch.h"
#include "cuda/sm80/linear_attention_backward.h"
#include "cuda/sm80/linear_attention_forward.h"
#include "cuda/units.h"

namespace efficient_attn {

void serve_linear_call(Part part, const LinearRequest& r) {
    Launch launch(r.device, r.stream);
    part == kForward ? serve_linear_forward(r.call, r.processors, r.workspace, launch)
                     : serve_linear_backward(r.call, r.processors, r.workspace, launch);
}

int64_t linear_workspace_wanted(const LinearAttentionParams& p, bool backward, int64_t processors) {
    return backward ? linear_backward_workspace(p, processors) : linear_forward_workspace(p, processors);
}

}  // namespace efficient_attn
