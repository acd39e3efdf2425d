// The Python module efficient_attn._cpu. A call arrives as one bytes object of 8-byte words, in the order in which
// backends/cpu.py packs them and common/words.h takes them off.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "buckets.h"
#include "common/words.h"
#include "dispatch.h"

namespace py = pybind11;

namespace efficient_attn {
namespace {

const Kernels& kernels() {
    static const Kernels* chosen = [] {
        const char* name = std::getenv("EFFICIENT_ATTN_ISA");
        if (name && !*name) name = nullptr;
        const Kernels* found = find_kernels(name);
        if (!found) {
            throw std::runtime_error(std::string("EFFICIENT_ATTN_ISA=") + name +
                                     " is not an instruction set that this build has and this processor runs; "
                                     "use one of baseline, avx2, avx512, avx512_bf16, amx_bf16, or unset it");
        }
        return found;
    }();
    return *chosen;
}

// What one thread does in a nanosecond, roughly, by the width of its vectors: multiply-adds, and bytes from its caches.
double products_per_nanosecond() {
    const std::string name = kernels().name;
    return name == "baseline" ? 5 : name == "avx2" ? 15 : 30;
}
constexpr double kBytesPerNanosecond = 20;

// As many threads as there are, or one where the work of `nanoseconds` is done before the others have begun and ended.
int worth_threads(int threads, double nanoseconds) {
    if (threads <= 1) return 1;
    return nanoseconds * (1 - 1.0 / threads) > crossing(threads) ? threads : 1;
}

// Keys that a query meets, about.
double met_keys(const AttentionParams& p) {
    const MaskView& mask = p.mask;
    double keys = static_cast<double>(p.Nk);
    if (mask.window_left >= 0 && mask.window_right >= 0)
        keys = std::min(keys, static_cast<double>(mask.window_left + mask.window_right + 1));
    if (!mask.indptr) return keys;
    const int64_t rows = mask.batch * mask.heads * ((p.Nq + mask.block_q - 1) / mask.block_q);
    return std::min(keys, static_cast<double>(mask.entries * mask.block_k) / static_cast<double>(rows ? rows : 1));
}

int worth_threads(int threads, const AttentionParams& p, bool backward) {
    const double keys = met_keys(p), width = static_cast<double>(p.D + p.Dv);
    const double products = static_cast<double>(p.B * p.Hq * p.Nq) * keys * width * (backward ? 2.5 : 1);
    const double size = p.dtype == kFloat64 ? 8 : p.dtype == kFloat32 ? 4 : 2;
    const double bytes = static_cast<double>(p.B * p.Hkv) * keys * width * size;
    return worth_threads(threads, std::max(products / products_per_nanosecond(), bytes / kBytesPerNanosecond));
}

void call(const AttentionParams& p, int threads, bool backward) {
    const py::gil_scoped_release release;
    const auto op = backward ? &Kernels::backward : &Kernels::forward;
    if (!run(kernels(), op, p, worth_threads(threads, p, backward))) throw std::bad_alloc();
}

// An order may name rows of its tensor only, whatever it holds.
void check_order(const TensorView& t, int64_t B, int64_t H, int64_t count, int64_t rows) {
    for (int64_t b = 0; t.order && b < (t.order_batch_stride ? B : 1); ++b) {
        for (int64_t h = 0; h < (t.order_head_stride ? H : 1); ++h) {
            const int32_t* order = t.order + b * t.order_batch_stride + h * t.order_head_stride;
            int32_t least = 0, most = 0;
            for (int64_t i = 0; i < count; ++i) least = std::min(least, order[i]), most = std::max(most, order[i]);
            if (least < 0 || most >= rows)
                throw std::invalid_argument("efficient_attn: an order names row " +
                                            std::to_string(least < 0 ? least : most) + " of a tensor that has " +
                                            std::to_string(rows) + " rows");
        }
    }
}

// The same of a table of pages.
void check_pages(const AttentionParams& p, bool backward) {
    const TensorView& t = p.key;
    if (t.pages && (backward || t.order || t.page_rows < 1))
        throw std::invalid_argument("efficient_attn: pages of one row or more, without an order, are for a forward");
    for (int64_t b = 0; t.pages && b < p.B; ++b) {
        for (int64_t i = 0; i * t.page_rows < p.Nk; ++i) {
            const int64_t page = t.pages[b * t.pages_batch_stride + i];
            if (page < 0 || page >= p.page_count)
                throw std::invalid_argument("efficient_attn: a table names page " + std::to_string(page) + " of " +
                                            std::to_string(p.page_count));
        }
    }
}

template <bool kBackward>
void attention(const std::string& words, int threads) {
    const AttentionParams p = read_params(words, kBackward);
    check_order(p.query, p.B, p.Hq, p.Nq, p.query_rows);
    check_order(p.key, p.B, p.Hkv, p.Nk, p.key_rows);
    check_pages(p, kBackward);
    call(p, threads, kBackward);
}

void attention_statistics(const std::string& words, int threads) {
    const StatisticsParams p = read_statistics_params(words);
    const py::gil_scoped_release release;
    if (!run(kernels(), &Kernels::statistics, p, worth_threads(threads, p.attention, false))) throw std::bad_alloc();
}

template <bool kBackward>
void linear_attention(const std::string& words, int threads) {
    const LinearAttentionParams p = read_linear_params(words, kBackward);
    const py::gil_scoped_release release;
    const double products = static_cast<double>(p.B * p.Hq * (p.Nq + p.Nk)) * static_cast<double>(p.F * (p.D + p.Dv));
    const auto op = kBackward ? &Kernels::linear_backward : &Kernels::linear_forward;
    if (!run(kernels(), op, p, worth_threads(threads, products / products_per_nanosecond()))) throw std::bad_alloc();
}

// A request that may be refused: memory works the same without.
void prefer_huge_pages(uintptr_t begin, uintptr_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = uintptr_t{1} << 21;
    const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)begin, (void)bytes;
#endif
}

// Where the addresses go that a repeated call is given, in their order.
template <bool kBackward>
auto places(AttentionParams& p) {
    if constexpr (kBackward)
        return std::array{&p.query.data,    &p.key.data,     &p.value.data, &p.out.data, &p.lse,
                          &p.grad_out.data, &p.weights.data, &p.dq.data,    &p.dk.data,  &p.dv.data};
    else
        return std::array{&p.query.data, &p.key.data, &p.value.data, &p.out.data, &p.lse, &p.weights.data};
}

template <size_t>
using Address = uintptr_t;

// A call that is made again and again: a function of where its tensors lie and of the number of threads. Whoever
// makes it keeps alive what they read of a mask.
template <bool kBackward, size_t... I>
py::cpp_function repeated(const AttentionParams& params, std::index_sequence<I...>) {
    return py::cpp_function([params](Address<I>... address, int threads) {
        AttentionParams p = params;
        const auto where = places<kBackward>(p);
        ((*where[I] = reinterpret_cast<void*>(address)), ...);
        call(p, threads, kBackward);
    });
}

// The same where the number of keys changes from call to call: queries that are those of the last of Nk keys, which lie
// in rows or, with a table, on pages; with lengths (int32, B), the last of so many in each batch element.
py::cpp_function cached(const AttentionParams& params) {
    return py::cpp_function([params](uintptr_t query, uintptr_t key, uintptr_t value, uintptr_t out, uintptr_t lse,
                                     uintptr_t sinks, uintptr_t table, int64_t table_stride, uintptr_t lengths,
                                     int64_t Nk, int threads) {
        AttentionParams p = params;
        p.query.data = reinterpret_cast<void*>(query);
        p.key.data = reinterpret_cast<void*>(key);
        p.value.data = reinterpret_cast<void*>(value);
        p.out.data = reinterpret_cast<void*>(out);
        p.lse = reinterpret_cast<void*>(lse);
        p.sinks = reinterpret_cast<const void*>(sinks);
        p.key.pages = p.value.pages = reinterpret_cast<const int32_t*>(table);
        p.key.pages_batch_stride = p.value.pages_batch_stride = table_stride;
        p.mask.kv_lengths = reinterpret_cast<const int32_t*>(lengths);
        p.mask.window_offset = Nk - p.Nq;
        p.Nk = p.key_rows = Nk;
        check_pages(p, false);
        call(p, threads, false);
    });
}

// A tensor (B or pages, H, rows, width), whose last dimension is dense.
struct Rows {
    char* data;
    int64_t batch, head, row;  // in bytes

    Rows(uintptr_t address, const std::array<int64_t, 4>& strides, int64_t size)
        : data(reinterpret_cast<char*>(address)),
          batch(strides[0] * size),
          head(strides[1] * size),
          row(strides[2] * size) {}
};

// Copies rows [0, counts[b]) of `added` behind the first firsts[b] rows of batch element b of a cache: to its own rows,
// or to the pages of a table.
void append_rows(uintptr_t cache, const std::array<int64_t, 4>& cache_strides, uintptr_t added,
                 const std::array<int64_t, 4>& strides, int64_t H, int64_t width, int64_t size, uintptr_t table,
                 int64_t table_stride, int64_t page_rows, const std::vector<int64_t>& firsts,
                 const std::vector<int64_t>& counts) {
    const Rows to(cache, cache_strides, size), from(added, strides, size);
    const int32_t* pages = reinterpret_cast<const int32_t*>(table);
    const size_t bytes = static_cast<size_t>(width * size);
    if (firsts.size() != counts.size() || (pages && page_rows < 1))
        throw std::invalid_argument("efficient_attn: rows are appended with a first and a count of each batch element");
    const py::gil_scoped_release release;
    for (int64_t b = 0; b < static_cast<int64_t>(counts.size()); ++b) {
        const int64_t first = firsts[static_cast<size_t>(b)], count = counts[static_cast<size_t>(b)];
        for (int64_t r = 0; r < count;) {
            const int64_t skipped = pages ? (first + r) % page_rows : first + r;
            const int64_t block = pages ? pages[b * table_stride + (first + r) / page_rows] : b;
            const int64_t end = pages ? std::min(count, r + page_rows - skipped) : count;
            for (int64_t h = 0; h < H; ++h) {
                char* place = to.data + block * to.batch + h * to.head + skipped * to.row;
                const char* row = from.data + b * from.batch + h * from.head + r * from.row;
                for (int64_t i = r; i < end; ++i, place += to.row, row += from.row) std::memcpy(place, row, bytes);
            }
            r = end;
        }
    }
}

// The lists of round `round` of buckets at these addresses; `sizes`: B, H, Hkv, Nq, Nk; `offset`: None where all keys
// of a bucket are seen.
BucketLists bucket_lists(const std::array<uintptr_t, 4>& addresses, int64_t round, const std::array<int64_t, 5>& sizes,
                         const std::optional<int64_t>& offset, bool others) {
    const auto at = [&](size_t i) { return reinterpret_cast<const int32_t*>(addresses[i]); };
    const py::gil_scoped_release release;
    return BucketLists({at(0), at(1), at(2), at(3), round, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4],
                        offset.has_value(), offset.value_or(0), others});
}

void write_lists(const BucketLists& lists, uintptr_t indptr, uintptr_t indices, uintptr_t ids, uintptr_t tiles) {
    const auto write = [](const auto& from, uintptr_t to) {
        if (!from.empty()) std::memcpy(reinterpret_cast<void*>(to), from.data(), from.size() * sizeof(from[0]));
    };
    write(lists.indptr, indptr), write(lists.indices, indices), write(lists.ids, ids), write(lists.tiles, tiles);
}

}  // namespace
}  // namespace efficient_attn

PYBIND11_MODULE(_cpu, module) {
    using namespace efficient_attn;
    module.attr("__doc__") = "CPU kernels of efficient-attn: plain pointers and strides, no PyTorch.";
    kernels();  // a wrong EFFICIENT_ATTN_ISA fails the import, not the first call
    module.def("attention_forward", &attention<false>);
    module.def("attention_backward", &attention<true>);
    module.def(
        "tiles_of_a_copy",
        [](const std::string& words, int threads) {
            const AttentionParams p = read_params(words, false);
            return tiles_of_a_copy(kernels(), p, worth_threads(threads, p, false));
        },
        "How many tiles of queries of a forward share one copy of the keys and values that they see; 0: none do.");
    module.def("attention_statistics", &attention_statistics);
    module.def("linear_attention_forward", &linear_attention<false>);
    module.def("linear_attention_backward", &linear_attention<true>);
    module.def(
        "repeated_forward",
        [](const std::string& words) {
            return repeated<false>(read_params(words, false), std::make_index_sequence<6>());
        },
        "A forward as a function of its addresses and of the number of threads.");
    module.def(
        "cached_forward", [](const std::string& words) { return cached(read_params(words, false)); },
        "A forward of the last queries as a function of its addresses, of the number of keys and of threads.");
    module.def("sort_buckets", [](uintptr_t bucket, int64_t lines, int64_t count, uintptr_t order) {
        const py::gil_scoped_release release;
        sort_buckets(reinterpret_cast<const int32_t*>(bucket), lines, count, reinterpret_cast<int32_t*>(order));
    });
    py::class_<BucketLists>(module, "BucketLists", "The lists of a round of buckets; see csrc/cpu/buckets.h.")
        .def(py::init(&bucket_lists))
        .def_property_readonly("entries", &BucketLists::entries)
        .def_property_readonly("tile_count", &BucketLists::tile_count)
        .def("write", &write_lists);
    module.def("append_rows", &append_rows, "Writes new rows into a cache of keys or values.");
    module.def(
        "repeated_backward",
        [](const std::string& words) {
            return repeated<true>(read_params(words, true), std::make_index_sequence<10>());
        },
        "The same of a backward.");
    module.def("prefer_huge_pages", &prefer_huge_pages,
               "Asks the system to back the whole pages of so many bytes from an address on by huge pages.");
    module.def(
        "fma_loop",
        [](int threads, int64_t steps) {
            const py::gil_scoped_release release;
            return run_fma_loops(kernels(), threads, steps);
        },
        "Fused multiply-adds without memory on so many threads at once, for benchmarks; returns the operations done.");
    module.def(
        "instruction_set", [] { return kernels().name; },
        "The instruction set in use: baseline, avx2, avx512, avx512_bf16 or amx_bf16.");
    module.def(
        "instruction_sets",
        [] {
            py::list names;
            for (const char* name : {"baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"})
                if (find_kernels(name)) names.append(name);
            return names;
        },
        "The instruction sets that this build has and this processor runs.");
}
