#include "attention_case.h"

#include <cstdio>

#include "draw.h"

namespace harness {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Few queries beside keys that fill several spans: of decoding, and of the backward in one pass.
void draw_many_keys(Random& random, AttentionCase& c) {
    c.B = random.choose<int64_t>({1, 1, 1, 2});
    c.Hkv = random.choose<int64_t>({1, 1, 1, 2, 3});
    c.Hq = c.Hkv * random.choose<int64_t>({1, 2, 3, 4, 6, 8, 16, random.integer(1, 16)});
    c.Nq = random.chance(0.8) ? random.integer(1, 16) : random.integer(17, 40);
    const bool wide = random.chance(0.3);
    if (wide) c.B = c.Hkv = 1, c.Hq = random.integer(1, 2), c.Nq = random.integer(1, 20);
    c.Nk = wide ? random.integer(500, 1200) : random.integer(1000, random.choose<int64_t>({1100, 2200, 5000}));
    if (random.chance(0.3)) c.Nk = c.Nk / 128 * 128 + random.integer(-1, 1);
    const double rows = static_cast<double>(c.B * c.Hq * c.Nq * c.Nk);
    const int64_t widest = wide ? 256 : static_cast<int64_t>(1.2e6 / rows);
    c.D =
        wide ? random.choose<int64_t>({256, 255, 192, 128}) : std::max<int64_t>(1, std::min(head_dim(random), widest));
    c.Dv = random.chance(0.6) ? c.D : std::max<int64_t>(1, std::min(head_dim(random), widest));
}

void draw_sizes(Random& random, AttentionCase& c) {
    if (random.chance(short_cases ? 0.01 : 0.08)) return draw_many_keys(random, c);
    c.B = random.choose<int64_t>({1, 1, 2, 3});
    c.Hkv = random.choose<int64_t>({1, 1, 2, 3});
    c.Hq = c.Hkv * random.choose<int64_t>({1, 1, 2, 3, 4});
    c.D = head_dim(random);
    c.Dv = random.chance(0.6) ? c.D : head_dim(random);
    // The definition costs pairs x (D + Dv) operations.
    const int64_t pairs = static_cast<int64_t>(budget(random) / static_cast<double>(c.B * c.Hq * (c.D + c.Dv))) + 1;
    const int64_t square = static_cast<int64_t>(std::sqrt(static_cast<double>(pairs))) + 1;
    switch (random.integer(0, 7)) {
        case 0:
        case 1:  // decode
            c.Nq = random.chance(0.5) ? 1 : random.integer(1, 16);
            c.Nk = length(random, pairs / c.Nq + 1);
            break;
        case 2:  // few keys
            c.Nk = random.integer(1, 16);
            c.Nq = length(random, pairs / c.Nk + 1);
            break;
        case 3:
            c.Nq = c.Nk = length(random, square);
            break;
        default:
            c.Nq = length(random, 2 * square);
            c.Nk = length(random, pairs / c.Nq + 1);
    }
    if (random.chance(0.03)) {
        switch (random.integer(0, 3)) {
            case 0:
                c.B = 0;
                break;
            case 1:
                c.Hq = c.Hkv = 0;
                break;
            case 2:
                c.Nq = 0;
                break;
            default:
                c.Nk = 0;
        }
    }
}

void draw_bias(Random& random, AttentionCase& c) {
    const int64_t full[4] = {c.B, c.Hq, c.query_rows, c.key_rows};
    int64_t size[4];
    const double broadcast = random.chance(0.3) ? 0 : 0.4;
    for (int dim = 0; dim < 4; ++dim) size[dim] = random.chance(broadcast) ? 1 : full[dim];
    const bool half = c.dtype == kBFloat16 || c.dtype == kFloat16;
    const int dtype = half && random.chance(0.3) ? static_cast<int>(kFloat32) : c.dtype;
    int order[4] = {0, 1, 2, 3};  // the keys stay innermost: backends/cpu.py copies a bias where they are not
    for (int n = 2; n > 0 && random.chance(0.4); --n) std::swap(order[n], order[random.integer(0, n)]);
    c.bias = make_image(dtype, size, order, random.chance(0.5) ? &random : nullptr);
    fill(random, c.bias, -2.0, 2.0);
    if (random.chance(0.2))  // -inf hides a pair
        c.bias.for_each([&](int64_t a, int64_t b, int64_t i, int64_t j) {
            if (random.chance(0.1)) c.bias.set(a, b, i, j, -INFINITY);
        });
    c.dbias = contiguous(dtype, size[0], size[1], size[2], size[3]);
}

// One block of a list: kind 0 is not listed, 1 full, 2 a tile of bits.
void append_block(Random& random, const AttentionCase& c, Mask& mask, uint8_t* pairs, int64_t block_i, int64_t block_j,
                  int kind) {
    const int64_t i0 = block_i * mask.block_q, j0 = block_j * mask.block_k, row_bytes = mask.block_k / 8;
    const int64_t rows = std::min(mask.block_q, c.Nq - i0), columns = std::min(mask.block_k, c.Nk - j0);
    mask.indices.push_back(static_cast<int32_t>(block_j));
    if (kind == 1) {
        mask.tile_ids.push_back(-1);
        for (int64_t i = 0; i < rows; ++i) std::memset(pairs + (i0 + i) * c.Nk + j0, 1, static_cast<size_t>(columns));
        return;
    }
    const int64_t id = mask.tile_count();
    mask.tile_ids.push_back(static_cast<int32_t>(id));
    mask.tiles.resize(static_cast<size_t>((id + 1) * mask.block_q * row_bytes), 0);
    uint8_t* tile = mask.tiles.data() + id * mask.block_q * row_bytes;
    const double density = random.choose<double>({0.02, 0.5, 0.95});
    const bool whole_rows = random.chance(0.3);  // some queries of the block see nothing of it
    for (int64_t i = 0; i < rows; ++i) {
        if (whole_rows && random.chance(0.5)) continue;
        for (int64_t j = 0; j < columns; ++j) {
            if (!random.chance(density)) continue;
            tile[i * row_bytes + j / 8] |= static_cast<uint8_t>(1 << j % 8);
            pairs[(i0 + i) * c.Nk + j0 + j] = 1;
        }
    }
}

// The same lists by key block.
void transpose_lists(const AttentionCase& c, Mask& mask) {
    const int64_t n_q = ceil_div(c.Nq, mask.block_q), n_k = ceil_div(c.Nk, mask.block_k);
    mask.t_indptr.push_back(0);
    for (int64_t head = 0; head < mask.batch * mask.heads; ++head) {
        for (int64_t key = 0; key < n_k; ++key) {
            for (int64_t row = 0; row < n_q; ++row) {
                for (int64_t e = mask.indptr[head * n_q + row]; e < mask.indptr[head * n_q + row + 1]; ++e) {
                    if (mask.indices[e] != key) continue;
                    mask.t_indices.push_back(static_cast<int32_t>(row));
                    mask.t_tile_ids.push_back(mask.tile_ids[e]);
                }
            }
            mask.t_indptr.push_back(static_cast<int64_t>(mask.t_indices.size()));
        }
    }
}

void draw_lists(Random& random, const AttentionCase& c, Mask& mask) {
    mask.listed = true;
    const bool small = random.chance(0.5);
    mask.block_q = 16 * (small ? random.integer(1, 4) : random.integer(1, 16));
    mask.block_k = 16 * (small ? random.integer(1, 4) : random.integer(1, 16));
    mask.batch = random.chance(0.5) ? 1 : c.B;
    mask.heads = random.chance(0.5) ? 1 : c.Hq;
    mask.pairs.assign(static_cast<size_t>(mask.batch * mask.heads * c.Nq * c.Nk), 0);
    const double density = random.choose<double>({0.1, 0.5, 0.9, 1.0}), full = random.choose<double>({0.0, 0.5, 1.0});
    // Sometimes only blocks near the diagonal, and sometimes rows that say what the row before says.
    const int64_t reach = random.chance(0.4) ? random.integer(0, 100) : INT64_MAX / 4;
    const int64_t alike = random.chance(0.2) ? random.choose<int64_t>({2, 4}) : 1;
    mask.indptr.push_back(0);
    for (int64_t head = 0; head < mask.batch * mask.heads; ++head) {
        uint8_t* pairs = mask.pairs.data() + head * c.Nq * c.Nk;
        for (int64_t i = 0; i < ceil_div(c.Nq, mask.block_q); ++i) {
            if (i % alike != 0) {
                const size_t rows = mask.indptr.size();
                for (int64_t e = mask.indptr[rows - 2]; e < mask.indptr[rows - 1]; ++e)
                    append_block(random, c, mask, pairs, i, mask.indices[static_cast<size_t>(e)], 1);
            }
            for (int64_t j = 0; i % alike == 0 && j < ceil_div(c.Nk, mask.block_k); ++j)
                if (random.chance(density) && std::abs(i * mask.block_q - j * mask.block_k) <= reach)
                    append_block(random, c, mask, pairs, i, j, alike > 1 || random.chance(full) ? 1 : 2);
            mask.indptr.push_back(static_cast<int64_t>(mask.indices.size()));
        }
    }
    transpose_lists(c, mask);
}

void draw_mask(Random& random, AttentionCase& c) {
    Mask& mask = c.mask;
    if (random.chance(0.5)) draw_lists(random, c, mask);
    if (random.chance(0.4)) {
        if (random.chance(0.4)) {
            mask.window_right = 0;  // causal
        } else {
            mask.window_left = random.choose<int64_t>({-1, 0, 5, 40, 300});
            mask.window_right = random.choose<int64_t>({-1, 0, 9, 70});
        }
        mask.window_offset = random.choose<int64_t>({0, 0, c.Nk - c.Nq, random.integer(-30, 30)});
    }
    if (random.chance(0.3))
        for (int64_t b = 0; b < c.B; ++b)
            mask.kv_lengths.push_back(static_cast<int32_t>(random.chance(0.2) ? random.choose<int64_t>({0, c.key_rows})
                                                                              : random.integer(0, c.key_rows)));
}

// A call of some rows of its tensors, which have more, in an order of their own.
Order draw_order(Random& random, int64_t B, int64_t heads, int64_t count, int64_t* rows) {
    *rows = count;
    if (count == 0 || B * heads == 0 || !random.chance(0.7)) return {};
    *rows += random.chance(0.5) ? 0 : random.integer(0, count + 9);
    const int64_t kind = random.integer(0, 2), lines = kind == 0 ? 1 : kind == 1 ? heads : B * heads;
    Order order;
    order.head_stride = kind == 0 ? 0 : count;
    order.batch_stride = kind == 2 ? heads * count : 0;
    std::vector<int32_t> all(static_cast<size_t>(*rows));
    for (size_t n = 0; n < all.size(); ++n) all[n] = static_cast<int32_t>(n);
    for (int64_t line = 0; line < lines; ++line) {
        for (size_t n = all.size(); n > 1; --n)
            std::swap(all[n - 1], all[static_cast<size_t>(random.integer(0, static_cast<int64_t>(n) - 1))]);
        order.rows.insert(order.rows.end(), all.begin(), all.begin() + count);
    }
    return order;
}

// What no kernel serves together with an order: backends/cpu refuses it by name.
void drop_what_orders_exclude(AttentionCase& c) {
    if (!c.has_order()) return;
    c.weight_heads = 0;
    const auto differs = [&](const Order& order, int dim) {
        return c.bias.size[dim] > 1 && ((order.head_stride > 0 && c.bias.size[1] == 1 && c.Hq > 1) ||
                                        (order.batch_stride > 0 && c.bias.size[0] == 1 && c.B > 1));
    };
    if (c.has_bias && (differs(c.query_order, 2) || differs(c.key_order, 3))) c.wants_bias_gradient = false;
}

// Results of a call that leaves rows of them alone hold what such rows mean: nothing was seen.
void begin_results(AttentionCase& c) {
    const auto all = [](Image& image, double x) {
        image.for_each([&](int64_t a, int64_t b, int64_t n, int64_t d) { image.set(a, b, n, d, x); });
    };
    if (c.query_rows > c.Nq) all(c.out, 0), all(c.lse, -INFINITY), all(c.dq, 0);
    if (c.key_rows > c.Nk) all(c.dk, 0), all(c.dv, 0);
    if (c.has_order() && c.has_bias) all(c.dbias, 0);
}

// NaN and infinity in some rows: whoever does not see them must not notice.
void poison(Random& random, AttentionCase& c) {
    if (random.chance(0.3))
        for (int64_t h = 0; h < (c.B > 0 && c.Nq > 0 ? c.Hq : 0); ++h)
            (random.chance(0.5) ? c.query : c.grad_out).set(0, h, random.integer(0, c.query_rows - 1), 0, NAN);
    for (int64_t b = 0; b < c.B; ++b) {
        for (int64_t h = 0; h < c.Hkv; ++h) {
            for (int64_t j = 0; j < c.key_rows; ++j) {
                if (!random.chance(0.03)) continue;
                const double x = random.choose<double>({NAN, INFINITY, -INFINITY});
                if (random.chance(0.7)) c.key.set(b, h, j, random.integer(0, c.D - 1), x);
                if (random.chance(0.7)) c.value.set(b, h, j, random.integer(0, c.Dv - 1), x);
            }
        }
    }
}

// Puts keys and values on pages, in any order, among pages of nobody.
void draw_pages(Random& random, AttentionCase& c) {
    if (c.key_rows != c.Nk || !c.key_order.rows.empty() || c.B * c.Hkv * c.Nk == 0) return;
    Pages& pages = c.pages;
    pages.rows = random.choose<int64_t>({16, 16, 32, 48, 256, random.integer(1, 40)});
    const int64_t each = ceil_div(c.Nk, pages.rows), count = c.B * each + random.integer(0, 2);
    pages.table_stride = each + random.integer(0, 2);
    std::vector<int32_t> free(static_cast<size_t>(count));
    for (size_t n = 0; n < free.size(); ++n) free[n] = static_cast<int32_t>(n);
    for (size_t n = free.size(); n > 1 && random.chance(0.9); --n)
        std::swap(free[n - 1], free[static_cast<size_t>(random.integer(0, static_cast<int64_t>(n) - 1))]);
    pages.table.assign(static_cast<size_t>(c.B * pages.table_stride), INT32_MAX);
    const auto on_pages = [&](Image& rows, Image& pool, int64_t width) {
        pool = random_layout(random, c.dtype, count, c.Hkv, pages.rows, width);
        pool.for_each([&](int64_t p, int64_t h, int64_t r, int64_t d) { pool.set(p, h, r, d, NAN); });
        for (int64_t b = 0; b < c.B; ++b) {
            for (int64_t i = 0; i < c.Nk; ++i) {
                const int64_t page = free[static_cast<size_t>(b * each + i / pages.rows)];
                pages.table[static_cast<size_t>(b * pages.table_stride + i / pages.rows)] = static_cast<int32_t>(page);
                for (int64_t h = 0; h < c.Hkv; ++h)
                    for (int64_t d = 0; d < width; ++d)
                        std::memcpy(pool.place(page, h, i % pages.rows, d), rows.place(b, h, i, d),
                                    static_cast<size_t>(element_bytes(c.dtype)));
            }
        }
    };
    on_pages(c.key, pages.key, c.D);
    on_pages(c.value, pages.value, c.Dv);
}

}  // namespace

bool AttentionCase::visible(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const int64_t centre = i + mask.window_offset;
    if (mask.window_left >= 0 && j < centre - mask.window_left) return false;
    if (mask.window_right >= 0 && j > centre + mask.window_right) return false;
    if (!mask.kv_lengths.empty() && key_of(b, h, j) >= mask.kv_lengths[static_cast<size_t>(b)]) return false;
    if (!mask.listed) return true;
    const int64_t head = (mask.batch == 1 ? 0 : b) * mask.heads + (mask.heads == 1 ? 0 : h);
    return mask.pairs[static_cast<size_t>((head * Nq + i) * Nk + j)] != 0;
}

std::string AttentionCase::describe() const {
    static const char* const names[] = {"float32", "float64", "bfloat16", "float16"};
    char text[512];
    std::snprintf(
        text, sizeof text,
        "%s B%ld Hq%ld Hkv%ld Nq%ld Nk%ld D%ld Dv%ld scale %g dropout %g, list %s %ldx%ld blocks %ldx%ld, "
        "window (%ld, %ld) offset %ld, lengths %s, bias %s, grad_lse %s, orders %s of %ld and %s of %ld rows, "
        "pages of %ld rows",
        names[dtype], B, Hq, Hkv, Nq, Nk, D, Dv, scale, dropout_p, mask.listed ? "yes" : "no", mask.batch, mask.heads,
        mask.block_q, mask.block_k, mask.window_left, mask.window_right, mask.window_offset,
        mask.kv_lengths.empty() ? "no" : "yes",
        !has_bias             ? "no"
        : wants_bias_gradient ? "with gradient"
                              : "yes",
        has_grad_lse ? "yes" : "no", query_order.rows.empty() ? "none" : "one", query_rows,
        key_order.rows.empty() ? "none" : "one", key_rows, pages.rows);
    return text;
}

AttentionCase random_attention_case(uint64_t seed) {
    Random random(seed);
    AttentionCase c{};
    c.dtype = static_cast<int>(random.integer(0, 3));
    draw_sizes(random, c);
    c.query_rows = c.Nq, c.key_rows = c.Nk;
    if (random.chance(0.3)) {
        c.query_order = draw_order(random, c.B, c.Hq, c.Nq, &c.query_rows);
        c.key_order = draw_order(random, c.B, c.Hkv, c.Nk, &c.key_rows);
    }
    c.scale = random.chance(0.7) ? 1 / std::sqrt(static_cast<double>(c.D)) : random.choose<double>({-0.3, 0.0, 0.9});
    c.dropout_p = random.chance(0.75) ? 0 : random.choose<double>({0.1, 0.5, 0.9});
    c.dropout_seed = random.next();
    const double spread = random.choose<double>({1.0, 1.0, 2.0});
    c.query = input(random, c.dtype, c.B, c.Hq, c.query_rows, c.D, -spread, spread);
    c.key = input(random, c.dtype, c.B, c.Hkv, c.key_rows, c.D, -spread, spread);
    c.value = input(random, c.dtype, c.B, c.Hkv, c.key_rows, c.Dv, -1.0, 1.0);
    c.grad_out = input(random, c.dtype, c.B, c.Hq, c.query_rows, c.Dv, -1.0, 1.0);
    if (random.chance(0.15)) poison(random, c);
    draw_mask(random, c);
    if ((c.has_bias = random.chance(0.4))) draw_bias(random, c);
    c.wants_bias_gradient = c.has_bias && random.chance(0.7);
    c.grad_lse = contiguous(c.accumulator(), c.B, c.Hq, c.query_rows, 1);
    if ((c.has_grad_lse = random.chance(0.3))) fill(random, c.grad_lse, -1.0, 1.0);
    c.out = random_layout(random, c.dtype, c.B, c.Hq, c.query_rows, c.Dv);
    c.lse = contiguous(c.accumulator(), c.B, c.Hq, c.query_rows, 1);
    c.dq = random_layout(random, c.dtype, c.B, c.Hq, c.query_rows, c.D);
    c.dk = random_layout(random, c.dtype, c.B, c.Hkv, c.key_rows, c.D);
    c.dv = random_layout(random, c.dtype, c.B, c.Hkv, c.key_rows, c.Dv);
    c.weight_heads = c.Hq == 0 ? 0 : random.choose<int64_t>({0, 0, 1, c.Hq});  // none: Python answers alone
    drop_what_orders_exclude(c);
    begin_results(c);
    c.weights = random_layout(random, c.dtype, c.B, c.weight_heads, c.Nq, c.Nk);
    if (random.chance(0.2)) draw_pages(random, c);
    return c;
}

void corrupt_lists(Random& random, AttentionCase& c) {
    Mask& mask = c.mask;
    if (!mask.listed) draw_lists(random, c, mask);
    const double rate = random.choose<double>({0.05, 0.5, 1.0});
    const auto spoil = [&](auto& numbers, int64_t sane) {
        using X = typename std::remove_reference_t<decltype(numbers)>::value_type;
        for (X& x : numbers) {
            if (!random.chance(rate)) continue;
            const int64_t wide = sizeof(X) == 8 ? INT64_MAX : INT32_MAX;
            x = static_cast<X>(random.choose<int64_t>({-1, -7, sane, sane + 1, random.integer(0, sane),
                                                       random.integer(-sane, 3 * sane + 40), wide, -wide - 1, wide / 16,
                                                       static_cast<int64_t>(random.next() >> 33)}));
        }
    };
    const int64_t entries = static_cast<int64_t>(mask.indices.size());
    if (random.chance(0.6)) spoil(mask.indptr, entries);
    if (random.chance(0.6)) spoil(mask.t_indptr, entries);
    if (random.chance(0.6)) spoil(mask.indices, ceil_div(c.Nk, mask.block_k));
    if (random.chance(0.6)) spoil(mask.t_indices, ceil_div(c.Nq, mask.block_q));
    if (random.chance(0.6)) spoil(mask.tile_ids, mask.tile_count());
    if (random.chance(0.6)) spoil(mask.t_tile_ids, mask.tile_count());
    if (random.chance(0.6)) spoil(mask.kv_lengths, c.Nk);
    if (random.chance(0.5))
        for (uint8_t& byte : mask.tiles) byte = static_cast<uint8_t>(random.next());
}

}  // namespace harness
