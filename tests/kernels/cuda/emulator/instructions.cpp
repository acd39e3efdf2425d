// Warp-wide instructions: they execute when all lanes of a warp have come to the same one.
#include "floats.h"
#include "hopper.h"
#include "state.h"

namespace emulator {
namespace {

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
        case kDrawTicket: {
            const Ticket& first = argument<Ticket>(w, 0);
            block.current = w * kLanes;
            const int drawn = draw_ticket(first.counter, first.end);
            for (int lane = 0; lane < kLanes; ++lane) argument<Ticket>(w, lane).value = drawn;
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

}  // namespace

const char* operation_name(int operation) {
    static const char* const names[kOperations] = {
        "nothing",      "warp_sync",    "vote.any",      "shfl",       "st.shared.32",   "st.shared.128",
        "ld.shared.32", "ld.shared.64", "ld.shared.128", "ldmatrix",   "ldmatrix.trans", "cp.async",
        "cp.async.32",  "mma.bf16",     "mma.f16",       "setmaxnreg", "group_fence",    "wgmma",
        "group_commit", "group_wait",   "tensor_load",   "bulk_add",   "draw_ticket"};
    return names[operation];
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

}  // namespace emulator
