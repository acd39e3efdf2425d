// One random attention call: sizes, tensors, mask, bias and dropout, all decided by a seed.
#pragma once

#include <string>
#include <vector>

#include "image.h"

namespace harness {

// The arrays of a BlockMask (efficient_attn/masks/block_mask.py), and the same mask written out pair by pair.
struct Mask {
    int64_t batch = 1, heads = 1, block_q = 128, block_k = 128;
    int64_t window_left = -1, window_right = -1, window_offset = 0;
    bool listed = false;
    std::vector<int64_t> indptr, t_indptr;
    std::vector<int32_t> indices, tile_ids, t_indices, t_tile_ids;
    std::vector<uint8_t> tiles;
    std::vector<int32_t> kv_lengths;  // empty: every key
    std::vector<uint8_t> pairs;       // [batch][heads][Nq][Nk], 1 where the list allows the pair

    int64_t tile_count() const { return static_cast<int64_t>(tiles.size()) / (block_q * block_k / 8); }
};

// Which of a tensor's rows each row of a call is, one line for all, for each head, or for each batch element and head.
struct Order {
    std::vector<int32_t> rows;  // empty: row i is row i
    int64_t batch_stride = 0, head_stride = 0;

    int64_t of(int64_t b, int64_t h, int64_t i) const {
        return rows.empty() ? i : rows[static_cast<size_t>(b * batch_stride + h * head_stride + i)];
    }
};

// The same keys and values on pages of a pool: row i of batch element b is row i % rows of page
// table[b * table_stride + i / rows].
struct Pages {
    int64_t rows = 0, table_stride = 0;
    std::vector<int32_t> table;  // empty: the forward reads them as the backward does
    Image key, value;            // (pages, Hkv, rows, D); what no row of the call lies on is NaN
};

struct AttentionCase {
    int dtype;
    int64_t B, Hq, Hkv, Nq, Nk, D, Dv;
    int64_t query_rows, key_rows;  // of the tensors; Nq and Nk where there is no order
    Order query_order, key_order;
    double scale, dropout_p;
    uint64_t dropout_seed;
    Image query, key, value, grad_out;
    bool has_bias, wants_bias_gradient, has_grad_lse;
    Image bias, grad_lse;
    int64_t weight_heads;                        // 0: no weights are asked for; 1: their average over the heads
    Image out, lse, weights, dq, dk, dv, dbias;  // layouts, every byte unwritten
    Mask mask;
    Pages pages;

    int accumulator() const { return dtype == kFloat64 ? kFloat64 : kFloat32; }
    bool visible(int64_t b, int64_t h, int64_t i, int64_t j) const;
    bool has_order() const { return !query_order.rows.empty() || !key_order.rows.empty(); }
    int64_t query_of(int64_t b, int64_t h, int64_t i) const { return query_order.of(b, h, i); }
    int64_t key_of(int64_t b, int64_t h, int64_t j) const { return key_order.of(b, h / (Hq / Hkv), j); }
    std::string describe() const;
};

AttentionCase random_attention_case(uint64_t seed);

// Makes the lists of a case say what no BlockMask can: indices, tiles, pointers and lengths out of range.
void corrupt_lists(Random& random, AttentionCase& c);

}  // namespace harness
