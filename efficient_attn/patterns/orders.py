"""In which order of tokens a pattern's pairs lie close together: the parts of `masks.PartedMask`.

A pattern says what its pairs are a union of, as `Band`s: tokens fall into segments (the residue classes of a stride,
the columns of an image), and a query sees those keys of its segment that are not too far. Which blocks these touch, how
large they should be, and whether it pays to leave the order of the sequence at all, is counted here for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..masks import BlockMask, Part, PartedMask
from ..masks.algebra import window_fields
from ..masks.lists import Grid, predicate_lists, ragged_range
from ..masks.parts import BLOCK_COST, ROW_COST, cost

SIZES = ((128, 128), (64, 128), (64, 64), (64, 32), (64, 16), (32, 32), (32, 16), (16, 16))
LEAST_PAIRS = 1 << 18  # of a call that is worth an order: below it loads and joins outweigh what is saved
GAIN = 0.85  # of the cost in the order of the sequence that a union may have


class Line(NamedTuple):
    """Tokens in an order, int64 (n,) each: ascending by segment, then by place."""

    token: Tensor
    segment: Tensor
    place: Tensor

    @classmethod
    def of(cls, token: Tensor, segment: Tensor | int = 0, place: Tensor | None = None) -> Line:
        """Tokens put in order."""
        place = token if place is None else place
        segment = torch.full_like(token, segment) if isinstance(segment, int) else segment
        order = place.argsort(stable=True)
        order = order[segment[order].argsort(stable=True)]
        return cls(token[order], segment[order], place[order])

    def order(self, tokens: int) -> Tensor | None:
        """As a part has it: None where it is that of all tokens."""
        if self.token.numel() == tokens and bool((self.token == torch.arange(tokens)).all()):
            return None
        return self.token.int()[None]


class Proposal(Protocol):
    """A part in blocks of any size."""

    def cost(self, size: tuple[int, int]) -> int: ...
    def part(self, size: tuple[int, int], q_len: int, kv_len: int) -> Part: ...


class Band(NamedTuple):
    """Pairs of one segment with low <= place of key - place of query <= high, without those of `hole` (first, last)."""

    queries: Line
    keys: Line
    low: int | None = None
    high: int | None = None
    hole: tuple[int, int] | None = None

    def cost(self, size: tuple[int, int]) -> int:
        """As `masks.parts.cost` counts it, of the blocks between the first and the last key that some query sees."""
        grid = self._grid(self._size(size))
        _, start, stop = self._reach(grid)
        first, last = start // grid.block_k, -(-stop // grid.block_k)
        heights = (grid.q_len - torch.arange(grid.n_q) * grid.block_q).clamp(max=grid.block_q)
        widths = (last * grid.block_k).clamp(max=grid.kv_len) - first * grid.block_k
        if self._needs_no_lists():  # cut where it ends, not at blocks
            widths, last = stop - start, first + 1
        seen = stop > start
        pairs = int((heights * torch.where(seen, widths, 0)).sum())
        return pairs + BLOCK_COST * int(torch.where(seen, last - first, 0).sum()) + ROW_COST * sum(grid[:2])

    def part(self, size: tuple[int, int], q_len: int, kv_len: int) -> Part:
        """The part in blocks of a size."""
        grid = self._grid(self._size(size))
        return Part(self._mask(grid), self.queries.order(q_len), self.keys.order(kv_len))

    def past(self, offset: int) -> Band | None:
        """Its pairs with key <= query + offset, where places tell which these are; else None.

        Places must grow with positions, for queries and keys of a segment alike; tokens that share a place must be one
        position, or see none of one another.
        """
        (i, sq, tq), (j, sk, tk) = self.queries, self.keys
        position, segment, place = (torch.cat(pair) for pair in ((i + offset, j), (sq, sk), (tq, tk)))
        order = position.argsort(stable=True)
        order = order[place[order].argsort(stable=True)]
        order = order[segment[order].argsort(stable=True)]
        further, apart, same = (x[order].diff() for x in (position, place, segment))
        grows, shared = (further > 0) | (same != 0) | (apart == 0), (apart == 0) & (same == 0) & (further != 0)
        apart_only = (self.high is not None and self.high < 0) or (
            self.hole is not None and self.hole[0] <= 0 <= self.hole[1]
        )
        if not bool(grows.all()) or (bool(shared.any()) and not apart_only):
            return None
        most = -1 if apart_only else 0
        return self._replace(high=most if self.high is None else min(self.high, most))

    def _grid(self, size: tuple[int, int]) -> Grid:
        return Grid(self.queries.token.numel(), self.keys.token.numel(), *size)

    def _size(self, size: tuple[int, int]) -> tuple[int, int]:
        return (64, 64) if self._needs_no_lists() else size  # as kernels cut what has no lists

    def _needs_no_lists(self) -> bool:
        return self._segments() == 1 and self.hole is None and self._is_window()

    def _mask(self, grid: Grid) -> BlockMask:
        window = self._window()
        by_window = self._is_window()
        if self._needs_no_lists():
            return BlockMask(grid.q_len, grid.kv_len, (grid.block_q, grid.block_k), **window)
        _, start, stop = self._reach(grid)
        first = start // grid.block_k
        counts = torch.where(stop > start, -(-stop // grid.block_k) - first, 0)
        rows, cols = ragged_range(first, counts)
        keys = self._classes(grid, rows, cols, by_window)
        sq, tq, sk, tk = (x.int() for x in (*self.queries[1:], *self.keys[1:]))
        low, high = (None, None) if by_window else (self.low, self.high)

        def visible(b: Tensor, h: Tensor, p: Tensor, c: Tensor) -> Tensor:
            seen = sq[p] == sk[c]
            if low is None and high is None and self.hole is None:
                return seen
            away = tk[c] - tq[p]
            seen = seen if low is None else seen & (away >= low)
            seen = seen if high is None else seen & (away <= high)
            return seen if self.hole is None else seen & ((away < self.hole[0]) | (away > self.hole[1]))

        lists = predicate_lists(visible, grid, 1, 1, rows, cols, keys=(*keys, grid.edge(rows, cols)))
        mask = BlockMask.from_lists(grid, lists)
        return mask._replace(**window) if by_window else mask

    def _segments(self) -> int:
        both = torch.stack([x[i] for x in (self.queries.segment, self.keys.segment) for i in (0, -1)])
        return 1 if bool((both == both[0]).all()) else 2

    def _is_window(self) -> bool:
        """Whether the band is one of rows and columns too: places step by one, alike in queries and keys."""
        if self.low is None and self.high is None:
            return True
        (_, sq, tq), (_, sk, tk) = self.queries, self.keys
        steps = all(bool(((t.diff() == 1) | (s.diff() != 0)).all()) for s, t in ((sq, tq), (sk, tk)))
        if not steps:
            return False
        if self._segments() == 1:
            return True
        return sq.shape == sk.shape and bool((sq == sk).all()) and bool((tq == tk).all())

    def _window(self) -> dict[str, Any]:
        """The band as a window of rows and columns, where it is one."""
        shift = int(self.queries.place[0] - self.keys.place[0])
        interval = tuple(None if side is None else side + shift for side in (self.low, self.high))
        return window_fields(interval, 0)  # type: ignore[arg-type]

    def _reach(self, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """For each query block its first row, and the columns start <= c < stop between which it sees any."""
        (_, sq, tq), (_, sk, tk) = self.queries, self.keys
        least, most = (int(f(torch.stack([f(tq), f(tk)]))) for f in (torch.amin, torch.amax))
        span = most - least + 1
        top = torch.arange(grid.n_q) * grid.block_q
        bottom = (top + grid.block_q).clamp(max=grid.q_len) - 1
        low = tq[top] * 0 + least if self.low is None else (tq[top] + self.low).clamp(least, most + 1)
        high = tq[bottom] * 0 + most if self.high is None else (tq[bottom] + self.high).clamp(least - 1, most)
        columns = sk * (span + 2) + (tk - least + 1)
        start = torch.searchsorted(columns, sq[top] * (span + 2) + (low - least + 1))
        stop = torch.searchsorted(columns, sq[bottom] * (span + 2) + (high - least + 1), right=True)
        return top, start, torch.maximum(start, stop)

    def _classes(self, grid: Grid, rows: Tensor, cols: Tensor, by_window: bool) -> tuple[Tensor, Tensor]:
        """Two numbers of each block; where they are equal, so are the tiles."""
        (_, sq, tq), (_, sk, tk) = self.queries, self.keys
        p, c = rows * grid.block_q, cols * grid.block_k
        p_last, c_last = (p + grid.block_q).clamp(max=grid.q_len) - 1, (c + grid.block_k).clamp(max=grid.kv_len) - 1
        together = (sq[p] == sq[p_last]) & (sk[c] == sk[c_last]) & (sq[p] == sk[c])
        nearest, farthest = tk[c] - tq[p_last], tk[c_last] - tq[p]  # least and greatest difference
        full = together.clone()
        if not by_window and self.low is not None:
            full &= nearest >= self.low
        if not by_window and self.high is not None:
            full &= farthest <= self.high
        if self.hole is not None:
            full &= (nearest > self.hole[1]) | (farthest < self.hole[0])
        steady = (tq[p_last] - tq[p] == p_last - p) & (tk[c_last] - tk[c] == c_last - c) & together
        kind = torch.where(full, 2, steady.long())
        alone = torch.arange(rows.numel())
        return kind, torch.where(full, 0, torch.where(steady, tk[c] - tq[p], alone))


def between(
    queries: Tensor,
    keys: Tensor,
    x: Tensor | None = None,
    y: Tensor | None = None,
    low: int | None = None,
    high: int | None = None,
) -> list[Band]:
    """Some queries and some keys in one segment, in the order of the sequence, at places x and y; none without any."""
    if queries.numel() == 0 or keys.numel() == 0:
        return []
    return [Band(Line.of(queries, 0, x), Line.of(keys, 0, y), low, high)]


def arranged(mask: BlockMask, proposals: Sequence[Proposal] | None) -> BlockMask:
    """The mask with the parts that are proposed, if these are the cheaper way to its pairs; else as it is."""
    if not proposals:
        return mask
    q_len, kv_len = mask.q_len, mask.kv_len
    parts = [each.part(min(SIZES, key=each.cost), q_len, kv_len) for each in proposals]
    parts.sort(key=lambda part: -part.mask.q_len)  # all rows first: what is joined may name a few
    union = PartedMask.trusted(parts, q_len=q_len, kv_len=kv_len, whole=mask)
    return union if cost(union) < GAIN * cost(mask) else mask


def worth_an_order(q_len: int, kv_len: int) -> bool:
    """Whether a call is long enough for a look at orders."""
    return q_len >= 64 and q_len * kv_len >= LEAST_PAIRS
