"""The order in which lists are walked (kernels/plan.py), run by test_triton.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import gc
import heapq
from collections import Counter

import pytest
import torch
import triton
import triton.language as tl

from efficient_attn import BlockMask, attention
from efficient_attn.backends.triton import attention as backend
from efficient_attn.backends.triton import plan as triton_plan
from efficient_attn.backends.triton import shared
from efficient_attn.kernels.walk import Grid, locate
from efficient_attn.masks import lists as mask_build

pytestmark = pytest.mark.interpreter

NQ, NK, BLOCKS = 100, 140, (16, 32)


def blocks_mask(heads: int = 2, seed: int = 0) -> BlockMask:
    """Full and partial blocks at random, more of them in some rows than in others, and one row of none."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = -(-NQ // BLOCKS[0]), -(-NK // BLOCKS[1])
    kind = torch.rand(1, heads, rows, columns, generator=generator)
    listed = kind < torch.linspace(0.2, 1, rows)[:, None]
    listed[:, :, 2] = False
    grow = lambda t: t.repeat_interleave(BLOCKS[0], 2).repeat_interleave(BLOCKS[1], 3)[..., :NQ, :NK]  # noqa: E731
    bits = torch.rand(1, heads, NQ, NK, generator=generator) < 0.7
    return BlockMask.from_dense(grow(listed) & (~grow(kind < 0.15) | bits), block_size=BLOCKS)


def plan_of(mask: BlockMask, transposed: bool) -> triton_plan.Plan:
    q = torch.zeros(1, 2, NQ, 16)
    k = torch.zeros(1, 2, NK, 16)
    problem = shared.problem_of(q, k, k, mask.arrays(), 1.0, 0.0, None)
    arrays = mask.arrays(transposed)
    return triton_plan.plan(shared.kernels(), arrays, transposed, NQ, NK, problem.low, problem.high)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("window", [None, (-1, 0), (45, 30)])
def test_clean_blocks_come_first_and_hidden_ones_not_at_all(window: tuple | None, transposed: bool) -> None:
    mask = blocks_mask() if window is None else blocks_mask().with_window(window, alignment="top_left")
    plan = plan_of(mask, transposed)
    arrays = mask.arrays(transposed)
    indptr, indices, tile_ids = arrays[8:11] if transposed else arrays[4:7]
    inside = torch.zeros(1, 1, 112, 160, dtype=torch.bool)  # what window and ends leave, in whole blocks
    only = BlockMask(NQ, NK, BLOCKS, window=mask.window, window_offset=mask.window_offset)
    inside[..., :NQ, :NK] = only.to_dense()
    if transposed:
        inside = inside.mT
    own, walked = BLOCKS[::-1] if transposed else BLOCKS
    rows = (indptr.numel() - 1) // 2
    seen = Counter()
    for row in range(2 * rows):
        begin, end = int(indptr[row]), int(indptr[row + 1])
        clean, rest = [], []
        for block, tile in zip(indices[begin:end].tolist(), tile_ids[begin:end].tolist(), strict=True):
            first = row % rows * own
            last = first + own if transposed else min(first + own, NQ)  # rows of missing queries are nobody's
            pairs = inside[0, 0, first:last, block * walked : (block + 1) * walked]
            if pairs.any():
                (clean if tile < 0 and pairs.all() else rest).append((block, tile))
            seen["clean" if tile < 0 and pairs.all() else "rest" if pairs.any() else "hidden"] += 1
        found = list(zip(plan.indices[begin:end].tolist(), plan.tile_ids[begin:end].tolist(), strict=True))
        assert found[: len(clean) + len(rest)] == clean + rest
        assert (int(plan.clean[row]), int(plan.live[row])) == (len(clean), len(clean) + len(rest))
    assert seen["clean"] and seen["rest"] and (seen["hidden"] or window is None)


@triton.jit
def where_programs_are(mask, out, grid, length, LIST: tl.constexpr, BLOCK: tl.constexpr):
    i_program = tl.program_id(0)
    i_tile, i_b, i_h = locate(i_program, mask, grid, length, LIST, BLOCK, False)
    tl.store(out + i_program * 2, i_tile)
    tl.store(out + i_program * 2 + 1, i_b * grid.heads + i_h)


@pytest.mark.parametrize("heads", [1, 2])
def test_the_longest_rows_start_first(heads: int) -> None:
    """Every tile of every line once; within a section of lines, none before one with more blocks."""
    mask = blocks_mask(heads)
    problem = shared.problem_of(
        torch.zeros(3, 2, NQ, 16), torch.zeros(3, 2, NK, 16), torch.zeros(3, 2, NK, 16), mask.arrays(), 1.0, 0.0, None
    )
    view = shared.mask_of(mask.arrays(), 3, False, problem, 2, True)
    lines, parts, section = 6, 2, 4
    tiles = view.blocks * parts
    out = torch.full((tiles * lines, 2), -1, dtype=torch.int32)
    grid = Grid(tiles * lines, lines, 2, section)
    where_programs_are[(tiles * lines,)](view, out, grid, NQ, BLOCKS[0], BLOCKS[0] // parts)
    assert len({tuple(x) for x in out.tolist()}) == tiles * lines and (out >= 0).all()
    live = plan_of(mask, False).live.view(heads, view.blocks)
    work = [int(live[line % 2 % heads, tile // parts]) for tile, line in out.tolist()]
    assert len(set(work)) > 2
    for line in range(lines):
        own = [w for w, (_, at) in zip(work, out.tolist(), strict=True) if at == line]
        assert own == sorted(own, reverse=True)
    first = section * tiles
    assert set(out[:first, 1].tolist()) == set(range(section)) and set(out[first:, 1].tolist()) == {4, 5}


def blocks_of_rows(name: str, rows: int) -> torch.Tensor:
    """Which blocks of 128 x 128 a mask lists, bool [rows, rows]."""
    first = torch.arange(rows)
    if name == "documents":  # packed sequences of very different lengths
        document = torch.bucketize(first, torch.tensor([30, 34, 50, 51, 57]), right=True)
        return document[:, None] == document
    generator = torch.Generator().manual_seed(0)
    return torch.rand(rows, rows, generator=generator) < torch.rand(rows, 1, generator=generator) * 0.5


@pytest.mark.parametrize("name", ["documents", "random"])
def test_longest_first_leaves_no_processor_idle(name: str) -> None:
    """A GPU gives the next program to the first processor that is free, as a persistent kernel would take it from a
    counter: in this order those of half an H200 end together, at half of 16 heads."""
    rows, heads, processors = 64, 8, 66
    listed = blocks_of_rows(name, rows)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), listed.sum(1).cumsum(0)])
    indices = listed.nonzero()[:, 1].to(torch.int32)
    q = torch.zeros(1, heads, rows * 128, 16)
    tiles = torch.zeros(0, 128, 16, dtype=torch.uint8)
    mask = BlockMask(rows * 128, rows * 128, (128, 128), 1, 1, indptr, indices, torch.full_like(indices, -1), tiles)
    problem = shared.problem_of(q, q, q, mask.arrays(), 1.0, 0.0, None)
    view = shared.mask_of(mask.arrays(), 1, False, problem, heads, True)
    out = torch.full((rows * heads, 2), -1, dtype=torch.int32)
    like = torch.empty(1, heads, rows * 128, 128, dtype=torch.bfloat16, device="meta")
    grid = Grid(rows * heads, heads, heads, shared.section_of(heads, rows * 128, like, like, 1))
    where_programs_are[(rows * heads,)](view, out, grid, rows * 128, 128, 128)
    work = listed.sum(1)[out[:, 0].long()].float() + 0.5  # a program begins and ends too
    assert work.sum() == (listed.sum() + 0.5 * rows) * heads
    loads = {order: load(taken.tolist(), processors) for order, taken in (("ours", work), ("short", work.sort()[0]))}
    assert loads["ours"] <= 1.03 < loads["short"]


def load(work: list[float], processors: int) -> float:
    """Longest over mean time of processors that take pieces of work in order."""
    busy = [0.0] * processors
    for piece in work:
        heapq.heapreplace(busy, busy[0] + piece)
    return max(busy) * processors / sum(work)


def test_a_plan_is_made_once_and_goes_with_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make = triton_plan._make
    monkeypatch.setattr(triton_plan, "_make", lambda *a: (made.append(a[2]), make(*a))[1])
    q, k = torch.randn(1, 2, NQ, 16), torch.randn(1, 2, NK, 16)

    def forward_and_backward(mask: BlockMask) -> None:
        how = (mask.arrays(True), 1.0, 0.0, None)  # as on a GPU; on CPUs the lists come without their transpose
        out, lse = backend.attention_forward(q, k, k, None, *how)
        backend.attention_backward(out, None, None, q, k, k, None, out, lse, *how, False)

    mask = blocks_mask(seed=4)
    for _ in range(2):
        forward_and_backward(mask)
    assert made == [False, True]  # the list and its transpose
    forward_and_backward(mask.with_causal("top_left"))  # the same lists under a window
    assert made == [False, True] * 2
    # The indices of another list: tiles instead of full blocks.
    tile = torch.zeros(1, *BLOCKS, dtype=torch.bool)
    tile[:, :4, :12] = True
    other = BlockMask(NQ, NK, BLOCKS, 1, 2, mask.indptr, mask.indices, torch.zeros_like(mask.indices),
                      mask_build.pack_bits(tile))  # fmt: skip
    assert other.indices is mask.indices
    out = attention(q, k, k, mask=other, backend="triton")
    torch.testing.assert_close(out, attention(q, k, k, mask=other, backend="reference"))
    assert made == [False, True] * 2 + [False]
    kept = len(triton_plan._plans)
    del mask, other
    gc.collect()
    assert len(triton_plan._plans) == kept - 2


def test_few_queries_many_keys_lists_and_lengths() -> None:
    """The keys of a row are split between programs, beyond a length within the clean and within the other blocks."""
    generator = torch.Generator().manual_seed(1)
    bits = torch.rand(1, 1, 3, 900, generator=generator) < 0.6
    bits[..., 64:640] = True
    for lengths in ([70, 900], [650, 0], [500, 10]):
        mask = BlockMask.from_dense(bits, block_size=(16, 64)).with_lengths(lengths)
        q, k, v = (torch.randn(2, 1, n, 16, generator=generator) for n in (3, 900, 900))
        for b, length in enumerate(lengths):
            k[b, :, length:], v[b, :, length:] = torch.nan, torch.inf
        ours, theirs = (attention(q, k, v, mask=mask, return_lse=True, backend=n) for n in ("triton", "reference"))
        for mine, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, expected)
