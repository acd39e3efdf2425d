// With s_ij = scale q_i . k_j + bias_ij over visible pairs, P = softmax(s), Z the dropout factor (0 or 1 / (1 - p)):
//
//     out = (Z P) V     lse_i = log sum_j exp s_ij     delta_i = dO_i . O_i - dlse_i     dS = P (Z (dO V^T) - delta)
//     dV = (Z P)^T dO   dQ = scale dS K                dK = scale dS^T Q                 dbias = dS
//
// Bounds: a score of size a is off by a few units of a's last place, hence a weight P by a relative r_i; every sum is
// off by its terms' absolute values times that, and times what their roundings may add up to. Half precision may also
// round P and dS before they enter a product. In float a weight below 2^-100 may count as 0.
#include "attention_reference.h"

#include <algorithm>

namespace harness {
namespace {

// Philox4x32-10 (Salmon et al., SC 2011), one counter, as the paper writes it.
void philox(uint64_t seed, uint32_t (&c)[4]) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        const uint64_t p0 = uint64_t{0xD2511F53u} * c[0], p1 = uint64_t{0xCD9E8D57u} * c[2];
        const uint32_t next[4] = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1),
                                  static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p0)};
        for (int n = 0; n < 4; ++n) c[n] = next[n];
    }
}

// Contract rule 6: which counter and word decide a pair.
bool kept(const AttentionCase& c, int64_t b, int64_t h, int64_t i, int64_t j) {
    if (c.dropout_p == 0) return true;
    uint32_t counter[4] = {static_cast<uint32_t>(j >> 1), static_cast<uint32_t>((i >> 4) * 8 + (i & 7)),
                           static_cast<uint32_t>(h), static_cast<uint32_t>(b)};
    philox(c.dropout_seed, counter);
    return counter[(i >> 3 & 1) * 2 + (j & 1)] >= static_cast<uint64_t>(c.dropout_p * 4294967296.0);
}

struct Dot {
    double value, size;  // size: the sum of the terms' absolute values
};

Dot dot(const double* x, const double* y, int64_t n) {
    Dot d{0, 0};
    for (int64_t k = 0; k < n; ++k) d.value += x[k] * y[k], d.size += std::fabs(x[k] * y[k]);
    return d;
}

struct Definition {
    AttentionCase& c;
    const std::vector<double> query, key, value, grad_out, bias, grad_lse;
    AttentionResults results;
    const double unit, product_unit;     // of the accumulator, and of P and dS where they enter a product
    std::vector<int64_t> seen;           // the keys of one row
    std::vector<double> weight, factor;  // P and Z for them

    explicit Definition(AttentionCase& given)
        : c(given),
          query(c.query.values()),
          key(c.key.values()),
          value(c.value.values()),
          grad_out(c.grad_out.values()),
          bias(c.has_bias ? c.bias.values() : std::vector<double>()),
          grad_lse(c.has_grad_lse ? c.grad_lse.values() : std::vector<double>()),
          unit(epsilon(c.accumulator())),
          product_unit(element_bytes(c.dtype) == 2 ? epsilon(c.dtype) : 0) {
        results.out = Bounded(c.out.count());
        results.lse = Bounded(c.lse.count());
        for (double& lse : results.lse.value) lse = -INFINITY;
        results.weights = Bounded(c.weights.count());
        results.dq = Bounded(c.dq.count());
        results.dk = Bounded(c.dk.count());
        results.dv = Bounded(c.dv.count());
        results.dbias = Bounded(c.has_bias ? c.dbias.count() : 0);
    }

    int64_t bias_at(int64_t b, int64_t h, int64_t i, int64_t j) const {
        const int64_t* size = c.bias.size;
        const int64_t at[4] = {b, h, i, j};
        int64_t place = 0;
        for (int dim = 0; dim < 4; ++dim) place = place * size[dim] + (size[dim] == 1 ? 0 : at[dim]);
        return place;
    }

    // How far a sum of n terms may be off, relative to their absolute values. Where they are all alike, so is their
    // rounding: a kernel adds up tiles of 64.
    double walk(double n) const { return unit * (2 * std::sqrt(n) + n / 32); }

    // How far a weight may be off, relative to itself, where those that count are off by `relative`.
    double off(double weight, double relative) const {
        const bool may_be_dropped = c.accumulator() == efficient_attn::kFloat32 && weight < 0x1p-99;
        return may_be_dropped ? std::max(relative, 1.0) : relative;
    }

    void row(int64_t b, int64_t h, int64_t i) {
        const int64_t kv = h / (c.Hq / c.Hkv), kv_row = (b * c.Hkv + kv) * c.key_rows;
        const int64_t row = c.query_of(b, h, i), at = (b * c.Hq + h) * c.query_rows + row;
        const double* q = query.data() + at * c.D;
        const double* dO = grad_out.data() + at * c.Dv;
        seen.clear(), weight.clear();
        double top = -INFINITY, largest = 0;
        for (int64_t column = 0; column < c.Nk; ++column) {
            if (!c.visible(b, h, i, column)) continue;
            const int64_t j = c.key_of(b, h, column);
            const double extra = c.has_bias ? bias[static_cast<size_t>(bias_at(b, h, row, j))] : 0;
            if (extra == -INFINITY) continue;
            const Dot score = dot(q, key.data() + (kv_row + j) * c.D, c.D);
            seen.push_back(j);
            weight.push_back(c.scale * score.value + extra);
            top = std::max(top, weight.back());
            largest = std::max(largest, std::fabs(c.scale) * score.size + std::fabs(extra));
        }
        if (seen.empty()) return;
        results.lse.value[static_cast<size_t>(at)] = 0;
        Bounded sum(1);
        for (double& w : weight) sum.add(0, w = std::exp(w - top), 0);
        const double total = sum.settle(0);
        for (double& w : weight) w /= total;
        const double relative = kUnits * unit * (2 + largest) + walk(static_cast<double>(seen.size()));
        results.lse.add(at, top + std::log(total), relative + 2 * unit * std::fabs(top));
        forward(b, h, row, at, kv_row, relative);
        backward(b, h, row, at, kv_row, q, dO, relative);
    }

    void forward(int64_t b, int64_t h, int64_t i, int64_t at, int64_t kv_row, double relative) {
        const double keep_factor = 1 / (1 - c.dropout_p);
        factor.clear();
        for (size_t n = 0; n < seen.size(); ++n) {
            factor.push_back(kept(c, b, h, i, seen[n]) ? keep_factor : 0);
            const double* v = value.data() + (kv_row + seen[n]) * c.Dv;
            const double w = factor[n] * weight[n], loose = off(weight[n], relative) + 2 * product_unit;
            for (int64_t d = 0; d < c.Dv; ++d) results.out.add(at * c.Dv + d, w * v[d], w * std::fabs(v[d]) * loose);
        }
        for (int64_t d = 0; d < c.Dv; ++d) results.out.settle(at * c.Dv + d);
        if (c.weight_heads > 0) weights(b, h, i, relative);
    }

    // Where one weight of a row is NaN, so may be those of what is hidden from it.
    void weights(int64_t b, int64_t h, int64_t i, double relative) {
        const bool average = c.weight_heads < c.Hq;
        const double share = average ? 1.0 / static_cast<double>(c.Hq) : 1;
        const int64_t row = ((b * c.weight_heads + (average ? 0 : h)) * c.Nq + i) * c.Nk;
        double sum = 0;
        for (size_t n = 0; n < seen.size(); ++n) {
            const double w = factor[n] * weight[n] * share;
            results.weights.add(row + seen[n], w, w * off(weight[n], relative));
            sum += weight[n];
        }
        for (int64_t j = 0; std::isnan(sum) && j < c.Nk; ++j) results.weights.add(row + j, NAN, NAN);
    }

    void backward(int64_t b, int64_t h, int64_t i, int64_t at, int64_t kv_row, const double* q, const double* dO,
                  double relative) {
        const Dot from_out = dot(dO, results.out.value.data() + at * c.Dv, c.Dv);
        const Dot out_error = dot(dO, results.out.error.data() + at * c.Dv, c.Dv);
        const double lse_gradient = c.has_grad_lse ? grad_lse[static_cast<size_t>(at)] : 0;
        const double delta = from_out.value - lse_gradient;
        // The kernel reads an out that was rounded, below the normal numbers to a fixed step.
        double stored = epsilon(c.dtype) * from_out.size + out_error.size;
        for (int64_t d = 0; d < c.Dv; ++d) stored += smallest(c.dtype) * std::fabs(dO[d]);
        const double pairs = static_cast<double>(c.B * c.Hq * c.query_rows * c.key_rows);
        const double over_queries = walk(static_cast<double>(c.Hq / c.Hkv * c.Nq));
        const double over_bias = c.has_bias ? walk(pairs / static_cast<double>(c.bias.count())) : 0;
        for (size_t n = 0; n < seen.size(); ++n) {
            const int64_t j = kv_row + seen[n];
            const double loose = off(weight[n], relative) + 2 * product_unit;
            const Dot g = dot(dO, value.data() + j * c.Dv, c.Dv);
            const double dS = weight[n] * (factor[n] * g.value - delta);
            const double size = factor[n] * g.size + from_out.size + std::fabs(lse_gradient);
            const double error = weight[n] * (loose * size + stored);
            for (int64_t d = 0; d < c.Dv; ++d) {
                const double x = factor[n] * weight[n] * dO[d];
                results.dv.add(j * c.Dv + d, x, (loose + over_queries) * std::fabs(x));
            }
            const double* k = key.data() + j * c.D;
            const double scale = c.scale, size_of_scale = std::fabs(scale);
            for (int64_t d = 0; d < c.D; ++d) {
                results.dq.add(at * c.D + d, scale * dS * k[d], size_of_scale * error * std::fabs(k[d]));
                results.dk.add(j * c.D + d, scale * dS * q[d],
                               size_of_scale * (error + over_queries * weight[n] * size) * std::fabs(q[d]));
            }
            if (c.has_bias) results.dbias.add(bias_at(b, h, i, seen[n]), dS, error + over_bias * weight[n] * size);
        }
    }
};

}  // namespace

AttentionResults attention_reference(AttentionCase& c) {
    Definition definition(c);
    for (int64_t b = 0; b < c.B; ++b)
        for (int64_t h = 0; h < c.Hq; ++h)
            for (int64_t i = 0; i < c.Nq; ++i) definition.row(b, h, i);
    AttentionResults results = std::move(definition.results);
    for (Bounded* result : {&results.weights, &results.dq, &results.dk, &results.dv, &results.dbias}) result->settle();
    const double terms = static_cast<double>(c.Nq + c.Nk);  // each may have been flushed on its own
    for (Bounded* result : {&results.out, &results.weights, &results.dq, &results.dk, &results.dv})
        round_to(c.dtype, c.dtype == kFloat16 ? 1 : 64 * terms, *result);
    round_to(c.accumulator(), 0, results.lse);
    if (c.has_bias) round_to(c.dbias.dtype, 64 * terms, results.dbias);
    return results;
}

}  // namespace harness
