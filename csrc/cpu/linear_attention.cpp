// The operators of linear attention, compiled once for each instruction set (operators.h).
#include "linear_attention_backward.h"
#include "linear_attention_forward.h"
#include "operators.h"

namespace efficient_attn {
namespace {

// Calls f with the operator, linear::Forward or linear::Backward, of the accumulation type.
template <template <class> class Op, class F>
inline auto with_accumulator(const LinearAttentionParams& p, F f) {
    return p.value_dtype == kFloat64 ? f(Op<double>{}) : f(Op<float>{});
}

template <template <class> class Op, int phases>
constexpr Operator<LinearAttentionParams> linear_operator() {
    using P = LinearAttentionParams;
    return {
        phases,
        nullptr,
        [](const P& p) { return with_accumulator<Op>(p, [&](auto op) { return op.shared_bytes(p); }); },
        [](const P& p) { return with_accumulator<Op>(p, [&](auto op) { return op.thread_bytes(p); }); },
        [](const P& p, int phase) { return with_accumulator<Op>(p, [&](auto op) { return op.task_count(p, phase); }); },
        nullptr,
        nullptr,
        [](const P& p, int phase, int64_t task, char* memory, char* shared) {
            with_accumulator<Op>(p, [&](auto op) { op.run_task(p, phase, task, memory, shared); });
        },
    };
}

}  // namespace

const Operator<LinearAttentionParams> EA_OF_THIS_SET(linear_forward) =
    linear_operator<linear::Forward, linear::kForwardPhases>();
const Operator<LinearAttentionParams> EA_OF_THIS_SET(linear_backward) =
    linear_operator<linear::Backward, linear::kBackwardPhases>();

}  // namespace efficient_attn
