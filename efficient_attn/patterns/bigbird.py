"""BigBird: windows, global and random ones, in whole blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..masks import BlockMask
from ..masks.lists import Grid, pointers, ragged_range
from ..options import register
from .base import Pattern


@register
@dataclass(frozen=True)
class BigBird(Pattern):
    """Blocks of `block` tokens: a window, global ones and random ones. Zaheer et al. 2020, arXiv:2007.14062.

    Block r of the queries sees
        window: the blocks r - window // 2 .. r + window // 2 (window is odd);
        global_blocks: half of them, rounded up, at the start and the rest at the end; they see every block too;
        random_blocks: others, drawn for each query block from `seed`, or all others when there are fewer.

    Defined for self-attention, whose queries and keys are cut into the same blocks.
    """

    name = "bigbird"
    formula = "softmax(QK^T)V over window + global + random blocks"
    paper = "Zaheer et al. 2020"
    complexity = "n b (w + g + r) d"

    block: int = 64
    window: int = 3
    global_blocks: int = 2
    random_blocks: int = 3
    seed: int = 0

    def check(self) -> None:
        self._check_block()
        self._at_least(window=1, global_blocks=0, random_blocks=0, seed=0)
        if self.window % 2 == 0:
            raise InputError(f"{self.name}: window is centred on the query block and must be odd, got {self.window}")

    @property
    def _own_block(self) -> tuple[int, int]:
        return (self.block, self.block)

    def visible(self, i: Tensor, j: Tensor, q_len: int, kv_len: int, head: int = 0) -> Tensor:
        self._check_square(q_len, kv_len)
        grid = Grid(q_len, kv_len, self.block, self.block)
        seen = torch.zeros(grid.n_q, grid.n_k, dtype=torch.bool)
        indptr, indices = self._blocks(grid)
        seen[torch.arange(grid.n_q).repeat_interleave(indptr.diff()), indices] = True
        return seen.to(i.device)[i // self.block, j // self.block]

    def _build(self, grid: Grid, num_heads: int) -> BlockMask:
        self._check_square(grid.q_len, grid.kv_len)
        indptr, indices = self._blocks(Grid(grid.q_len, grid.kv_len, self.block, self.block))
        return BlockMask.from_csr(indptr, indices, q_len=grid.q_len, kv_len=grid.kv_len, block_size=self.block)

    def _blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """indptr and indices of the visible blocks."""
        n_q, n_k, half = grid.n_q, grid.n_k, self.window // 2
        if n_q == 0 or n_k == 0:
            return torch.zeros(n_q + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        first, last = -(-self.global_blocks // 2), self.global_blocks // 2
        row = torch.arange(n_q)
        every_row = (row < first) | (row >= n_q - last)
        # Three ranges that may overlap: global at the start, window, global at the end.
        starts = torch.stack([torch.zeros_like(row), row - half, torch.full_like(row, n_k - last)], 1)
        stops = torch.stack([torch.full_like(row, first), row + half + 1, torch.full_like(row, n_k)], 1)
        starts[every_row, 0], stops[every_row, 0] = 0, n_k
        starts, stops = starts.clamp(0, n_k), stops.clamp(0, n_k)
        which, indices = ragged_range(starts.flatten(), (stops - starts).clamp(min=0).flatten())
        rows, cols = which // 3, indices
        listed = torch.cat([rows * n_k + cols, self._random(starts, stops, n_k)]).unique()
        counts = torch.bincount(listed // n_k, minlength=n_q)
        return pointers(counts), listed % n_k

    def _random(self, starts: Tensor, stops: Tensor, n_k: int) -> Tensor:
        """row * n_k + column of the random blocks, outside the ranges (rows, 3) that a row has anyway."""
        starts, order = starts.sort(1)
        taken_until = stops.gather(1, order).cummax(1).values
        starts = torch.maximum(starts, torch.cat([torch.zeros_like(starts[:, :1]), taken_until[:, :-1]], 1))
        widths = (taken_until - starts).clamp(min=0)  # of the ranges made disjoint, ascending
        free = n_k - widths.sum(1)
        row = torch.arange(starts.shape[0])
        ranks: list[Tensor] = []  # chosen so far in each row, as ranks among the free blocks, ascending
        chosen = []
        for draw in range(min(self.random_blocks, int(free.max()))):
            enough = free > draw
            rank = _hashed(self.seed, row, draw) % (free - draw).clamp(min=1)
            for earlier in ranks:
                rank = rank + (rank >= earlier)
            rank = torch.where(enough, rank, n_k)
            ranks = list(torch.stack([*ranks, rank]).sort(0).values)
            column = rank
            for start, width in zip(starts.unbind(1), widths.unbind(1), strict=True):
                column = torch.where((width > 0) & (column >= start), column + width, column)
            chosen.append((row * n_k + column)[enough])
        return torch.cat([row.new_empty(0), *chosen])


def _hashed(seed: int, row: Tensor, draw: int) -> Tensor:
    """62 random bits for each row, a pure function of its arguments on every platform (splitmix64)."""
    word = (row * 1_000_003 + draw) * -7046029254386353131 + seed * 0x2545F491
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        word = (word ^ ((word >> shift) & (2 ** (64 - shift) - 1))) * factor
    return (word ^ ((word >> 31) & (2**33 - 1))) & (2**62 - 1)
