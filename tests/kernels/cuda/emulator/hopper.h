// Hopper's work under way: tensor copies, sums in global memory and wgmma.
//
// It lies in a queue until a random later time, at which it reads what is in memory then. What it will read and write
// is marked from the start until the wait, so that an access too early is found in any order.
#pragma once

#include <deque>
#include <memory>

#include "state.h"

namespace emulator {

constexpr int kGroupWarps = 4, kGroupThreads = kGroupWarps * kLanes, kRegisterFile = 65536;

struct SharedBarrier {
    int arrivals, pending, phase;
    int64_t bytes;  // expected and not yet copied
    bool fenced;
    int maker, clock;                          // the thread that made it; its component of vector clocks
    uint32_t arrived[kClocks], done[kClocks];  // what those see who wait for this phase, and for the last one
    std::vector<int> waiting;
};

struct TensorCopy {
    uint32_t address, barrier;
    TensorMapFields map;
    int place[4], thread;
    uint32_t clock;  // one more than the barrier's phase
};

// Accumulators that multiplies under way add up in.
struct Accumulators {
    float* home[kGroupThreads];
    int count;  // a thread
    std::vector<float> values;
};

struct Multiply {
    GroupMultiply what;
    const uint32_t* a_home[kGroupThreads];
    uint32_t a[kGroupThreads][4];
    std::shared_ptr<Accumulators> c;
    std::vector<uint32_t> a_chunks[kGroupWarps], b_chunks;  // where 8 elements each lie
    int group[kGroupWarps];                                 // commits of each warp before
    bool executed, waited[kGroupWarps];
};

struct WarpGroup {
    std::deque<Multiply> multiplies;
};

struct BulkSum {
    float* target;
    uint32_t source;
    int bytes, thread;
    bool committed, executed, let_go;
    std::vector<uint8_t> read;  // what shared memory held, once it is let go
};

struct Asynchronous {
    std::map<uint32_t, SharedBarrier> barriers;
    std::vector<BulkSum> sums;
    std::vector<TensorCopy> copies;
    std::vector<WarpGroup> groups;
};
extern Asynchronous hopper;

// --- barriers.cpp ---

std::string shared_barrier_text(int address);
SharedBarrier& shared_barrier(uint32_t address, bool asynchronous);
void complete_phase(SharedBarrier& b);

// --- tensor_copies.cpp ---

inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }
void check_proxy(uint32_t chunk, const char* what);
void execute_copy(const TensorCopy& copy);
bool execute_some_sum();
void check_no_sums();

// --- group_multiply.cpp ---

bool group_is_here(int w);
void release_group(int group);
void issue_multiply(int group);
bool execute_next(int group);
void group_fence(int w);
void group_wait(int w);
void check_group_idle();

// --- hopper.cpp ---

void change_registers(int w);
void check_block_ended();
bool work_under_way();
// Does some of the work under way; false where there is none.
bool advance();

}  // namespace emulator
