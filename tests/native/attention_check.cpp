#include <cstdio>

#include "attention_reference.h"
#include "families.h"

namespace harness {
namespace {

using efficient_attn::AttentionParams;
using efficient_attn::Kernels;

template <class X>
Guarded place(const std::vector<X>& numbers, Flush flush) {
    Guarded memory(numbers.size() * sizeof(X), flush);
    if (!numbers.empty()) std::memcpy(memory.data(), numbers.data(), numbers.size() * sizeof(X));
    return memory;
}

// A case's tensors and mask between guard pages, and the arguments that point at them.
struct Call {
    Placed query, key, value, grad_out, bias, grad_lse, out, lse, dq, dk, dv, dbias;
    std::vector<Guarded> lists;
    AttentionParams p{};

    Call(const AttentionCase& c, Flush flush)
        : query(c.query, flush),
          key(c.key, flush),
          value(c.value, flush),
          grad_out(c.grad_out, flush),
          bias(c.bias, flush),
          grad_lse(c.grad_lse, flush),
          out(c.out, flush),
          lse(c.lse, flush),
          dq(c.dq, flush),
          dk(c.dk, flush),
          dv(c.dv, flush),
          dbias(c.dbias, flush) {
        p.dtype = c.dtype;
        p.B = c.B, p.Hq = c.Hq, p.Hkv = c.Hkv, p.Nq = c.Nq, p.Nk = c.Nk, p.D = c.D, p.Dv = c.Dv;
        p.query = query.view(), p.key = key.view(), p.value = value.view(), p.out = out.view();
        p.lse = lse.data();
        p.scale = c.scale, p.dropout_p = c.dropout_p, p.dropout_seed = c.dropout_seed;
        p.grad_out = grad_out.view(), p.dq = dq.view(), p.dk = dk.view(), p.dv = dv.view();
        p.grad_lse = c.has_grad_lse ? grad_lse.data() : nullptr;
        if (c.has_bias) {
            p.bias.data = bias.data();
            p.bias.dtype = p.dbias.dtype = c.bias.dtype;
            for (int dim = 0; dim < 4; ++dim) {
                p.bias.stride[dim] = c.bias.size[dim] == 1 ? 0 : c.bias.stride[dim];
                p.dbias.size[dim] = c.bias.size[dim];
            }
            p.dbias.data = c.wants_bias_gradient ? dbias.data() : nullptr;
        }
        set_mask(c.mask, flush);
    }

    template <class X>
    const X* list(const std::vector<X>& numbers, Flush flush) {
        lists.push_back(place(numbers, flush));
        return reinterpret_cast<const X*>(lists.back().data());
    }

    void set_mask(const Mask& mask, Flush flush) {
        efficient_attn::MaskView& view = p.mask;
        view.batch = mask.batch, view.heads = mask.heads, view.block_q = mask.block_q, view.block_k = mask.block_k;
        view.window_left = mask.window_left, view.window_right = mask.window_right;
        view.window_offset = mask.window_offset;
        if (!mask.kv_lengths.empty()) view.kv_lengths = list(mask.kv_lengths, flush);
        if (!mask.listed) return;
        view.entries = static_cast<int64_t>(mask.indices.size());
        view.tile_count = mask.tile_count();
        view.indptr = list(mask.indptr, flush);
        view.indices = list(mask.indices, flush);
        view.tile_ids = list(mask.tile_ids, flush);
        view.tiles = list(mask.tiles, flush);
        view.t_indptr = list(mask.t_indptr, flush);
        view.t_indices = list(mask.t_indices, flush);
        view.t_tile_ids = list(mask.t_tile_ids, flush);
    }

    std::string inputs_changed() const {
        const std::pair<const char*, const Placed*> inputs[] = {{"query", &query}, {"key", &key},
                                                                {"value", &value}, {"grad_out", &grad_out},
                                                                {"bias", &bias},   {"grad_lse", &grad_lse}};
        for (const auto& [name, placed] : inputs)
            if (!placed->unchanged()) return std::string(name) + ", an input, was written";
        return "";
    }
};

struct Result {
    const char* name;
    const Bounded* expected;
    Placed Call::* place;
};

// The results that a case has, with what the definition says of each.
std::vector<Result> results(const AttentionCase& c, const AttentionResults& expected) {
    std::vector<Result> all = {{"out", &expected.out, &Call::out},
                               {"lse", &expected.lse, &Call::lse},
                               {"dq", &expected.dq, &Call::dq},
                               {"dk", &expected.dk, &Call::dk},
                               {"dv", &expected.dv, &Call::dv}};
    if (c.wants_bias_gradient) all.push_back({"dbias", &expected.dbias, &Call::dbias});
    return all;
}

std::string compare(const char* name, const std::vector<double>& ours, const Bounded& expected, Context& context) {
    for (size_t n = 0; n < ours.size(); ++n) {
        const double want = expected.value[n], error = expected.error[n];
        if (ours[n] == want) continue;  // also infinities
        // Where the definition itself meets NaN or infinity that a pair does see, anything goes.
        if (std::isnan(want) || std::isnan(error) || std::isinf(error)) continue;
        if (std::isinf(want) && want > 0) continue;
        const double difference = std::fabs(ours[n] - want);
        if (!(difference <= error)) {
            char text[256];
            std::snprintf(text, sizeof text, "%s[%zu] = %.9g, should be %.9g within %.3g", name, n, ours[n], want,
                          error);
            return text;
        }
        if (difference / error > context.worst) context.worst = difference / error;
    }
    context.elements += static_cast<int64_t>(ours.size());
    return "";
}

bool call(const Kernels& kernels, const Call& made, int threads, Context& context) {
    context.calls += 2;
    return efficient_attn::run(kernels.forward, made.p, threads) &&
           efficient_attn::run(kernels.backward, made.p, threads);
}

struct Run {
    int threads;
    Flush flush;
};
constexpr Run kRuns[] = {{1, Flush::kEnd}, {2, Flush::kStart}, {3, Flush::kEnd}};

std::string where(const Kernels& kernels, const Run& run) {
    return std::string(" [") + kernels.name + ", " + std::to_string(run.threads) +
           " threads, tensors flush against the " + (run.flush == Flush::kEnd ? "end" : "start") + "]";
}

std::string check_on(const Kernels& kernels, const AttentionCase& c, const AttentionResults& expected,
                     Context& context) {
    const std::vector<Result> all = results(c, expected);
    std::vector<std::vector<char>> first;
    for (const Run& how : kRuns) {
        const std::string place = where(kernels, how);
        context.now("attention: " + c.describe() + place);
        const Call made(c, how.flush);
        if (!call(kernels, made, how.threads, context)) return "run() was refused memory" + place;
        if (const std::string changed = made.inputs_changed(); !changed.empty()) return changed + place;
        for (size_t n = 0; n < all.size(); ++n) {
            Image now = (made.*all[n].place).now();
            if (how.threads == 1) {
                first.push_back(now.bytes);
                const std::string wrong = compare(all[n].name, now.values(), *all[n].expected, context);
                if (!wrong.empty()) return wrong + place;
            } else if (now.bytes != first[n]) {
                return std::string(all[n].name) + " has other bits than on one thread" + place;
            }
            if (!(made.*all[n].place).slack_is_unwritten() || !now.gaps_are_unwritten())
                return std::string(all[n].name) + " was written beside its elements" + place;
        }
    }
    return "";
}

}  // namespace

std::string check_attention(uint64_t seed, Context& context) {
    AttentionCase c = random_attention_case(seed);
    const AttentionResults expected = attention_reference(c);
    for (const Kernels* kernels : context.kernels) {
        const std::string wrong = check_on(*kernels, c, expected, context);
        if (!wrong.empty()) return wrong + "\n  " + c.describe();
    }
    return "";
}

// Lists that Python refuses to make: nothing is said of the results, but no access may leave its array.
std::string check_malformed_lists(uint64_t seed, Context& context) {
    AttentionCase c = random_attention_case(seed);
    Random random(~seed);
    corrupt_lists(random, c);
    for (const Kernels* kernels : context.kernels) {
        for (const Run& how : kRuns) {
            const std::string place = where(*kernels, how);
            context.now("malformed lists: " + c.describe() + place);
            const Call made(c, how.flush);
            if (!call(*kernels, made, how.threads, context)) return "run() was refused memory" + place;
            if (const std::string changed = made.inputs_changed(); !changed.empty()) return changed + place;
            for (const Placed* result : {&made.out, &made.lse, &made.dq, &made.dk, &made.dv, &made.dbias})
                if (!result->slack_is_unwritten() || !result->now().gaps_are_unwritten())
                    return "a result was written beside its elements" + place;
        }
    }
    return "";
}

}  // namespace harness
