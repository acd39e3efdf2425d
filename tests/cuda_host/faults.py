"""Faults that one could make in the kernels: name -> (file below csrc/cuda, what stands there, what would be wrong).

Those in sm90/ are looked for on a twin of capability 90.
"""

FORWARD, KEYS, QUERIES = (f"sm80/attention_{name}.h" for name in ("forward", "key_gradient", "query_gradient"))
ARRIVED = "        block_sync();  // this slot has arrived, and every warp is done with the other one\n"
HOPPER = "sm90/attention_forward.h"
SUMS = "        group_wait<0>(f.out[0], f.weights);\n"
RELEASE = "        release(values.of(F::kValueEmpty, 8), c.lane);\n"
WAIT = "        copy_async_wait<0>();\n" + ARRIVED

FAULTS: dict[str, tuple[str, str, str]] = {
    "no barrier in the forward": (FORWARD, ARRIVED, ""),
    "no wait in the forward": (FORWARD, WAIT, ARRIVED),
    "a wait that leaves one group under way": (FORWARD, "copy_async_wait<0>", "copy_async_wait<1>"),
    "the next tile is loaded before the barrier": (
        FORWARD, WAIT, "        if (more) load_slot<F>(p, at, next, slot ^ 1);\n" + WAIT,
    ),
    "the next tile goes to the same slot": (
        FORWARD, "load_slot<F>(p, at, next, slot ^ 1)", "load_slot<F>(p, at, next, slot)",
    ),
    "no barrier in dK and dV": (KEYS, ARRIVED, ""),
    "no barrier in dQ": (QUERIES, ARRIVED, ""),
    "no barrier between the steps of dbias": (
        QUERIES, "        block_sync();  // every warp is done with the tiles\n", "",
    ),
    "no barrier between the warps' column sums": (
        QUERIES, "        block_sync();\n        if (warp == 0) {", "        if (warp == 0) {",
    ),
    "a barrier that some warps pass by": (FORWARD, ARRIVED, ARRIVED.replace("block_sync", "if (active) block_sync")),
    "the copies are not committed": (
        FORWARD, "            load_slot<F>(p, at, next, slot ^ 1);\n            copy_async_commit();\n",
        "            load_slot<F>(p, at, next, slot ^ 1);\n",
    ),
    "another swizzle where tiles are read": (
        "tile.h", "(lane_address ^ static_cast<uint32_t>(k << 5))", "(lane_address + static_cast<uint32_t>(k << 5))",
    ),
    "no swizzle at all": ("tile.h", "((chunk ^ (row & 7)) << 4)", "(chunk << 4)"),
    "matrices of B in the order of A": (
        "tile.h", "chunk_offset<kWidth>((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1)",
        "chunk_offset<kWidth>(lane & 15, lane >> 4)",
    ),
    "no warp_sync between writing and reading a row": (
        "tile.h", "    warp_sync();\n    const int chunk = column", "    const int chunk = column",
    ),
    "a row too many is loaded": ("tile.h", "const bool exists = first + row < end && count > 0;",
                                 "const bool exists = first + row <= end && count > 0;"),
    "a row too many is written": ("tile.h", "if (position >= end || count <= 0) continue;",
                                  "if (position > end || count <= 0) continue;"),
    "a whole chunk at the ragged end of a row": ("tile.h", "exists ? count * 2 : 0", "exists ? 16 : 0"),
    "one key too many is visible": ("scores.h", "smaller(line + high + 1, step", "smaller(line + high + 2, step"),
    "one query too many is visible to a key": ("scores.h", "i <= j + high &&", "i <= j + high + 1 &&"),
    "every other tile is left out": ("mask.h", "        cursor_ += kWidth;\n", "        cursor_ += 2 * kWidth;\n"),
    "the bits of the next row": ("scores.h", "line % block * row_bytes", "(line + 1) % block * row_bytes"),
    "P is not faded": (FORWARD, "x *= fade[m][e / 2];", "x *= 1.0f;"),
    "no wait for the keys": (HOPPER, "    barrier_wait(slot.of(F::kKeyFull, 8), slot.parity);\n", ""),
    "the wait for the keys has the other parity": (HOPPER, "(slot.of(F::kKeyFull, 8), slot.parity)",
                                                   "(slot.of(F::kKeyFull, 8), slot.parity ^ 1)"),
    "no wait for the values": (HOPPER, "barrier_wait(values.of(F::kValueFull, 8), values.parity);\n        start_sums",
                               "start_sums"),
    "no wait for the queries": (HOPPER, "        barrier_wait(F::kQueryFull, query_parity);\n", ""),
    "no bytes are expected": (HOPPER, "barrier_arrive_expect(key_full, F::kTileBytes)", "barrier_arrive(key_full)"),
    "half the bytes are expected": (HOPPER, "barrier_arrive_expect(value_full, F::kTileBytes)",
                                    "barrier_arrive_expect(value_full, F::kTileBytes / 2)"),
    "the producer does not wait for empty slots": (
        HOPPER, "            barrier_wait(slot.of(F::kKeyEmpty, 8), slot.parity ^ 1);\n", "",
    ),
    "the queries are loaded over the ones before": (
        HOPPER, "    barrier_wait(F::kQueryEmpty, parity ^ 1);\n", "",
    ),
    "a slot is released before its keys are read": (
        HOPPER, "    group_wait<0>(s[0]);\n    release(keys.of(F::kKeyEmpty, 8), c.lane);\n",
        "    release(keys.of(F::kKeyEmpty, 8), c.lane);\n    group_wait<0>(s[0]);\n",
    ),
    "a slot is released before its values are read": (HOPPER, SUMS + RELEASE, RELEASE + SUMS),
    "the queries are released before the output has passed": (
        HOPPER, "        store_output(f, p, at, tile, c);\n        release(F::kQueryEmpty, lane);\n",
        "        release(F::kQueryEmpty, lane);\n        store_output(f, p, at, tile, c);\n",
    ),
    "every lane releases": (HOPPER, "    if (lane == 0) barrier_arrive(barrier);", "    barrier_arrive(barrier);"),
    "no group_wait for the scores": (HOPPER, "    group_wait<0>(s[0]);\n", ""),
    "a group_wait that leaves the scores under way": (HOPPER, "group_wait<1>(s[0])", "group_wait<2>(s[0])"),
    "the scores are not committed": (
        HOPPER, "column), k > 0);\n    }\n    group_commit();\n", "column), k > 0);\n    }\n",
    ),
    "no group_fence": (HOPPER, "    group_fence(s[0]);\n", ""),
    "a group_fence that leaves out P": (HOPPER, "group_fence(f.out[0], f.weights)", "group_fence(f.out[0])"),
    "P is packed while the product reads it": (
        HOPPER, "        // Waiting for the next keys", "        pack_a<typename F::T>(f.weights, s[0]);\n        // Waiting",
    ),
    "no proxy fence behind the output": (HOPPER, "    async_proxy_fence();  // Q of", "    // Q of"),
    "barriers that copies may not see": (HOPPER, "            barrier_init_fence();\n", ""),
    "a descriptor with another stride": (HOPPER, "kTileBytes), 0, kPattern)", "kTileBytes), 0, kPattern / 2)"),
    "a descriptor that goes on by rows": (HOPPER, "k * 2 * kPattern)", "k * kPattern)"),
    "a panel further on than the tile": (HOPPER, "column = k % 4 * 32", "column = k % 4 * 64"),
    "values read as if they were transposed": (HOPPER, "F::kHead, true>", "F::kHead, false>"),
    "a turn is not passed on": (
        HOPPER, "        if (F::kTurns) named_arrive(turn_of(1 - c.index), F::kConsumers * kGroup);\n", "",
    ),
    "the last turn is taken by nobody": (
        HOPPER, "index == 0) named_sync(turn_of(0), F::kConsumers * kGroup);  // the last turn given\n",
        "index == 0) ;\n",
    ),
    "more registers than there are": (HOPPER, "kConsumerRegisters = 232", "kConsumerRegisters = 240"),
    "tiles taken in turn, one off": (HOPPER, "blocks - 1 - block", "blocks - block"),
    "the same values twice": (HOPPER, "        values.advance();\n        if (warp_any", "        if (warp_any"),
    "the output is not faded": (HOPPER, "x *= fade[m][e / 2];", "x *= 1.0f;"),
    "Hopper's flags are not written": (HOPPER, "static_cast<uint16_t>(suspect)", "uint16_t{0}"),
}  # fmt: skip
