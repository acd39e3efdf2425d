"""What can be done with masks without drawing them: exact operators on block lists, windows and lengths.

A window is written here as an interval (low, high) of j - i, None for an open end. No function allocates more than the
blocks of its result, its distinct tiles, and one chunk of pairs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .lists import (
    ABSENT,
    CHUNK,
    FULL,
    BlockLists,
    Grid,
    all_blocks,
    assemble,
    build,
    count_bits,
    entry_rows,
    expand,
    pack_bits,
    ragged_range,
    take_rows,
    unique_rows,
    unpack_bits,
    with_trivial,
)

Interval = tuple[int | None, int | None]


# --- intervals ---


def intersect(a: Interval, b: Interval) -> Interval | None:
    """The common part of two intervals; None when there is none."""
    lows, highs = _ends(a, b)
    low, high = max(lows, default=None), min(highs, default=None)
    return None if low is not None and high is not None and low > high else (low, high)


def unite(a: Interval, b: Interval) -> Interval | None:
    """The union of two intervals; None when a gap lies between them."""
    for first, second in ((a, b), (b, a)):
        if first[1] is not None and second[0] is not None and first[1] + 1 < second[0]:
            return None
    lows, highs = _ends(a, b)
    return min(lows) if len(lows) == 2 else None, max(highs) if len(highs) == 2 else None


def _ends(a: Interval, b: Interval) -> tuple[list[int], list[int]]:
    return [x[0] for x in (a, b) if x[0] is not None], [x[1] for x in (a, b) if x[1] is not None]


def window_fields(interval: Interval, offset: int) -> dict[str, Any]:
    """An interval of j - i as window and window_offset, with the given offset where it lies inside."""
    low, high = interval
    if low is None and high is None:
        return {"window": None, "window_offset": 0}
    offset = offset if low is None else max(offset, low)
    offset = offset if high is None else min(offset, high)
    return {
        "window": (-1 if low is None else offset - low, -1 if high is None else high - offset),
        "window_offset": offset,
    }


def keys_seen(i: Tensor, window: Interval, kv_len: int) -> tuple[Tensor, Tensor]:
    """The keys start <= j < stop that each query i sees under a window."""
    low, high = window
    start = torch.zeros_like(i) if low is None else (i + low).clamp(0, kv_len)
    stop = torch.full_like(i, kv_len) if high is None else (i + high + 1).clamp(0, kv_len)
    return start, torch.maximum(start, stop)


# --- windows and lengths as lists ---


def explicit(grid: Grid, lists: BlockLists | None, window: Interval, lengths: Tensor) -> BlockLists:
    """Canonical lists of the pairs that lists, window and lengths (int64 [1 | batch]) all allow."""
    if lists is None:
        batch, heads = lengths.numel(), 1
        rows, cols = reachable_blocks(grid, window, lengths)
        tile_ids = torch.full_like(rows, FULL)
        tiles = torch.empty(0, grid.block_q, grid.block_k // 8, dtype=torch.uint8, device=rows.device)
    else:
        batch, heads = (lists.batch if lengths.numel() == 1 else lengths.numel()), lists.heads
        lists = expand(lists, grid.n_q, batch, heads)
        rows, cols, tile_ids, tiles = entry_rows(lists), lists.indices.long(), lists.tile_ids.long(), lists.tiles
    ends = lengths.expand(batch)[rows // max(heads * grid.n_q, 1)]
    touched, window_cuts, end_cuts = how_cut(grid, window, ends, rows, cols)
    rows, cols, tile_ids, ends = rows[touched], cols[touched], tile_ids[touched], ends[touched]
    window_cuts, end_cuts = window_cuts[touched], end_cuts[touched]

    shifts = torch.where(window_cuts, rows % max(grid.n_q, 1) * grid.block_q - cols * grid.block_k, 0)
    widths = torch.where(end_cuts, ends - cols * grid.block_k, grid.block_k)
    edges = grid.edge(rows, cols)
    source, full_bits = with_trivial(tiles), grid.full_bits(rows.device)
    q = torch.arange(grid.block_q, device=rows.device)[:, None]
    k = torch.arange(grid.block_k, device=rows.device)

    def tiles_of(entries: Tensor) -> Tensor:
        shift, width, cuts = (t[entries][:, None, None] for t in (shifts, widths, window_cuts))
        seen = in_interval(k - q - shift, window) | ~cuts
        return pack_bits(seen & (k < width)) & source[tile_ids[entries]] & full_bits[edges[entries]]

    return build(grid, batch, heads, rows, cols, (tile_ids, window_cuts.long(), shifts, widths, edges), tiles_of)


def draw(grid: Grid, lists: BlockLists | None, window: Interval, lengths: Tensor) -> Tensor:
    """bool (batch, heads, q_len, kv_len)."""
    device = lengths.device
    i, j = torch.arange(grid.q_len, device=device)[:, None], torch.arange(grid.kv_len, device=device)
    seen = in_interval(j - i, window) & (j < lengths[:, None, None, None])
    if lists is None:
        return seen
    blocks = torch.zeros(
        lists.batch * lists.heads * grid.n_q, grid.n_k, grid.block_q, grid.block_k, dtype=torch.bool, device=device
    )
    tiles, cols = with_trivial(lists.tiles), lists.indices.long()
    rows, ids = entry_rows(lists), lists.tile_ids.long()
    for some in torch.arange(cols.numel(), device=device).split(max(1, CHUNK // (grid.block_q * grid.block_k))):
        blocks[rows[some], cols[some]] = unpack_bits(tiles[ids[some]])
    listed = blocks.view(lists.batch, lists.heads, grid.n_q, grid.n_k, grid.block_q, grid.block_k).transpose(3, 4)
    listed = listed.reshape(lists.batch, lists.heads, grid.n_q * grid.block_q, grid.n_k * grid.block_k)
    return listed[:, :, : grid.q_len, : grid.kv_len] & seen


def seen_keys(grid: Grid, lists: BlockLists | None, window: Interval, lengths: Tensor) -> Tensor:
    """The keys that any query sees, in any head: bool [batch, kv_len]."""
    j = torch.arange(grid.kv_len, device=lengths.device)
    if lists is None:
        low, high = window
        seen = (j < lengths[:, None]) & (grid.q_len > 0)
        seen = seen if low is None else seen & (j >= low)
        return seen if high is None else seen & (j - high < grid.q_len)
    lists = explicit(grid, lists, window, lengths)
    tiles = with_trivial(lists.tiles)
    columns = unpack_bits(functools.reduce(torch.bitwise_or, tiles.unbind(1)))  # of each tile
    places = entry_rows(lists) // max(lists.heads * grid.n_q, 1) * grid.n_k + lists.indices.long()
    counts = torch.zeros(lists.batch * grid.n_k, grid.block_k, dtype=torch.int32, device=j.device)
    counts.index_add_(0, places, columns[lists.tile_ids.long()].int())
    return (counts > 0).view(lists.batch, -1)[:, : grid.kv_len]


def reachable_blocks(grid: Grid, window: Interval, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, cols) of the blocks that a window and the lengths of each batch element touch."""
    first, counts = reach(grid, window, lengths)
    return ragged_range(first.reshape(-1), counts.reshape(-1))


def reach(grid: Grid, window: Interval, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """For each query block the first key block that a window and the lengths touch, and how many: [batch, n_q]."""
    top = torch.arange(grid.n_q, device=lengths.device) * grid.block_q
    bottom = (top + grid.block_q).clamp(max=grid.q_len) - 1
    low, high = window
    first = torch.zeros_like(top) if low is None else (top + low).clamp(min=0)  # key
    last = torch.full_like(top, grid.kv_len) if high is None else bottom + high
    last = torch.minimum(last, lengths[:, None] - 1)  # [batch, n_q]
    counts = torch.where(first <= last, last // grid.block_k - first // grid.block_k + 1, 0)
    return (first // grid.block_k).expand_as(last), counts


def how_cut(grid: Grid, window: Interval, ends: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For blocks: is any pair inside window and length; does the window cut it; does the length `ends` cut it."""
    i_first = rows % max(grid.n_q, 1) * grid.block_q
    i_last = (i_first + grid.block_q).clamp(max=grid.q_len) - 1
    j_first = cols * grid.block_k
    j_end = (j_first + grid.block_k).clamp(max=grid.kv_len)
    j_last = torch.minimum(j_end, ends) - 1
    touched, cuts = j_first < ends, torch.zeros_like(rows, dtype=torch.bool)
    low, high = window
    if low is not None:
        touched, cuts = touched & (j_last - i_first >= low), cuts | (j_first - i_last < low)
    if high is not None:
        touched, cuts = touched & (j_first - i_last <= high), cuts | (j_last - i_first > high)
    return touched, cuts, j_end > ends


def in_interval(difference: Tensor, window: Interval) -> Tensor:
    """Which differences j - i a window allows."""
    low, high = window
    seen = torch.ones_like(difference, dtype=torch.bool) if low is None else difference >= low
    return seen if high is None else seen & (difference <= high)


# --- operators on lists ---


def merge(grid: Grid, a: BlockLists, b: BlockLists, bits: Callable[[Tensor, Tensor], Tensor]) -> BlockLists:
    """Lists of bits(a, b), a bitwise operator that is 0 where both are 0. batch and heads broadcast."""
    batch, heads = (y if x == 1 else x for x, y in ((a.batch, b.batch), (a.heads, b.heads)))
    a, b = expand(a, grid.n_q, batch, heads), expand(b, grid.n_q, batch, heads)
    blocks_a, blocks_b = (entry_rows(x) * grid.n_k + x.indices for x in (a, b))
    blocks = torch.cat([blocks_a, blocks_b]).unique()
    ids_a, ids_b = torch.full_like(blocks, ABSENT), torch.full_like(blocks, ABSENT)
    ids_a[torch.searchsorted(blocks, blocks_a)] = a.tile_ids.long()
    ids_b[torch.searchsorted(blocks, blocks_b)] = b.tile_ids.long()
    rows, cols = blocks // max(grid.n_k, 1), blocks % max(grid.n_k, 1)
    edges, full_bits = grid.edge(rows, cols), grid.full_bits(rows.device)
    tiles_a, tiles_b = with_trivial(a.tiles), with_trivial(b.tiles)

    def tiles_of(entries: Tensor) -> Tensor:
        return bits(tiles_a[ids_a[entries]], tiles_b[ids_b[entries]]) & full_bits[edges[entries]]

    return build(grid, batch, heads, rows, cols, (ids_a, ids_b, edges), tiles_of)


def complement(grid: Grid, lists: BlockLists) -> BlockLists:
    """Lists of the pairs that are not visible."""
    rows, cols = all_blocks(grid, lists.batch, lists.heads, lists.indptr.device)
    ids = torch.full_like(rows, ABSENT)
    ids[entry_rows(lists) * grid.n_k + lists.indices] = lists.tile_ids.long()
    edges, full_bits = grid.edge(rows, cols), grid.full_bits(rows.device)
    tiles = with_trivial(lists.tiles)

    def tiles_of(entries: Tensor) -> Tensor:
        return ~tiles[ids[entries]] & full_bits[edges[entries]]

    return build(grid, lists.batch, lists.heads, rows, cols, (ids, edges), tiles_of)


def reblock(grid: Grid, lists: BlockLists, new: Grid) -> BlockLists:
    """The same pairs in blocks of another size, composed of the pieces that both sizes are multiples of."""
    device = lists.indptr.device
    piece_q, piece_k = math.gcd(grid.block_q, new.block_q), math.gcd(grid.block_k, new.block_k)
    per_q, per_k = new.block_q // piece_q, new.block_k // piece_k
    old_q, old_k = grid.block_q // piece_q, grid.block_k // piece_k
    blocks = entry_rows(lists) * grid.n_k + lists.indices  # ascending
    rows, cols = _covering_blocks(grid, blocks, new)

    # Every piece of every new block: the old block that it lies in, and where in there.
    i_piece = (rows % max(new.n_q, 1) * per_q)[:, None, None] + torch.arange(per_q, device=device)[:, None]
    j_piece = (cols * per_k)[:, None, None] + torch.arange(per_k, device=device)
    line = (rows // max(new.n_q, 1))[:, None, None]
    wanted = (line * grid.n_q + i_piece // old_q) * grid.n_k + j_piece // old_k
    at = torch.searchsorted(blocks, wanted).clamp(max=max(blocks.numel() - 1, 0))
    inside = (i_piece // old_q < grid.n_q) & (j_piece // old_k < grid.n_k)
    found = inside & (blocks[at] == wanted)
    n_tiles = lists.tiles.shape[0]
    ids = torch.where(found, lists.tile_ids.long()[at], ABSENT)
    ids = torch.where(ids < 0, ids + n_tiles + 2, ids)
    place = (ids * old_q + i_piece % old_q) * old_k + j_piece % old_k
    place = torch.where(ids >= n_tiles, ids * old_q * old_k, place)  # all pieces of a trivial tile are alike
    pieces = with_trivial(lists.tiles).view(-1, old_q, piece_q, old_k, piece_k // 8).transpose(2, 3)
    pieces = pieces.reshape(-1, piece_q, piece_k // 8)

    edges, full_bits = new.edge(rows, cols), new.full_bits(device)
    first, classes = unique_rows(torch.cat([place.flatten(1), edges[:, None]], 1))
    packed = []
    for some in first.split(max(1, CHUNK // (new.block_q * new.block_k))):
        tiles = pieces[place[some]].transpose(2, 3).reshape(-1, new.block_q, new.block_k // 8)
        packed.append(tiles & full_bits[edges[some]])
    empty = torch.empty(0, new.block_q, new.block_k // 8, dtype=torch.uint8, device=device)
    return assemble(new, lists.batch, lists.heads, rows, cols, classes, torch.cat([empty, *packed]))


def _covering_blocks(grid: Grid, blocks: Tensor, new: Grid) -> tuple[Tensor, Tensor]:
    """(rows, cols) of the blocks of `new` that overlap the given ones of `grid`, ascending."""
    row, col = blocks // max(grid.n_k, 1), blocks % max(grid.n_k, 1)
    line, i_block = row // max(grid.n_q, 1), row % max(grid.n_q, 1)
    for axis, old_size, new_size, n_new in (
        (0, grid.block_q, new.block_q, new.n_q),
        (1, grid.block_k, new.block_k, new.n_k),
    ):
        position = i_block if axis == 0 else col
        first = position * old_size // new_size
        last = ((position + 1) * old_size - 1) // new_size
        which, position = ragged_range(first, last.clamp(max=n_new - 1) - first + 1)
        line, i_block, col = line[which], i_block[which], col[which]
        i_block, col = (position, col) if axis == 0 else (i_block, position)
    covering = ((line * new.n_q + i_block) * new.n_k + col).unique()
    return covering // max(new.n_k, 1), covering % max(new.n_k, 1)


# --- counting ---


def count_pairs(grid: Grid, lists: BlockLists | None, window: Interval, lengths: Tensor) -> int:
    """Number of visible pairs over all batch elements and heads."""
    total = 0
    for part, length, times in _per_batch(grid, lists, lengths):
        if part is None:
            start, stop = keys_seen(torch.arange(grid.q_len, device=length.device), window, int(length))
            total += times * int((stop - start).sum())
        else:
            total += times * int(entry_pairs(grid, explicit(grid, part, window, length)).sum())
    return total


def count_blocks(grid: Grid, lists: BlockLists | None, window: Interval, lengths: Tensor) -> int:
    """Number of blocks that are listed and touched by window and length, over all batch elements and heads."""
    total = 0
    for part, length, times in _per_batch(grid, lists, lengths):
        if part is None:
            total += times * reachable_blocks(grid, window, length)[0].numel()
        else:
            touched, _, _ = how_cut(grid, window, length, entry_rows(part), part.indices.long())
            total += times * int(touched.sum())
    return total


def visited_pairs(grid: Grid, lists: BlockLists | None, window: Interval, lengths: Tensor) -> int:
    """Number of pairs in the blocks of `count_blocks`, visible or not, those beyond q_len and kv_len left out."""
    total = 0
    for part, length, times in _per_batch(grid, lists, lengths):
        if part is None:
            first, counts = reach(grid, window, length)
            keys = ((first + counts) * grid.block_k).clamp(max=grid.kv_len) - first * grid.block_k
            rows = torch.arange(grid.n_q, device=length.device)
            heights = (grid.q_len - rows * grid.block_q).clamp(max=grid.block_q)
            total += times * int((heights * torch.where(counts > 0, keys, 0)).sum())
        else:
            rows, cols = entry_rows(part), part.indices.long()
            touched, _, _ = how_cut(grid, window, length, rows, cols)
            total += times * int(torch.where(touched, grid.pairs(rows, cols), 0).sum())
    return total


def entry_pairs(grid: Grid, lists: BlockLists) -> Tensor:
    """Number of visible pairs of each entry."""
    whole = grid.pairs(entry_rows(lists), lists.indices.long())
    counted = torch.cat([count_bits(lists.tiles), whole.new_zeros(1)])[lists.tile_ids.long()]
    return torch.where(lists.tile_ids == FULL, whole, counted)


def _per_batch(
    grid: Grid, lists: BlockLists | None, lengths: Tensor
) -> Iterator[tuple[BlockLists | None, Tensor, int]]:
    """(lists, length [1], how often) such that nothing has to be repeated for every batch element at once."""
    if lengths.numel() == 1:
        yield lists, lengths, 1
    elif lists is None or lists.batch == 1:
        values, times = lengths.unique(return_counts=True)
        for value, count in zip(values.split(1), times.tolist(), strict=False):
            yield lists, value, count
    else:
        for b in range(lists.batch):
            per_batch = lists.heads * grid.n_q
            rows = torch.arange(b * per_batch, (b + 1) * per_batch, device=lengths.device)
            yield take_rows(lists, rows, 1, lists.heads), lengths[b : b + 1], 1
