// The arguments of one attention call as plain data: what Python hands over and every kernel reads.
//
// Letters: B batch, Hq query heads, Hkv key/value heads, Nq queries, Nk keys, D and Dv head dimensions.
// No member functions here: this header is compiled once per instruction set and must not emit shared symbols.
#pragma once

#include <cstdint>

namespace efficient_attn {

enum DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// A (B, H, N, D) tensor whose last dimension has stride 1; strides count elements. With an order, row i of a call is
// the tensor's row order[b * order_batch_stride + h * order_head_stride + i] (CPU only). With pages, the tensor is
// (pages, H, page_rows, D), and row i of batch element b is row i % page_rows of page
// pages[b * pages_batch_stride + i / page_rows] (CPU only, keys and values of a forward).
struct TensorView {
    void* data;
    int64_t batch_stride, head_stride, row_stride;
    const int32_t* order = nullptr;  // null: row i
    int64_t order_batch_stride = 0, order_head_stride = 0;
    const int32_t* pages = nullptr;  // null: none; else of every row below Nk, whatever a mask says of it
    int64_t page_rows = 0, pages_batch_stride = 0;
};

// Additive bias, each dimension 1 or full of (B, Hq, Nq, Nk); a broadcast dimension has stride 0.
struct BiasView {
    const void* data;
    int64_t stride[4];
    int dtype;
};

// A bias by relative position: what is added to pair (i, j) stands at i - j + Nk - 1 of a line of Nq + Nk - 1 numbers
// of the accumulation type, 64 of which may be read beyond its end; a stride of 0 broadcasts over batch or heads.
struct DiagonalView {
    const void* data;  // null: none
    int64_t batch_stride, head_stride;
    int64_t hides;  // whether one of them is -inf
};

// The gradient of the bias: contiguous, with the bias's own shape (size 1 where it broadcasts).
struct BiasGradient {
    void* data;
    int64_t size[4];
    int dtype;
};

// What attention multiplies the values with, or the gradient of it: (B, heads, Nq, Nk), of every query head, or of one
// "head" for all: their average.
struct WeightsView {
    void* data;  // null: not wanted
    int64_t stride[4];
    int64_t heads;
};

// Pair (i, j) is visible when list, window and length all allow it; see efficient_attn/masks/block_mask.py.
struct MaskView {
    const int64_t* indptr;  // null: no list
    const int32_t* indices;
    const int32_t* tile_ids;
    const uint8_t* tiles;
    const int64_t* t_indptr;  // the same lists by key block, for the backward
    const int32_t* t_indices;
    const int32_t* t_tile_ids;
    const int32_t* kv_lengths;  // null: every key
    int64_t entries, tile_count;
    int64_t batch, heads, block_q, block_k;
    int64_t rows_alike;  // so many rows of the list in turn say the same and are one, of block_q queries; 0: none are
    int64_t window_left, window_right, window_offset;  // -1: unlimited
};

// Where the tensors have an order, Nq and Nk count the rows that it names: tiles, lists and windows are in its
// coordinates, while lse, bias, dropout and lengths go by the tensors' own rows. Of results that name fewer rows than
// there are, the others are left as they are.
struct AttentionParams {
    int dtype;
    int64_t B, Hq, Hkv, Nq, Nk, D, Dv;
    int64_t query_rows, key_rows;  // of the tensors: Nq and Nk where there is no order
    int64_t page_count;            // of keys and values that are on pages
    TensorView query, key, value, out;
    void* lse;  // (B, Hq, query_rows) contiguous, float32 or float64; in a CPU forward null: not wanted
    BiasView bias;
    DiagonalView diagonals;
    MaskView mask;
    double scale, dropout_p;
    double softcap;     // 0: none; c: scaled scores x become c tanh(x / c), before any bias
    const void* sinks;  // (Hq), of the accumulation type: a score beside those of the keys, without a value; null: none
    uint64_t dropout_seed;
    int64_t dropout_head, dropout_query, dropout_key;  // the pair (0, 0) of head 0 as dropout counts: a part's origin
    WeightsView weights;  // of the forward a result, of the backward a gradient; in the call's dtype
    int64_t continues;    // out and lse hold results for other keys, which are joined; dq, dk and dv are added to (CPU)
    int threads;          // how many will run it; decides the order of work, never the bits

    // Backward only.
    TensorView grad_out, dq, dk, dv;
    const void* grad_lse;  // like lse, or null
    BiasGradient dbias;    // data null: not wanted
    void* delta;           // a result: delta of every row, (B, Hq, Nq), like lse; null: not wanted
    void* ddiagonals;      // (B, Hq, Nq + Nk - 1) of the accumulation type, zeros at first; null: not wanted

    // Of the CPU, which sets them itself: see cpu/bands.h.
    int64_t band_keys, band_overlap, band_tiles;
    int64_t copies_keys;  // whether tasks copy their keys and values once for all of their tiles
};

// One pass over the weights of a call for what is known of them; see cpu/attention_statistics.h. `out` and `value` of
// the call are not read. All results are contiguous, of the accumulation type, a null pointer or a count of 0 where not
// wanted.
struct StatisticsParams {
    AttentionParams attention;
    void *entropy, *distance, *nearby;  // (B, Hq, Nq)
    void* shares;                       // (B, Hq, Nq, set_count)
    void* top_weights;                  // (B, Hq, Nq, top), descending
    int32_t* top_keys;                  // likewise; -1: no such key
    void* received;                     // (1 + row_weight_count, B, Hq, chunks, Nk), zeros at first
    void* map;                          // (B, Hq, blocks of queries, blocks of keys), zeros at first
    const void* row_weights;            // (row_weight_count, B, Hq, Nq)
    const uint32_t* key_sets;           // (B, Nk): bit s of a key's word says whether it is in set s
    int64_t key_sets_stride;            // from one batch element to the next; 0: one for all
    int64_t set_count, top, row_weight_count, map_block;
    int64_t chunk_rows;       // query rows of a task; a multiple of map_block
    int64_t position_offset;  // query i stands at key i + position_offset
    double nearby_window;
};

enum FeatureMap : int { kIdentity = 0, kElu = 1, kRelu = 2, kExponential = 3 };

// a = phi(query), b = phi(key); u = root * projection x where there is a projection, else x, and phi(u) is
//     kIdentity  u          kElu  elu(u) + 1          kRelu  max(u, 0) * gain + floor
//     kExponential  e^u, with a projection Performer's softmax features, for a key e^(u - |root x|^2 / 2)
struct LinearAttentionParams {
    int feature_dtype, value_dtype;        // of query, key, dq, dk; of value, out, grad_out, dv
    int64_t B, Hq, Hkv, Nq, Nk, D, F, Dv;  // F = D without a projection
    TensorView query, key, value, out;
    void* normaliser;         // (B, Hq, Nq) contiguous, float32 or float64 like all that follows
    void* key_shift;          // (B, Hkv, S) contiguous: exponents that were taken off kElu and kExponential; null: none
    const uint8_t* key_mask;  // (B, Nk) contiguous; null: every key
    const void* projection;   // (projection_heads, F, D) contiguous; null: none
    int64_t projection_heads;  // 1 or Hkv
    int64_t feature_map;
    double root, gain, floor, limit;   // limit: how far a key's exponent may exceed the shift
    int64_t is_causal, causal_offset;  // causal: query i sees the keys j <= i + causal_offset
    int threads;                       // decides on the schedule, never on the bits

    // Backward only.
    TensorView grad_out, dq, dk, dv;
    const void* grad_normaliser;  // like normaliser, or null
};

// What one instruction set offers. A call is a few phases; a phase is a number of tasks that any thread may take, in
// order. Every task writes its own results (or adds in a fixed order), so that the bits do not depend on the threads.
template <class Params>
struct Operator {
    int phases;
    void (*prepare)(Params&);  // null: nothing is to be known of a call beforehand
    int64_t (*shared_bytes)(const Params&);
    int64_t (*thread_bytes)(const Params&);
    int64_t (*task_count)(const Params&, int phase);
    double (*task_cost)(const Params&, int phase, int64_t task);  // null, or below 0: tasks in their own order
    bool (*is_short)(const Params&, int phase);                   // null: no phase is too short for a second thread
    void (*run_task)(const Params&, int phase, int64_t task, char* thread_memory, char* shared_memory);
};

struct Kernels {
    const char* name;
    const Operator<AttentionParams>*forward, *backward;
    const Operator<StatisticsParams>* statistics;
    const Operator<LinearAttentionParams>*linear_forward, *linear_backward;
    int64_t (*fma_loop)(int64_t steps);  // cpu/peak.h; returns the operations done
    const Kernels* others;               // null, or attention on all types but bfloat16 is theirs
};

}  // namespace efficient_attn
