// What the parts of the emulator share: the block of threads that runs, and what each part offers to the others.
#pragma once

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "emulator.h"

namespace emulator {

constexpr int kLanes = 32, kMostWarps = 32, kBarriers = 16, kBanks = 32;
constexpr uint32_t kAll = 0xFFFFFFFFu;
// Vector clocks have a component for each warp, and one for the copies that each barrier in shared memory counts.
constexpr int kSharedBarriers = 64, kClocks = kMostWarps + kSharedBarriers;

enum State : uint8_t { kRunnable, kAtWarpWide, kAtBarrier, kAtSharedBarrier, kAtTurn, kDone };

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
    const int32_t* turn;  // that it waits for, until it has been passed on `number` times
    int number;
};

struct Word {
    uint32_t write_clock, write_step;
    int16_t write_warp, write_lane;  // -1: not written yet
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
    bool last = false;      // of the launch: what tickets are left are its
    bool together = false;  // with others, which go on now and then
    int ticket = -1;        // the latest
    uint32_t shared_bytes = 0;
    std::vector<Fiber> fibers;
    std::vector<Warp> warp;
    std::vector<Barrier> barrier;
    std::vector<uint8_t> shared;
    std::vector<Word> words;
    std::vector<uint32_t> reads;  // clock of each warp's last read of each word
    const std::function<void()>* kernel = nullptr;
    uint8_t* stacks = nullptr;
    void* host = nullptr;  // the stack of launch()
    std::string report;
};

extern Block block;  // the one that runs
extern Counters totals;
extern uint64_t random_state;

inline uint32_t draw() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return static_cast<uint32_t>(random_state >> 32);
}

template <class X>
X& argument(int warp, int lane) {
    return *static_cast<X*>(block.fibers[warp * kLanes + lane].arguments);
}

// --- fibers.cpp ---

std::string here();
// Gives up: back to launch(), which throws. The fibers are left as they are.
[[noreturn]] void fail(const std::string& text);
// Goes on with a random lane that can run: of the same warp mostly, now and then of another one.
void run_another();
void stop(State state);
void begin_block(int64_t index);
// Runs the block until it ends (true), or until it waits for a turn or another one of those together shall go on.
bool run_block();
std::string where_everybody_is();

// --- global_memory.cpp ---

void check_elements(const void* address, int bytes, bool write);
bool may_add_to(const float* target, int bytes);
int draw_ticket(const int32_t* counter, int end);
void begin_launch();

// --- turns.cpp ---

void forget_turns();
void begin_turns();
void wake_at_turns();  // the fibers of this block whose turn has come
int64_t turns_passed();
// A thread adds to sums, and knows that it has.
void add_in_turn(const float* target, int bytes);
void added_in_turn(const float* target, int thread);

// --- shared_memory.cpp ---

bool has_seen(int w, int lane, int other, uint32_t clock);
void share_seen(int w);
void check_shared(uint32_t address, uint32_t bytes, bool write, int lane, const char* what);
void count_conflicts(int operation, const uint32_t* addresses, int lanes, int bytes);
void shared_access(int operation, int w);
void load_matrices(int operation, int w);

// --- barriers.cpp ---

// Adds to `into` what a thread has seen.
void join(uint32_t* into, int thread);

}  // namespace emulator
