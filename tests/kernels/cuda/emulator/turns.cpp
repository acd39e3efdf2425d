// Sums in a fixed order: which addition comes before which one, by the turns that threads await and pass on.
//
// A clock for each thread that adds, as the vector clocks of shared memory. An addition is in order if the one before
// it to the same sums was known to be complete (bulk_wait), behind a sums_fence, when its thread passed a turn on, and
// this thread has that from a turn it awaited, behind a sums_fence of its own.
#include "state.h"

namespace emulator {
namespace {

using Clocks = std::map<int64_t, int64_t>;  // thread of the launch -> what is known of it

struct Thread {
    Clocks known;
    int64_t clock = 1;
    bool fenced = true;                    // a sums_fence since the last turn
    std::vector<const float*> unfenced{};  // what it knows to be complete, before a sums_fence
};
struct Addition {
    int64_t thread, complete;  // since that clock of its thread; 0: not known to be
};

std::map<const int32_t*, Clocks> turns;
std::map<int64_t, Thread> threads;
std::map<const float*, Addition> additions;  // the latest, by the sums they begin with
int64_t passed;

int64_t number_of(int thread) { return block.index * block.threads + thread; }

Clocks& clocks_of(const int32_t* turn) {
    const auto found = turns.find(turn);
    if (found == turns.end()) fail(here() + "a turn that is none");
    return found->second;
}

void merge(Clocks& into, const Clocks& from) {
    for (const auto& [thread, clock] : from) into[thread] = std::max(into[thread], clock);
}

}  // namespace

void allow_turns(int32_t* data, int64_t count) {
    for (int64_t k = 0; k < count; ++k) turns[data + k] = {};
}

void forget_turns() { turns.clear(); }

void begin_turns() {
    threads.clear();
    additions.clear();
}

int64_t turns_passed() { return passed; }

void wake_at_turns() {
    for (size_t t = 0; t < block.fibers.size(); ++t) {
        Fiber& fiber = block.fibers[t];
        if (fiber.state != kAtTurn || *fiber.turn != fiber.number) continue;
        fiber.state = kRunnable;
        block.warp[t / kLanes].runnable |= 1u << t % kLanes;
    }
}

void await_turn(const int32_t* turn, int number) {
    const Clocks& clocks = clocks_of(turn);
    if (*turn > number || number < 0)
        fail(here() + "waits for turn " + std::to_string(number) + ", and " + std::to_string(*turn) + " are past");
    Fiber& fiber = block.fibers[block.current];
    const int self = block.current;
    fiber.turn = turn;
    fiber.number = number;
    if (*turn != number || (block.together && draw() % 2)) {
        stop(kAtTurn);
        run_another();
        block.current = self;
    }
    Thread& thread = threads[number_of(block.current)];
    merge(thread.known, clocks);
    thread.fenced = false;
}

void pass_turn(int32_t* turn) {
    Clocks& clocks = clocks_of(turn);
    const int64_t number = number_of(block.current);
    Thread& thread = threads[number];
    thread.known[number] = thread.clock++;
    merge(clocks, thread.known);
    ++*turn;
    ++passed;
    wake_at_turns();
}

void sums_fence() {
    const int64_t number = number_of(block.current);
    Thread& thread = threads[number];
    thread.fenced = true;
    for (const float* target : thread.unfenced) {
        const auto found = additions.find(target);
        if (found != additions.end() && found->second.thread == number) found->second.complete = thread.clock;
    }
    thread.unfenced.clear();
}

void add_in_turn(const float* target, int) {
    if (turns.empty()) return;
    const int64_t number = number_of(block.current);
    Thread& thread = threads[number];
    if (!thread.fenced) fail(here() + "bulk_add without a sums_fence behind the turn it awaited");
    const auto before = additions.find(target);
    if (before != additions.end()) {
        const Addition& b = before->second;
        const int64_t seen = b.thread == number ? thread.clock : thread.known[b.thread];
        if (!b.complete || seen < b.complete)
            fail(here() + "bulk_add to sums that thread " + std::to_string(b.thread % block.threads) + " of block " +
                 std::to_string(b.thread / block.threads) + " may still be adding to");
    }
    additions[target] = {number, 0};
}

void added_in_turn(const float* target, int thread) {
    if (!turns.empty()) threads[number_of(thread)].unfenced.push_back(target);
}

}  // namespace emulator
