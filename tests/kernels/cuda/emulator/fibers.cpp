// Fibers: every thread of a block has a stack of its own, and a random one of those that can run goes on.
#include <sys/mman.h>

#include <new>
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

// The next lane to run: a random one that can, of the same warp mostly, now and then of another one. False: none can.
bool choose_another() {
    if (work_under_way() && draw() % 4 == 0) advance();
    int w = block.current / kLanes;
    if (!block.warp[w].runnable || draw() % 8 == 0) {
        const int first = static_cast<int>(draw() % static_cast<uint32_t>(block.warps));
        int k = 0;
        while (k < block.warps && !block.warp[(first + k) % block.warps].runnable) ++k;
        if (k == block.warps) return advance() && choose_another();
        w = (first + k) % block.warps;
    }
    const uint32_t runnable = block.warp[w].runnable, turn = draw() % kLanes;
    const uint32_t turned = turn ? (runnable >> turn | runnable << (kLanes - turn)) : runnable;
    const int lane = static_cast<int>((static_cast<uint32_t>(__builtin_ctz(turned)) + turn) % kLanes);
    block.current = w * kLanes + lane;
    return true;
}

bool any_fiber(State state) {
    return std::any_of(block.fibers.begin(), block.fibers.end(), [&](const Fiber& f) { return f.state == state; });
}

bool has_ended() {
    return std::all_of(block.fibers.begin(), block.fibers.end(), [](const Fiber& f) { return f.state == kDone; });
}

}  // namespace

std::string where_everybody_is() {
    const auto where = [](const Fiber& f) -> std::string {
        if (f.state == kDone) return "done";
        if (f.state == kAtWarpWide) return operation_name(f.operation);
        if (f.state == kAtBarrier) return "barrier " + std::to_string(f.barrier);
        if (f.state == kAtSharedBarrier) return shared_barrier_text(f.barrier);
        if (f.state == kAtTurn)
            return "turn " + std::to_string(f.number) + ", and " + std::to_string(*f.turn) + " are past";
        return "able to run";
    };
    std::string text;
    for (int w = 0; w < block.warps; ++w) {
        text += "\n  warp " + std::to_string(w) + ":";
        for (int lane = 0, end; lane < kLanes; lane = end) {  // lanes at one place together
            const std::string place = where(block.fibers[w * kLanes + lane]);
            for (end = lane + 1; end < kLanes && where(block.fibers[w * kLanes + end]) == place;) ++end;
            text += " " + std::to_string(lane) + "-" + std::to_string(end - 1) + "=" + place;
        }
    }
    return text;
}

void begin_block(int64_t index) {
    if (!block.stacks) {
        void* memory = mmap(nullptr, kStack * kMostWarps * kLanes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        block.stacks = static_cast<uint8_t*>(memory);
    }
    block.index = index;
    block.ticket = -1;
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
        void** top = reinterpret_cast<void**>(block.stacks + (t + 1) * kStack - 16);
        *--top = nullptr;  // keeps the stack aligned as after a call
        *--top = reinterpret_cast<void*>(fiber_main);
        for (int k = 0; k < 6; ++k) *--top = nullptr;
        block.fibers[t].stack_pointer = top;
    }
    block.report.clear();
    block.current = static_cast<int>(draw() % static_cast<uint32_t>(block.threads));
}

bool run_block() {
    wake_at_turns();
    if (!choose_another()) return false;
    emulator_switch(&block.host, block.fibers[block.current].stack_pointer);
    const bool ended = block.report.empty() && has_ended();
    if (ended) check_block_ended();
    if (!block.report.empty()) throw std::runtime_error("emulator: " + block.report);
    totals.blocks += ended;
    return ended;
}

Block block;
Counters totals;
uint64_t random_state = 1;

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

void run_another() {
    constexpr uint32_t kSeldom = 256;
    Fiber& from = block.fibers[block.current];
    const bool goes_on = choose_another();
    if (goes_on && !(block.together && draw() % kSeldom == 0)) {
        Fiber& to = block.fibers[block.current];
        if (&from != &to) emulator_switch(&from.stack_pointer, to.stack_pointer);
        return;
    }
    if (!goes_on && !has_ended() && !any_fiber(kAtTurn))
        fail("deadlock in block " + std::to_string(block.index) + where_everybody_is());
    emulator_switch(&from.stack_pointer, block.host);  // back when run_block chooses it
}

void stop(State state) {
    block.fibers[block.current].state = state;
    block.warp[block.current / kLanes].runnable &= ~(1u << block.current % kLanes);
}

Counters& counters() { return totals; }

int thread_index() { return block.current; }
int64_t block_index() { return block.index; }
int64_t block_count() { return block.count; }

}  // namespace emulator
