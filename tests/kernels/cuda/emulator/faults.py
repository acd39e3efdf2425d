"""Faults that one could make in the kernels: name -> (file below csrc/cuda, what stands there, what would be wrong).

Those in sm90/ are looked for on a emulator of capability 90.
"""

FORWARD, KEYS, QUERIES = (f"sm80/attention_{name}.h" for name in ("forward", "key_gradient", "query_gradient"))
AWAIT, WAIT = "        await_slot();\n", "        copy_async_wait<0>();\n"
LINEAR, LINEAR_TILES = (f"sm80/linear_attention_{name}.h" for name in ("sums", "tiles"))
DECODE = "sm80/attention_decode.h"
KEYS_ARRIVED = "        block_sync();  // the keys have arrived, and every warp is done with the tile before them\n"
VALUES_ARRIVED = "        block_sync();  // the values have arrived, and every warp is done with the keys\n"
HOPPER, GROUPS = "sm90/attention_forward.h", "sm90/groups.h"
HOPPER_KEYS, HOPPER_QUERIES, GRADIENTS = (
    f"sm90/{name}.h" for name in ("attention_key_gradient", "attention_query_gradient", "gradients")
)
ONE_PASS = "sm90/attention_backward.h"
SUMS = "        group_wait<0>(f.out[0], f.weights);\n"
RELEASE = "        release(values.of(F::kValueEmpty, 8), c.lane);\n"

FAULTS: dict[str, tuple[str, str, str]] = {
    "no barrier in the forward": (FORWARD, AWAIT, WAIT),
    "no wait in the forward": (FORWARD, AWAIT, "        block_sync();\n"),
    "a wait that leaves one group under way": (
        "tile.h", "    copy_async_wait<0>();\n    block_sync();", "    copy_async_wait<1>();\n    block_sync();",
    ),
    "the next tile is loaded before the barrier": (
        FORWARD, AWAIT, "        if (more) load_slot<F>(p, at, next, slot ^ 1);\n" + AWAIT,
    ),
    "the next tile goes to the same slot": (
        FORWARD, "load_slot<F>(p, at, next, slot ^ 1)", "load_slot<F>(p, at, next, slot)",
    ),
    "no barrier in dK and dV": (KEYS, AWAIT, WAIT),
    "no barrier in dQ": (QUERIES, AWAIT, WAIT),
    "no barrier between the steps of dbias": (
        QUERIES, "        block_sync();  // every warp is done with the tiles\n", "",
    ),
    "no barrier between the warps' column sums": (
        QUERIES, "        block_sync();\n        if (warp == 0) {", "        if (warp == 0) {",
    ),
    "a barrier that some warps pass by": (FORWARD, AWAIT, WAIT + "        if (active) block_sync();\n"),
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
    "a key of the future is visible": (LINEAR_TILES, "t >= s : t <= s;", "t >= s : t <= s + 1;"),
    "a query does not see its own key": (LINEAR_TILES, "t >= s : t <= s;", "t > s : t <= s;"),
    "a segment sees itself": (
        LINEAR, "        if (p.causal) store_global(slot, sum);\n        sum += now;\n",
        "        sum += now;\n        if (p.causal) store_global(slot, sum);\n",
    ),
    "chunks are walked forward": (LINEAR, "p.reverse ? p.times.chunks - 1 - step : step", "step"),
    "one head of a group only": (LINEAR, "h = head + step % p.spread;", "h = head;"),
    "what rounding left is left out": (
        LINEAR_TILES, "    if (kB) multiply_add<", "    if (kA && kB) multiply_add<",
    ),
    "a NaN of the future meets a weight of zero": (
        LINEAR_TILES, "if (bad) b.high[r] = read_as<BFloat16>(b.high[r], kFinite);", "",
    ),
    "no wait for the keys": (
        HOPPER, "    barrier_wait(slot.of(F::kKeyFull, 8), slot.parity);\n    const uint32_t line",
        "    const uint32_t line",
    ),
    "the wait for the keys has the other parity": (
        HOPPER, "slot.parity);\n    const uint32_t line", "slot.parity ^ 1);\n    const uint32_t line",
    ),
    "the tile is read before it is there": (
        HOPPER, "    barrier_wait(slot.of(F::kKeyFull, 8), slot.parity);\n    return read_tile", "    return read_tile",
    ),
    "the end of the work is not sent": (
        HOPPER, "lane);\n    release(slot.of(F::kKeyFull, 8), lane);\n", "lane);\n",
    ),
    "the end is sent into a slot in use": (
        HOPPER, "    barrier_wait(slot.of(F::kKeyEmpty, 8), slot.parity ^ 1);\n    send_end", "    send_end",
    ),
    "tickets begin at 0 again": (GROUPS, "? in.given + draw_ticket", "? draw_ticket"),
    "the last ticket is left": (GROUPS, "while (ticket < in.tiles)", "while (ticket < in.tiles - 1)"),
    "the consumers take the head for the tile": (GROUPS, "load_shared_32(line + 24)", "load_shared_32(line + 20)"),
    "a block of the list twice": (GROUPS, "+ rank / in.tiles_per_block);", "+ rank / in.tiles_per_block / 2);"),
    "a block of the list read from its other end": (
        GROUPS, "in.last_first ? in.tiles_per_head - 1 - tile", "in.last_first ? in.tiles_per_head - tile",
    ),
    "both of Hopper's kernels draw from one counter": (
        "attention_backward.h", "k.counters ? k.counters + 1 : nullptr", "k.counters",
    ),
    "no wait for the values": (HOPPER, "barrier_wait(values.of(F::kValueFull, 8), values.parity);\n        start_sums",
                               "start_sums"),
    "no wait for the queries": (HOPPER, "        barrier_wait(F::kQueryFull + index * 8, query_parity);\n", ""),
    "no bytes are expected": (HOPPER, "barrier_arrive_expect(key_full, F::kTileBytes)", "barrier_arrive(key_full)"),
    "half the bytes are expected": (HOPPER, "barrier_arrive_expect(value_full, F::kTileBytes)",
                                    "barrier_arrive_expect(value_full, F::kTileBytes / 2)"),
    "the producer does not wait for empty slots": (
        HOPPER, "            barrier_wait(slot.of(F::kKeyEmpty, 8), slot.parity ^ 1);\n", "",
    ),
    "the queries are loaded over the ones before": (
        HOPPER, "        barrier_wait(F::kQueryEmpty + consumer * 8, parity ^ 1);\n", "",
    ),
    "a slot is released before its keys are read": (
        HOPPER, "    group_wait<0>(s[0]);\n    release(keys.of(F::kKeyEmpty, 8), c.lane);\n",
        "    release(keys.of(F::kKeyEmpty, 8), c.lane);\n    group_wait<0>(s[0]);\n",
    ),
    "a slot is released before its values are read": (HOPPER, SUMS + RELEASE, RELEASE + SUMS),
    "the queries are released before the output has passed": (
        HOPPER, "        if (F::kOutputApart) release(", "        release(",
    ),
    "the output passes through the queries that are released": (HOPPER, "F::kOutputApart ? F::kOutput", "0 ? 0u"),
    "both consumers wait for the first one's queries": (
        HOPPER, "barrier_wait(F::kQueryFull + index * 8", "barrier_wait(F::kQueryFull",
    ),
    "a step is taken for a whole one at its end": (HOPPER, "step.end == step.first + F::kKeys && ", ""),
    "a wide step on Hopper sees a key too many": (
        "scores.h", "smaller(i + high + 1, step.end) - place", "i + high + 1 - place",
    ),
    "every lane releases": (GROUPS, "    if (lane == 0) barrier_arrive(barrier);", "    barrier_arrive(barrier);"),
    "no group_wait for the scores": (HOPPER, "    group_wait<0>(s[0]);\n", ""),
    "a group_wait that leaves the scores under way": (HOPPER, "group_wait<1>(s[0])", "group_wait<2>(s[0])"),
    "the scores are not committed": (
        HOPPER, "column), k > 0);\n    }\n    group_commit();\n", "column), k > 0);\n    }\n",
    ),
    "no group_fence": (HOPPER, "    group_fence(s[0]);\n", ""),
    "a group_fence that leaves out P": (HOPPER, "group_fence(f.out[0], f.weights)", "group_fence(f.out[0])"),
    "P is packed while the product reads it": (
        HOPPER, "        // Waiting for the next keys",
        "        pack_a<typename F::T>(f.weights, s[0]);\n        // Waiting for the next keys",
    ),
    "no proxy fence behind the output": (HOPPER, "    if (!F::kOutputApart) async_proxy_fence();", ""),
    "barriers that copies may not see": (HOPPER, "            barrier_init_fence();\n", ""),
    "a descriptor with another stride": (HOPPER, "kTileBytes), 0, kPattern)", "kTileBytes), 0, kPattern / 2)"),
    "a descriptor that goes on by rows": (HOPPER, "k * 2 * kPattern)", "k * kPattern)"),
    "a panel further on than the tile": (HOPPER, "column = k % 4 * 32", "column = k % 4 * 64"),
    "values read as if they were transposed": (HOPPER, "F::kHead, true>", "F::kHead, false>"),
    "a turn is not passed on": (
        HOPPER, "        if (F::kTurns) named_arrive(turn_of(1 - c.index), F::kConsumers * kGroup);\n", "",
    ),
    "the last turn is not taken": (
        HOPPER, "index == 0) named_sync(turn_of(0), F::kConsumers * kGroup);  // the last turn given\n",
        "index == 0) ;\n",
    ),
    "more registers than there are": (HOPPER, "kHead == 64 ? 224 : 232", "240"),
    "the same values twice": (HOPPER, "        values.advance();\n        if (warp_any", "        if (warp_any"),
    "the output is not faded": (HOPPER, "x *= fade[m][e / 2];", "x *= 1.0f;"),
    "Hopper's flags are not written": (HOPPER, "static_cast<uint16_t>(suspect)", "uint16_t{0}"),
    "no wait for a step of the backward": (
        GRADIENTS, "    barrier_wait(slot.of(G::kFull, 8), slot.parity);\n    return read_step", "    return read_step",
    ),
    "the tile of the backward is read before it is there": (
        GRADIENTS, "    barrier_wait(slot.of(G::kFull, 8), slot.parity);\n    return read_tile", "    return read_tile",
    ),
    "the end of the backward is sent into a slot in use": (
        HOPPER_KEYS, "    barrier_wait(slot.of(G::kEmpty, 8), slot.parity ^ 1);\n    send_end", "    send_end",
    ),
    "the end of the backward arrives once": (HOPPER_KEYS, "arrival < 2; ++arrival", "arrival < 1; ++arrival"),
    "the end of dQ is not sent": (HOPPER_QUERIES, "lane);\n    release(slot.of(G::kFull, 8), lane);\n", "lane);\n"),
    "no wait for K and V": (HOPPER_KEYS, "        clear(dv);\n        barrier_wait(G::kKeysFull, keys_parity);\n",
                            "        clear(dv);\n"),
    "no wait for Q and dO": (HOPPER_QUERIES, "        barrier_wait(G::kRowsFull, rows_parity);\n", ""),
    "queries are loaded over those in use": (
        HOPPER_KEYS, "            barrier_wait(slot.of(G::kEmpty, 8), slot.parity ^ 1);\n", "",
    ),
    "keys are loaded over those in use": (
        HOPPER_QUERIES, "            barrier_wait(slot.of(G::kEmpty, 8), slot.parity ^ 1);\n", "",
    ),
    "K is loaded over dK": (HOPPER_KEYS, "        barrier_wait(G::kKeysEmpty, keys_parity ^ 1);\n", ""),
    "Q is loaded over dQ": (HOPPER_QUERIES, "        barrier_wait(G::kRowsEmpty, rows_parity ^ 1);\n", ""),
    "the shifts of the queries are not waited for": (
        HOPPER_KEYS, "init_slots<G>(2)", "init_slots<G>(1)",
    ),
    "half the bytes of a step are expected": (
        GRADIENTS, "barrier_arrive_expect(full, 2 * G::kTileBytes)", "barrier_arrive_expect(full, G::kTileBytes)",
    ),
    "P^T is not fenced": (
        HOPPER_KEYS, "s[0]);\n    group_fence(weights, dv[0]);\n    group_multiply_rows<T, "
        "G::kHead, G::kQueries>(dv[0], weights, g",
        "s[0]);\n    group_fence(dv[0]);\n    group_multiply_rows<T, G::kHead, G::kQueries>(dv[0], weights, g",
    ),
    "dS^T is found before dP^T is there": (HOPPER_KEYS, "    group_wait<1>(dp[0]);\n", "    group_wait<2>(dp[0]);\n"),
    "a slot is released while it is multiplied": (
        HOPPER_KEYS, "    group_wait<0>(dk[0], dv[0], weights, gradients);\n", "    group_wait<1>(dv[0], weights);\n",
    ),
    "a slot of K is released while it is multiplied": (
        HOPPER_QUERIES, "    group_wait<0>(dq[0], gradients);\n", "    group_wait<1>(dq[0], gradients);\n",
    ),
    "dQ: weights are found before the scores are there": (
        HOPPER_QUERIES, "    group_wait<1>(s[0]);\n", "    group_wait<2>(s[0]);\n",
    ),
    "dQ: dS is found before dP is there": (HOPPER_QUERIES, "    group_wait<0>(dp[0]);  // the", "    // the"),
    "both consumers read the first one's keys": (
        HOPPER_KEYS, "return kShared ? 0 : consumer_index() * kOwnBytes;", "return 0;",
    ),
    "no proxy fence behind dK and dV": (
        HOPPER_KEYS, "rows, 1.0f, p.call.Dv, p.dv_aligned);\n        async_proxy_fence();",
        "rows, 1.0f, p.call.Dv, p.dv_aligned);\n",
    ),
    "no proxy fence behind dQ": (HOPPER_QUERIES, "        async_proxy_fence();  // Q of", "        // Q of"),
    "the shift of another query": (HOPPER_KEYS, "load_shared_64(shifts + n * 32 + lane % 4 * 8)",
                                   "load_shared_64(shifts + n * 32 + (lane + 1) % 4 * 8)"),
    "the bit of another pair": (GRADIENTS, "<< (n * 4 + e)", "<< (n * 4 + (e ^ 1))"),
    "a step that is cut short is taken for a full one": (
        "mask.h", "step.end == step.first + width", "step.end <= step.first + width",
    ),
    "K read as if it were transposed": (
        GRADIENTS, "group_multiply<T, kHead, true>(c", "group_multiply<T, kHead, false>(c",
    ),
    "the flag of another tile": (GRADIENTS, "in_head - 1 - tile : tile", "tile : tile"),
    "Hopper's weights are read too early": (HOPPER_KEYS, "    barrier_wait(G::kWeightsFull, parity);\n", ""),
    "weights are written over those in use": (HOPPER_KEYS, "    barrier_wait(G::kWeightsEmpty, parity ^ 1);\n", ""),
    "dS of both is read before both have written it": (
        ONE_PASS, "    named_sync(kMeetingOfBoth, kConsumers * kGroup);  // and", "    // and",
    ),
    "the tile of dS is that of the step before": (
        ONE_PASS, "tile = slot.of(G::kGradients, G::kGradientBytes)", "tile = G::kGradients",
    ),
    "dK passes through keys that the other consumer reads": (
        HOPPER_KEYS, "        if (G::kOnePass) named_sync(kMeetingOfBoth, kConsumers * kGroup);", "        ",
    ),
    "a part of dQ is written over while it is added": (
        ONE_PASS, "        return bulk_wait_read();\n", "        return;\n",
    ),
    "a part of dQ is written over before it is added": (
        HOPPER_KEYS, "named_sync(written_of(consumer_index())", "named_arrive(written_of(consumer_index())",
    ),
    "no proxy fence before a part of dQ is added": (
        ONE_PASS, "    async_proxy_fence();\n    tell_writer();\n", "    tell_writer();\n",
    ),
    "the line of a step is written over before dQ is": (
        HOPPER_KEYS, "(kOnePass ? slot.parity *", "(false ? slot.parity *",
    ),
    "a turn is not passed on in the backward": (ONE_PASS, "    pass_turn(turn);\n", ""),
    "a turn is passed on before the sum": (
        ONE_PASS, "    bulk_commit();\n    bulk_wait();\n    sums_fence();\n    pass_turn(turn);\n",
        "    bulk_commit();\n    sums_fence();\n    pass_turn(turn);\n    bulk_wait();\n",
    ),
    "a turn is passed on when the sum is only read": (
        ONE_PASS, "    bulk_wait();\n    sums_fence();\n    pass_turn",
        "    bulk_wait_read();\n    sums_fence();\n    pass_turn",
    ),
    "a turn is not awaited": (ONE_PASS, "    await_turn(turn, turn_number<G>(p, first_key, step.first));\n", ""),
    "turns in another order than tickets": (
        ONE_PASS, "    return first_key / G::kRows - larger(0, i + p.low) / G::kRows;",
        "    return (smaller(static_cast<int>(p.call.Nk), i + kTurnQueries + p.high) - 1) / G::kRows - "
        "first_key / G::kRows;",
    ),
    "turns of a window begin with the first key": (ONE_PASS, " - larger(0, i + p.low) / G::kRows;", ";"),
    "no fence behind a turn": (ONE_PASS, "step.first));\n    sums_fence();\n", "step.first));\n"),
    "no fence before a turn is passed on": (
        ONE_PASS, "    sums_fence();\n    pass_turn(turn);\n", "    pass_turn(turn);\n",
    ),
    "both halves of dQ have one turn": (
        ONE_PASS, "* p.call.Hq + h) * 2 + half;\n    return p.turns", "* p.call.Hq + h) * 2;\n    return p.turns",
    ),
    "the first ticket is not drawn": (GROUPS, "    if (waits) work.given = 0;\n", ""),
    "a part of dQ is added before it is there": (
        ONE_PASS, "group_wait<1>(dq, dv[0], weights);", "group_wait<2>(dq, dv[0], weights);",
    ),
    "the sums are not waited for": (ONE_PASS, "    if (lane == 0) bulk_wait();\n", ""),
    "the sums of the other half": (
        ONE_PASS, "sums = query_sums(p, b, head, consumer,", "sums = query_sums(p, b, head, 1 - consumer,",
    ),
    "sums without a swizzle": (ONE_PASS, "(chunk ^ (i % 2 * 4))", "(chunk)"),
}  # fmt: skip

# The head of the kernels that are built for a fault, where it is not 64.
HEADS = {
    "weights are read before they are there": 256,
    "weights are written over those in use": 256,
    "dK passes through keys that the other consumer reads": 128,
    "a part of dQ is written over before it is added": 128,
    "the line of a step is written over before dQ is": 128,
    "the first ticket is not drawn": 128,
    "the queries are released before the output has passed": 128,
    "no proxy fence behind the output": 128,
    "a wide step on Hopper sees a key too many": 128,
    **{name: 128 for name, (file, _, _) in FAULTS.items() if file == ONE_PASS},
}
