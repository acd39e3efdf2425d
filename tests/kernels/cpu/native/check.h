// What every family does with a call: run it from both ends of its memory and on 1 to 3 threads, and look at what it
// left behind.
#pragma once

#include <string>
#include <vector>

#include "bounded.h"

namespace harness {

inline std::string where(const efficient_attn::Kernels& kernels, const Run& run) {
    return std::string(" [") + kernels.name + ", " + std::to_string(run.threads) +
           " threads, tensors flush against the " + (run.flush == Flush::kEnd ? "end" : "start") + "]";
}

template <class X>
Guarded place(const std::vector<X>& numbers, Flush flush) {
    Guarded memory(numbers.size() * sizeof(X), flush);
    if (!numbers.empty()) std::memcpy(memory.data(), numbers.data(), numbers.size() * sizeof(X));
    return memory;
}

using Inputs = std::vector<std::pair<const char*, const Placed*>>;

inline std::string written(const Inputs& inputs) {
    for (const auto& [name, placed] : inputs)
        if (!placed->unchanged()) return std::string(name) + ", an input, was written";
    return "";
}

// A result of a call, with what the definition says of it.
template <class Call>
struct Result {
    const char* name;
    const Bounded* expected;
    Placed Call::* place;
};

// Where two results differ.
inline std::string first_difference(const Image& now, const std::vector<char>& before) {
    Image other = now;
    other.bytes = before;
    const std::vector<double> ours = Image(now).values(), theirs = other.values();
    for (size_t n = 0; n < ours.size(); ++n) {
        if (!std::memcmp(&ours[n], &theirs[n], sizeof(double))) continue;
        char text[128];
        std::snprintf(text, sizeof text, "[%zu] has other bits, %.17g instead of %.17g,", n, ours[n], theirs[n]);
        return text;
    }
    return " has other bits between its elements";
}

// Call: Call(case, flush), run(kernels, threads), inputs().
template <class Call, class Case>
std::string check_on(const efficient_attn::Kernels& kernels, const char* family, const Case& c,
                     const std::vector<Result<Call>>& all, Context& context) {
    std::vector<std::vector<char>> first;
    for (const Run& how : context.runs()) {
        const std::string place = where(kernels, how);
        context.now(std::string(family) + ": " + c.describe() + place);
        const Call made(c, how.flush);
        context.calls += 2;
        if (!made.run(kernels, how.threads)) return "run() was refused memory" + place;
        if (const std::string changed = written(made.inputs()); !changed.empty()) return changed + place;
        for (size_t n = 0; n < all.size(); ++n) {
            Image now = (made.*all[n].place).now();
            if (first.size() == n) {
                first.push_back(now.bytes);
                const std::string wrong = compare(all[n].name, now.values(), *all[n].expected, context);
                if (!wrong.empty()) return wrong + place;
            } else if (now.bytes != first[n]) {
                return std::string(all[n].name) + first_difference(now, first[n]) + " than in the first run" + place;
            }
            if (!(made.*all[n].place).slack_is_unwritten() || !now.gaps_are_unwritten())
                return std::string(all[n].name) + " was written beside its elements" + place;
        }
    }
    return "";
}

}  // namespace harness
