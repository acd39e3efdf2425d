// The two slots of tiles of a walk, in shared memory, as forward, dK and dV, and dQ use them: while a step is worked
// off, the tiles of the next one are on their way, and a step costs one barrier.
#pragma once

#include "cuda/tile.h"

namespace efficient_attn {
namespace sm80 {
namespace {

// Before the walk, where it has `any` step: load() starts loading what the block of threads owns and the first step.
// kSafe: another pass over the same memory may have come before.
template <bool kSafe, class Load>
EA_DEVICE void fill_first_slot(bool any, Load load) {
    if (kSafe) block_sync();  // the pass before may still be reading what is loaded now
    if (!any) return;
    load();
    copy_async_commit();
}

// At each step, before it is worked off: load() starts loading the next one, where there are `more`, into the other
// slot.
template <class Load>
EA_DEVICE void turn_slots(bool more, Load load) {
    copy_async_wait<0>();
    block_sync();  // this slot has arrived, and every warp is done with the other one
    if (!more) return;
    load();
    copy_async_commit();
}

}  // namespace
}  // namespace sm80
}  // namespace efficient_attn
