// Fibers: every thread of a block has a stack of its own, and a random one of those that can run goes on.
#include <sys/mman.h>

#include <stdexcept>

#include "hopper.h"
#include "state.h"

#ifndef __x86_64__
#error "the switch between fibers is written for x86-64"
#endif

// Saves the callee's registers of the System V ABI on this stack and takes up the other one.
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, .-emulator_switch
)");
extern "C" void emulator_switch(void** save, void* to);

namespace emulator {
namespace {

constexpr size_t kStack = 128 * 1024;
uint8_t* stacks = nullptr;

std::string where_everybody_is() {
    std::string text;
    for (int w = 0; w < block.warps; ++w) {
        text += "\n  warp " + std::to_string(w) + ":";
        int done = 0;
        for (int lane = 0; lane < kLanes; ++lane) {
            const Fiber& f = block.fibers[w * kLanes + lane];
            if (f.state == kDone) ++done;
            if (f.state == kAtWarpWide) text += " " + std::to_string(lane) + "=" + operation_name(f.operation);
            if (f.state == kAtBarrier) text += " " + std::to_string(lane) + "=barrier " + std::to_string(f.barrier);
            if (f.state == kAtSharedBarrier) text += " " + std::to_string(lane) + "=" + shared_barrier_text(f.barrier);
        }
        if (done) text += " " + std::to_string(done) + " lanes done";
    }
    return text;
}

void fiber_main() {
    (*block.kernel)();
    for (const Group& group : block.fibers[block.current].groups)
        if (!group.copies.empty()) fail(here() + "ended with a cp.async under way");
    check_group_idle();
    check_no_sums();
    stop(kDone);
    block.warp[block.current / kLanes].done |= 1u << block.current % kLanes;
    run_another();
    __builtin_unreachable();
}

void run_block(int64_t index) {
    block.index = index;
    block.fibers.assign(static_cast<size_t>(block.threads), Fiber{});
    block.warp.assign(static_cast<size_t>(block.warps), Warp{});
    block.barrier.assign(kBarriers, Barrier{});
    block.shared.assign(block.shared_bytes, 0xFF);
    block.words.assign(block.shared_bytes / 4, Word{0, 0, -1, -1, false, false, 0, 0});
    block.reads.assign(block.words.size() * static_cast<size_t>(block.warps), 0);
    for (int w = 0; w < block.warps; ++w) {
        block.warp[w].runnable = kAll;
        block.warp[w].clock[w] = 1;
        block.warp[w].registers = std::min(256, kRegisterFile / block.threads / 8 * 8);
    }
    hopper = {};
    hopper.groups.resize(static_cast<size_t>((block.warps + kGroupWarps - 1) / kGroupWarps));
    for (int t = 0; t < block.threads; ++t) {
        void** top = reinterpret_cast<void**>(stacks + (t + 1) * kStack - 16);
        *--top = nullptr;  // keeps the stack aligned as after a call
        *--top = reinterpret_cast<void*>(fiber_main);
        for (int k = 0; k < 6; ++k) *--top = nullptr;
        block.fibers[t].stack_pointer = top;
    }
    block.report.clear();
    block.current = static_cast<int>(draw() % static_cast<uint32_t>(block.threads));
    emulator_switch(&block.host, block.fibers[block.current].stack_pointer);
    ++totals.blocks;
    if (block.report.empty()) check_block_ended();
    if (!block.report.empty()) throw std::runtime_error("emulator: " + block.report);
}

}  // namespace

Block block;
Counters totals;

std::string here() {
    return "block " + std::to_string(block.index) + ", warp " + std::to_string(block.current / kLanes) + ", lane " +
           std::to_string(block.current % kLanes) + ": ";
}

// Gives up: back to launch(), which throws. The fibers are left as they are.
void fail(const std::string& text) {
    block.report = text;
    void* unused;
    emulator_switch(&unused, block.host);
    __builtin_unreachable();
}

// Goes on with a random lane that can run: of the same warp mostly, now and then of another one.
void run_another() {
    if (work_under_way() && draw() % 4 == 0) advance();
    int w = block.current / kLanes;
    if (!block.warp[w].runnable || draw() % 8 == 0) {
        const int first = static_cast<int>(draw() % static_cast<uint32_t>(block.warps));
        int k = 0;
        while (k < block.warps && !block.warp[(first + k) % block.warps].runnable) ++k;
        if (k == block.warps && advance()) return run_another();
        if (k == block.warps) {
            for (const Fiber& f : block.fibers)
                if (f.state != kDone) fail("deadlock in block " + std::to_string(block.index) + where_everybody_is());
            void* unused;
            emulator_switch(&unused, block.host);
            __builtin_unreachable();
        }
        w = (first + k) % block.warps;
    }
    const uint32_t runnable = block.warp[w].runnable, turn = draw() % kLanes;
    const uint32_t turned = turn ? (runnable >> turn | runnable << (kLanes - turn)) : runnable;
    const int lane = static_cast<int>((static_cast<uint32_t>(__builtin_ctz(turned)) + turn) % kLanes);
    Fiber& from = block.fibers[block.current];
    block.current = w * kLanes + lane;
    Fiber& to = block.fibers[block.current];
    if (&from != &to) emulator_switch(&from.stack_pointer, to.stack_pointer);
}

void stop(State state) {
    block.fibers[block.current].state = state;
    block.warp[block.current / kLanes].runnable &= ~(1u << block.current % kLanes);
}

Counters& counters() { return totals; }

void launch(const std::function<void()>& kernel, int64_t blocks, int threads, uint32_t shared_bytes, uint64_t seed) {
    if (!stacks) {
        void* memory = mmap(nullptr, kStack * kMostWarps * kLanes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        stacks = static_cast<uint8_t*>(memory);
    }
    if (threads % kLanes || threads < kLanes || threads > kMostWarps * kLanes)
        throw std::runtime_error("emulator: a block of " + std::to_string(threads) + " threads");
    block.threads = threads;
    block.warps = threads / kLanes;
    block.count = blocks;
    block.shared_bytes = shared_bytes;
    block.kernel = &kernel;
    block.random = seed * 0x9E3779B97F4A7C15ull + 0x632BE59BD9B4E019ull;
    std::vector<int64_t> order(static_cast<size_t>(blocks));
    for (int64_t k = 0; k < blocks; ++k) {
        const int64_t other = static_cast<int64_t>(draw() % static_cast<uint32_t>(k + 1));
        order[static_cast<size_t>(k)] = order[static_cast<size_t>(other)];
        order[static_cast<size_t>(other)] = k;
    }
    ++totals.launches;
    begin_launch();
    for (int64_t index : order) {
        block.last = index == order.back();
        run_block(index);
    }
}

int thread_index() { return block.current; }
int64_t block_index() { return block.index; }
int64_t block_count() { return block.count; }

}  // namespace emulator
