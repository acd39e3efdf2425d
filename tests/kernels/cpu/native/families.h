// The kinds of calls that the harness makes. A new operator is a function here and a file beside it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "memory.h"

namespace harness {

// On how many threads a call runs, and against which end of its memory its tensors lie.
struct Run {
    int threads;
    Flush flush;
};
constexpr Run kRuns[] = {{1, Flush::kEnd}, {2, Flush::kStart}, {3, Flush::kEnd}};

struct Context {
    std::vector<const efficient_attn::Kernels*> kernels;  // every instruction set to run
    int64_t calls = 0, elements = 0;                      // of an operator; results compared with the definition
    double worst = 0;                                     // the largest error, as a share of its bound
    void (*now)(const std::string&) = nullptr;            // told what is about to run, for the message of a crash
    const Run* only = nullptr;                            // the one run of a case that is run once

    std::vector<Run> runs() const { return only ? std::vector<Run>{*only} : std::vector<Run>(kRuns, kRuns + 3); }
};

// Runs the case that `seed` decides on every instruction set, from both ends of its memory and on 1 to 3 threads.
// Returns what is wrong, or an empty string.
std::string check_attention(uint64_t seed, Context& context);
std::string check_malformed_lists(uint64_t seed, Context& context);
std::string check_linear_attention(uint64_t seed, Context& context);

struct Family {
    const char* name;
    std::string (*check)(uint64_t seed, Context& context);
};

constexpr Family kFamilies[] = {
    {"attention", check_attention}, {"malformed", check_malformed_lists}, {"linear_attention", check_linear_attention}};

}  // namespace harness
