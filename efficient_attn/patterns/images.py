"""Patterns of grids: a sequence that is an image (or a line, or a video) in row-major order, after some prefix tokens.

Prefix tokens, such as [CLS], stand before the grid, see everything and are seen by everything. Additional keys, such as
those of a text, stand behind it: every query sees them, and no query stands at them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..masks import BlockMask
from ..masks.lists import Grid, assemble
from ..masks.rules import MAX_LENGTH
from ..options import check_choice, register
from .base import Pattern, by_classes, cross
from .image_tiles import Axis, Tiles
from .orders import Band, Line, Proposal, between


class _OnGrid(Pattern):
    """A pattern with fields `size` and `prefix`."""

    size: tuple[int, ...] | None
    prefix: int
    additional_keys: int = 0

    @property
    def _may_begin_later(self) -> bool:
        return False

    def _check_size(self, axes: tuple[int, ...]) -> None:
        self._at_least(prefix=0)
        if self.size is not None:
            self._at_least(size=1)
            if len(self.size) not in axes or math.prod(self.size) > MAX_LENGTH:
                raise InputError(
                    f"{self.name}: size is that of a grid with {' or '.join(map(str, axes))} axes and at most "
                    f"{MAX_LENGTH} tokens, got {self.size}"
                )

    def _shape(self, q_len: int, kv_len: int, axes: int = 2) -> tuple[int, ...]:
        """The grid for these lengths: `size`, or the line or square that they hold."""
        if self.additional_keys and kv_len != q_len + self.additional_keys:
            raise InputError(
                f"{self.name}: additional_keys={self.additional_keys} are keys behind those of the {q_len} tokens, "
                f"{q_len + self.additional_keys} in all; got {kv_len}"
            )
        self._check_square(q_len, kv_len - self.additional_keys)
        tokens = q_len - self.prefix
        if self.size is not None:
            if math.prod(self.size) != tokens:
                raise InputError(
                    f"{self.name}: size {'x'.join(map(str, self.size))} with prefix={self.prefix} is a sequence of "
                    f"{math.prod(self.size) + self.prefix} tokens; got {q_len}"
                )
            return self.size
        side = math.isqrt(max(tokens, 0))
        if axes == 2 and side * side != tokens:
            raise InputError(
                f"{self.name}: {q_len} tokens with prefix={self.prefix} are no square image; say size=HEIGHTxWIDTH"
            )
        if tokens < 0:
            raise InputError(f"{self.name}: prefix={self.prefix} exceeds the {q_len} tokens")
        return (tokens,) if axes == 1 else (side, side)

    def _with_prefix(self, mask: BlockMask) -> BlockMask:
        if not self.prefix and not self.additional_keys:
            return mask
        i, j = torch.arange(mask.q_len), torch.arange(mask.kv_len)
        return mask | cross(i < self.prefix, (j < self.prefix) | (j >= mask.q_len), mask.grid)

    def _around_prefix(self, tokens: int, proposals: Sequence[Proposal]) -> Sequence[Proposal]:
        """Parts of the grid, and those of the prefix tokens and additional keys: all see them, the first see all."""
        everything, first = torch.arange(tokens), torch.arange(min(self.prefix, tokens))
        behind = torch.arange(tokens, tokens + self.additional_keys)
        seen_by_all = torch.cat([first, behind])
        return [*proposals, *between(everything, seen_by_all), *between(first, everything[self.prefix :])]

    def _join_prefix(self, seen: Tensor, i: Tensor, j: Tensor, q_len: int) -> Tensor:
        return seen | (i < self.prefix) | (j < self.prefix) | (j >= q_len)


@register
@dataclass(frozen=True)
class Neighborhood(_OnGrid):
    """The `kernel` nearest tokens along each axis, in a grid. Hassani et al. 2023, arXiv:2204.07143 and 2209.15001.

    Along an axis of n positions, in the part of the axis that shares x's residue modulo the dilation, with n' positions
    and x at place p, a query sees the places s .. s + kernel - 1, s = min(max(p - kernel // 2, 0), n' - kernel): a
    window of fixed size that is shifted, not cut, at the borders. On a causal axis it sees p - kernel + 1 .. p, cut.

    With a stride (generalized neighborhood attention, Hassani et al. 2025, arXiv:2504.16922) each run of `stride`
    places shares the window of its leader, the place stride // 2 of the run, or its last on a causal axis, and in any
    case one of the n': in s, the leader stands for p, and on a causal axis a query sees leader - kernel + 1 .. p. With
    stride = kernel, windows that do not overlap: those of Swin.

    size: of the grid, one to three axes; None: `axes` = 2 is the square image that the sequence is, 1 the line.
    kernel, dilation, causal, stride: of each axis, or one for all. kernel * dilation may not exceed the axis, nor the
        stride the kernel.
    prefix: tokens before the grid that see and are seen by everything.
    additional_keys: keys behind those of the grid, which every query sees, under the same softmax; Nk = Nq + them.
    """

    name = "neighborhood"
    formula = "softmax(QK^T)V over the k nearest along each axis, shifted at borders"
    paper = "Hassani et al. 2023"
    complexity = "n k^2 d"

    size: tuple[int, ...] | None = None
    kernel: tuple[int, ...] = (7,)
    dilation: tuple[int, ...] = (1,)
    causal: tuple[bool, ...] = (False,)
    prefix: int = 0
    axes: int = 2
    stride: tuple[int, ...] = (1,)
    additional_keys: int = 0

    def check(self) -> None:
        self._check_size((1, 2, 3))
        self._at_least(kernel=1, dilation=1, stride=1, additional_keys=0)
        if self.axes not in (1, 2):
            raise InputError(f"{self.name}: axes must be 1 or 2, got {self.axes!r}; for others give the size")
        count = self.axes if self.size is None else len(self.size)
        for option in ("kernel", "dilation", "causal", "stride"):
            given = getattr(self, option)
            if len(given) not in (1, count):
                raise InputError(f"{self.name}: {option} needs one value for each of {count} axes, or one for all")
        if any(stride > kernel for kernel, stride in zip(*self._spread(count, self.kernel, self.stride), strict=True)):
            raise InputError(f"{self.name}: stride may not exceed kernel={self.kernel} on any axis, got {self.stride}")

    def visible(self, i: Tensor, j: Tensor, q_len: int, kv_len: int, head: int = 0) -> Tensor:
        seen = torch.ones_like(i * j, dtype=torch.bool)
        step = q_len - self.prefix
        for axis in self._per_axis(q_len, kv_len):
            step //= max(axis.length, 1)
            x, y = ((t - self.prefix) // max(step, 1) % max(axis.length, 1) for t in (i, j))
            start, stop = axis.window(x)
            place = y // axis.dilation
            seen = seen & (x % axis.dilation == y % axis.dilation) & (place >= start) & (place < stop)
        return self._join_prefix(seen, i, j, q_len)

    def _build(self, grid: Grid, num_heads: int) -> BlockMask:
        axes = self._per_axis(grid.q_len, grid.kv_len)
        parts = torch.arange(grid.q_len - self.prefix).split(_TOKENS)
        longest = axes[-1].kernel if axes[-1].dilation == 1 else 1
        touched = torch.zeros(grid.n_q * grid.n_k, dtype=torch.bool)
        for x in parts:
            row = (x + self.prefix) // grid.block_q * grid.n_k
            key = torch.empty_like(x)
            for start, length in _runs(x, axes, self.prefix):
                for j in range(0, longest + grid.block_k - 1, grid.block_k) if longest > 1 else (0,):
                    torch.sub(length, 1, out=key).clamp_(0, j).add_(start)
                    touched.index_fill_(0, _quotient(key, grid.block_k, key).add_(row), True)
        row_bytes, one = grid.block_k // 8, torch.tensor(1)
        tile_bytes = grid.block_q * row_bytes
        places = (touched.cumsum(0) - 1).clamp_(min=0) * tile_bytes
        tiles = torch.zeros(int(touched.sum()) * tile_bytes, dtype=torch.uint8)
        for x in parts:
            row = (x + self.prefix) // grid.block_q
            inside = (x + self.prefix - row * grid.block_q) * row_bytes
            row = row * grid.n_k
            # In place: fresh memory for each of these would cost ten times what is done in it.
            eight, block, place, low, high = torch.empty(5, x.numel(), dtype=torch.int64).unbind()
            for start, length in _runs(x, axes, self.prefix):
                for byte in range((longest + 6) // 8 + 1 if longest > 1 else 1):
                    torch.bitwise_and(start, 7, out=low).sub_(8 * byte)
                    torch.add(low, length, out=high).clamp_(0, 8)
                    torch.bitwise_left_shift(one, high, out=high)
                    high.sub_(torch.bitwise_left_shift(one, low.clamp_(0, 8), out=low)).clamp_(min=0)
                    # Beyond the end there are no bits.
                    torch.bitwise_right_shift(start, 3, out=eight).add_(byte).clamp_(max=(grid.kv_len - 1) // 8)
                    _quotient(eight, row_bytes, block)
                    torch.take(places, torch.add(row, block, out=low), out=place)
                    place.add_(eight).sub_(block.mul_(row_bytes)).add_(inside)
                    # Every pair comes once, so that adding its bit sets it.
                    tiles.scatter_add_(0, place, high.to(torch.uint8))
        rows, cols = touched.view(grid.n_q, grid.n_k).nonzero().unbind(1)
        tiles = tiles.view(-1, grid.block_q, grid.block_k // 8)
        lists = assemble(grid, 1, 1, rows, cols, torch.arange(rows.numel()), tiles)
        return self._with_prefix(BlockMask.from_lists(grid, lists))

    def _proposals(self, q_len: int, kv_len: int) -> Sequence[Proposal] | None:
        axes = [Axis(axis.length, axis.dilation, axis.window) for axis in self._per_axis(q_len, kv_len)]
        if any(axis.length == 0 for axis in axes):
            return None
        return self._around_prefix(q_len, [Tiles(axes, self.prefix, lambda i, j: self.visible(i, j, q_len, kv_len))])

    @staticmethod
    def _spread(count: int, *options: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """Options with one value for each axis."""
        return [option * count if len(option) == 1 else option for option in options]

    def _per_axis(self, q_len: int, kv_len: int) -> list[_Windows]:
        shape = self._shape(q_len, kv_len, self.axes)
        options = self._spread(len(shape), self.kernel, self.dilation, self.causal, self.stride)
        axes = [_Windows(*values) for values in zip(shape, *options, strict=True)]
        for n, kernel, dilation, *_ in axes:
            if n and kernel * dilation > n:
                raise InputError(
                    f"{self.name}: a kernel of {kernel} with dilation {dilation} spans {kernel * dilation} positions; "
                    f"the axis has {n}"
                )
        return axes


class _Windows(NamedTuple):
    """What a neighbourhood sees along one axis."""

    length: int
    kernel: int
    dilation: int
    causal: bool
    stride: int

    def window(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The places start <= p < stop that positions x of the axis see among those with x's residue."""
        place = x // self.dilation
        count = (self.length - x % self.dilation + self.dilation - 1) // self.dilation
        leader = place
        if self.stride > 1:
            within = self.stride - 1 if self.causal else self.stride // 2
            leader = torch.minimum(place // self.stride * self.stride + within, count - 1)
        if self.causal:
            return (leader - self.kernel + 1).clamp(min=0), place + 1
        start = torch.minimum((leader - self.kernel // 2).clamp(min=0), count - self.kernel)
        return start, start + self.kernel


# Tokens at a time when bit tiles are made: what is in work stays in the cache and in memory that malloc keeps.
_TOKENS = 16384


def _quotient(x: Tensor, divisor: int, out: Tensor) -> Tensor:
    """x // divisor, as a shift where it is one: ten times as fast."""
    if divisor & (divisor - 1):
        return torch.floor_divide(x, divisor, out=out)
    return torch.bitwise_right_shift(x, divisor.bit_length() - 1, out=out)


def _runs(x: Tensor, axes: list[_Windows], prefix: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The keys start <= y < start + length that each of the tokens x of a grid sees, run by run.

    Both are written over by the next run.
    """
    in_one = axes[-1].dilation == 1  # neighbours along the last axis are neighbours in the sequence
    per_axis: list[list[tuple[Tensor, Tensor]]] = []  # (offset, length) of each step
    step = math.prod(axis.length for axis in axes)
    for a, axis in enumerate(axes):
        step //= max(axis.length, 1)
        own = x // max(step, 1) % max(axis.length, 1)
        start, stop = axis.window(own)
        residue = own % axis.dilation
        if in_one and a == len(axes) - 1:
            per_axis.append([(start * step, stop - start)])
            continue
        seen = [(start + p, start + p < stop) for p in range(axis.kernel)]  # a causal axis is cut
        per_axis.append([(torch.where(s, (at * axis.dilation + residue) * step, 0), s.long()) for at, s in seen])
    start, length = torch.empty_like(x), torch.empty_like(x)
    for chosen in itertools.product(*per_axis):
        start.fill_(prefix)
        length.fill_(1)
        for offset, count in chosen:
            start.add_(offset)
            length.mul_(count)
        yield start, length


@register
@dataclass(frozen=True)
class Axial(_OnGrid):
    """The tokens of one's own row and of one's own column of an image. Ho et al. 2019, arXiv:1912.12180.

    size: (height, width); None: the square image that the sequence is.
    part: "both" sees row and column in one softmax; "rows" and "columns" are the two attentions that the paper
    alternates, for layers or heads of their own.
    causal: only tokens up to oneself in row-major order.
    prefix: tokens before the image that see and are seen by everything.
    """

    name = "axial"
    formula = "softmax(QK^T)V over i's row and column"
    paper = "Ho et al. 2019"
    complexity = "n (h + w) d"

    size: tuple[int, ...] | None = None
    part: str = "both"
    causal: bool = False
    prefix: int = 0

    def check(self) -> None:
        self._check_size((2,))
        check_choice(self, "part", ("both", "rows", "columns"))

    def visible(self, i: Tensor, j: Tensor, q_len: int, kv_len: int, head: int = 0) -> Tensor:
        width = max(self._shape(q_len, kv_len)[1], 1)
        x, y = i - self.prefix, j - self.prefix
        row, column = x // width == y // width, x % width == y % width
        seen = {"both": row | column, "rows": row, "columns": column}[self.part]
        return self._join_prefix(seen & (j <= i) if self.causal else seen, i, j, q_len)

    def _build(self, grid: Grid, num_heads: int) -> BlockMask:
        width = max(self._shape(grid.q_len, grid.kv_len)[1], 1)
        top, left = torch.arange(grid.n_q)[:, None] * grid.block_q, torch.arange(grid.n_k) * grid.block_k
        bottom, right = top + grid.block_q - 1, left + grid.block_k - 1
        row = (top - self.prefix) // width <= (right - self.prefix) // width
        row &= (bottom - self.prefix) // width >= (left - self.prefix) // width
        column = (right - top) // width > (left - bottom - 1) // width  # j - i passes a multiple of the width
        listed = {"both": row | column, "rows": row, "columns": column}[self.part]
        listed = listed & (left <= bottom) if self.causal else listed
        rows, cols = listed.nonzero().unbind(1)
        top, left = rows * grid.block_q, cols * grid.block_k
        # Beyond this distance no pair shares a row and the order is settled: only j - i modulo the width matters.
        far = width + max(grid.block_q, grid.block_k)
        shift = top - left
        near = torch.where(shift.abs() < far, (top - self.prefix) % width, -1)
        side = shift.clamp(-far, far)
        cut = (self.prefix - top).clamp(0, grid.block_q) * (grid.block_k + 1) + (self.prefix - left).clamp(
            0, grid.block_k
        )
        mask = by_classes(
            lambda i, j: self.visible(i, j, grid.q_len, grid.kv_len),
            grid, rows, cols, shift % width, side, near, cut,
        )  # fmt: skip
        return self._with_prefix(mask)

    def _proposals(self, q_len: int, kv_len: int) -> Sequence[Proposal] | None:
        height, width = self._shape(q_len, kv_len)
        if height * width == 0:
            return None
        tokens = torch.arange(self.prefix, q_len)
        row, column = (tokens - self.prefix) // width, (tokens - self.prefix) % width
        past = 0 if self.causal else None
        along_row, along_column = Line.of(tokens, row, column), Line.of(tokens, column, row)
        rows, columns = (Band(line, line, None, past) for line in (along_row, along_column))
        if self.part == "rows":
            return self._around_prefix(q_len, [rows])
        if self.part == "both":  # what is in the row too is not in the column
            columns = columns._replace(high=-1) if self.causal else columns._replace(hole=(0, 0))
            return self._around_prefix(q_len, [rows, columns])
        return self._around_prefix(q_len, [columns])
