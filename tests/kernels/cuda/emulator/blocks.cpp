// The blocks of a launch: one after another, or some together, which go on in turns as a policy says.
#include <list>
#include <stdexcept>

#include "hopper.h"
#include "state.h"

namespace emulator {
namespace {

// A block that has begun and does not run now.
struct Parked {
    Block block;
    Asynchronous hopper;
    int64_t stopped_at = -1;  // how many turns had been passed when it had to wait for one; -1: it can go on

    void change_places() {
        std::swap(block, emulator::block);
        std::swap(hopper, emulator::hopper);
    }
};

using Blocks = std::list<Parked>;

// Who goes on; blocks.end(): all of them wait.
Blocks::iterator choose(Blocks& blocks, Policy policy, Blocks::iterator before) {
    std::vector<Blocks::iterator> able;
    for (auto b = blocks.begin(); b != blocks.end(); ++b)
        if (b->stopped_at != turns_passed()) able.push_back(b);
    if (able.empty()) return blocks.end();
    const auto by_ticket = [](Blocks::iterator a, Blocks::iterator b) { return a->block.ticket < b->block.ticket; };
    if (policy == kLatestFirst) return *std::max_element(able.begin(), able.end(), by_ticket);
    if (policy == kEarliestFirst) return *std::min_element(able.begin(), able.end(), by_ticket);
    const auto found = std::find(able.begin(), able.end(), before);
    if (policy == kInTurns && found != able.end()) return found + 1 == able.end() ? able.front() : *(found + 1);
    return able[draw() % able.size()];
}

[[noreturn]] void report_deadlock(Blocks& blocks) {
    std::string text = "emulator: deadlock: every block that runs waits for a turn";
    for (Parked& parked : blocks) {
        parked.change_places();
        text += "\nblock " + std::to_string(block.index) + ", ticket " + std::to_string(block.ticket) + ":" +
                where_everybody_is();
        parked.change_places();
    }
    throw std::runtime_error(text);
}

// The blocks whose turn to be parked comes again: their memory, above all the stacks, is used again.
Blocks& spare() {
    static Blocks blocks;
    return blocks;
}

void run_together(const std::vector<int64_t>& order, int together, Policy policy, const Block& like) {
    Blocks blocks;
    size_t begun = 0;
    auto current = blocks.end();
    while (begun < order.size() || !blocks.empty()) {
        while (begun < order.size() && static_cast<int>(blocks.size()) < together) {
            if (spare().empty()) spare().emplace_back();
            blocks.splice(blocks.end(), spare(), spare().begin());
            Parked& made = blocks.back();
            made.stopped_at = -1;
            made.block.threads = like.threads, made.block.warps = like.warps, made.block.count = like.count;
            made.block.shared_bytes = like.shared_bytes, made.block.kernel = like.kernel, made.block.together = true;
            made.change_places();
            begin_block(order[begun++]);
            made.change_places();
        }
        current = choose(blocks, policy, current);
        if (current == blocks.end()) report_deadlock(blocks);
        const int64_t passed = turns_passed();
        current->change_places();
        const bool ended = run_block();
        const bool able = std::any_of(block.warp.begin(), block.warp.end(), [](const Warp& w) { return w.runnable; });
        current->change_places();
        current->stopped_at = able || turns_passed() != passed ? -1 : passed;
        if (!ended) continue;
        spare().splice(spare().end(), blocks, current);
        current = blocks.end();
    }
}

}  // namespace

void launch(const std::function<void()>& kernel, int64_t blocks, int threads, uint32_t shared_bytes, uint64_t seed,
            int together, Policy policy) {
    if (threads % kLanes || threads < kLanes || threads > kMostWarps * kLanes)
        throw std::runtime_error("emulator: a block of " + std::to_string(threads) + " threads");
    block.threads = threads;
    block.warps = threads / kLanes;
    block.count = blocks;
    block.shared_bytes = shared_bytes;
    block.kernel = &kernel;
    block.together = false;
    random_state = seed * 0x9E3779B97F4A7C15ull + 0x632BE59BD9B4E019ull;
    std::vector<int64_t> order(static_cast<size_t>(blocks));
    for (int64_t k = 0; k < blocks; ++k) {
        const int64_t other = static_cast<int64_t>(draw() % static_cast<uint32_t>(k + 1));
        order[static_cast<size_t>(k)] = order[static_cast<size_t>(other)];
        order[static_cast<size_t>(other)] = k;
    }
    ++totals.launches;
    begin_launch();
    begin_turns();
    if (together > 0) return run_together(order, together, policy, block);
    for (int64_t index : order) {
        block.last = index == order.back();
        begin_block(index);
        if (!run_block()) throw std::runtime_error("emulator: a turn is awaited in a launch whose blocks do not wait");
    }
}

}  // namespace emulator
