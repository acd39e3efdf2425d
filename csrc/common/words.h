// A call as Python hands it over: one bytes object of 8-byte words, in the order in which backends/words.py packs them.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "params.h"

namespace efficient_attn {
namespace {

class Reader {
  public:
    explicit Reader(const std::string& words) : next_(words.data()), end_(words.data() + words.size()) {}

    template <class X>
    X take() {
        static_assert(sizeof(X) == 8, "every field is one word");
        if (next_ + 8 > end_) throw std::invalid_argument("efficient_attn: the packed arguments are too short");
        X x;
        std::memcpy(&x, next_, 8);
        next_ += 8;
        return x;
    }
    int64_t integer() { return take<int64_t>(); }
    template <class X = void>
    X* pointer() {
        return reinterpret_cast<X*>(take<int64_t>());
    }
    TensorView view() {
        TensorView t;
        t.data = pointer();
        t.batch_stride = integer();
        t.head_stride = integer();
        t.row_stride = integer();
        return t;
    }
    void finish() const {
        if (next_ != end_) throw std::invalid_argument("efficient_attn: the packed arguments are too long");
    }

  private:
    const char* next_;
    const char* end_;
};

// How many rows the tensors have, and their order.
inline void read_order(Reader& in, std::initializer_list<TensorView*> tensors, int64_t* rows) {
    *rows = in.integer();
    const int32_t* order = in.pointer<const int32_t>();
    const int64_t batch_stride = in.integer(), head_stride = in.integer();
    for (TensorView* t : tensors) {
        t->order = order;
        t->order_batch_stride = batch_stride;
        t->order_head_stride = head_stride;
    }
}

inline TensorView in_order_of(TensorView t, const TensorView& other) {
    t.order = other.order;
    t.order_batch_stride = other.order_batch_stride;
    t.order_head_stride = other.order_head_stride;
    return t;
}

inline AttentionParams read_call(Reader& in) {
    AttentionParams p{};
    p.dtype = static_cast<int>(in.integer());
    for (int64_t* size : {&p.B, &p.Hq, &p.Hkv, &p.Nq, &p.Nk, &p.D, &p.Dv}) *size = in.integer();
    p.scale = in.take<double>();
    p.dropout_p = in.take<double>();
    p.dropout_seed = in.take<uint64_t>();
    for (int64_t* first : {&p.dropout_head, &p.dropout_query, &p.dropout_key}) *first = in.integer();
    p.query = in.view();
    p.key = in.view();
    p.value = in.view();
    p.out = in.view();
    p.lse = in.pointer();
    p.bias.data = in.pointer();
    p.bias.dtype = static_cast<int>(in.integer());
    for (int64_t& stride : p.bias.stride) stride = in.integer();
    p.weights.data = in.pointer();
    for (int64_t& stride : p.weights.stride) stride = in.integer();
    p.weights.heads = in.integer();
    p.softcap = in.take<double>();
    p.sinks = in.pointer<const void>();
    p.diagonals.data = in.pointer<const void>();
    for (int64_t* number : {&p.diagonals.batch_stride, &p.diagonals.head_stride, &p.diagonals.hides})
        *number = in.integer();
    MaskView& mask = p.mask;
    for (int64_t* number : {&mask.batch, &mask.heads, &mask.block_q, &mask.block_k, &mask.window_left,
                            &mask.window_right, &mask.window_offset, &mask.entries, &mask.tile_count})
        *number = in.integer();
    mask.indptr = in.pointer<const int64_t>();
    mask.indices = in.pointer<const int32_t>();
    mask.tile_ids = in.pointer<const int32_t>();
    mask.tiles = in.pointer<const uint8_t>();
    mask.t_indptr = in.pointer<const int64_t>();
    mask.t_indices = in.pointer<const int32_t>();
    mask.t_tile_ids = in.pointer<const int32_t>();
    mask.kv_lengths = in.pointer<const int32_t>();
    read_order(in, {&p.query, &p.out}, &p.query_rows);
    read_order(in, {&p.key, &p.value}, &p.key_rows);
    p.continues = in.integer();
    p.key.pages = p.value.pages = in.pointer<const int32_t>();
    p.key.page_rows = p.value.page_rows = in.integer();
    p.key.pages_batch_stride = p.value.pages_batch_stride = in.integer();
    p.page_count = in.integer();
    return p;
}

inline AttentionParams read_params(const std::string& words, bool backward) {
    Reader in(words);
    AttentionParams p = read_call(in);
    if (backward) {
        p.grad_out = in_order_of(in.view(), p.query);
        p.dq = in_order_of(in.view(), p.query);
        p.dk = in_order_of(in.view(), p.key);
        p.dv = in_order_of(in.view(), p.key);
        p.grad_lse = in.pointer();
        p.dbias.data = in.pointer();
        p.dbias.dtype = p.bias.dtype;
        for (int64_t& size : p.dbias.size) size = in.integer();
        p.delta = in.pointer();
        p.ddiagonals = in.pointer();
    }
    in.finish();
    return p;
}

inline StatisticsParams read_statistics_params(const std::string& words) {
    Reader in(words);
    StatisticsParams p{};
    p.attention = read_call(in);
    for (void** result : {&p.entropy, &p.distance, &p.nearby, &p.shares, &p.top_weights}) *result = in.pointer();
    p.top_keys = in.pointer<int32_t>();
    p.received = in.pointer();
    p.map = in.pointer();
    p.row_weights = in.pointer<const void>();
    p.key_sets = in.pointer<const uint32_t>();
    for (int64_t* number : {&p.key_sets_stride, &p.set_count, &p.top, &p.row_weight_count, &p.map_block, &p.chunk_rows,
                            &p.position_offset})
        *number = in.integer();
    p.nearby_window = in.take<double>();
    in.finish();
    return p;
}

inline LinearAttentionParams read_linear_params(const std::string& words, bool backward) {
    Reader in(words);
    LinearAttentionParams p{};
    p.feature_dtype = static_cast<int>(in.integer());
    p.value_dtype = static_cast<int>(in.integer());
    for (int64_t* size : {&p.B, &p.Hq, &p.Hkv, &p.Nq, &p.Nk, &p.D, &p.F, &p.Dv, &p.projection_heads, &p.feature_map,
                          &p.is_causal, &p.causal_offset})
        *size = in.integer();
    for (double* number : {&p.root, &p.gain, &p.floor, &p.limit}) *number = in.take<double>();
    for (TensorView* view : {&p.query, &p.key, &p.value, &p.out}) *view = in.view();
    p.normaliser = in.pointer();
    p.key_shift = in.pointer();
    p.key_mask = in.pointer<const uint8_t>();
    p.projection = in.pointer();
    if (backward) {
        for (TensorView* view : {&p.grad_out, &p.dq, &p.dk, &p.dv}) *view = in.view();
        p.grad_normaliser = in.pointer();
    }
    in.finish();
    return p;
}

}  // namespace
}  // namespace efficient_attn
