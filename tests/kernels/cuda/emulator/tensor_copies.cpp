// Tensor copies and sums in global memory (cp.async.bulk, cp.reduce.async.bulk).
#include <stdexcept>

#include "hopper.h"

namespace emulator {
namespace {

int64_t box_bytes(const TensorMapFields& map) { return int64_t{2} * map.box[0] * map.box[1] * map.box[2] * map.box[3]; }

// One row of the box, 128 bytes: zeros where it leaves the tensor.
void copy_row(const TensorCopy& copy, uint32_t to, const int64_t (&place)[4]) {
    const TensorMapFields& map = copy.map;
    bool inside = true;
    int64_t offset = place[0] * 2;
    for (int d = 1; d < 4; ++d) {
        inside &= place[d] >= 0 && place[d] < map.sizes[d];
        offset += place[d] * map.strides[d - 1];
    }
    const int64_t begin = std::max<int64_t>(0, -place[0]);
    const int64_t end = inside ? std::min<int64_t>(map.box[0], map.sizes[0] - place[0]) : 0;
    const uint8_t* from = map.base + offset;
    std::vector<uint8_t> row(static_cast<size_t>(map.box[0]) * 2, 0);
    if (begin < end) {
        check_elements(from + begin * 2, static_cast<int>(end - begin) * 2, false);
        std::memcpy(&row[static_cast<size_t>(begin) * 2], from + begin * 2, static_cast<size_t>(end - begin) * 2);
    }
    for (uint32_t byte = 0; byte < row.size(); byte += 16)
        std::memcpy(&block.shared[swizzled(to + byte)], &row[byte], 16);
}

void execute_sum(BulkSum& sum) {
    for (int k = 0; k < sum.bytes / 4; ++k) {
        float x;
        std::memcpy(&x, sum.read.empty() ? &block.shared[sum.source + static_cast<uint32_t>(k) * 4] : &sum.read[k * 4],
                    4);
        sum.target[k] += x;
    }
    sum.executed = true;
}

}  // namespace

// What shared memory is to be read or written by the asynchronous proxy: ordinary writes before must have been fenced.
void check_proxy(uint32_t chunk, const char* what) {
    for (uint32_t k = chunk / 4; k < chunk / 4 + 4; ++k) {
        const Word& word = block.words[k];
        if (word.write_warp < 0 || !word.ordinary) continue;
        if (block.fibers[word.write_warp * kLanes + word.write_lane].fences == word.fences)
            fail(here() + what + " at shared byte " + std::to_string(chunk) + ", written by warp " +
                 std::to_string(word.write_warp) + " without an async_proxy_fence behind");
    }
}

void execute_copy(const TensorCopy& copy) {
    const int self = block.current;
    block.current = copy.thread;
    uint32_t to = copy.address;
    for (int b = 0; b < copy.map.box[3]; ++b)
        for (int h = 0; h < copy.map.box[2]; ++h)
            for (int n = 0; n < copy.map.box[1]; ++n, to += static_cast<uint32_t>(copy.map.box[0]) * 2)
                copy_row(copy, to, {copy.place[0], copy.place[1] + n, copy.place[2] + h, copy.place[3] + b});
    for (uint32_t k = copy.address / 4; k < to / 4; ++k) block.words[k].under_way = false;
    SharedBarrier& barrier = hopper.barriers[copy.barrier];
    barrier.arrived[barrier.clock] = std::max(barrier.arrived[barrier.clock], copy.clock);
    barrier.bytes -= box_bytes(copy.map);
    complete_phase(barrier);
    block.current = self;
}

bool execute_some_sum() {
    for (BulkSum& sum : hopper.sums)
        if (!sum.executed) return execute_sum(sum), true;
    return false;
}

void check_no_sums() {
    for (const BulkSum& sum : hopper.sums)
        if (sum.thread == block.current) fail(here() + "ended with a bulk_add under way");
}

void check_tensor_map(const TensorMapFields& map) {
    const auto refuse = [](const std::string& why) {
        throw std::runtime_error("emulator: cuTensorMapEncodeTiled refuses: " + why);
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
    if (bytes <= 0 || bytes % 16 || source % 16 || reinterpret_cast<uintptr_t>(target) % 16)
        fail(here() + "bulk_add of " + std::to_string(bytes) + " bytes, or misaligned");
    if (!may_add_to(target, bytes)) fail(here() + "bulk_add outside of the sums");
    for (uint32_t chunk = source; chunk < source + static_cast<uint32_t>(bytes); chunk += 16) {
        check_shared(chunk, 16, false, lane, "bulk_add");
        check_proxy(chunk, "bulk_add reads");
        for (uint32_t k = chunk / 4; k < chunk / 4 + 4; ++k) ++block.words[k].readers;
    }
    add_in_turn(target, bytes);
    hopper.sums.push_back({target, source, bytes, block.current, false, false, false, {}});
    ++totals.calls[kBulkAdd];
}

void bulk_commit() {
    for (BulkSum& sum : hopper.sums) sum.committed |= sum.thread == block.current;
}

// Shared memory that a sum reads is free again; it may still be added later.
static void let_go(BulkSum& sum) {
    if (sum.let_go) return;
    const int w = block.current / kLanes;
    for (uint32_t word = sum.source / 4; word < (sum.source + static_cast<uint32_t>(sum.bytes)) / 4; ++word) {
        --block.words[word].readers;
        block.reads[word * static_cast<size_t>(block.warps) + static_cast<size_t>(w)] = block.warp[w].clock[w];
    }
    const uint8_t* first = &block.shared[sum.source];
    sum.read.assign(first, first + sum.bytes);
    sum.let_go = true;
}

void bulk_wait(bool read) {
    for (size_t k = hopper.sums.size(); k-- > 0;) {
        BulkSum& sum = hopper.sums[k];
        if (sum.thread != block.current || !sum.committed) continue;
        let_go(sum);
        if (read) continue;
        if (!sum.executed) execute_sum(sum);
        added_in_turn(sum.target, sum.thread);
        hopper.sums.erase(hopper.sums.begin() + static_cast<std::ptrdiff_t>(k));
    }
}

void async_proxy_fence() { ++block.fibers[block.current].fences; }

}  // namespace emulator
