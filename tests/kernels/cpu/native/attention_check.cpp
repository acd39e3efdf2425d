#include "attention_reference.h"
#include "check.h"

namespace harness {
namespace {

using efficient_attn::AttentionParams;
using efficient_attn::Kernels;

// A case's tensors and mask between guard pages, and the arguments that point at them.
struct Call {
    Placed query, key, value, grad_out, bias, grad_lse, out, lse, weights, dq, dk, dv, dbias, key_pages, value_pages;
    std::vector<Guarded> lists;
    AttentionParams p{};
    efficient_attn::TensorView paged_key{}, paged_value{};  // of the forward, where keys and values lie on pages
    efficient_attn::WeightsView asked{};

    Call(const AttentionCase& c, Flush flush)
        : query(c.query, flush),
          key(c.key, flush),
          value(c.value, flush),
          grad_out(c.grad_out, flush),
          bias(c.bias, flush),
          grad_lse(c.grad_lse, flush),
          out(c.out, flush),
          lse(c.lse, flush),
          weights(c.weights, flush),
          dq(c.dq, flush),
          dk(c.dk, flush),
          dv(c.dv, flush),
          dbias(c.dbias, flush),
          key_pages(c.pages.key, flush),
          value_pages(c.pages.value, flush) {
        p.dtype = c.dtype;
        p.B = c.B, p.Hq = c.Hq, p.Hkv = c.Hkv, p.Nq = c.Nq, p.Nk = c.Nk, p.D = c.D, p.Dv = c.Dv;
        p.query_rows = c.query_rows, p.key_rows = c.key_rows;
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
        if (c.weight_heads > 0) {
            asked.data = weights.data(), asked.heads = c.weight_heads;
            for (int dim = 0; dim < 4; ++dim) asked.stride[dim] = c.weights.stride[dim];
        }
        set_mask(c.mask, flush);
        set_order(c.query_order, flush, {&p.query, &p.out, &p.grad_out, &p.dq});
        set_order(c.key_order, flush, {&p.key, &p.value, &p.dk, &p.dv});
        paged_key = p.key, paged_value = p.value;
        if (c.pages.table.empty()) return;
        paged_key = key_pages.view(), paged_value = value_pages.view();
        const int32_t* table = list(c.pages.table, flush);
        for (efficient_attn::TensorView* t : {&paged_key, &paged_value})
            t->pages = table, t->page_rows = c.pages.rows, t->pages_batch_stride = c.pages.table_stride;
    }

    void set_order(const Order& order, Flush flush, std::initializer_list<efficient_attn::TensorView*> tensors) {
        const int32_t* rows = order.rows.empty() ? nullptr : list(order.rows, flush);
        for (efficient_attn::TensorView* t : tensors) {
            t->order = rows;
            t->order_batch_stride = order.batch_stride;
            t->order_head_stride = order.head_stride;
        }
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

    Inputs inputs() const {
        return {{"query", &query}, {"key", &key},           {"value", &value},         {"grad_out", &grad_out},
                {"bias", &bias},   {"grad_lse", &grad_lse}, {"key_pages", &key_pages}, {"value_pages", &value_pages}};
    }
    // with_gradient: the weights that were written are their own gradient in the backward.
    bool run(const Kernels& kernels, int threads, bool with_gradient = false) const {
        AttentionParams forward = p, backward = p;
        forward.weights = asked;
        forward.key = paged_key, forward.value = paged_value;
        if (with_gradient) backward.weights = asked;
        return efficient_attn::run(kernels, &Kernels::forward, forward, threads) &&
               efficient_attn::run(kernels, &Kernels::backward, backward, threads);
    }
};

// The results that a case has, with what the definition says of each.
std::vector<Result<Call>> results(const AttentionCase& c, const AttentionResults& expected) {
    std::vector<Result<Call>> all = {{"out", &expected.out, &Call::out},
                                     {"lse", &expected.lse, &Call::lse},
                                     {"dq", &expected.dq, &Call::dq},
                                     {"dk", &expected.dk, &Call::dk},
                                     {"dv", &expected.dv, &Call::dv}};
    if (c.weight_heads > 0) all.push_back({"weights", &expected.weights, &Call::weights});
    if (c.wants_bias_gradient) all.push_back({"dbias", &expected.dbias, &Call::dbias});
    return all;
}

}  // namespace

std::string check_attention(uint64_t seed, Context& context) {
    AttentionCase c = random_attention_case(seed);
    const AttentionResults expected = attention_reference(c);
    for (const Kernels* kernels : context.kernels) {
        const std::string wrong = check_on<Call>(*kernels, "attention", c, results(c, expected), context);
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
        for (const Run& how : context.runs()) {
            const std::string place = where(*kernels, how);
            context.now("malformed lists: " + c.describe() + place);
            const Call made(c, how.flush);
            context.calls += 2;
            if (!made.run(*kernels, how.threads, true)) return "run() was refused memory" + place;
            if (const std::string changed = written(made.inputs()); !changed.empty()) return changed + place;
            for (const Placed* result :
                 {&made.out, &made.lse, &made.weights, &made.dq, &made.dk, &made.dv, &made.dbias})
                if (!result->slack_is_unwritten() || !result->now().gaps_are_unwritten())
                    return "a result was written beside its elements" + place;
        }
    }
    return "";
}

}  // namespace harness
