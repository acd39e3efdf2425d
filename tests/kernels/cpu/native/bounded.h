// A result of a definition, and how far an honest kernel may be from each of its elements.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "families.h"
#include "image.h"

namespace harness {

constexpr double kUnits = 16;  // units in the last place that a score, an exponent or a sum may be off by

// A long sum is kept with what its roundings lost (Neumaier 1974), so that the definition is no part of its bound:
// thousands of like terms added one by one in double would be further off than a kernel that adds up tiles. `settle`
// ends a sum.
struct Bounded {
    std::vector<double> value, error, lost;

    explicit Bounded(int64_t count = 0)
        : value(static_cast<size_t>(count), 0), error(value.size(), 0), lost(value.size(), 0) {}
    void add(int64_t at, double x, double e) {
        double &sum = value[static_cast<size_t>(at)], before = sum;
        sum += x;
        const double rounding = std::fabs(before) >= std::fabs(x) ? (before - sum) + x : (x - sum) + before;
        if (std::isfinite(rounding)) lost[static_cast<size_t>(at)] += rounding;
        error[static_cast<size_t>(at)] += e;
    }
    double settle(int64_t at) {
        double& rest = lost[static_cast<size_t>(at)];
        value[static_cast<size_t>(at)] += rest;
        rest = 0;
        return value[static_cast<size_t>(at)];
    }
    void settle() {
        for (size_t n = 0; n < value.size(); ++n) settle(static_cast<int64_t>(n));
    }
    double* values(int64_t at) { return value.data() + at; }
    double* errors(int64_t at) { return error.data() + at; }
};

// Element `at` is stored in `dtype`, half a unit off at most; what is below its range may be flushed, what is above it
// is infinite.
inline void round_to(int dtype, double range, Bounded& result, int64_t at) {
    double &value = *result.values(at), &error = *result.errors(at);
    if (std::isinf(value)) return;
    error += epsilon(dtype) * std::fabs(value) + range * smallest(dtype);
    if (std::fabs(value) + error > largest(dtype)) error = INFINITY;
}
inline void round_to(int dtype, double range, Bounded& result) {
    for (size_t n = 0; n < result.value.size(); ++n) round_to(dtype, range, result, static_cast<int64_t>(n));
}

// Says which element of `ours` is off, or nothing.
inline std::string compare(const char* name, const std::vector<double>& ours, const Bounded& expected,
                           Context& context) {
    for (size_t n = 0; n < ours.size(); ++n) {
        const double want = expected.value[n], error = expected.error[n];
        // Where the definition itself meets NaN or infinity that a pair does see, anything goes.
        const bool anything = std::isnan(want) || std::isnan(error) || std::isinf(error) || want == INFINITY;
        if (!anything) ++context.elements;
        if (anything || ours[n] == want) continue;  // also infinities
        const double difference = std::fabs(ours[n] - want);
        if (!(difference <= error)) {
            char text[256];
            std::snprintf(text, sizeof text, "%s[%zu] = %.9g, should be %.9g within %.3g", name, n, ours[n], want,
                          error);
            return text;
        }
        if (difference / error > context.worst) context.worst = difference / error;
    }
    return "";
}

}  // namespace harness
