// The definition of attention and its gradients, one pair at a time in double, with a bound on what rounding may do.
#pragma once

#include <vector>

#include "attention_case.h"

namespace harness {

// A result, contiguous, and how far an honest kernel may be from each of its elements.
struct Bounded {
    std::vector<double> value, error;

    explicit Bounded(int64_t count = 0) : value(static_cast<size_t>(count), 0), error(static_cast<size_t>(count), 0) {}
    void add(int64_t at, double x, double e) {
        value[static_cast<size_t>(at)] += x;
        error[static_cast<size_t>(at)] += e;
    }
};

struct AttentionResults {
    Bounded out, lse, dq, dk, dv, dbias;
};

AttentionResults attention_reference(AttentionCase& c);

}  // namespace harness
