#include "check.h"
#include "linear_attention_reference.h"

namespace harness {
namespace {

using efficient_attn::Kernels;

// A case's tensors between guard pages, and the arguments that point at them.
struct Call {
    Placed query, key, value, projection, grad_out, grad_normaliser, out, normaliser, key_shift, dq, dk, dv;
    Guarded key_mask;
    efficient_attn::LinearAttentionParams p{};

    Call(const LinearAttentionCase& c, Flush flush)
        : query(c.query, flush),
          key(c.key, flush),
          value(c.value, flush),
          projection(c.projection, flush),
          grad_out(c.grad_out, flush),
          grad_normaliser(c.grad_normaliser, flush),
          out(c.out, flush),
          normaliser(c.normaliser, flush),
          key_shift(c.key_shift, flush),
          dq(c.dq, flush),
          dk(c.dk, flush),
          dv(c.dv, flush),
          key_mask(place(c.key_mask, flush)) {
        p.feature_dtype = c.feature_dtype, p.value_dtype = c.value_dtype;
        p.B = c.B, p.Hq = c.Hq, p.Hkv = c.Hkv, p.Nq = c.Nq, p.Nk = c.Nk, p.D = c.D, p.F = c.F, p.Dv = c.Dv;
        p.query = query.view(), p.key = key.view(), p.value = value.view(), p.out = out.view();
        p.normaliser = normaliser.data();
        p.key_shift = c.has_key_shift() ? key_shift.data() : nullptr;
        p.key_mask = c.has_key_mask ? reinterpret_cast<const uint8_t*>(key_mask.data()) : nullptr;
        p.projection = c.projection_heads ? projection.data() : nullptr;
        p.projection_heads = c.projection_heads;
        p.feature_map = c.feature_map;
        p.root = c.root, p.gain = c.gain, p.floor = c.floor, p.limit = c.limit;
        p.is_causal = c.is_causal, p.causal_offset = c.causal_offset;
        p.grad_out = grad_out.view(), p.dq = dq.view(), p.dk = dk.view(), p.dv = dv.view();
        p.grad_normaliser = c.has_grad_normaliser ? grad_normaliser.data() : nullptr;
    }
    Inputs inputs() const {
        return {{"query", &query},           {"key", &key},           {"value", &value},
                {"projection", &projection}, {"grad_out", &grad_out}, {"grad_normaliser", &grad_normaliser}};
    }
    bool run(const Kernels& kernels, int threads) const {
        return efficient_attn::run(kernels, &Kernels::linear_forward, p, threads) &&
               efficient_attn::run(kernels, &Kernels::linear_backward, p, threads);
    }
};

}  // namespace

std::string check_linear_attention(uint64_t seed, Context& context) {
    LinearAttentionCase c = random_linear_attention_case(seed);
    const LinearAttentionResults expected = linear_attention_reference(c);
    const std::vector<Result<Call>> all = {{"out", &expected.out, &Call::out},
                                           {"normaliser", &expected.normaliser, &Call::normaliser},
                                           {"key_shift", &expected.key_shift, &Call::key_shift},
                                           {"dq", &expected.dq, &Call::dq},
                                           {"dk", &expected.dk, &Call::dk},
                                           {"dv", &expected.dv, &Call::dv}};
    for (const Kernels* kernels : context.kernels) {
        const std::string wrong = check_on<Call>(*kernels, "linear attention", c, all, context);
        if (!wrong.empty()) return wrong + "\n  " + c.describe();
    }
    return "";
}

}  // namespace harness
