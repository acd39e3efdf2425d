// A GPU's block of threads on a CPU, for tests: one fiber a thread, warps and lanes scheduled in a seeded random order,
// and a report for everything that a GPU would let pass silently:
//
//   * an access of shared memory outside of it, misaligned, not yet written, or under way by cp.async;
//   * two accesses of shared memory, one of them a write, that no barrier or warp-wide instruction orders
//     (vector clocks as in FastTrack, Flanagan and Freund, 2009; one clock a warp, and steps within a warp);
//   * an access of global memory outside the elements of the tensors that were allowed, misaligned, a write to
//     an input, an output element that no block or more than one has written;
//   * lanes of a warp at different warp-wide instructions, a deadlock at a barrier, a copy that is not waited for;
//   * of Hopper: tensor copies and wgmma work at a random time before the wait that covers them. Reported are accesses
//     before that of what they write or read (a warp reads its own 16 rows of an A in shared memory), registers written
//     and not fenced, ordinary writes of shared memory that no proxy fence shows to them, descriptors and tensor maps
//     against the rules, more registers taken than given;
//   * of sums in a fixed order (turns.cpp): an addition that no turn orders behind the one before. Blocks whose tiles
//     wait for one another run together, some of them at a time, in an order that may be the worst (blocks.cpp).
//
// Shared memory is NaN at the start, and so is the target of a copy until its wait, and the accumulators of a wgmma.
// Bank conflicts are counted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace emulator {

enum Operation : int {
    kNothing,
    kWarpSync,
    kWarpAny,
    kShuffle,
    kStore32,
    kStore128,
    kLoad32,
    kLoad64,
    kLoad128,
    kMatrices,
    kMatricesTransposed,
    kCopyAsync,
    kCopyAsync32,
    kMmaBFloat16,
    kMmaFloat16,
    kRegisters,
    kGroupFence,
    kGroupMultiply,  // the one that all warps of a warpgroup execute together
    kGroupCommit,
    kGroupWait,
    kTensorLoad,  // by one thread
    kBulkAdd,     // likewise
    kDrawTicket,
    kOperations
};

const char* operation_name(int operation);

// What happened since the last reset. conflicts: wavefronts beyond the fewest that the bytes need.
struct Counters {
    int64_t calls[kOperations], conflicts[kOperations], barriers, blocks, launches;
};
Counters& counters();

// --- called by the host ---

// Elements of a tensor that kernels may read, or write each exactly once (by one block of threads).
void allow(const void* data, const int64_t* sizes, const int64_t* strides, int dimensions, int element, bool written);
void allow(const void* data, int64_t bytes, bool written);
void allow_workspace(void* data, int64_t bytes);    // like an output, of which some may stay unwritten
void allow_sums(void* data, int64_t bytes);         // float32 that any block may add to by bulk_add, and read
void allow_counters(int32_t* data, int64_t count);  // that one launch each may draw tickets from
void allow_turns(int32_t* data, int64_t count);     // by which the sums are in order
void forget();                                      // what was allowed
void check_all_written();                           // throws unless every element that may be written is

// Which of the blocks that run together goes on where one stops: any, the next one, the one that drew the latest ticket
// (so that whoever may wait does), or the earliest.
enum Policy : int { kAny, kInTurns, kLatestFirst, kEarliestFirst };

// Runs `kernel` for each of the blocks, which begin in a random order: `together` at a time, or where that is 0, each
// by itself and as if the others had drawn their tickets before. Throws std::runtime_error with a report.
void launch(const std::function<void()>& kernel, int64_t blocks, int threads, uint32_t shared_bytes, uint64_t seed,
            int together = 0, Policy policy = kAny);

// --- called by the threads (tests/kernels/cuda/emulator/cuda/ptx.h) ---

int thread_index();
int64_t block_index();
int64_t block_count();
void block_barrier(int id, int threads);  // threads 0: all
void barrier_arrive_only(int id, int threads);
bool barrier_any(int id, int threads, bool value);
void warp_wide(int operation, void* arguments);  // executes when all 32 lanes have come with the same operation
void commit_copies();
void wait_copies(int pending);
void check_global(const void* address, int bytes, bool write);

struct Access {
    uint32_t address;
    uint32_t words[4];
};
struct Shuffle {
    float value;
    int mask;
};
struct Vote {
    bool value;
};
struct Copy {
    uint32_t address;
    const void* source;
    int bytes, whole;  // what is read, and written with zeros behind it
};
struct Ticket {
    const int32_t* counter;
    int end, value;
};
struct Mma {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
};

// Hopper; see hopper.h.

// What a TensorMap holds here: elements of 2 bytes, dimensions from the innermost, strides in bytes of all but it.
struct TensorMapFields {
    const uint8_t* base;
    int64_t sizes[4], strides[3];
    int32_t box[4];
};
// Throws where cuTensorMapEncodeTiled would refuse a map with 128-byte swizzle.
void check_tensor_map(const TensorMapFields& map);

void barrier_init(uint32_t barrier, int arrivals);
void barrier_init_fence();
void barrier_arrive(uint32_t barrier, int expected_bytes);
void barrier_wait(uint32_t barrier, int parity);
void tensor_load(uint32_t address, const TensorMapFields& map, uint32_t barrier, const int (&place)[4]);
void async_proxy_fence();
void bulk_add(float* target, uint32_t source, int bytes);
void bulk_commit();
void bulk_wait(bool read);  // read: only until shared memory has been
void sums_fence();
void await_turn(const int32_t* turn, int number);
void pass_turn(int32_t* turn);

struct RegisterCount {
    int count;
    bool take;
};
struct Registers {  // of one thread
    void* data;
    size_t bytes;
};
struct Fence {
    const Registers* named;
    int count, pending;  // pending: of group_wait
};
struct GroupMultiply {
    float* c;
    const uint32_t* a_registers;  // or null
    uint64_t a, b;
    int columns;
    bool bfloat16, transpose_b, accumulate, transpose_a;
};

}  // namespace emulator
