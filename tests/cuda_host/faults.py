"""Faults that one could make in the kernels: name -> (file below csrc/cuda, what stands there, what would be wrong)."""

FORWARD, KEYS, QUERIES = (f"sm80/attention_{name}.h" for name in ("forward", "key_gradient", "query_gradient"))
ARRIVED = "        block_sync();  // this slot has arrived, and every warp is done with the other one\n"
LINEAR = "sm80/linear_sums.h"
DECODE = "sm80/attention_decode.h"
KEYS_ARRIVED = "        block_sync();  // the keys have arrived, and every warp is done with the tile before them\n"
VALUES_ARRIVED = "        block_sync();  // the values have arrived, and every warp is done with the keys\n"
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
    "no barrier for the keys of few queries": (DECODE, KEYS_ARRIVED, ""),
    "no barrier for the values of few queries": (DECODE, VALUES_ARRIVED, ""),
    "values are not waited for": (
        DECODE, "        copy_async_wait<D::kSlots - 2>();\n" + VALUES_ARRIVED,
        "        copy_async_wait<D::kSlots - 1>();\n" + VALUES_ARRIVED,
    ),
    "the ring is filled one tile too early": (
        DECODE, "load_next(tile + D::kSlots - 1);", "load_next(tile + D::kSlots);",
    ),
    "the ring is joined in while it is read": (DECODE, "    block_sync();  // every warp is done with the tiles\n", ""),
    "no barrier before warps are joined": (DECODE, "    block_sync();  // what the warps found is there\n", ""),
    "rows go to the next head of the group": (
        DECODE, "h = head_of(p, at, row);", "h = head_of(p, at, row + 1);",
    ),
    "the last part of the keys is not joined": (
        DECODE, "for (int s = warp; s < p.splits;", "for (int s = warp; s < p.splits - 1;",
    ),
    "parts of the keys overlap": (
        "mask.h", "end_ = smaller(cursor_ + each, end_);", "end_ = smaller(cursor_ + each + kWidth, end_);",
    ),
    "parts of a list overlap": (
        "mask.h", "last_ = smaller(entry_ + each, last_);", "last_ = smaller(entry_ + each + 1, last_);",
    ),
    "a NaN behind a mask meets a weight of zero": (
        DECODE, "multiply<T, D::kHead, true>(f.out", "multiply<T, D::kHead, false>(f.out",
    ),
    "a chunk is loaded while the one before is read": (
        LINEAR, "        block_sync();  // every warp is done with the chunk before\n", "",
    ),
    "a head is loaded while the one before is read": (
        LINEAR, "                if (g > 0) block_sync();  // every warp is done with the head before\n", "",
    ),
    "weights are read before they are there": (
        LINEAR, "            block_sync();  // the weights are there\n", "",
    ),
    "rows of a state are read before they are there": (
        LINEAR, "        block_sync();  // the rows are there\n", "",
    ),
    "normalisers are read before they are there": (LINEAR, "    block_sync();  // the normalisers are there\n", ""),
    "a key of the future is visible": (LINEAR, "t >= s : t <= s;", "t >= s : t <= s + 1;"),
    "a query does not see its own key": (LINEAR, "t >= s : t <= s;", "t > s : t <= s;"),
    "a segment sees itself": (
        LINEAR, "        if (p.causal) store_global(slot, sum);\n        sum += now;\n",
        "        sum += now;\n        if (p.causal) store_global(slot, sum);\n",
    ),
    "chunks are walked forward": (LINEAR, "p.reverse ? p.times.chunks - 1 - step : step", "step"),
    "one head of a group only": (LINEAR, "h = head + step % p.spread;", "h = head;"),
    "what rounding left is left out": (
        LINEAR, "    if (kB) multiply_add<", "    if (kA && kB) multiply_add<",
    ),
    "a NaN of the future meets a weight of zero": (
        LINEAR, "if (bad) b.high[r] = read_as<BFloat16>(b.high[r], kFinite);", "",
    ),
}  # fmt: skip
