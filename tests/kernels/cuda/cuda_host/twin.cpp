#include "twin.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <stdexcept>
#include <vector>

#ifndef __x86_64__
#error "the switch between fibers is written for x86-64"
#endif

// Saves the callee's registers of the System V ABI on this stack and takes up the other one.
asm(R"(
.text
.globl twin_switch
.type twin_switch, @function
twin_switch:
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
.size twin_switch, .-twin_switch
)");
extern "C" void twin_switch(void** save, void* to);

namespace twin {
namespace {

constexpr int kLanes = 32, kMostWarps = 32, kBarriers = 16, kBanks = 32;
constexpr uint32_t kAll = 0xFFFFFFFFu;
// Vector clocks have a component for each warp, and one for the copies that each barrier in shared memory counts.
constexpr int kSharedBarriers = 64, kClocks = kMostWarps + kSharedBarriers;
constexpr size_t kStack = 128 * 1024;

// --- global memory ---

struct Region {
    const uint8_t* begin;
    int64_t bytes;
    bool written, whole;         // may be written, and must be
    std::vector<int64_t> owner;  // of each byte: kOutside, kFree, kEarlierLaunch, or the block that wrote it
    bool sums = false;           // float32 that every block may add to
};
constexpr int64_t kOutside = -2, kFree = -1, kEarlierLaunch = INT64_MAX;

std::vector<Region> regions;

// --- a block of threads ---

enum State : uint8_t { kRunnable, kAtWarpWide, kAtBarrier, kAtSharedBarrier, kDone };

struct Group {
    std::vector<Copy> copies;
};

struct Fiber {
    void* stack_pointer;
    State state;
    int operation, barrier;
    void* arguments;
    bool vote;
    std::vector<Group> groups;  // the last one is open
    uint32_t fences;            // proxy fences so far
    bool acquired;              // this thread alone has seen, by a barrier in shared memory, what `seen` says
    uint32_t seen[kClocks];
    std::map<const uint8_t*, std::vector<uint8_t>> known;  // registers as a group_fence or a group_wait left them
};

struct Word {
    uint32_t write_clock, write_step;
    int16_t write_warp, write_lane;  // -1: nobody yet
    bool under_way;
    bool ordinary;     // the last write was by an instruction of the generic proxy, after `fences` fences of its thread
    uint16_t readers;  // warps that a wgmma reads it for
    uint32_t fences;
};

struct Warp {
    uint32_t runnable, arrived, done;
    uint32_t step;  // warp_syncs and barriers so far
    uint32_t clock[kClocks];
    bool at_group;  // all lanes have come to a group-wide instruction
    bool fenced;    // a group_fence since the last group_wait
    int commits, registers;
};

struct Barrier {
    bool vote;
    std::vector<int> threads;  // that wait
    int arrivals;              // without waiting, and what they have seen
    uint32_t clock[kClocks];
};

struct Block {
    int threads = 0, warps = 0, current = 0;
    int64_t index = 0, count = 0;
    uint32_t shared_bytes = 0;
    std::vector<Fiber> fibers;
    std::vector<Warp> warp;
    std::vector<Barrier> barrier;
    std::vector<uint8_t> shared;
    std::vector<Word> words;
    std::vector<uint32_t> reads;  // clock of each warp's last read of each word
    uint64_t random = 1;
    const std::function<void()>* kernel = nullptr;
    void* host = nullptr;  // the stack of launch()
    std::string report;
};

Block block;
Counters totals;
uint8_t* stacks = nullptr;

uint32_t draw() {
    block.random ^= block.random << 13;
    block.random ^= block.random >> 7;
    block.random ^= block.random << 17;
    return static_cast<uint32_t>(block.random >> 32);
}

std::string here() {
    return "block " + std::to_string(block.index) + ", warp " + std::to_string(block.current / kLanes) + ", lane " +
           std::to_string(block.current % kLanes) + ": ";
}

// Of hopper.h.
std::string shared_barrier_text(int address);
bool work_under_way();
bool advance();
void check_group_idle();
void check_no_sums();

// Gives up: back to launch(), which throws. The fibers are left as they are.
[[noreturn]] void fail(const std::string& text) {
    block.report = text;
    void* unused;
    twin_switch(&unused, block.host);
    __builtin_unreachable();
}

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
            twin_switch(&unused, block.host);
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
    if (&from != &to) twin_switch(&from.stack_pointer, to.stack_pointer);
}

void stop(State state) {
    block.fibers[block.current].state = state;
    block.warp[block.current / kLanes].runnable &= ~(1u << block.current % kLanes);
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

// What is wrong with an access that begins in `region`, or an empty text.
const char* judge(Region& region, int64_t first, int bytes, bool write) {
    if (first + bytes > region.bytes) return "across the end of a tensor";
    if (write && !region.written) return "that is an input";
    for (int64_t k = first; k < first + bytes; ++k) {
        const int64_t owner = region.owner[static_cast<size_t>(k)];
        const bool other = owner >= 0 && owner != block.index && owner != kEarlierLaunch;
        if (owner == kOutside) return "between the elements of a tensor";
        if (other) return "that another block of the launch has written";
        if (!write && region.written && owner == kFree) return "that nobody has written";
    }
    for (int64_t k = first; write && k < first + bytes; ++k) region.owner[static_cast<size_t>(k)] = block.index;
    return "";
}

// Tensors may lie in one another, as the parts of a packed projection do: some one must allow the access.
void check_elements(const void* address, int bytes, bool write) {
    const char* wrong = "outside of every tensor";
    const uint8_t* byte = static_cast<const uint8_t*>(address);
    for (Region& region : regions) {
        if (byte < region.begin || byte >= region.begin + region.bytes) continue;
        wrong = judge(region, byte - region.begin, bytes, write);
        if (!*wrong) return;
    }
    if (bytes > 0)
        fail(here() + (write ? "write" : "read") + " of " + std::to_string(bytes) + " bytes of global memory " + wrong);
}

// --- shared memory ---

// Whether `lane` of warp w has seen what warp `other` did until `clock`.
bool has_seen(int w, int lane, int other, uint32_t clock) {
    if (clock <= block.warp[w].clock[other]) return true;
    const Fiber& fiber = block.fibers[w * kLanes + lane];
    return fiber.acquired && clock <= fiber.seen[other];
}

// What single lanes have seen is seen by the whole warp after a warp_sync or a barrier.
void share_seen(int w) {
    for (int lane = 0; lane < kLanes; ++lane) {
        Fiber& fiber = block.fibers[w * kLanes + lane];
        if (!fiber.acquired) continue;
        for (int k = 0; k < kClocks; ++k) block.warp[w].clock[k] = std::max(block.warp[w].clock[k], fiber.seen[k]);
        fiber.acquired = false;
    }
}

void check_shared(uint32_t address, uint32_t bytes, bool write, int lane, const char* what) {
    const int w = block.current / kLanes;
    const auto say = [&](const std::string& text) {
        fail("block " + std::to_string(block.index) + ", warp " + std::to_string(w) + ", lane " + std::to_string(lane) +
             ": " + what + " at shared byte " + std::to_string(address) + ": " + text);
    };
    if (address % bytes) say("not aligned to " + std::to_string(bytes) + " bytes");
    if (uint64_t{address} + bytes > block.shared_bytes)
        say("out of range, shared memory has " + std::to_string(block.shared_bytes) + " bytes");
    Warp& warp = block.warp[w];
    for (uint32_t k = address / 4; k < (address + bytes) / 4; ++k) {
        Word& word = block.words[k];
        if (!write && word.write_warp < 0) say("read before anything was written");
        if (word.under_way) say("a copy is still under way there");
        if (write && word.readers) say("a wgmma or a bulk_add may still be reading there");
        if (word.write_warp >= 0) {
            if (word.write_warp != w && !has_seen(w, lane, word.write_warp, word.write_clock))
                say("race with a " + (word.write_warp < kMostWarps ? "write by warp " + std::to_string(word.write_warp)
                                                                   : std::string("tensor copy")));
            if (word.write_warp == w && word.write_lane != lane && word.write_step == warp.step)
                say("race with a write by lane " + std::to_string(word.write_lane));
        }
        uint32_t* reads = &block.reads[k * static_cast<size_t>(block.warps)];
        if (!write) {
            reads[w] = warp.clock[w];
            continue;
        }
        for (int other = 0; other < block.warps; ++other)
            if (other != w && !has_seen(w, lane, other, reads[other]))
                say("race with a read by warp " + std::to_string(other));
        word.write_warp = static_cast<int16_t>(w);
        word.write_lane = static_cast<int16_t>(lane);
        word.write_clock = warp.clock[w];
        word.write_step = warp.step;
        word.ordinary = true;
        word.fences = block.fibers[w * kLanes + lane].fences;
    }
}

// Wavefronts beyond the fewest possible, for the lanes [first, first + lanes) that access `bytes` each in one phase.
void count_conflicts(int operation, const uint32_t* addresses, int lanes, int bytes) {
    uint32_t seen[kBanks][kLanes];
    int used[kBanks] = {};
    int most = 1;
    for (int lane = 0; lane < lanes; ++lane)
        for (uint32_t word = addresses[lane] / 4; word < (addresses[lane] + bytes) / 4; ++word) {
            const int bank = word % kBanks;
            if (std::find(seen[bank], seen[bank] + used[bank], word) == seen[bank] + used[bank])
                seen[bank][used[bank]++] = word;
            most = std::max(most, used[bank]);
        }
    totals.conflicts[operation] += most - 1;
}

template <class X>
X& argument(int warp, int lane) {
    return *static_cast<X*>(block.fibers[warp * kLanes + lane].arguments);
}

void shared_access(int operation, int w) {
    const int bytes = operation == kStore32 || operation == kLoad32 ? 4 : operation == kLoad64 ? 8 : 16;
    const int phase = 128 / bytes;
    const bool write = operation == kStore32 || operation == kStore128;
    uint32_t addresses[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
        Access& access = argument<Access>(w, lane);
        addresses[lane] = access.address;
        check_shared(access.address, bytes, write, lane, operation_name(operation));
        if (write) {
            std::memcpy(&block.shared[access.address], access.words, bytes);
        } else {
            std::memcpy(access.words, &block.shared[access.address], bytes);
        }
    }
    for (int lane = 0; lane < kLanes; lane += phase) count_conflicts(operation, addresses + lane, phase, bytes);
}

void load_matrices(int operation, int w) {
    uint16_t matrix[4][8][8];
    uint32_t addresses[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
        addresses[lane] = argument<Access>(w, lane).address;
        check_shared(addresses[lane], 16, false, lane, operation_name(operation));
        std::memcpy(matrix[lane / 8][lane % 8], &block.shared[addresses[lane]], 16);
    }
    for (int lane = 0; lane < kLanes; lane += 8) count_conflicts(operation, addresses + lane, 8, 16);
    for (int lane = 0; lane < kLanes; ++lane)
        for (int m = 0; m < 4; ++m) {
            const int g = lane / 4, t = lane % 4 * 2;
            const uint16_t low = operation == kMatrices ? matrix[m][g][t] : matrix[m][t][g];
            const uint16_t high = operation == kMatrices ? matrix[m][g][t + 1] : matrix[m][t + 1][g];
            argument<Access>(w, lane).words[m] = low | static_cast<uint32_t>(high) << 16;
        }
}

void start_copies(int operation, int w) {
    uint32_t addresses[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
        Copy& copy = argument<Copy>(w, lane);
        addresses[lane] = copy.address;
        block.current = w * kLanes + lane;
        const uint32_t whole = static_cast<uint32_t>(copy.whole);
        if (copy.bytes < 0 || copy.bytes > copy.whole)
            fail(here() + "cp.async of " + std::to_string(copy.bytes) + " bytes");
        if (reinterpret_cast<uintptr_t>(copy.source) % whole) fail(here() + "cp.async from a misaligned address");
        check_elements(copy.source, copy.bytes, false);
        check_shared(copy.address, whole, true, lane, "cp.async");
        std::memset(&block.shared[copy.address], 0xFF, whole);
        for (uint32_t k = 0; k < whole / 4; ++k) block.words[copy.address / 4 + k].under_way = true;
        std::vector<Group>& groups = block.fibers[block.current].groups;
        if (groups.empty()) groups.emplace_back();
        groups.back().copies.push_back(copy);
    }
    const int bytes = operation == kCopyAsync ? 16 : 4, phase = 128 / bytes;
    for (int lane = 0; lane < kLanes; lane += phase) count_conflicts(operation, addresses + lane, phase, bytes);
}

// The sum runs over k in float32, starting from c; products of 16-bit floats are exact.
template <float (*kFrom)(uint16_t)>
void multiply_add(int w) {
    float a[16][16], b[16][8], c[16][8];
    for (int lane = 0; lane < kLanes; ++lane) {
        const Mma& mma = argument<Mma>(w, lane);
        const int g = lane / 4, t = lane % 4 * 2;
        for (int r = 0; r < 4; ++r)
            for (int high = 0; high < 2; ++high)
                a[g + r % 2 * 8][t + r / 2 * 8 + high] = kFrom(static_cast<uint16_t>(mma.a[r] >> (16 * high)));
        for (int r = 0; r < 2; ++r)
            for (int high = 0; high < 2; ++high)
                b[t + r * 8 + high][g] = kFrom(static_cast<uint16_t>(mma.b[r] >> (16 * high)));
        for (int r = 0; r < 4; ++r) c[g + r / 2 * 8][t + r % 2] = mma.c[r];
    }
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < 16; ++k)
            for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
    for (int lane = 0; lane < kLanes; ++lane)
        for (int r = 0; r < 4; ++r) argument<Mma>(w, lane).c[r] = c[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2];
}

#include "hopper.h"

void execute(int operation, int w) {
    switch (operation) {
        case kWarpSync:
            share_seen(w);
            break;
        case kRegisters:
            change_registers(w);
            break;
        case kGroupFence:
            group_fence(w);
            break;
        case kGroupMultiply:
            issue_multiply(w / kGroupWarps);
            break;
        case kGroupCommit:
            ++block.warp[w].commits;
            break;
        case kGroupWait:
            group_wait(w);
            break;
        case kWarpAny: {
            bool any = false;
            for (int lane = 0; lane < kLanes; ++lane) any |= argument<Vote>(w, lane).value;
            for (int lane = 0; lane < kLanes; ++lane) argument<Vote>(w, lane).value = any;
            break;
        }
        case kShuffle: {
            float values[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) values[lane] = argument<Shuffle>(w, lane).value;
            for (int lane = 0; lane < kLanes; ++lane) {
                Shuffle& shuffle = argument<Shuffle>(w, lane);
                shuffle.value = values[(lane ^ shuffle.mask) % kLanes];
            }
            break;
        }
        case kMatrices:
        case kMatricesTransposed:
            load_matrices(operation, w);
            break;
        case kCopyAsync:
        case kCopyAsync32:
            start_copies(operation, w);
            break;
        case kMmaBFloat16:
            multiply_add<from_bfloat16>(w);
            break;
        case kMmaFloat16:
            multiply_add<from_float16>(w);
            break;
        default:
            shared_access(operation, w);
    }
}

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
    twin_switch(&block.host, block.fibers[block.current].stack_pointer);
    ++totals.blocks;
    if (block.report.empty()) check_block_ended();
    if (!block.report.empty()) throw std::runtime_error("host twin: " + block.report);
}

float float16_table[65536];
const bool float16_ready = [] {
    for (uint32_t bits = 0; bits < 65536; ++bits) {
        const int exponent = static_cast<int>(bits >> 10 & 31), fraction = static_cast<int>(bits & 1023);
        float value = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                    : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
        if (exponent == 31) value = fraction ? NAN : INFINITY;
        float16_table[bits] = bits >> 15 ? -value : value;
    }
    return true;
}();

}  // namespace

const char* operation_name(int operation) {
    static const char* const names[kOperations] = {
        "nothing",      "warp_sync",    "vote.any",      "shfl",       "st.shared.32",   "st.shared.128",
        "ld.shared.32", "ld.shared.64", "ld.shared.128", "ldmatrix",   "ldmatrix.trans", "cp.async",
        "cp.async.32",  "mma.bf16",     "mma.f16",       "setmaxnreg", "group_fence",    "wgmma",
        "group_commit", "group_wait",   "tensor_load",   "bulk_add"};
    return names[operation];
}

Counters& counters() { return totals; }

void allow(const void* data, const int64_t* sizes, const int64_t* strides, int dimensions, int element, bool written) {
    int64_t elements = 1, last = 0;
    for (int d = 0; d < dimensions; ++d) elements *= sizes[d], last += (sizes[d] - 1) * strides[d];
    if (elements == 0) return;
    Region region{static_cast<const uint8_t*>(data), (last + 1) * element, written, written, {}};
    region.owner.assign(static_cast<size_t>(region.bytes), kOutside);
    for (int64_t k = 0; k < elements; ++k) {
        int64_t rest = k, place = 0;
        for (int d = dimensions - 1; d >= 0; rest /= sizes[d--]) place += rest % sizes[d] * strides[d];
        for (int byte = 0; byte < element; ++byte) region.owner[static_cast<size_t>(place * element + byte)] = kFree;
    }
    if (written) std::memset(const_cast<void*>(data), 0xFF, static_cast<size_t>(region.bytes));
    regions.push_back(std::move(region));
}

void allow(const void* data, int64_t bytes, bool written) {
    const int64_t one = 1;
    if (data) allow(data, &bytes, &one, 1, 1, written);
}

void allow_workspace(void* data, int64_t bytes) {
    allow(data, bytes, true);
    regions.back().whole = false;
}

void allow_sums(void* data, int64_t bytes) {
    allow(data, bytes, false);
    regions.back().sums = true;
}

void forget() { regions.clear(); }

void check_all_written() {
    for (const Region& region : regions)
        for (int64_t k = 0; region.whole && k < region.bytes; ++k)
            if (region.owner[static_cast<size_t>(k)] == kFree)
                throw std::runtime_error("host twin: byte " + std::to_string(k) + " of " +
                                         std::to_string(region.bytes) + " of an output was never written");
}

void launch(const std::function<void()>& kernel, int64_t blocks, int threads, uint32_t shared_bytes, uint64_t seed) {
    if (!stacks) {
        void* memory = mmap(nullptr, kStack * kMostWarps * kLanes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        stacks = static_cast<uint8_t*>(memory);
    }
    if (threads % kLanes || threads < kLanes || threads > kMostWarps * kLanes)
        throw std::runtime_error("host twin: a block of " + std::to_string(threads) + " threads");
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
    // What an earlier kernel of the call has written may be written again by one that follows it.
    for (Region& region : regions)
        for (int64_t& owner : region.owner)
            if (owner >= 0) owner = kEarlierLaunch;
    for (int64_t index : order) run_block(index);
}

int thread_index() { return block.current; }
int64_t block_index() { return block.index; }
int64_t block_count() { return block.count; }

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

void warp_wide(int operation, void* arguments) {
    const int self = block.current, w = self / kLanes, lane = self % kLanes;
    Warp& warp = block.warp[w];
    Fiber& fiber = block.fibers[self];
    fiber.operation = operation;
    fiber.arguments = arguments;
    for (uint32_t others = warp.arrived; others; others &= others - 1) {
        const int there = block.fibers[w * kLanes + __builtin_ctz(others)].operation;
        if (there != operation)
            fail(here() + "is at " + operation_name(operation) + ", another lane of the warp at " +
                 operation_name(there));
        break;
    }
    if (warp.done) fail(here() + "is at " + operation_name(operation) + ", but a lane of the warp has ended");
    warp.arrived |= 1u << lane;
    if (warp.arrived != kAll) {
        stop(kAtWarpWide);
        run_another();
        return;
    }
    if (operation == kGroupMultiply && !group_is_here(w)) {
        stop(kAtWarpWide);
        run_another();
        return;
    }
    ++totals.calls[operation];
    execute(operation, w);
    if (operation == kGroupMultiply) release_group(w / kGroupWarps);
    if (operation == kWarpSync) ++warp.step;  // the others order no memory
    block.current = self;
    warp.arrived = 0;
    warp.runnable = kAll;
    for (int k = 0; k < kLanes; ++k) block.fibers[w * kLanes + k].state = kRunnable;
}

void check_tensor_map(const TensorMapFields& map) {
    const auto refuse = [](const std::string& why) {
        throw std::runtime_error("host twin: cuTensorMapEncodeTiled refuses: " + why);
    };
    if (reinterpret_cast<uintptr_t>(map.base) % 16) refuse("the tensor does not begin on 16 bytes");
    for (int d = 0; d < 4; ++d) {
        if (map.sizes[d] < 1 || map.sizes[d] > int64_t{1} << 32) refuse("a size of " + std::to_string(map.sizes[d]));
        if (map.box[d] < 1 || map.box[d] > 256) refuse("a box of " + std::to_string(map.box[d]));
    }
    for (int64_t stride : map.strides)
        if (stride <= 0 || stride % 16 || stride >= int64_t{1} << 40) refuse("a stride of " + std::to_string(stride));
    if (map.box[0] * 2 != 128) refuse("rows of the box that are not as wide as the swizzle");
}

void barrier_init(uint32_t barrier, int arrivals) {
    check_shared(barrier, 8, true, block.current % kLanes, "mbarrier.init");
    if (arrivals < 1) fail(here() + "a barrier of " + std::to_string(arrivals) + " arrivals");
    SharedBarrier made{};
    made.arrivals = made.pending = arrivals;
    made.maker = block.current;
    made.clock = kMostWarps + static_cast<int>(hopper.barriers.size());
    if (made.clock == kClocks) fail(here() + "more barriers than the twin has clocks for");
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

void tensor_load(uint32_t address, const TensorMapFields& map, uint32_t barrier, const int (&place)[4]) {
    const SharedBarrier& counting = shared_barrier(barrier, true);
    const int lane = block.current % kLanes;
    if (address % 1024)
        fail(here() + "tensor_load to shared byte " + std::to_string(address) + ", no multiple of 1024");
    TensorCopy copy{address, barrier, map, {}, block.current, static_cast<uint32_t>(counting.phase) + 1};
    std::copy(place, place + 4, copy.place);
    const uint32_t end = address + static_cast<uint32_t>(box_bytes(map));
    for (uint32_t chunk = address; chunk < end; chunk += 16) {
        if (chunk + 16 <= block.shared_bytes) check_proxy(chunk, "tensor_load writes");
        check_shared(chunk, 16, true, lane, "tensor_load");
        for (uint32_t k = chunk / 4; k < chunk / 4 + 4; ++k) {
            Word& word = block.words[k];
            word.under_way = true;
            word.ordinary = false;
            word.write_warp = static_cast<int16_t>(counting.clock);  // seen by those who wait for the phase
            word.write_clock = copy.clock;
        }
        std::memset(&block.shared[chunk], 0xFF, 16);
    }
    hopper.copies.push_back(copy);
    ++totals.calls[kTensorLoad];
}

void bulk_add(float* target, uint32_t source, int bytes) {
    const int lane = block.current % kLanes;
    const uint8_t* first = reinterpret_cast<const uint8_t*>(target);
    if (bytes <= 0 || bytes % 16 || source % 16 || reinterpret_cast<uintptr_t>(target) % 16)
        fail(here() + "bulk_add of " + std::to_string(bytes) + " bytes, or misaligned");
    if (std::none_of(regions.begin(), regions.end(), [&](const Region& region) {
            return region.sums && first >= region.begin && first + bytes <= region.begin + region.bytes;
        }))
        fail(here() + "bulk_add outside of the sums");
    for (uint32_t chunk = source; chunk < source + static_cast<uint32_t>(bytes); chunk += 16) {
        check_shared(chunk, 16, false, lane, "bulk_add");
        check_proxy(chunk, "bulk_add reads");
        for (uint32_t k = chunk / 4; k < chunk / 4 + 4; ++k) ++block.words[k].readers;
    }
    hopper.sums.push_back({target, source, bytes, block.current, false, false});
    ++totals.calls[kBulkAdd];
}

void bulk_commit() {
    for (BulkSum& sum : hopper.sums) sum.committed |= sum.thread == block.current;
}

void bulk_wait() {
    const int w = block.current / kLanes;
    for (size_t k = hopper.sums.size(); k-- > 0;) {
        BulkSum& sum = hopper.sums[k];
        if (sum.thread != block.current || !sum.committed) continue;
        if (!sum.executed) execute_sum(sum);
        for (uint32_t word = sum.source / 4; word < (sum.source + static_cast<uint32_t>(sum.bytes)) / 4; ++word) {
            --block.words[word].readers;
            block.reads[word * static_cast<size_t>(block.warps) + static_cast<size_t>(w)] = block.warp[w].clock[w];
        }
        hopper.sums.erase(hopper.sums.begin() + static_cast<std::ptrdiff_t>(k));
    }
}

void async_proxy_fence() { ++block.fibers[block.current].fences; }

void commit_copies() {
    std::vector<Group>& groups = block.fibers[block.current].groups;
    if (groups.empty()) groups.emplace_back();
    groups.emplace_back();
}

void wait_copies(int pending) {
    std::vector<Group>& groups = block.fibers[block.current].groups;
    while (static_cast<int>(groups.size()) - 1 > pending) {  // the open group is not waited for
        for (const Copy& copy : groups.front().copies) {
            uint8_t bytes[16] = {};
            std::memcpy(bytes, copy.source, static_cast<size_t>(copy.bytes));
            const uint32_t whole = static_cast<uint32_t>(copy.whole);
            for (uint32_t k = 0; k < whole / 4; ++k) block.words[copy.address / 4 + k].under_way = false;
            check_shared(copy.address, whole, true, block.current % kLanes, "the arrival of cp.async");
            std::memcpy(&block.shared[copy.address], bytes, whole);
        }
        groups.erase(groups.begin());
    }
}

void check_global(const void* address, int bytes, bool write) {
    if (reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes))
        fail(here() + "global memory at an address not aligned to " + std::to_string(bytes));
    check_elements(address, bytes, write);
}

float from_bfloat16(uint16_t bits) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

float from_float16(uint16_t bits) { return float16_table[bits]; }

uint16_t to_bfloat16(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    if (value != value) return 0x7FFF;
    return static_cast<uint16_t>((word + 0x7FFF + (word >> 16 & 1)) >> 16);
}

uint16_t to_float16(float value) {
    if (value != value) return 0x7FFF;
    const _Float16 half = static_cast<_Float16>(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

}  // namespace twin
