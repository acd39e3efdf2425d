// Threads: OpenMP where the compiler has it (the process then has one libgomp, PyTorch's, which is loaded before us).
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <new>
#include <numeric>
#include <system_error>
#include <thread>
#include <vector>

#include "dispatch.h"
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace efficient_attn {
namespace {

// GNU OpenMP's thread pool does not survive fork(): a child that enters a parallel region waits for threads that are
// not there. A child of this process therefore starts plain threads for a call, and joins them.
bool is_forked_child = false;

#if defined(__unix__) || defined(__APPLE__)
struct ForkWatch {
    ForkWatch() {
        pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });
    }
} fork_watch;
#endif

// run_task(position, thread) for every position, each taken by one thread.
template <class F>
void run_on_plain_threads(int64_t tasks, int threads, const F& run_task) {
    std::atomic<int64_t> next{0};
    auto work = [&](int thread) {
        for (int64_t position = next++; position < tasks; position = next++) run_task(position, thread);
    };
    std::vector<std::thread> helpers;
    try {
        for (int thread = 1; thread < threads; ++thread) helpers.emplace_back(work, thread);
    } catch (const std::system_error&) {
        // No more threads to be had: those that started, and this one, do the work.
    }
    work(0);
    for (std::thread& helper : helpers) helper.join();
}

template <class Params>
void set_threads(Params& p, int threads) {
    p.threads = threads;
}
void set_threads(StatisticsParams& p, int threads) { p.attention.threads = threads; }

// Whether a call is for the kernels' `others`.
bool is_for_others(const AttentionParams& p) { return p.dtype != kBFloat16; }
bool is_for_others(const StatisticsParams& p) { return is_for_others(p.attention); }
bool is_for_others(const LinearAttentionParams&) { return false; }

int64_t cache_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// The tasks of a phase, the longest first where they differ, so that no thread is left with a long one at the end.
// False when memory is refused.
template <class Params>
bool order_tasks(const Operator<Params>& op, const Params& p, int phase, int64_t tasks,
                 std::vector<int64_t>* order) try {
    order->clear();
    if (!op.task_cost || op.task_cost(p, phase, 0) < 0) return true;
    std::vector<double> cost(static_cast<size_t>(tasks));
    for (int64_t task = 0; task < tasks; ++task) cost[static_cast<size_t>(task)] = op.task_cost(p, phase, task);
    order->resize(static_cast<size_t>(tasks));
    std::iota(order->begin(), order->end(), int64_t{0});
    std::stable_sort(order->begin(), order->end(),
                     [&](int64_t a, int64_t b) { return cost[static_cast<size_t>(a)] > cost[static_cast<size_t>(b)]; });
    return true;
} catch (const std::bad_alloc&) {
    return false;
}

}  // namespace

double crossing(int threads) {
    constexpr int kNumbers = 256, kTries = 12;
    constexpr double kAsleep = 3, kLeast = 3e3, kMost = 3e4;  // a thread that sleeps takes longer than one that waits
    static std::atomic<double> known[kNumbers];
    if (is_forked_child) return 2 * kMost;
    std::atomic<double>& cost = known[threads < kNumbers ? threads : kNumbers - 1];
    if (cost.load(std::memory_order_relaxed) > 0) return cost;
    double least = kMost;
    for (int i = 0; i < kTries; ++i) {
        const auto begin = std::chrono::steady_clock::now();
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
        {
            std::atomic_signal_fence(std::memory_order_seq_cst);
        }
#else
        run_on_plain_threads(threads, threads, [](int64_t, int) {});
#endif
        const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - begin;
        least = std::min(least, taken.count());
    }
    cost = std::min(kMost, std::max(kLeast, kAsleep * least));
    return cost;
}

int64_t tiles_of_a_copy(const Kernels& kernels, const AttentionParams& given, int threads) {
    AttentionParams p = given;
    set_threads(p, threads);
    (kernels.others && is_for_others(p) ? *kernels.others : kernels).forward->prepare(p);
    return p.copies_keys ? p.band_tiles : 0;
}

template <class Params>
bool run(const Kernels& kernels, const Operator<Params>* Kernels::* member, const Params& given, int threads) {
    const Operator<Params>& op = *((kernels.others && is_for_others(given) ? *kernels.others : kernels).*member);
    Params p = given;
    set_threads(p, threads);
    if (op.prepare) op.prepare(p);
    int64_t most = 0;
    for (int phase = 0; phase < op.phases; ++phase)
        most = op.task_count(p, phase) > most ? op.task_count(p, phase) : most;
    if (threads < 1) threads = 1;
    if (threads > most) threads = most < 1 ? 1 : static_cast<int>(most);
    const int64_t shared = cache_lines(op.shared_bytes(p)), each = cache_lines(op.thread_bytes(p));
    char* memory = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(shared + threads * each + 64)));
    if (!memory) return false;
    std::vector<int64_t> order;
    for (int phase = 0; phase < op.phases; ++phase) {
        const int64_t tasks = op.task_count(p, phase);
        const bool alone = threads == 1 || tasks == 1 || (op.is_short && op.is_short(p, phase));
        if (!alone && !order_tasks(op, p, phase, tasks, &order)) order.clear();
        if (alone) {
            for (int64_t task = 0; task < tasks; ++task) op.run_task(p, phase, task, memory + shared, memory);
            continue;
        }
        auto run_task = [&](int64_t position, int thread) {
            const int64_t task = order.empty() ? position : order[static_cast<size_t>(position)];
            op.run_task(p, phase, task, memory + shared + thread * each, memory);
        };
        if (is_forked_child) {
            run_on_plain_threads(tasks, threads, run_task);
            continue;
        }
#if defined(_OPENMP)
#pragma omp parallel for schedule(monotonic : dynamic) num_threads(threads)
        for (int64_t position = 0; position < tasks; ++position) run_task(position, omp_get_thread_num());
#else
        run_on_plain_threads(tasks, threads, run_task);
#endif
    }
    std::free(memory);
    return true;
}

template bool run(const Kernels&, const Operator<AttentionParams>* Kernels::*, const AttentionParams&, int);
template bool run(const Kernels&, const Operator<StatisticsParams>* Kernels::*, const StatisticsParams&, int);
template bool run(const Kernels&, const Operator<LinearAttentionParams>* Kernels::*, const LinearAttentionParams&, int);

}  // namespace efficient_attn
