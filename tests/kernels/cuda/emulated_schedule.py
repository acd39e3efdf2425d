"""How long the CUDA kernels' blocks of threads take together, by the order in which Hopper's kernels draw their tiles:
a simulation of an H200's processors, run by test_cuda_emulator.py, for the emulator knows the order."""

from __future__ import annotations

import heapq

import pytest
import torch

from efficient_attn import BlockMask, SlidingWindow
from efficient_attn.backends.cuda import attention as cuda
from efficient_attn.backends.cuda import schedule
from efficient_attn.backends.words import pack_attention, pointer
from efficient_attn.masks import MaskArrays
from efficient_attn.measuring.inputs import random_blocks

pytestmark = pytest.mark.interpreter
PROCESSORS = 132
WRITING = 0.3  # of a step, in one pass: 32 KiB of partial sums added in global memory, and the turn handed on


def load(tiles: list[int], costs: dict[int, float]) -> float:
    """The longest load over the mean one, where each processor takes the next tile when it is done."""
    ready = [0.0] * PROCESSORS
    for tile in tiles:
        heapq.heapreplace(ready, ready[0] + costs[tile])
    return max(ready) / (sum(ready) / PROCESSORS)


def load_in_turns(tiles: list[int], spans: list[tuple[int, int]], step: int, back: bool = True) -> float:
    """That of the backward in one pass, in which every step's part of dQ waits for those of the tiles before.

    A tile has a step for each `step` queries of its span, the last ones first (`back`). A part is written, which takes
    WRITING of a step, once the step is done and the part of the tile before is written; the next step is done after
    the write.
    """
    ready, span_of = [0.0] * PROCESSORS, len(spans)
    written: dict[int, torch.Tensor] = {}  # head -> when the latest part of each step's queries was
    for tile in tiles:
        first, last = spans[tile % span_of]
        steps = torch.arange(first // step, (last - 1) // step + 1)
        steps = steps.flip(0) if back else steps
        turns = written.setdefault(tile // span_of, torch.zeros(spans[-1][1] // step, dtype=torch.float64))
        number = torch.arange(len(steps), dtype=torch.float64)
        waits = turns[steps] + WRITING
        # done[k] = max(done[k - 1] + 1, waits[k - 1])
        bounds = torch.cat([torch.tensor([ready[0] + 1.25], dtype=torch.float64), waits[:-1] - number[1:]])
        done = bounds.cummax(0).values + number
        parts = torch.maximum(done + WRITING, waits)
        turns[steps] = parts
        heapq.heapreplace(ready, max(float(done[-1]) + 0.25, float(parts[-1])))
    busy = sum((last - 1) // step - first // step + 1.5 for first, last in (spans[t % span_of] for t in tiles))
    return max(ready) / (busy / PROCESSORS)


def spans_of(arrays: MaskArrays, length: int, rows: int, keys: bool) -> list[tuple[int, int]]:
    """What the tiles of `rows` queries or keys see under a window: from where, to where."""
    low = arrays.window_offset - arrays.window_left if arrays.window_left >= 0 else -length
    high = arrays.window_offset + arrays.window_right if arrays.window_right >= 0 else length
    low, high = (-high, -low) if keys else (low, high)
    return [
        (max(0, min(start + low, length)), max(0, min(start + rows + high, length)))
        for start in range(0, length, rows)
    ]  # fmt: skip


def drawn(arrays: MaskArrays, length: int, heads: int, D: int, rows: int, keys: bool) -> list[int]:
    """The tiles of a kernel in the order of their tickets."""
    q = torch.zeros(D, dtype=torch.bfloat16).as_strided((1, heads, length, D), (0, 0, 0, 1))
    words = pack_attention(q, q, q, None, q, torch.zeros(1), arrays, 1.0, 0.0, None)[1]
    order = (schedule.key_order if keys else schedule.query_order)(arrays, heads)
    tiles = cuda.kernels().tiles_in_order(words, keys, rows, pointer(order))
    assert sorted(tiles) == list(range(heads * length // rows))
    return tiles


def arrays_of(mask: BlockMask | None) -> MaskArrays:
    return MaskArrays() if mask is None else mask.arrays(True)


def schedule_of(mask: BlockMask | None, length: int, heads: int, D: int, rows: int, keys: bool) -> tuple[float, float]:
    """That of a kernel over tiles of `rows`, and what no order can undercut. A tile costs its steps and
    half a step to begin and end."""
    arrays = arrays_of(mask)
    arrays = MaskArrays() if mask is None else mask.arrays(True)
    tiles = drawn(arrays, length, heads, D, rows, keys)
    per_head, step = length // rows, 64 if keys else 128
    starts = torch.arange(0, length, rows)
    steps = torch.zeros(per_head)
    indptr = arrays.t_indptr if keys else arrays.indptr
    if indptr is not None:
        block = arrays.block_k if keys else arrays.block_q
        steps = (indptr.diff() * ((arrays.block_q if keys else arrays.block_k) / step))[starts // block].float()
    else:
        spans = spans_of(arrays, length, rows, keys)
        steps = torch.tensor([-(-(last - first // step * step) // step) for first, last in spans])
    costs = {
        h * per_head + (k if keys else per_head - 1 - k): float(steps[k]) + 0.5
        for h in range(heads) for k in range(per_head)
    }  # fmt: skip
    # Of the k P + 1 costliest tiles some processor has k + 1.
    largest = sorted(costs.values(), reverse=True)[::PROCESSORS]
    least = max((k + 1) * cost for k, cost in enumerate(largest)) / (sum(costs.values()) / PROCESSORS)
    return load(tiles, costs), least


def documents(length: int) -> BlockMask:
    """A causal list over documents of very different lengths, as packed training data has."""
    ends = torch.tensor([0.02, 0.03, 0.1, 0.5, 0.55, 0.56, 0.6, 0.9, 1.0]) * (length // 128)
    document = torch.bucketize(torch.arange(length // 128), ends.round().long(), right=True)
    visible = (document[:, None] == document) & torch.ones(length // 128, length // 128).tril().bool()
    return blocks(visible)


def blocks(visible: torch.Tensor) -> BlockMask:
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), visible.sum(1).cumsum(0)])
    n = visible.shape[0] * 128
    return BlockMask.from_csr(indptr, visible.nonzero()[:, 1].int(), q_len=n, kv_len=n, block_size=(128, 128))


def uneven(length: int) -> BlockMask:
    """Rows of random lengths, in no order."""
    generator, n = torch.Generator().manual_seed(4), length // 128
    return blocks(torch.rand(n, n, generator=generator) < torch.rand(n, 1, generator=generator).clamp(0.05))


SCHEDULED = {
    "dense": lambda n: None,
    "causal": lambda n: BlockMask(n, n).with_causal(),
    "window": lambda n: SlidingWindow(left=1023, right=0, alignment="bottom_right").block_mask(n, n),
    "documents": documents,
    "uneven": uneven,
    **{f"blocks {d} %": lambda n, d=d: random_blocks(n, n, d / 100, block=128) for d in (5, 10, 25, 50)},
}


@pytest.mark.parametrize("kind", SCHEDULED)
def test_all_processors_end_together(kind: str) -> None:
    """The heaviest of an H200's 132 has at most 3 % more than the mean, or than what no order can undercut."""
    shapes = [(16384, 16, 128), (16384, 16, 64), (16384, 8, 256)] + ([(1024, 128, 128)] if kind == "dense" else [])
    found = {}
    for length, heads, D in shapes:
        mask = SCHEDULED[kind](length)
        for keys in (False, True):
            rows = 64 if keys and D == 256 else 128
            longest, least = schedule_of(mask, length, heads, D, rows, keys)
            found[length, D, keys] = longest
            assert longest <= 1.03 * max(1.0, least), (length, heads, D, keys, longest, least)
    print(kind, {key: round(value, 3) for key, value in found.items()})


@pytest.mark.parametrize("kind", ["dense", "causal", "window"])
def test_turns_hardly_make_anyone_wait(kind: str) -> None:
    """The same of the backward in one pass, at the benchmark's length; how much of it is waiting is printed."""
    length, heads, rows = 16384, 16, 128
    mask = SCHEDULED[kind](length)
    arrays = arrays_of(mask)
    tiles, spans = drawn(arrays, length, heads, 128, rows, True), spans_of(arrays, length, rows, True)
    alone, least = schedule_of(mask, length, heads, 128, rows, True)
    found = load_in_turns(tiles, spans, 64)
    print(f"{kind}: {found:.3f}, {found / alone - 1:.1%} of it waiting")
    assert found <= 1.03 * max(1.0, least)
    if kind == "causal":  # it is the walk from the end that keeps it so
        assert load_in_turns(tiles, spans, 64, back=False) > 1.1
