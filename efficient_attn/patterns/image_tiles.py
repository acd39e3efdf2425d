"""Neighbourhoods of a grid in an order of tiles: a tile of queries sees some tiles of keys, a block each.

Generalized neighborhood attention, Hassani et al. 2025, arXiv:2504.16922, section 3: the token permutation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..masks import BlockMask, Part
from ..masks.lists import Grid, predicate_lists, ragged_range, unique_rows
from ..masks.parts import BLOCK_COST, ROW_COST

Window = Callable[[Tensor], tuple[Tensor, Tensor]]  # positions of an axis -> places start <= p < stop that they see


class Axis(NamedTuple):
    """One axis of the grid: tokens share a residue, of which each has places 0, 1, ..."""

    length: int
    dilation: int
    window: Window

    def cells(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Runs of `size` places, by residue: residue, first place and length of each, and the cell of each position."""
        counts = (self.length - torch.arange(self.dilation) + self.dilation - 1) // self.dilation
        residue, number = ragged_range(torch.zeros_like(counts), -(-counts // size))
        first = number * size
        bases = (-(-counts // size)).cumsum(0) - -(-counts // size)
        x = torch.arange(self.length)
        return (
            residue,
            first,
            (counts[residue] - first).clamp(max=size),
            bases[x % self.dilation] + x // self.dilation // size,
        )

    def meetings(self, of_query: int, of_key: int) -> tuple[Tensor, Tensor, Tensor]:
        """Cells of queries and of keys that see one another, and a number that is equal where they do so alike."""
        residue, first, count, _ = self.cells(of_query)
        key_residue, key_first, _, _ = self.cells(of_key)
        base = torch.searchsorted(key_residue, residue)
        start = self.window(first * self.dilation + residue)[0]
        stop = self.window((first + count - 1) * self.dilation + residue)[1]
        low, high = start // of_key, (stop - 1) // of_key
        cell, key_cell = ragged_range(base + low, (high - low + 1).clamp(min=0))
        p = first[cell][:, None] + torch.arange(of_query)
        inside = torch.arange(of_query) < count[cell][:, None]
        low, high = self.window((p * self.dilation + residue[cell][:, None]).clamp(max=self.length - 1))
        y = (key_first[key_cell][:, None] + torch.arange(of_key))[:, None]
        seen = (y >= low[..., None]) & (y < high[..., None]) & inside[..., None]
        return cell, key_cell, unique_rows(_padded(seen.flatten(1)))[1]


def _padded(rows: Tensor) -> Tensor:
    """bool rows as int64, eight flags a number."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % 8)).contiguous().view(torch.int64)


class Tiling(NamedTuple):
    """Tokens in the order of some tiles: full tiles first, so that each is a block."""

    token: Tensor  # int64, of each place in the order
    base: Tensor  # place of each tile's first token, in the shape of the cells
    sizes: Tensor  # how many

    @classmethod
    def of(cls, axes: list[Axis], sides: tuple[int, ...]) -> Tiling:
        counts, cells, inner = [], [], []
        for axis, side in zip(axes, sides, strict=True):
            _, first, count, cell = axis.cells(side)
            counts.append(count)
            cells.append(cell)
            inner.append(torch.arange(axis.length) // axis.dilation - first[cell])
        count = counts[0]
        for other in counts[1:]:
            count = count[..., None] * other
        flat = count.flatten()
        order = (flat != math.prod(sides)).long().argsort(stable=True)
        base = torch.empty_like(flat)
        base[order] = flat[order].cumsum(0) - flat[order]
        shape = [axis.length for axis in axes]
        tile, within = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        for a in range(len(axes)):
            view = [-1 if b == a else 1 for b in range(len(axes))]
            tile = tile * counts[a].numel() + cells[a].view(view)
            within = within * counts[a][cells[a]].view(view) + inner[a].view(view)
        token = torch.empty(tile.numel(), dtype=torch.int64)
        token[base[tile.flatten()] + within.flatten()] = torch.arange(tile.numel())
        return cls(token, base.view(count.shape), count)


def sides_of(volume: int, axes: int) -> tuple[int, ...]:
    """The sides of a tile, powers of two as alike as can be; the last axes get the longer ones."""
    bits = volume.bit_length() - 1
    return tuple(1 << (bits // axes + (a >= axes - bits % axes)) for a in range(axes))


class Tiles(NamedTuple):
    """The pairs of a neighbourhood, without prefix tokens. visible: of tokens of the grid."""

    axes: list[Axis]
    prefix: int
    visible: Callable[[Tensor, Tensor], Tensor]

    def cost(self, size: tuple[int, int]) -> int:
        """As `masks.parts.cost` counts it."""
        blocks = 1
        for axis, q, k in zip(self.axes, *self._sides(size), strict=True):
            blocks *= axis.meetings(q, k)[0].numel()
        tokens = math.prod(axis.length for axis in self.axes)
        return blocks * (size[0] * size[1] + BLOCK_COST) + 2 * ROW_COST * tokens

    def part(self, size: tuple[int, int], q_len: int, kv_len: int) -> Part:
        """The part in blocks of a size."""
        q_sides, k_sides = self._sides(size)
        queries, keys = Tiling.of(self.axes, q_sides), Tiling.of(self.axes, k_sides)
        grid = Grid(queries.token.numel(), keys.token.numel(), *size)
        met = [axis.meetings(q, k) for axis, q, k in zip(self.axes, q_sides, k_sides, strict=True)]
        chosen = torch.cartesian_prod(*(torch.arange(m[0].numel()) for m in met)).view(-1, len(met))
        of_query = tuple(m[0][chosen[:, a]] for a, m in enumerate(met))
        of_key = tuple(m[1][chosen[:, a]] for a, m in enumerate(met))
        alike = torch.zeros_like(chosen[:, 0])
        for a, m in enumerate(met):
            alike = alike * (int(m[2].max()) + 1) + m[2][chosen[:, a]]
        rows, cols, tile = self._blocks(queries, of_query, keys, of_key, grid)
        whole = (queries.sizes[of_query] == size[0]) & (keys.sizes[of_key] == size[1])
        # Each whole pair of tiles is a block of its own; what others share is asked one by one.
        blocks = rows * grid.n_k + cols
        found, inverse = blocks.unique(return_inverse=True)
        first = torch.full_like(found, blocks.numel()).scatter_reduce_(0, inverse, torch.arange(blocks.numel()), "amin")
        own = torch.where(whole[tile], alike[tile], -1 - torch.arange(tile.numel()))[first]
        rows, cols = found // grid.n_k, found % grid.n_k
        q, k = queries.token + self.prefix, keys.token + self.prefix
        lists = predicate_lists(lambda b, h, p, c: self.visible(q[p], k[c]), grid, 1, 1, rows, cols, keys=(own,))
        return Part(BlockMask.from_lists(grid, lists), q.int()[None], k.int()[None])

    def _sides(self, size: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return sides_of(size[0], len(self.axes)), sides_of(size[1], len(self.axes))

    @staticmethod
    def _blocks(
        queries: Tiling, of_query: tuple[Tensor, ...], keys: Tiling, of_key: tuple[Tensor, ...], grid: Grid
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The blocks that pairs of tiles lie in, and which pair each is of."""
        ends = []
        for tiling, cells, size in ((queries, of_query, grid.block_q), (keys, of_key, grid.block_k)):
            base = tiling.base[cells]
            ends.append((base // size, (base + tiling.sizes[cells] - 1) // size))
        (top, bottom), (left, right) = ends
        found = []
        for down, across in itertools.product((0, 1), (0, 1)):
            pair = ((top + down <= bottom) & (left + across <= right)).nonzero()[:, 0]
            found.append((top[pair] + down, left[pair] + across, pair))
        rows, cols, pairs = (torch.cat(column) for column in zip(*found, strict=True))
        return rows, cols, pairs
