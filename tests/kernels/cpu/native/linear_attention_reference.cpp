// With a = phi(q), b = phi(k) (features below), w_ij = a_i . b_j over visible pairs, v' = [v, 1]:
//
//     n_i = sum_j w_ij     out_i = sum_j w_ij v_j / n_i (0 where n_i = 0)     u_i = [dO_i / n_i, dn_i - dO_i . out_i /
//     n_i] da_i = sum_j (u_i . v'_j) b_j     db_j = sum_i (u_i . v'_j) a_i     dv_j = sum_i w_ij u_i
//
// and back through phi and u = root W x. Bounds: an exponent of size z is off by a few units of z's last place, every
// sum by a few units of its terms' absolute values and by what its terms are off. Where n_i is not known to half of
// itself, nothing is said of the row.
#include "linear_attention_reference.h"

#include <algorithm>

namespace harness {
namespace {

using namespace efficient_attn;

// phi and dphi/du of rows of features.
struct Features {
    Bounded phi, slope;
    explicit Features(int64_t count = 0) : phi(count), slope(count) {}
};

struct Definition {
    LinearAttentionCase& c;
    const std::vector<double> query, key, value, projection, grad_out, grad_normaliser;
    const double unit, tiny;  // of the accumulator
    Features a, b;
    Bounded shift, da, db;
    LinearAttentionResults results;
    Bounded weights;             // w_ij of one head, where the pair is visible
    Bounded u;                   // of one row, [Dv + 1]
    std::vector<uint8_t> known;  // whether something is said of a row

    explicit Definition(LinearAttentionCase& given)
        : c(given),
          query(c.query.values()),
          key(c.key.values()),
          value(c.value.values()),
          projection(c.projection_heads ? c.projection.values() : std::vector<double>()),
          grad_out(c.grad_out.values()),
          grad_normaliser(c.has_grad_normaliser ? c.grad_normaliser.values() : std::vector<double>()),
          unit(epsilon(c.accumulator())),
          tiny(smallest(c.accumulator())),
          a(c.B * c.Hq * c.Nq * c.F),
          b(c.B * c.Hkv * c.Nk * c.F),
          shift(c.B * c.Hkv * c.F),
          da(c.B * c.Hq * c.Nq * c.F),
          db(c.B * c.Hkv * c.Nk * c.F),
          u(c.Dv + 1),
          known(static_cast<size_t>(c.B * c.Hq * c.Nq), 1) {
        results.out = Bounded(c.out.count());
        results.normaliser = Bounded(c.normaliser.count());
        results.key_shift = Bounded(c.key_shift.count());
        results.dq = Bounded(c.dq.count());
        results.dk = Bounded(c.dk.count());
        results.dv = Bounded(c.dv.count());
    }

    const double* projection_of(int64_t kv) const {
        return projection.data() + (c.projection_heads == 1 ? 0 : kv) * c.F * c.D;
    }

    // u = root W x, or x.
    void project(const double* x, int64_t kv, double* u_row, double* error) const {
        for (int64_t f = 0; f < c.F; ++f) {
            if (!c.projection_heads) {
                u_row[f] = x[f], error[f] = 0;
                continue;
            }
            const double* W = projection_of(kv) + f * c.D;
            double sum = 0, size = 0;
            for (int64_t d = 0; d < c.D; ++d) sum += W[d] * x[d], size += std::fabs(W[d] * x[d]);
            u_row[f] = c.root * sum, error[f] = kUnits * unit * c.root * size;
        }
    }

    void plain_feature(double x, double off, double* phi, double* phi_off, double* slope, double* slope_off) const {
        const bool near_zero = off > 0 && std::fabs(x) <= off;
        if (c.feature_map == kIdentity) {
            *phi = x, *phi_off = off, *slope = 1;
        } else if (c.feature_map == kElu) {
            *phi = x > 0 ? x + 1 : std::exp(x);
            *phi_off = *phi * (off + kUnits * unit * (1 + std::fabs(x))) + tiny;
            *slope = x > 0 ? 1 : *phi;
            *slope_off = near_zero ? 2 * off : x > 0 ? 0 : *phi_off;
        } else {
            *phi = (x <= 0 ? 0 : x) * c.gain + c.floor;
            *slope = x > 0 ? c.gain : 0;
            *phi_off = c.gain * off + (*phi == 0 ? 0 : 2 * unit * (std::fabs(*phi) + std::fabs(c.floor)));
            *slope_off = near_zero ? std::fabs(c.gain) : unit * std::fabs(*slope);
        }
    }

    // Exponents of a key's softmax features, and what they are off.
    void key_exponents(const double* x, double* z, double* off) const {
        double norm = 0;
        for (int64_t d = 0; d < c.D; ++d) norm += c.root * c.root * x[d] * x[d] / 2;
        for (int64_t f = 0; f < c.F; ++f) z[f] -= norm, off[f] += kUnits * unit * (norm + std::fabs(z[f]));
    }

    void key_features() {
        for (int64_t unit_of = 0; unit_of < c.B * c.Hkv; ++unit_of) {
            const int64_t batch = unit_of / c.Hkv, kv = unit_of % c.Hkv, first = unit_of * c.Nk;
            const bool softmax = c.feature_map == kExponential;
            double *top = shift.values(unit_of * c.F), *top_off = shift.errors(unit_of * c.F);
            std::fill(top, top + c.F, -INFINITY);
            for (int64_t j = 0; j < c.Nk; ++j) {
                if (!c.key_is_there(batch, j)) continue;
                double *z = b.phi.values((first + j) * c.F), *off = b.phi.errors((first + j) * c.F);
                project(key.data() + (first + j) * c.D, kv, z, off);
                if (softmax) key_exponents(key.data() + (first + j) * c.D, z, off);
                for (int64_t f = 0; f < c.F; ++f) {
                    if (!(z[f] <= top[f])) top[f] = std::isnan(top[f]) ? NAN : z[f];  // NaN stays
                    top_off[f] = std::max(top_off[f], off[f]);
                }
            }
            for (int64_t f = 0; f < c.F; ++f)
                if (!softmax || top[f] == -INFINITY) top[f] = top_off[f] = 0;
            for (int64_t j = 0; j < c.Nk; ++j)
                if (c.key_is_there(batch, j)) map_key((first + j) * c.F, top, top_off);
        }
    }

    void map_key(int64_t at, const double* top, const double* top_off) {
        double *phi = b.phi.values(at), *off = b.phi.errors(at);
        double *slope = b.slope.values(at), *slope_off = b.slope.errors(at);
        for (int64_t f = 0; f < c.F; ++f) {
            if (c.feature_map != kExponential) {
                plain_feature(phi[f], off[f], phi + f, off + f, slope + f, slope_off + f);
                continue;
            }
            const double z = phi[f] - top[f], spread = off[f] + top_off[f] + kUnits * unit * (1 + std::fabs(z));
            phi[f] = slope[f] = std::exp(z);
            off[f] = slope_off[f] = phi[f] * spread + tiny;
        }
    }

    void query_features() {
        for (int64_t row = 0; row < c.B * c.Hq * c.Nq; ++row) {
            const int64_t batch = row / c.Nq / c.Hq, kv = row / c.Nq % c.Hq / (c.Hq / c.Hkv);
            double *phi = a.phi.values(row * c.F), *off = a.phi.errors(row * c.F);
            double *slope = a.slope.values(row * c.F), *slope_off = a.slope.errors(row * c.F);
            project(query.data() + row * c.D, kv, phi, off);
            const double* raise = shift.values((batch * c.Hkv + kv) * c.F);
            const double* raise_off = shift.errors((batch * c.Hkv + kv) * c.F);
            double top = -INFINITY, top_off = 0;
            for (int64_t f = 0; f < c.F; ++f) {
                if (c.feature_map != kExponential) {
                    plain_feature(phi[f], off[f], phi + f, off + f, slope + f, slope_off + f);
                    continue;
                }
                phi[f] += raise[f], off[f] += raise_off[f] + kUnits * unit * (std::fabs(phi[f]) + std::fabs(raise[f]));
                if (!(phi[f] <= top)) top = std::isnan(top) ? NAN : phi[f];
                top_off = std::max(top_off, off[f]);
            }
            for (int64_t f = 0; f < c.F && c.feature_map == kExponential; ++f) {
                const double z = phi[f] - top;
                phi[f] = slope[f] = std::exp(z);
                off[f] = slope_off[f] = phi[f] * (off[f] + top_off + kUnits * unit * (1 + std::fabs(z))) + tiny;
            }
        }
    }

    // w_ij of one row and what it gives forwards.
    void forward(int64_t batch, int64_t h, int64_t i) {
        const int64_t kv = h / (c.Hq / c.Hkv), at = (batch * c.Hq + h) * c.Nq + i, keys = (batch * c.Hkv + kv) * c.Nk;
        double *n = results.normaliser.values(at), *n_off = results.normaliser.errors(at);
        double *out = results.out.values(at * c.Dv), *out_off = results.out.errors(at * c.Dv);
        const double *x = a.phi.values(at * c.F), *x_off = a.phi.errors(at * c.F);
        for (int64_t j = 0; j < c.Nk; ++j) {
            if (!c.visible(batch, i, j)) continue;
            const double *y = b.phi.values((keys + j) * c.F), *y_off = b.phi.errors((keys + j) * c.F);
            double w = 0, size = 0, off = 0;
            for (int64_t f = 0; f < c.F; ++f) {
                const double term = x[f] * y[f];
                w += term, size += std::fabs(term);
                off += x_off[f] * (std::fabs(y[f]) + y_off[f]) + std::fabs(x[f]) * y_off[f] + (term != 0 ? tiny : 0);
            }
            off += kUnits * unit * size;
            weights.value[static_cast<size_t>(i * c.Nk + j)] = w;
            weights.error[static_cast<size_t>(i * c.Nk + j)] = off;
            results.normaliser.add(at, w, off);
            const double* v = value.data() + (keys + j) * c.Dv;
            for (int64_t d = 0; d < c.Dv; ++d) results.out.add(at * c.Dv + d, w * v[d], off * std::fabs(v[d]));
        }
        results.normaliser.settle(at);
        for (int64_t d = 0; d < c.Dv; ++d) results.out.settle(at * c.Dv + d);
        // A row that is not finite itself is NaN even where it sees nothing.
        const bool finite = std::all_of(x, x + c.F, [](double y) { return std::isfinite(y); });
        if (*n == 0 && *n_off == 0 && finite) return;
        const bool sure = finite && std::fabs(*n) > 2 * *n_off && std::fabs(*n) > 1e3 * tiny;
        known[static_cast<size_t>(at)] = sure;
        if (!finite) *n_off = INFINITY;
        for (int64_t d = 0; d < c.Dv; ++d) {
            out[d] /= *n;
            out_off[d] = sure ? (out_off[d] + std::fabs(out[d]) * *n_off) / (std::fabs(*n) - *n_off) +
                                    2 * unit * std::fabs(out[d])
                              : INFINITY;
        }
    }

    void make_u(int64_t at) {
        const double n = results.normaliser.value[static_cast<size_t>(at)];
        const double n_off = results.normaliser.error[static_cast<size_t>(at)];
        const bool sure = known[static_cast<size_t>(at)];
        const double* dO = grad_out.data() + at * c.Dv;
        const double *out = results.out.values(at * c.Dv), *out_off = results.out.errors(at * c.Dv);
        double sum = 0, size = 0, off = 0;
        for (int64_t d = 0; d < c.Dv; ++d) {
            const double x = n == 0 ? 0 : dO[d] / n;
            const double relative = n_off / (std::fabs(n) - n_off) + 2 * unit;
            const double x_off = !sure ? INFINITY : x == 0 ? 0 : std::fabs(x) * relative + tiny;
            u.value[static_cast<size_t>(d)] = x, u.error[static_cast<size_t>(d)] = x_off;
            sum -= x * out[d], size += std::fabs(x * out[d]);
            off += x_off * (std::fabs(out[d]) + out_off[d]) + (x == 0 ? 0 : std::fabs(x) * out_off[d]);
        }
        const double dn = c.has_grad_normaliser ? grad_normaliser[static_cast<size_t>(at)] : 0;
        u.value.back() = sum + dn;
        u.error.back() = !sure ? INFINITY : off + kUnits * unit * (size + std::fabs(dn));
    }

    void backward(int64_t batch, int64_t h, int64_t i) {
        const int64_t kv = h / (c.Hq / c.Hkv), at = (batch * c.Hq + h) * c.Nq + i, keys = (batch * c.Hkv + kv) * c.Nk;
        make_u(at);
        const double *x = a.phi.values(at * c.F), *x_off = a.phi.errors(at * c.F);
        double* dx_off = da.errors(at * c.F);
        if (!known[static_cast<size_t>(at)]) std::fill(dx_off, dx_off + c.F, INFINITY);
        for (int64_t j = 0; j < c.Nk; ++j) {
            if (!c.visible(batch, i, j)) continue;
            const double* v = value.data() + (keys + j) * c.Dv;
            double g = u.value.back(), size = std::fabs(g), off = u.error.back();
            for (int64_t d = 0; d < c.Dv; ++d) {
                g += u.value[static_cast<size_t>(d)] * v[d];
                size += std::fabs(u.value[static_cast<size_t>(d)] * v[d]);
                off += u.error[static_cast<size_t>(d)] * std::fabs(v[d]);
            }
            off += kUnits * unit * size;
            const double *y = b.phi.values((keys + j) * c.F), *y_off = b.phi.errors((keys + j) * c.F);
            for (int64_t f = 0; f < c.F; ++f) {
                da.add(at * c.F + f, g * y[f], off * (std::fabs(y[f]) + y_off[f]) + size * y_off[f]);
                db.add((keys + j) * c.F + f, g * x[f], off * (std::fabs(x[f]) + x_off[f]) + size * x_off[f]);
            }
            const double w = weights.value[static_cast<size_t>(i * c.Nk + j)];
            const double w_off = weights.error[static_cast<size_t>(i * c.Nk + j)];
            for (int64_t d = 0; d < c.Dv; ++d) {
                const double from = u.value[static_cast<size_t>(d)], from_off = u.error[static_cast<size_t>(d)];
                results.dv.add((keys + j) * c.Dv + d, w * from,
                               w_off * (std::fabs(from) + from_off) + std::fabs(w) * from_off);
            }
        }
    }

    // From the gradient of a row of features to that of the row of inputs, x: a key's, else null.
    void input_gradient(const Features& features, const Bounded& gradient, int64_t row, int64_t kv, const double* x,
                        Bounded& result) const {
        std::vector<double> du(static_cast<size_t>(c.F)), off(du.size());
        double sum = 0, sum_off = 0;
        for (int64_t f = 0; f < c.F; ++f) {
            const size_t at = static_cast<size_t>(row * c.F + f), n = static_cast<size_t>(f);
            const double g = gradient.value[at], g_off = gradient.error[at];
            const double slope = features.slope.value[at], slope_off = features.slope.error[at];
            du[n] = g * slope;
            off[n] = g_off * (std::fabs(slope) + slope_off) + std::fabs(g) * slope_off + unit * std::fabs(du[n]);
            sum += du[n], sum_off += off[n] + kUnits * unit * std::fabs(du[n]);
        }
        const bool from_norm = x && c.feature_map == kExponential;
        for (int64_t d = 0; d < c.D; ++d) {
            double dx = 0, dx_off = 0;
            if (!c.projection_heads) dx = du[static_cast<size_t>(d)], dx_off = off[static_cast<size_t>(d)];
            for (int64_t f = 0; f < (c.projection_heads ? c.F : 0); ++f) {
                const double W = c.root * projection_of(kv)[f * c.D + d], g = du[static_cast<size_t>(f)];
                dx += W * g, dx_off += std::fabs(W) * (off[static_cast<size_t>(f)] + kUnits * unit * std::fabs(g));
            }
            if (from_norm) {
                const double factor = c.root * c.root * x[d];
                dx -= factor * sum, dx_off += std::fabs(factor) * (sum_off + kUnits * unit * std::fabs(sum));
            }
            result.add(row * c.D + d, dx, dx_off);
        }
    }

    // The gradients of a key that is not finite may be NaN even where no query sees it.
    void doubt_poisoned_keys() {
        const auto is_finite = [](double x) { return std::isfinite(x); };
        for (int64_t row = 0; row < c.B * c.Hkv * c.Nk; ++row) {
            if (!c.key_is_there(row / c.Nk / c.Hkv, row % c.Nk)) continue;
            const double *phi = b.phi.values(row * c.F), *v = value.data() + row * c.Dv;
            const bool finite = std::all_of(phi, phi + c.F, is_finite);
            double *dk = db.errors(row * c.F), *dv = results.dv.errors(row * c.Dv);
            if (!finite || !std::all_of(v, v + c.Dv, is_finite)) std::fill(dk, dk + c.F, INFINITY);
            if (!finite) std::fill(dv, dv + c.Dv, INFINITY);
        }
    }

    // How many terms of a sum may have been flushed to 0, each on its own, in units of the smallest stored number.
    double range(int dtype) const { return dtype == kFloat16 ? 1 : 64 * static_cast<double>(c.Nq + c.Nk + c.F); }

    void run() {
        key_features();
        query_features();
        weights = Bounded(c.Nq * c.Nk);
        for (int64_t head = 0; head < c.B * c.Hq; ++head) {
            const int64_t batch = head / c.Hq, h = head % c.Hq;
            for (int64_t i = 0; i < c.Nq; ++i) forward(batch, h, i);
            // The backward reads an out that was rounded.
            for (int64_t n = head * c.Nq * c.Dv; n < (head + 1) * c.Nq * c.Dv; ++n)
                round_to(c.value_dtype, range(c.value_dtype), results.out, n);
            for (int64_t i = 0; i < c.Nq; ++i) backward(batch, h, i);
        }
        for (Bounded* sums : {&da, &db, &results.dv}) sums->settle();
        for (int64_t row = 0; row < c.B * c.Hq * c.Nq; ++row)
            input_gradient(a, da, row, row / c.Nq % c.Hq / (c.Hq / c.Hkv), nullptr, results.dq);
        doubt_poisoned_keys();
        for (int64_t row = 0; row < c.B * c.Hkv * c.Nk; ++row)
            if (c.key_is_there(row / c.Nk / c.Hkv, row % c.Nk))
                input_gradient(b, db, row, row / c.Nk % c.Hkv, key.data() + row * c.D, results.dk);
        // Which shift the kernels chose is theirs, and with it the scale of the normaliser.
        if (c.has_key_shift())
            for (Bounded* result : {&results.normaliser, &results.key_shift})
                std::fill(result->error.begin(), result->error.end(), INFINITY);
        for (Bounded* result : {&results.dq, &results.dk}) round_to(c.feature_dtype, range(c.feature_dtype), *result);
        round_to(c.value_dtype, range(c.value_dtype), results.dv);
        for (Bounded* result : {&results.normaliser, &results.key_shift}) round_to(c.accumulator(), 0, *result);
    }
};

}  // namespace

LinearAttentionResults linear_attention_reference(LinearAttentionCase& c) {
    Definition definition(c);
    definition.run();
    return std::move(definition.results);
}

}  // namespace harness
