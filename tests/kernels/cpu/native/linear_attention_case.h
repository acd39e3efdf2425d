// One random call of linear attention: sizes, tensors, feature map, projection and masks, all decided by a seed.
#pragma once

#include <string>
#include <vector>

#include "image.h"

namespace harness {

struct LinearAttentionCase {
    int feature_dtype, value_dtype;
    int64_t B, Hq, Hkv, Nq, Nk, D, F, Dv;
    int64_t feature_map, projection_heads;  // heads 0: no projection, F = D
    double root, gain, floor, limit;
    bool is_causal;
    int64_t causal_offset;
    bool has_key_mask, has_grad_normaliser;
    std::vector<uint8_t> key_mask;  // [B][Nk]
    Image query, key, value, projection, grad_out, grad_normaliser;
    Image out, normaliser, key_shift, dq, dk, dv;  // layouts, every byte unwritten

    int accumulator() const { return value_dtype == kFloat64 ? kFloat64 : kFloat32; }
    bool has_key_shift() const {
        return feature_map == efficient_attn::kExponential || feature_map == efficient_attn::kElu;
    }
    bool key_is_there(int64_t b, int64_t j) const {
        return !has_key_mask || key_mask[static_cast<size_t>(b * Nk + j)] != 0;
    }
    // Without overflow, whatever the offset.
    bool visible(int64_t b, int64_t i, int64_t j) const {
        return key_is_there(b, j) && (!is_causal || j - i <= causal_offset);
    }
    std::string describe() const;
};

LinearAttentionCase random_linear_attention_case(uint64_t seed);

}  // namespace harness
