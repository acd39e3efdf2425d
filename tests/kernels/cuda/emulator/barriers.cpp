// Barriers of a block of threads and those in shared memory (mbarrier).
#include "hopper.h"
#include "state.h"

namespace emulator {
namespace {

void release(Barrier& barrier) {
    uint32_t joined[kClocks];
    bool part[kMostWarps] = {};
    for (int thread : barrier.threads) part[thread / kLanes] = true;
    std::copy(barrier.clock, barrier.clock + kClocks, joined);
    for (int w = 0; w < block.warps; ++w)
        if (part[w]) share_seen(w);
    for (int w = 0; w < block.warps; ++w)
        for (int k = 0; part[w] && k < kClocks; ++k) joined[k] = std::max(joined[k], block.warp[w].clock[k]);
    for (int w = 0; w < block.warps; ++w)
        if (part[w]) {
            std::copy(joined, joined + kClocks, block.warp[w].clock);
            ++block.warp[w].clock[w];
            ++block.warp[w].step;
        }
    for (int thread : barrier.threads) {
        block.fibers[thread].vote = barrier.vote;
        block.fibers[thread].state = kRunnable;
        block.warp[thread / kLanes].runnable |= 1u << thread % kLanes;
    }
    barrier.threads.clear();
    barrier.vote = false;
    barrier.arrivals = 0;
    std::fill(barrier.clock, barrier.clock + kClocks, 0u);
    ++totals.barriers;
}

}  // namespace

void join(uint32_t* into, int thread) {
    const Fiber& fiber = block.fibers[thread];
    for (int k = 0; k < kClocks; ++k) {
        into[k] = std::max(into[k], block.warp[thread / kLanes].clock[k]);
        if (fiber.acquired) into[k] = std::max(into[k], fiber.seen[k]);
    }
}

void block_barrier(int id, int threads) {
    if (id < 0 || id >= kBarriers) fail(here() + "barrier " + std::to_string(id) + " does not exist");
    Barrier& barrier = block.barrier[id];
    const int wanted = threads ? threads : block.threads;
    if (wanted % kLanes) fail(here() + "a barrier of " + std::to_string(wanted) + " threads is no number of warps");
    barrier.threads.push_back(block.current);
    block.fibers[block.current].barrier = id;
    stop(kAtBarrier);
    if (static_cast<int>(barrier.threads.size()) + barrier.arrivals == wanted) release(barrier);
    run_another();
}

void barrier_arrive_only(int id, int threads) {
    Barrier& barrier = block.barrier[id];
    Warp& warp = block.warp[block.current / kLanes];
    join(barrier.clock, block.current);
    ++warp.clock[block.current / kLanes];
    ++barrier.arrivals;
    if (static_cast<int>(barrier.threads.size()) + barrier.arrivals == threads) release(barrier);
}

bool barrier_any(int id, int threads, bool value) {
    block.barrier[id].vote |= value;
    block_barrier(id, threads);
    return block.fibers[block.current].vote;
}

// --- in shared memory ---

std::string shared_barrier_text(int address) {
    const SharedBarrier& b = hopper.barriers[static_cast<uint32_t>(address)];
    return "barrier at shared byte " + std::to_string(address) + " (phase " + std::to_string(b.phase) + " lacks " +
           std::to_string(b.pending) + " arrivals and " + std::to_string(b.bytes) + " bytes)";
}

SharedBarrier& shared_barrier(uint32_t address, bool asynchronous) {
    const auto found = hopper.barriers.find(address);
    if (found == hopper.barriers.end()) fail(here() + "no barrier was made at shared byte " + std::to_string(address));
    const int lane = block.current % kLanes, w = block.current / kLanes;
    const Word& word = block.words[address / 4];
    if (word.write_warp == w ? word.write_lane != lane && word.write_step == block.warp[w].step
                             : !has_seen(w, lane, word.write_warp, word.write_clock))
        fail(here() + "the barrier at shared byte " + std::to_string(address) + " may not have been made yet");
    if (asynchronous && !found->second.fenced)
        fail(here() + "no barrier_init_fence after the barrier at shared byte " + std::to_string(address) +
             " was made");
    return found->second;
}

void complete_phase(SharedBarrier& b) {
    if (b.pending || b.bytes) return;
    ++b.phase;
    b.pending = b.arrivals;
    std::copy(b.arrived, b.arrived + kClocks, b.done);
    for (int thread : b.waiting) {
        block.fibers[thread].state = kRunnable;
        block.warp[thread / kLanes].runnable |= 1u << thread % kLanes;
    }
    b.waiting.clear();
    ++totals.barriers;
}

void barrier_init(uint32_t barrier, int arrivals) {
    check_shared(barrier, 8, true, block.current % kLanes, "mbarrier.init");
    if (arrivals < 1) fail(here() + "a barrier of " + std::to_string(arrivals) + " arrivals");
    SharedBarrier made{};
    made.arrivals = made.pending = arrivals;
    made.maker = block.current;
    made.clock = kMostWarps + static_cast<int>(hopper.barriers.size());
    if (made.clock == kClocks) fail(here() + "more barriers than the emulator has clocks for");
    if (!hopper.barriers.emplace(barrier, made).second) fail(here() + "a barrier is made where there is one");
}

void barrier_init_fence() {
    for (auto& [address, barrier] : hopper.barriers) barrier.fenced |= barrier.maker == block.current;
}

void barrier_arrive(uint32_t address, int expected_bytes) {
    SharedBarrier& barrier = shared_barrier(address, expected_bytes > 0);
    join(barrier.arrived, block.current);
    ++block.warp[block.current / kLanes].clock[block.current / kLanes];
    barrier.bytes += expected_bytes;
    if (--barrier.pending < 0)
        fail(here() + "one arrival too many at the " + shared_barrier_text(static_cast<int>(address)));
    complete_phase(barrier);
}

void barrier_wait(uint32_t address, int parity) {
    SharedBarrier& barrier = shared_barrier(address, false);
    if (parity != 0 && parity != 1) fail(here() + "parity " + std::to_string(parity));
    Fiber& fiber = block.fibers[block.current];
    if ((barrier.phase & 1) == parity) {
        const int awaited = barrier.phase;
        fiber.barrier = static_cast<int>(address);
        barrier.waiting.push_back(block.current);
        stop(kAtSharedBarrier);
        run_another();
        if (barrier.phase != awaited + 1)
            fail(here() +
                 "the phase waited for is past, the next one too: " + shared_barrier_text(static_cast<int>(address)));
    }
    if (!fiber.acquired) std::fill(fiber.seen, fiber.seen + kClocks, 0u);
    fiber.acquired = true;
    for (int k = 0; k < kClocks; ++k) fiber.seen[k] = std::max(fiber.seen[k], barrier.done[k]);
}

}  // namespace emulator
