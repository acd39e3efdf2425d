"""The block layouts of DeepSpeed's sparse attention, with its names for the options, so that its configurations carry
over (`from_config`). DeepSpeed itself refuses to build them on PyTorch 2.

A layout is a table of blocks (row r: query block, column c: key block), for each head. What they have in common:

* attention="unidirectional" speaks about blocks: the diagonal ones are whole. As with DeepSpeed, the order of tokens
  inside them is for the call to settle (is_causal=True).
* different_layout_per_head=False gives every head the layout of head 0.
* Random blocks are the ones that DeepSpeed draws after `random.seed(seed)`.
* DeepSpeed asks for lengths that are a multiple of the block; here the last block may be shorter.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..masks import BlockMask
from ..masks.lists import FULL, BlockLists, Grid, pointers, ragged_range
from ..options import check_choice, register
from .base import Pattern

DIRECTIONS = ("bidirectional", "unidirectional")
STRIP = 1 << 21  # blocks of a layout in a table at a time
STRIPS_FROM = 32  # a table costs less than a sort where one block in so many is listed
Rectangle = tuple[slice, slice]  # rows and columns of a layout


class _Layout(Pattern):
    """A layout is made of rectangles of blocks; `_rectangles` names them and `_lower` cuts what lies above."""

    block: int
    attention: str

    @property
    def _heads_differ(self) -> bool:
        return getattr(self, "different_layout_per_head", False)

    @property
    def _own_block(self) -> tuple[int, int]:
        return (self.block, self.block)

    @property
    def _one_way(self) -> bool:
        return self.attention == "unidirectional"

    @property
    def _lower(self) -> bool:
        """Whether blocks above the diagonal are removed in the end."""
        return False

    def _rectangles(self, n: int, head: int) -> Iterable[Rectangle]:
        """What a layout of n x n blocks holds."""
        raise NotImplementedError

    def _drawn(self, n: int, heads: int) -> Iterator[Tensor]:
        """For each head the columns of its random blocks, (n, how many)."""
        return (torch.empty(n, 0, dtype=torch.int64) for _ in range(heads))

    def visible(self, i: Tensor, j: Tensor, q_len: int, kv_len: int, head: int = 0) -> Tensor:
        self._check_square(q_len, kv_len)
        n = -(-q_len // self.block)
        head = head if self._heads_differ else 0
        seen = torch.zeros(n, n, dtype=torch.bool)
        for rows, cols in self._rectangles(n, head):
            seen[rows, cols] = True
        for columns in self._drawn(n, head + 1):
            last = columns
        seen.scatter_(1, last, True)
        return (seen.tril() if self._lower else seen).to(i.device)[i // self.block, j // self.block]

    def _build(self, grid: Grid, num_heads: int) -> BlockMask:
        self._check_square(grid.q_len, grid.kv_len)
        n = -(-grid.q_len // self.block)
        heads = [
            _rows(_edges(self._rectangles(n, head), n), columns, n, self._lower)
            for head, columns in zip(range(num_heads), self._drawn(n, num_heads), strict=True)
        ]
        counts, indices = (torch.cat(parts) for parts in zip(*heads, strict=True))
        none = torch.empty(0, self.block, self.block // 8, dtype=torch.uint8)
        lists = BlockLists(1, num_heads, pointers(counts), indices, torch.full_like(indices, FULL), none)
        return BlockMask.from_lists(Grid(grid.q_len, grid.kv_len, self.block, self.block), lists)

    def _check_common(self) -> None:
        self._check_block()
        check_choice(self, "attention", DIRECTIONS)

    def _check_enough(self, n: int, what: str, needed: int) -> None:
        if n < needed:
            raise InputError(f"{self.name}: {what}={needed} exceeds the {n} blocks of a row")

    def _check_global(self) -> None:
        self._at_least(global_block_indices=0)
        ends: tuple[int, ...] | None = getattr(self, "global_block_end_indices")  # noqa: B009
        if not ends:
            object.__setattr__(self, "global_block_end_indices", None)
            return
        self._at_least(global_block_end_indices=0)
        starts: tuple[int, ...] = getattr(self, "global_block_indices")  # noqa: B009
        if len(starts) != len(ends) or any(start >= end for start, end in zip(starts, ends, strict=True)):
            raise InputError(
                f"{self.name}: global_block_end_indices needs a larger number for each of global_block_indices, got "
                f"{starts} and {ends}"
            )


def _edges(rectangles: Iterable[Rectangle], n: int) -> Tensor:
    """Top, bottom, left and right of some rectangles in a layout of n x n blocks, int64 [4, how many]."""
    sides = [(range(n)[rows], range(n)[cols]) for rows, cols in rectangles]
    edges = [(r.start, r.stop, c.start, c.stop) for r, c in sides if r and c]
    return torch.tensor(edges, dtype=torch.int64).view(-1, 4).T


def _rows(edges: Tensor, drawn: Tensor, n: int, lower: bool) -> tuple[Tensor, Tensor]:
    """How many blocks each row of a layout has, and their columns, int32: of rectangles, and `drawn` (n, how many)."""
    top, bottom, left, right = edges
    area = int(((bottom - top) * (right - left)).sum()) + drawn.numel()
    of_strips = _strips if area * STRIPS_FROM > n * n else _sorted
    return of_strips(edges, drawn, n, lower)


def _sorted(edges: Tensor, drawn: Tensor, n: int, lower: bool) -> tuple[Tensor, Tensor]:
    """`_rows` of a sparse layout: every block is listed, and blocks listed twice are found by sorting."""
    top, bottom, left, right = edges
    which, rows = ragged_range(top, bottom - top)
    each, cols = ragged_range(left[which], (right - left)[which])
    blocks = torch.cat([rows[each] * n + cols, (torch.arange(n)[:, None] * n + drawn).flatten()]).unique()
    rows, cols = blocks // max(n, 1), blocks % max(n, 1)
    if lower:
        rows, cols = rows[cols <= rows], cols[cols <= rows]
    return torch.bincount(rows, minlength=n), cols.int()


def _strips(edges: Tensor, drawn: Tensor, n: int, lower: bool) -> tuple[Tensor, Tensor]:
    """`_rows` of a layout with many blocks, from a table of a few rows at a time.

    What changes from a row to the next, and from a column to the next, is summed to the number of rectangles over each
    block.
    """
    top, bottom, left, right = edges
    rows, order = torch.cat([top, top, bottom, bottom]).sort()
    cols = torch.cat([left, right, right, left])[order]
    steps = torch.ones(4, top.numel(), dtype=torch.int32)
    steps[1::2] = -1
    steps = steps.flatten()[order]
    counts, indices = [], []
    above = torch.zeros(n + 1, dtype=torch.int32)
    height = max(1, STRIP // (n + 1))
    for first in range(0, n, height):
        count = min(height, n - first)
        part = slice(*torch.searchsorted(rows, torch.tensor([first, first + count])).tolist())
        table = torch.zeros(count, n + 1, dtype=torch.int32)
        table.view(-1).scatter_add_(0, (rows[part] - first) * (n + 1) + cols[part], steps[part])
        for row in table:  # PyTorch's cumsum is slow down the columns
            above = row.add_(above)
        seen = table.cumsum(1, dtype=torch.int32)[:, :n] > 0
        seen.scatter_(1, drawn[first : first + count], True)
        if lower:
            seen = seen.tril_(first)
        counts.append(seen.sum(1))
        indices.append(seen.nonzero()[:, 1].int())
    return torch.cat(counts), torch.cat(indices)


def _windows(lengths: Iterable[int], n: int) -> Iterator[tuple[int, int]]:
    """First block, and the one after the last, of consecutive windows; the last length repeats."""
    start, length = 0, 0
    remaining = iter(lengths)
    while start < n:
        length = next(remaining, length)
        yield start, min(start + length, n)
        start += length


def _local(windows: Iterable[tuple[int, int]], one_way: bool) -> Iterator[Rectangle]:
    """A square for each window, or its lower triangle, row by row."""
    for start, stop in windows:
        if one_way:
            yield from ((slice(row, row + 1), slice(start, row + 1)) for row in range(start, stop))
        else:
            yield slice(start, stop), slice(start, stop)


def _sliding(width: int, n: int, one_way: bool = False) -> Iterator[Rectangle]:
    """width // 2 blocks to each side, or to the left only."""
    side = width // 2
    return ((slice(r, r + 1), slice(max(0, r - side), r + 1 if one_way else r + side + 1)) for r in range(n))


def _global_ranges(starts: tuple[int, ...], ends: tuple[int, ...] | None, n: int) -> Iterator[tuple[int, int]]:
    """The ranges of global blocks that begin inside the sequence."""
    stops = tuple(start + 1 for start in starts) if ends is None else ends
    return ((start, min(stop, n)) for start, stop in zip(starts, stops, strict=True) if start < n)


@register
@dataclass(frozen=True)
class DeepSpeedFixed(_Layout):
    """`FixedSparsityConfig`: local windows, and a run of blocks that stands for each window.

    local:   row r sees the num_local_blocks blocks of its own window (up to r, when unidirectional).
    global:  in window w, the blocks f .. f + num_global_blocks - 1 of it, with f = num_local_blocks - (1 + head mod
             num_different_global_patterns) * num_global_blocks, are seen by every row (by the rows from the run's first
             on, when unidirectional). A last window that is cut short has the same run, moved back so that it ends at
             the last block. With horizontal_global_attention the rows of the run see every column.
    """

    name = "deepspeed_fixed"
    formula = "softmax(QK^T)V over windows + a run of each, in blocks"
    paper = "DeepSpeed; Child et al. 2019"
    complexity = "n (w b + n g / w) d"

    block: int = 16
    different_layout_per_head: bool = False
    num_local_blocks: int = 4
    num_global_blocks: int = 1
    attention: str = "bidirectional"
    horizontal_global_attention: bool = False
    num_different_global_patterns: int = 1

    def check(self) -> None:
        self._check_common()
        self._at_least(num_local_blocks=1, num_global_blocks=1, num_different_global_patterns=1)
        patterns, local, runs = self.num_different_global_patterns, self.num_local_blocks, self.num_global_blocks
        if local % runs:
            raise InputError(f"{self.name}: num_local_blocks={local} must be a multiple of num_global_blocks={runs}")
        if self.horizontal_global_attention and self._one_way:
            raise InputError(f"{self.name}: horizontal_global_attention looks ahead; it needs attention=bidirectional")
        if patterns > 1 and not self.different_layout_per_head:
            raise InputError(f"{self.name}: num_different_global_patterns={patterns} needs different_layout_per_head")
        if patterns > local // runs:
            raise InputError(
                f"{self.name}: a window has {local // runs} runs of {runs} blocks; num_different_global_patterns="
                f"{patterns} is more"
            )

    def _rectangles(self, n: int, head: int) -> Iterator[Rectangle]:
        yield from _local(_windows((self.num_local_blocks,), n), self._one_way)
        runs, local = self.num_global_blocks, self.num_local_blocks
        first = local - (1 + head % self.num_different_global_patterns) * runs
        whole = n - n % local
        starts = list(range(first, whole, local))
        if whole < n:
            starts.append(min(whole + first, n - runs))
        for start in starts:
            yield slice(start if self._one_way else 0, None), slice(start, start + runs)
            if self.horizontal_global_attention:
                yield slice(start, start + runs), slice(None)


@register
@dataclass(frozen=True)
class DeepSpeedVariable(_Layout):
    """`VariableSparsityConfig`: windows of given lengths, given global blocks, random ones.

    local:   windows of local_window_blocks[0], [1], ... blocks, the last length repeating.
    global:  the blocks global_block_indices (or, with global_block_end_indices, the ranges that both name) are seen by
             every row (by those from the range's first on, when unidirectional), and with horizontal_global_attention
             see every column.
    random:  num_random_blocks columns in each row, drawn from all, also when unidirectional.
    """

    name = "deepspeed_variable"
    formula = "softmax(QK^T)V over given windows + given global + random blocks"
    paper = "DeepSpeed"
    complexity = "n b (w + g + r) d"

    block: int = 16
    different_layout_per_head: bool = False
    num_random_blocks: int = 0
    local_window_blocks: tuple[int, ...] = (4,)
    global_block_indices: tuple[int, ...] = (0,)
    global_block_end_indices: tuple[int, ...] | None = None
    attention: str = "bidirectional"
    horizontal_global_attention: bool = False
    seed: int = 0

    def check(self) -> None:
        self._check_common()
        self._at_least(num_random_blocks=0, seed=0, local_window_blocks=1)
        self._check_global()
        if not self.local_window_blocks:
            raise InputError(f"{self.name}: local_window_blocks must name at least one window")
        if self.horizontal_global_attention and self._one_way:
            raise InputError(f"{self.name}: horizontal_global_attention looks ahead; it needs attention=bidirectional")

    def _drawn(self, n: int, heads: int) -> Iterator[Tensor]:
        self._check_enough(n, "num_random_blocks", self.num_random_blocks)
        return _samples(self.seed, self.num_random_blocks, [n] * n, heads)

    def _rectangles(self, n: int, head: int) -> Iterator[Rectangle]:
        yield from _local(_windows(self.local_window_blocks, n), self._one_way)
        for start, stop in _global_ranges(self.global_block_indices, self.global_block_end_indices, n):
            if self.horizontal_global_attention:
                yield slice(start, stop), slice(None)
            yield slice(start if self._one_way else 0, None), slice(start, stop)


@register
@dataclass(frozen=True)
class DeepSpeedBigBird(_Layout):
    """`BigBirdSparsityConfig`: num_sliding_window_blocks // 2 blocks to each side, the first num_global_blocks rows and
    columns, and num_random_blocks columns in each row.

    Unidirectional: random blocks of row r are drawn from its first r + 1, which leaves row 0 one to choose from, and
    what lies above the diagonal is removed in the end.
    """

    name = "deepspeed_bigbird"
    formula = "softmax(QK^T)V over window + global + random blocks"
    paper = "DeepSpeed; Zaheer et al. 2020"
    complexity = "n b (w + g + r) d"

    block: int = 16
    different_layout_per_head: bool = False
    num_random_blocks: int = 1
    num_sliding_window_blocks: int = 3
    num_global_blocks: int = 1
    attention: str = "bidirectional"
    seed: int = 0

    def check(self) -> None:
        self._check_common()
        self._at_least(num_random_blocks=0, num_sliding_window_blocks=1, num_global_blocks=0, seed=0)
        if self._one_way and self.num_random_blocks > 1:
            raise InputError(
                f"{self.name}: the first row of a unidirectional layout has one block to choose from; "
                f"num_random_blocks={self.num_random_blocks} is more"
            )

    @property
    def _lower(self) -> bool:
        return self._one_way

    def _drawn(self, n: int, heads: int) -> Iterator[Tensor]:
        self._check_enough(n, "num_random_blocks", self.num_random_blocks)
        choices = list(range(1, n + 1)) if self._one_way else [n] * n
        return _samples(self.seed, self.num_random_blocks, choices, heads)

    def _rectangles(self, n: int, head: int) -> Iterator[Rectangle]:
        self._check_enough(n, "num_sliding_window_blocks", self.num_sliding_window_blocks)
        self._check_enough(n, "num_global_blocks", self.num_global_blocks)
        yield from _sliding(self.num_sliding_window_blocks, n)
        yield slice(0, self.num_global_blocks), slice(None)
        yield slice(None), slice(0, self.num_global_blocks)


@register
@dataclass(frozen=True)
class DeepSpeedBSLongformer(_Layout):
    """`BSLongformerSparsityConfig`: num_sliding_window_blocks // 2 blocks to each side, and given global blocks (or
    ranges, as in `DeepSpeedVariable`) as rows and columns. Unidirectional removes what lies above the diagonal.
    """

    name = "deepspeed_bslongformer"
    formula = "softmax(QK^T)V over window + given global blocks"
    paper = "DeepSpeed; Beltagy et al. 2020"
    complexity = "n b (w + g) d"

    block: int = 16
    different_layout_per_head: bool = False
    num_sliding_window_blocks: int = 3
    global_block_indices: tuple[int, ...] = (0,)
    global_block_end_indices: tuple[int, ...] | None = None
    attention: str = "bidirectional"

    def check(self) -> None:
        self._check_common()
        self._at_least(num_sliding_window_blocks=1)
        self._check_global()

    @property
    def _lower(self) -> bool:
        return self._one_way

    def _rectangles(self, n: int, head: int) -> Iterator[Rectangle]:
        self._check_enough(n, "num_sliding_window_blocks", self.num_sliding_window_blocks)
        yield from _sliding(self.num_sliding_window_blocks, n)
        for start, stop in _global_ranges(self.global_block_indices, self.global_block_end_indices, n):
            yield slice(start, stop), slice(None)
            yield slice(None), slice(start, stop)


@register
@dataclass(frozen=True)
class DeepSpeedLocalSlidingWindow(_Layout):
    """`LocalSlidingWindowSparsityConfig`: num_sliding_window_blocks // 2 blocks to the left and, when bidirectional, to
    the right.
    """

    name = "deepspeed_local"
    formula = "softmax(QK^T)V over a window of blocks"
    paper = "DeepSpeed"
    complexity = "n b w d"

    block: int = 16
    num_sliding_window_blocks: int = 3
    attention: str = "unidirectional"

    def check(self) -> None:
        self._check_common()
        self._at_least(num_sliding_window_blocks=1)

    def _rectangles(self, n: int, head: int) -> Iterator[Rectangle]:
        self._check_enough(n, "num_sliding_window_blocks", self.num_sliding_window_blocks)
        return _sliding(self.num_sliding_window_blocks, n, self._one_way)


def _samples(seed: int, count: int, choices: list[int], heads: int) -> Iterator[Tensor]:
    """`count` of range(choices[row]) for each row, head after head, from one Mersenne twister, as DeepSpeed draws."""
    draw = functools.partial(random.Random(seed).sample, k=count)
    for _ in range(heads):
        table = [draw(range(most)) for most in choices]
        yield torch.tensor(table, dtype=torch.int64).view(len(choices), count)


MODES: dict[str, type[Pattern]] = {
    "fixed": DeepSpeedFixed,
    "variable": DeepSpeedVariable,
    "bigbird": DeepSpeedBigBird,
    "bslongformer": DeepSpeedBSLongformer,
    "local_sliding_window": DeepSpeedLocalSlidingWindow,
}


def from_config(config: Mapping[str, Any]) -> Pattern:
    """The pattern of the "sparse_attention" section of a DeepSpeed configuration: {"mode": "fixed", "block": 16, ...}.

    Options that belong to another mode are ignored, as DeepSpeed does; mode "dense" is `Dense()`.

    Raises:
        InputError: an unknown mode, or values that the mode does not allow.
    """
    mode = config.get("mode", "fixed")
    if mode == "dense":
        from .tokens import Dense

        return Dense()
    if mode not in MODES:
        raise InputError(f"DeepSpeed's sparse attention has no mode {mode!r}; it has dense, {', '.join(MODES)}")
    cls = MODES[mode]
    return cls(**{option: config[option] for option in cls.kinds if option in config})
