"""What a mask says of a part of the sequence: the keys that queries read, how much work they are, the part's mask.

Everything is counted from lists, window and lengths; nothing of queries x keys is made.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..masks import BlockMask
from ..masks.algebra import how_cut, reach
from ..masks.lists import BlockLists, entry_rows, take_rows

Run = tuple[int, int]


def visited_by_block(mask: BlockMask) -> Tensor:
    """The pairs that a kernel visits for each query block, float64 [n_q], the mean over batch and heads."""
    grid, lists, window, lengths = mask.parts
    heights = (grid.q_len - torch.arange(grid.n_q) * grid.block_q).clamp(max=grid.block_q)
    if lists is None:
        first, counts = (part.cpu() for part in reach(grid, window, lengths))
        keys = ((first + counts) * grid.block_k).clamp(max=grid.kv_len) - first * grid.block_k
        return torch.where(counts > 0, keys, 0).double().mean(0) * heights if lengths.numel() else heights.double()
    rows, cols, touched = entries(mask)
    pairs = torch.where(touched, grid.pairs(rows, cols), 0).double()
    found = torch.zeros(grid.n_q, dtype=torch.float64, device=rows.device)
    found.index_add_(0, rows % max(grid.n_q, 1), pairs)
    return found.cpu() / max(lists.batch * lists.heads, 1)


def keys_read(mask: BlockMask, queries: Sequence[Run]) -> list[Run]:
    """The keys that any query of some runs may read, in any batch element and head, ascending.

    Whole blocks where the mask has lists; without, the range of window and lengths, from a multiple of 16 on.
    """
    grid, lists, (low, high), lengths = mask.parts
    found: list[Run] = []
    longest = int(lengths.max()) if lengths.numel() else 0
    if lists is None:
        for start, stop in queries:
            first = 0 if low is None else max(start + low, 0)
            last = longest if high is None else min(stop + high, longest)
            if first < last and start < stop:
                found.append((first // 16 * 16, last))
        return _union(found)
    rows, cols, touched = entries(mask)
    block = rows % max(grid.n_q, 1)
    wanted = torch.zeros(grid.n_q, dtype=torch.bool, device=rows.device)
    for start, stop in queries:
        wanted[start // grid.block_q : -(-stop // grid.block_q)] = True
    seen = torch.zeros(grid.n_k, dtype=torch.bool, device=rows.device)
    seen[cols[touched & wanted[block]]] = True
    flags = torch.cat([seen.new_zeros(1), seen, seen.new_zeros(1)]).int().diff().cpu()
    starts, stops = (flags == 1).nonzero().flatten().tolist(), (flags == -1).nonzero().flatten().tolist()
    return [(a * grid.block_k, min(b * grid.block_k, grid.kv_len)) for a, b in zip(starts, stops, strict=True)]


def hulls(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """For each query block the first key that it may read in any batch element and head, and the one behind the last:
    int64 [n_q] twice, the first not below the last where it reads none."""
    grid, lists, window, lengths = mask.parts
    low = torch.full((grid.n_q,), grid.kv_len, dtype=torch.int64)
    high = torch.zeros_like(low)
    if lists is None:
        first, counts = (part.cpu() for part in reach(grid, window, lengths))
        for start, count in zip(first, counts, strict=True):
            low = torch.where(count > 0, torch.minimum(low, start * grid.block_k), low)
            high = torch.where(count > 0, torch.maximum(high, (start + count) * grid.block_k), high)
        return low, high.clamp(max=grid.kv_len)
    rows, cols, touched = (part.cpu() for part in entries(mask))
    block, cols = (rows % max(grid.n_q, 1))[touched], cols[touched]
    low.scatter_reduce_(0, block, cols * grid.block_k, "amin")
    high.scatter_reduce_(0, block, (cols + 1) * grid.block_k, "amax")
    return low, high.clamp(max=grid.kv_len)


def submask(mask: BlockMask, queries: Run, keys: Run) -> BlockMask | None:
    """The mask between a run of queries and a run of keys; None where no block of it is visited.

    Where the mask has lists, both runs start at blocks of it, and end at one or with the sequence.
    """
    (a, b), (c, d) = queries, keys
    lengths = None if mask.kv_lengths is None else (mask.kv_lengths - c).clamp(0, d - c)
    fields: dict[str, Any] = {"window": mask.window, "window_offset": mask.window_offset + a - c if mask.window else 0}
    lists = mask.lists
    if lists is None:
        part = BlockMask(b - a, d - c, mask.block_size, kv_lengths=lengths, **fields)
        grid, _, window, ends = part.parts
        return part if b > a and d > c and bool((reach(grid, window, ends)[1] > 0).any()) else None
    part_lists = _columns(_rows(mask, lists, queries), c // mask.block_size[1], -(-d // mask.block_size[1]))
    part = BlockMask.unchecked(
        q_len=b - a, kv_len=d - c, block_size=mask.block_size, kv_lengths=lengths, **fields, **part_lists._asdict()
    )
    _, _, touched = entries(part)
    return part if bool(touched.any()) else None


def packed_mask(mask: BlockMask, queries: Run, keys: Sequence[Run]) -> BlockMask:
    """The mask between a run of queries and the keys of some runs of whole blocks, one after the other."""
    whole = submask(mask, queries, (0, mask.kv_len))
    block_q, block_k = mask.block_size
    q_len, kv_len = queries[1] - queries[0], sum(stop - start for start, stop in keys)
    if whole is None:
        whole = ~BlockMask(q_len, mask.kv_len, mask.block_size)
    lists = whole.explicit_lists()
    place = torch.full((whole.grid.n_k,), -1, dtype=torch.int64, device=lists.indices.device)
    blocks = torch.cat([torch.arange(start // block_k, -(-stop // block_k)) for start, stop in keys] or [place[:0]])
    place[blocks] = torch.arange(blocks.numel(), device=place.device)
    indices = place[lists.indices.long()].int()
    return BlockMask.unchecked(
        q_len=q_len, kv_len=kv_len, block_size=(block_q, block_k), **lists._replace(indices=indices)._asdict()
    )


def digest(mask: BlockMask) -> int:
    """A number of 63 bits that masks of other pairs or blocks do not share; the work of the first time is kept."""
    if mask not in _digests:
        state = hashlib.sha256()
        facts = (*mask.shape, mask.block_size, mask.window, mask.window_offset, mask.indptr is None)
        state.update(repr(facts).encode())
        for tensor in (mask.indptr, mask.indices, mask.tile_ids, mask.tiles, mask.kv_lengths):
            if tensor is not None:
                state.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        _digests[mask] = int.from_bytes(state.digest()[:8], "little") >> 1
    return _digests[mask]


_digests: weakref.WeakKeyDictionary[BlockMask, int] = weakref.WeakKeyDictionary()


def entries(mask: BlockMask) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column of each listed block, and whether window and length touch it."""
    grid, lists, window, lengths = mask.parts
    assert lists is not None
    rows, cols = entry_rows(lists), lists.indices.long()
    if lists.batch == 1 and lengths.numel() > 1:  # a block counts where any batch element has it
        lengths = lengths.amax().reshape(1)
    ends = lengths.expand(lists.batch)[rows // max(lists.heads * grid.n_q, 1)]
    touched, _, _ = how_cut(grid, window, ends, rows, cols)
    return rows, cols, touched


def _rows(mask: BlockMask, lists: BlockLists, queries: Run) -> BlockLists:
    """The lists of the query blocks of a run alone."""
    n_q, block = mask.grid.n_q, mask.block_size[0]
    first, last = queries[0] // block, -(-queries[1] // block)
    lines = torch.arange(lists.batch * lists.heads, device=lists.indptr.device)[:, None] * n_q
    rows = lines + torch.arange(first, last, device=lines.device)
    return take_rows(lists, rows.reshape(-1), lists.batch, lists.heads)


def _columns(lists: BlockLists, first: int, last: int) -> BlockLists:
    """The entries of key blocks first <= j < last, counted from the first."""
    kept = (lists.indices >= first) & (lists.indices < last)
    rows = entry_rows(lists)[kept]
    counts = torch.bincount(rows, minlength=lists.indptr.numel() - 1)
    indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return lists._replace(indptr=indptr, indices=lists.indices[kept] - first, tile_ids=lists.tile_ids[kept])


def _union(runs: Sequence[Run]) -> list[Run]:
    """Runs, ascending, those that touch or overlap made one."""
    found: list[Run] = []
    for start, stop in sorted(runs):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found
