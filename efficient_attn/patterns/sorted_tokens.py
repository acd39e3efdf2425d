"""The lists of tokens in the order of their buckets, where what a query sees is a run of columns.

A row of 64 keys is one word. Those of the run come from its two ends; those that an earlier round has put together with
the query are words of a table, by key block and bucket: nothing here is asked pair by pair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import BlockMask
from ..masks.lists import FULL, BlockLists, Grid, pointers, ragged_range

if TYPE_CHECKING:
    from .buckets import Buckets

BLOCK = 64  # of the lists: a row of a tile is one word
ENTRIES = 1024  # whose words are worked on together, in the cache
LARGEST_TABLE = 1 << 22  # words


def sorted_lists(
    found: Buckets, r: int, query_order: Tensor, key_order: Tensor, *, offset: int | None, others: bool
) -> BlockMask:
    """The mask of round r for tokens in the order of its buckets, without the pairs of earlier rounds.

    Args:
        query_order, key_order: (B, H, N) that sort found.query[r] and found.key[r]; with `offset` or chunks stably.
        offset: a query at position p sees keys up to p + offset; None: all.
        others: without oneself.
    """
    batch, heads, q_len = query_order.shape
    grid = Grid(q_len, key_order.shape[2], BLOCK, BLOCK)
    low, high = (_in_blocks(x, grid) for x in _runs(found, r, query_order, key_order, offset))
    last = (grid.q_len - torch.arange(grid.n_q, device=low.device) * BLOCK).clamp(max=BLOCK).repeat(batch * heads) - 1
    some = high > low
    start = torch.where(some, low, grid.kv_len).amin(1)
    stop = torch.where(some, high, 0).amax(1)
    first = start // BLOCK
    rows, cols = ragged_range(first, torch.where(stop > start, -(-stop // BLOCK) - first, 0))
    left = cols * BLOCK
    right = (left + BLOCK).clamp(max=grid.kv_len)
    # Inside a bucket every pair is visible, unless an earlier round or oneself is left out.
    full = (low.amax(1)[rows] <= left) & (high.amin(1)[rows] >= right)
    full &= r == 0 and not others
    before = r if rows.numel() > 0 else 0
    earlier = [_Together(found, e, query_order, key_order, grid) for e in range(before)]
    oneself = _places_of(key_order, query_order, grid) if others else None
    bits = torch.ones(BLOCK + 1, dtype=torch.int64, device=rows.device) << torch.arange(BLOCK + 1, device=rows.device)
    bits[BLOCK] = 0
    below = bits - 1  # of n: the n lowest bits
    whole = below[right - left]
    row_places = torch.arange(BLOCK, device=rows.device)
    kept, tiles, asked = [], [], (~full).nonzero()[:, 0]
    for each in asked.split(ENTRIES):
        row, at = rows[each], left[each][:, None]
        words = below[(high[row] - at).clamp_(0, BLOCK)] & ~below[(low[row] - at).clamp_(0, BLOCK)]
        for other in earlier:
            words &= ~other.words(row, cols[each])
        if oneself is not None:
            words &= ~bits[torch.where(oneself[row] >= at, oneself[row] - at, BLOCK).clamp_(max=BLOCK)]
        full[each] = ((words == whole[each][:, None]) | (row_places > last[row][:, None])).all(1)
        partial = (~full[each] & (words != 0).any(1)).nonzero()[:, 0]
        kept.append(each[partial])
        tiles.append(words[partial])
    ids = torch.full_like(rows, FULL - 1)  # not listed
    ids[full] = FULL
    if kept:
        place = torch.cat(kept)
        ids[place] = torch.arange(place.numel(), device=rows.device)
    listed = ids >= FULL
    counts = torch.bincount(rows[listed], minlength=batch * heads * grid.n_q)
    packed = torch.cat([rows.new_empty(0, BLOCK), *tiles]).view(torch.uint8).view(-1, BLOCK, BLOCK // 8)
    lists = BlockLists(batch, heads, pointers(counts), cols[listed].int(), ids[listed].int(), packed)
    return BlockMask.from_lists(grid, lists)


def _runs(found: Buckets, r: int, query_order: Tensor, key_order: Tensor, offset: int | None) -> tuple[Tensor, Tensor]:
    """The columns low <= c < high that each row sees in round r, (B, H, Nq) int64."""
    query, key = found.query[r].gather(-1, query_order), found.key[r].gather(-1, key_order)
    if query.numel() == 0 or key.numel() == 0:
        return torch.zeros_like(query_order), torch.zeros_like(query_order)
    buckets = torch.arange(int(query.max()) + 2, dtype=key.dtype, device=key.device)
    starts = torch.searchsorted(key.contiguous(), buckets.expand(*key.shape[:2], -1).contiguous())
    starts = starts.repeat_interleave(query.shape[1] // key.shape[1], 1)
    low = starts.gather(-1, query.long())
    if offset is None:
        high = starts.gather(-1, query.long() + 1)
    else:  # within a bucket positions ascend
        step = key_order.shape[2] + 1
        last = (query_order + (offset + 1)).clamp(0, step - 1)
        high = _search(key.long() * step + key_order + 1, query.long() * step + last, right=True)
    if found.query_chunk is not None and found.key_chunk is not None:
        own, chunk = found.query_chunk[r].gather(-1, query_order), found.key_chunk[r].gather(-1, key_order)
        low = torch.maximum(low, _search(chunk, own - 1, right=False))
        high = torch.minimum(high, _search(chunk, own, right=True))
    return low, torch.maximum(low, high)


def _search(key: Tensor, query: Tensor, *, right: bool) -> Tensor:
    """Where (B, H, Nq) stand in ascending (B, Hkv, Nk)."""
    grouped = query.reshape(*key.shape[:2], -1).contiguous()
    return torch.searchsorted(key.contiguous(), grouped, right=right).view(query.shape)


def _in_blocks(rows: Tensor, grid: Grid) -> Tensor:
    """(B, H, Nq) as (B * H * n_q, BLOCK), with zeros behind."""
    return F.pad(rows, (0, grid.n_q * BLOCK - grid.q_len)).reshape(-1, BLOCK)


def _places_of(key_order: Tensor, query_order: Tensor, grid: Grid) -> Tensor:
    """The column of each row's own token, in blocks; beyond all columns where there is none."""
    columns = torch.arange(grid.kv_len, device=key_order.device).expand_as(key_order)
    own = torch.full_like(key_order, grid.kv_len + BLOCK).scatter(-1, key_order, columns)
    inside = query_order.clamp(max=grid.kv_len - 1)
    place = own.repeat_interleave(query_order.shape[1] // key_order.shape[1], 1).gather(-1, inside)
    return _in_blocks(torch.where(query_order < grid.kv_len, place, grid.kv_len + BLOCK), grid)


class _Together:
    """Which keys of a block a round puts together with each of its queries, in the order of another round."""

    def __init__(self, found: Buckets, r: int, query_order: Tensor, key_order: Tensor, grid: Grid) -> None:
        self.heads, self.key_heads, self.n_q = query_order.shape[1], key_order.shape[1], grid.n_q
        self.query = _in_blocks(found.query[r].gather(-1, query_order) + 1, grid)
        self.buckets = _Words(found.key[r].gather(-1, key_order), self.query, grid)
        self.chunks = None
        if found.query_chunk is not None and found.key_chunk is not None:
            self.chunk = _in_blocks(found.query_chunk[r].gather(-1, query_order) + 1, grid)
            self.chunks = _Words(found.key_chunk[r].gather(-1, key_order), self.chunk, grid)

    def words(self, rows: Tensor, cols: Tensor) -> Tensor:
        """(entries, BLOCK) words of the blocks at rows and columns."""
        line = rows // self.n_q
        line = line // self.heads * self.key_heads + line % self.heads // (self.heads // self.key_heads)
        words = self.buckets.of(line, cols, self.query[rows])
        if self.chunks is not None:
            own = self.chunk[rows]
            words &= self.chunks.of(line, cols, own) | self.chunks.of(line, cols, own - 1)
        return words


class _Words:
    """Keys (B, Hkv, Nk) with a number from -1 on: for a block and a number + 1 that is asked for, the bits of its keys
    that have it."""

    def __init__(self, numbers: Tensor, asked: Tensor, grid: Grid) -> None:
        lines, self.n_k = numbers.shape[0] * numbers.shape[1], grid.n_k
        self.count = max(int(numbers.max()) + 1, int(asked.max())) + 1
        column = torch.arange(grid.kv_len, device=numbers.device)
        block = torch.arange(lines, device=numbers.device)[:, None] * grid.n_k + column // BLOCK
        ids = (block * self.count + numbers.flatten(0, 1) + 1).flatten()
        ones = (torch.ones_like(column) << (column % BLOCK)).expand(lines, -1).flatten()
        self.ids, size = None, lines * grid.n_k * self.count
        if size > LARGEST_TABLE:  # no more than a word a key
            self.ids, ids = ids.unique(return_inverse=True)
            size = self.ids.numel()
        # Every key comes once, so that adding its bit sets it.
        self.table = torch.zeros(size, dtype=torch.int64, device=numbers.device).scatter_add_(0, ids, ones)

    def of(self, line: Tensor, cols: Tensor, numbers: Tensor) -> Tensor:
        """(entries, BLOCK) words for numbers + 1, of blocks in a line; 0 for a number that no key has."""
        ids = ((line * self.n_k + cols) * self.count)[:, None] + numbers
        if self.ids is None:
            return self.table[ids]
        place = torch.searchsorted(self.ids, ids).clamp(max=self.ids.numel() - 1)
        return torch.where(self.ids[place] == ids, self.table[place], 0)
