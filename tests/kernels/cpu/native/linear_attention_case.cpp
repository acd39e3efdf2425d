#include "linear_attention_case.h"

#include <cstdio>

#include "draw.h"

namespace harness {
namespace {

using namespace efficient_attn;

// Timelines of several segments: a segment has 1024 places or four times the features.
void draw_long(Random& random, LinearAttentionCase& c) {
    c.B = c.Hkv = 1;
    c.Hq = random.integer(1, 2);
    c.D = random.integer(1, 16);
    c.Dv = random.integer(1, 16);
    const int64_t many = random.integer(1000, random.choose<int64_t>({1100, 2200, 3400})), few = random.integer(1, 20);
    switch (random.integer(0, 15)) {
        case 0:  // a timeline has at most 64 segments: these are longer ones
            c.Hq = 1, c.D = random.integer(1, 2), c.Dv = random.integer(1, 2);
            c.Nk = random.integer(65530, 67000), c.Nq = random.integer(1, 2);
            break;
        case 1:
            c.D = random.integer(1, 3), c.Dv = random.integer(1, 3);
            c.Nq = c.Nk = random.integer(1000, 1200);
            break;
        case 2:
        case 3:
        case 4:
        case 5:
            c.Nk = few, c.Nq = many;
            break;
        default:
            c.Nk = many, c.Nq = few;
    }
}

void draw_sizes(Random& random, LinearAttentionCase& c) {
    if (random.chance(0.12)) return draw_long(random, c);
    c.B = random.choose<int64_t>({1, 1, 2, 3});
    c.Hkv = random.choose<int64_t>({1, 1, 2, 3});
    c.Hq = c.Hkv * random.choose<int64_t>({1, 1, 2, 3, 4});
    c.D = head_dim(random);
    c.Dv = random.chance(0.6) ? c.D : head_dim(random);
    const int64_t pairs = static_cast<int64_t>(budget(random) / static_cast<double>(c.B * c.Hq * (c.D + c.Dv))) + 1;
    const int64_t square = static_cast<int64_t>(std::sqrt(static_cast<double>(pairs))) + 1;
    if (random.chance(0.2)) {
        c.Nq = c.Nk = length(random, square);
    } else {
        c.Nq = length(random, random.chance(0.3) ? 3 : 2 * square);
        c.Nk = length(random, pairs / c.Nq + 1);
    }
    if (random.chance(0.04)) {
        switch (random.integer(0, 4)) {
            case 0:
                c.B = 0;
                break;
            case 1:
                c.Hq = c.Hkv = 0;
                break;
            case 2:
                c.Nq = 0;
                break;
            case 3:
                c.Dv = 0;
                break;
            default:
                c.Nk = 0;
        }
    }
}

void draw_features(Random& random, LinearAttentionCase& c) {
    c.feature_map = random.choose<int64_t>({kIdentity, kElu, kRelu, kExponential, kExponential});
    c.F = c.D, c.root = 1, c.gain = 1, c.floor = 0, c.limit = 30;
    if (c.feature_map == kExponential || random.chance(0.25)) {
        c.projection_heads = random.chance(0.5) ? 1 : c.Hkv;
        c.F = random.choose<int64_t>({1, 2, 16, 31, 64, random.integer(1, 40), random.integer(1, 130)});
        c.root = std::pow(static_cast<double>(c.D), random.choose<double>({-0.25, -0.25, -0.5}));
        const bool half_open = c.feature_map == kRelu && random.chance(0.7);
        c.gain = half_open ? 1 / std::sqrt(static_cast<double>(c.F)) : 1;
        c.floor = half_open ? 1e-3 : 0;
        c.projection = contiguous(c.accumulator(), c.projection_heads, c.F, c.D, 1);
        const double spread = random.choose<double>({1, 1, 1.7});
        fill(random, c.projection, -spread, spread);
    }
    if (c.has_key_shift()) c.limit = random.choose<double>({30, 30, 2, 0.5});  // low: the shift rises often
}

void draw_masks(Random& random, LinearAttentionCase& c) {
    c.is_causal = random.chance(0.6);
    const int64_t last = c.Nk - c.Nq;
    if (c.is_causal)
        c.causal_offset = random.choose<int64_t>({0, 0, 0, last, last, last + random.integer(-70, 70),
                                                  random.integer(-c.Nq - 3, c.Nk + 3), random.integer(-70, 70),
                                                  INT64_MAX, INT64_MIN});
    if (!(c.has_key_mask = random.chance(0.4))) return;
    c.key_mask.assign(static_cast<size_t>(c.B * c.Nk), 1);
    const double density = random.choose<double>({0, 0.05, 0.5, 0.95});
    const int64_t longest = random.choose<int64_t>({1, 100, 2000});  // runs of keys that are there or are not
    for (size_t n = 0; n < c.key_mask.size();) {
        const uint8_t there = random.chance(density);
        for (int64_t run = random.integer(1, longest); run > 0 && n < c.key_mask.size(); --run) c.key_mask[n++] = there;
    }
}

// NaN and infinity in some rows: whoever does not see them must not notice. Without causality every query sees every
// key that is there.
void poison(Random& random, LinearAttentionCase& c) {
    const double there = c.is_causal ? 0.03 : random.chance(0.1) ? 0.03 : 0;
    for (int64_t b = 0; b < c.B; ++b) {
        for (int64_t h = 0; h < c.Hkv; ++h) {
            for (int64_t j = 0; j < c.Nk; ++j) {
                if (!random.chance(c.key_is_there(b, j) ? there : 0.5)) continue;
                const double x = random.choose<double>({NAN, INFINITY, -INFINITY});
                if (random.chance(0.7)) c.key.set(b, h, j, random.integer(0, c.D - 1), x);
                if (c.Dv > 0 && random.chance(0.7)) c.value.set(b, h, j, random.integer(0, c.Dv - 1), x);
            }
        }
        for (int64_t h = 0; h < (c.Nq > 0 && (c.is_causal || random.chance(0.1)) ? c.Hq : 0); ++h) {
            const int64_t i = random.integer(0, c.Nq - 1);
            if (random.chance(0.5)) c.query.set(b, h, i, random.integer(0, c.D - 1), NAN);
            if (c.Dv > 0 && random.chance(0.5)) c.grad_out.set(b, h, i, random.integer(0, c.Dv - 1), NAN);
        }
    }
}

int other_dtype(Random& random, int dtype) {
    if (dtype == kFloat64 || random.chance(0.7)) return dtype;
    return static_cast<int>(random.choose<int64_t>({kFloat32, kBFloat16, kFloat16}));
}

}  // namespace

std::string LinearAttentionCase::describe() const {
    static const char* const names[] = {"float32", "float64", "bfloat16", "float16"};
    static const char* const maps[] = {"identity", "elu", "relu", "exponential"};
    char text[512];
    std::snprintf(
        text, sizeof text,
        "features %s values %s B%ld Hq%ld Hkv%ld Nq%ld Nk%ld D%ld F%ld Dv%ld %s, projections %ld root %g gain "
        "%g floor %g limit %g, causal %s offset %ld, key mask %s, grad_normaliser %s",
        names[feature_dtype], names[value_dtype], B, Hq, Hkv, Nq, Nk, D, F, Dv, maps[feature_map], projection_heads,
        root, gain, floor, limit, is_causal ? "yes" : "no", causal_offset, has_key_mask ? "yes" : "no",
        has_grad_normaliser ? "yes" : "no");
    return text;
}

LinearAttentionCase random_linear_attention_case(uint64_t seed) {
    Random random(seed);
    LinearAttentionCase c{};
    c.value_dtype = static_cast<int>(random.integer(0, 3));
    c.feature_dtype = other_dtype(random, c.value_dtype);
    draw_sizes(random, c);
    draw_features(random, c);
    draw_masks(random, c);
    // Positive features keep the normaliser away from 0, where everything is ill-conditioned.
    const bool positive = c.feature_map == kIdentity && !c.projection_heads && random.chance(0.8);
    const double spread = random.choose<double>({1.0, 1.0, 2.0}), low = positive ? 0.2 : -spread;
    c.query = input(random, c.feature_dtype, c.B, c.Hq, c.Nq, c.D, low, spread);
    c.key = input(random, c.feature_dtype, c.B, c.Hkv, c.Nk, c.D, low, spread);
    c.value = input(random, c.value_dtype, c.B, c.Hkv, c.Nk, c.Dv, -1, 1);
    c.grad_out = input(random, c.value_dtype, c.B, c.Hq, c.Nq, c.Dv, -1, 1);
    if (random.chance(0.15)) poison(random, c);
    c.normaliser = contiguous(c.accumulator(), c.B, c.Hq, c.Nq, 1);
    c.grad_normaliser = c.normaliser;
    c.has_grad_normaliser = random.chance(0.3) && !c.has_key_shift();  // there n is known up to a factor
    if (c.has_grad_normaliser) fill(random, c.grad_normaliser, -1, 1);
    const int64_t rows = c.is_causal ? (c.Nk + 63) / 64 + 1 : 1, constants = c.Hkv ? c.Hq / c.Hkv * c.Nq : 0;
    c.key_shift = contiguous(c.accumulator(), c.has_key_shift() ? c.B : 0, c.Hkv, rows * c.F + constants, 1);
    c.out = random_layout(random, c.value_dtype, c.B, c.Hq, c.Nq, c.Dv);
    c.dq = random_layout(random, c.feature_dtype, c.B, c.Hq, c.Nq, c.D);
    c.dk = random_layout(random, c.feature_dtype, c.B, c.Hkv, c.Nk, c.D);
    c.dv = random_layout(random, c.value_dtype, c.B, c.Hkv, c.Nk, c.Dv);
    return c;
}

}  // namespace harness
