// The definition of linear attention and its gradients, one pair at a time in double, with bounds on rounding.
#pragma once

#include "bounded.h"
#include "linear_attention_case.h"

namespace harness {

struct LinearAttentionResults {
    Bounded out, normaliser, key_shift, dq, dk, dv;
};

LinearAttentionResults linear_attention_reference(LinearAttentionCase& c);

}  // namespace harness
