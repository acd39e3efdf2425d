// The time that passes for Hopper's work under way, and the registers of its warpgroups.
#include "hopper.h"

namespace emulator {

Asynchronous hopper;

void change_registers(int w) {
    const RegisterCount& change = argument<RegisterCount>(w, 0);
    block.current = w * kLanes;
    int& registers = block.warp[w].registers;
    if (change.count % 8 || change.count < 24 || change.count > 256)
        fail(here() + "setmaxnreg to " + std::to_string(change.count));
    if (change.take ? change.count < registers : change.count > registers)
        fail(here() + "setmaxnreg from " + std::to_string(registers) + " to " + std::to_string(change.count));
    registers = change.count;
}

void check_block_ended() {
    int registers = 0;
    for (int w = 0; w < block.warps; ++w) {
        registers += block.warp[w].registers * kLanes;
        if (block.warp[w].registers != block.warp[w / kGroupWarps * kGroupWarps].registers)
            block.report = "the warps of a warpgroup have changed their registers differently";
    }
    const std::string where = "block " + std::to_string(block.index) + " ended with ";
    if (registers > kRegisterFile) block.report = where + std::to_string(registers) + " registers taken by setmaxnreg";
    if (!hopper.copies.empty()) block.report = where + "a tensor copy under way";
    for (int id = 0; id < kBarriers; ++id)
        if (block.barrier[id].arrivals) block.report = where + "arrivals at barrier " + std::to_string(id);
}

bool work_under_way() {
    if (!hopper.copies.empty()) return true;
    if (std::any_of(hopper.sums.begin(), hopper.sums.end(), [](const BulkSum& sum) { return !sum.executed; }))
        return true;
    return std::any_of(hopper.groups.begin(), hopper.groups.end(),
                       [](const WarpGroup& g) { return !g.multiplies.empty(); });
}

// Does some of the work under way; false where there is none.
bool advance() {
    const int self = block.current;
    if (!hopper.copies.empty() && draw() % 2) {
        const size_t k = draw() % hopper.copies.size();
        const TensorCopy copy = hopper.copies[k];
        hopper.copies.erase(hopper.copies.begin() + static_cast<std::ptrdiff_t>(k));
        execute_copy(copy);
        return true;
    }
    if (draw() % 2 && execute_some_sum()) return true;
    const uint32_t first = draw();
    for (size_t k = 0; k < hopper.groups.size(); ++k)
        if (execute_next(static_cast<int>((first + k) % hopper.groups.size()))) return true;
    block.current = self;
    return hopper.copies.empty() ? execute_some_sum() : advance();
}

}  // namespace emulator
