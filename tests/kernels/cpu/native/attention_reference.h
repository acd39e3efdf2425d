// The definition of attention and its gradients, one pair at a time in double, with a bound on what rounding may do.
#pragma once

#include "attention_case.h"
#include "bounded.h"

namespace harness {

struct AttentionResults {
    Bounded out, lse, weights, dq, dk, dv, dbias;
};

AttentionResults attention_reference(AttentionCase& c);

}  // namespace harness
