// Shared memory: races by vector clocks, bank conflicts, and the instructions that read and write it.
#include "state.h"

namespace emulator {

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

}  // namespace emulator
