"""Patterns of one sequence at token granularity: windows, strides, global tokens, prefixes and documents.

All but `Dense` and `Documents` have the option `alignment`: where the queries stand when they are not as many as the
keys, whose positions are 0, 1, ... "top_left" puts query i at key i, "bottom_right" the last query at the last key. It
has no default: without one, other lengths are an error. A formula's i is the position of the query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..masks import BlockMask
from ..masks.lists import Grid
from ..options import check_choice, register
from .base import Pattern, along_diagonals, by_classes, cross, empty_mask
from .orders import Band, Line, Proposal, between

PARTS = ("both", "local", "summary")

# --- orders ---


def _positions(pattern: Pattern, q_len: int, kv_len: int) -> tuple[Line, Line]:
    """Queries and keys in one segment, where they stand."""
    i, j = torch.arange(q_len), torch.arange(kv_len)
    return Line.of(i, 0, i + pattern._offset(q_len, kv_len)), Line.of(j)


def _residues(pattern: Pattern, q_len: int, kv_len: int, step: int, low: int | None, high: int | None) -> Band:
    """Tokens by their position modulo a step; places are steps."""
    (i, _, x), (j, _, y) = _positions(pattern, q_len, kv_len)
    return Band(Line.of(i, x % step, x // step), Line.of(j, y % step, y // step), low, high)


# --- windows: no lists, no memory ---


@register
@dataclass(frozen=True)
class Dense(Pattern):
    """Every pair."""

    name = "dense"
    formula = "softmax(QK^T)V"
    paper = "Vaswani et al. 2017"
    complexity = "n^2 d"

    @property
    def _analytic(self) -> bool:
        return True

    def visible(self, i: Tensor, j: Tensor, q_len: int, kv_len: int, head: int = 0) -> Tensor:
        return (i >= 0) & (j >= 0)

    def _build(self, grid: Grid, num_heads: int) -> BlockMask:
        return empty_mask(grid)


@register
@dataclass(frozen=True)
class SlidingWindow(Pattern):
    """Keys from i - left to i + right; -1 is unlimited. Beltagy et al. 2020, arXiv:2004.05150.

    alignment: where the queries stand when q_len != kv_len: "top_left" puts query i at key i, "bottom_right" the last
    query at the last key.
    """

    name = "sliding_window"
    formula = "softmax(QK^T)V over i - left <= j <= i + right"
    paper = "Beltagy et al. 2020"
    complexity = "n w d"

    left: int = 128
    right: int = 128
    alignment: str | None = None

    def check(self) -> None:
        self._at_least(left=-1, right=-1)
        self._check_alignment()

    @property
    def _analytic(self) -> bool:
        return True

    def visible(self, i: Tensor, j: Tensor, q_len: int, kv_len: int, head: int = 0) -> Tensor:
        away = j - i - self._offset(q_len, kv_len)
        return ((away >= -self.left) | (self.left < 0)) & ((away <= self.right) | (self.right < 0))

    def _build(self, grid: Grid, num_heads: int) -> BlockMask:
        start = self._offset(grid.q_len, grid.kv_len)
        return empty_mask(grid, window=(self.left, self.right), window_offset=start)


@register
@dataclass(frozen=True)
class Causal(Pattern):
    """Keys j <= i: a query and what came before it.

    alignment: as in `SlidingWindow`: "top_left" is j <= i for query number i, "bottom_right" j <= i + kv_len - q_len.
    """

    name = "causal"
    formula = "softmax(QK^T)V over j <= i"
    paper = "Vaswani et al. 2017"
    complexity = "n^2 d / 2"

    alignment: str | None = None

    def check(self) -> None:
        self._check_alignment()

    @property
    def _analytic(self) -> bool:
        return True

    def visible(self, i: Tensor, j: Tensor, q_len: int, kv_len: int, head: int = 0) -> Tensor:
        return j <= i + self._offset(q_len, kv_len)

    def _build(self, grid: Grid, num_heads: int) -> BlockMask:
        return SlidingWindow(-1, 0, self.alignment)._build(grid, num_heads)


# --- strides ---


@register
@dataclass(frozen=True)
class Dilated(Pattern):
    """Every dilation-th key: `left` of them before query i, `right` after, and i. Beltagy et al. 2020, section 3.1.

    alignment: as in `SlidingWindow`.
    """

    name = "dilated"
    formula = "softmax(QK^T)V over j = i + t dilation"
    paper = "Beltagy et al. 2020"
    complexity = "n w d dilation"

    left: int = 64
    right: int = 64
    dilation: int = 2
    alignment: str | None = None

    def check(self) -> None:
        self._at_least(left=0, right=0, dilation=1)
        self._check_alignment()

    def visible(self, i: Tensor, j: Tensor, q_len: int, kv_len: int, head: int = 0) -> Tensor:
        away = j - i - self._offset(q_len, kv_len)
        reach = (away >= -self.left * self.dilation) & (away <= self.right * self.dilation)
        return reach & (away % self.dilation == 0)

    def _build(self, grid: Grid, num_heads: int) -> BlockMask:
        longest = max(grid.q_len, grid.kv_len)
        left, right = (min(side * self.dilation, longest) for side in (self.left, self.right))
        return along_diagonals(self, SlidingWindow(left, right, self.alignment)._build(grid, num_heads))

    def _proposals(self, q_len: int, kv_len: int) -> Sequence[Proposal] | None:
        return [_residues(self, q_len, kv_len, self.dilation, -self.left, self.right)] if self.dilation > 1 else None


@register
@dataclass(frozen=True)
class Strided(Pattern):
    """The last `stride` keys and every stride-th one before. Child et al. 2019, arXiv:1904.10509, section 4.3.

        local:    A1(i) = {max(0, i - stride), ..., i}
        summary:  A2(i) = {j <= i : (i - j) mod stride = 0}

    part: "both" is a merged head, which sees A1 and A2; "local" and "summary" are the two factors, for heads or layers
    of their own (`per_head`).
    causal: as in the paper; False looks ahead in the same way.
    alignment: as in `SlidingWindow`.
    """

    name = "strided"
    formula = "softmax(QK^T)V over i - j <= s or s | i - j"
    paper = "Child et al. 2019"
    complexity = "n^2 d"

    stride: int = 128
    causal: bool = True
    part: str = "both"
    alignment: str | None = None

    def check(self) -> None:
        self._at_least(stride=1)
        check_choice(self, "part", PARTS)
        self._check_alignment()

    def visible(self, i: Tensor, j: Tensor, q_len: int, kv_len: int, head: int = 0) -> Tensor:
        away = i + self._offset(q_len, kv_len) - j
        seen = torch.zeros_like(away, dtype=torch.bool)
        if self.part != "summary":
            seen = seen | (away.abs() <= self.stride)
        if self.part != "local":
            seen = seen | (away % self.stride == 0)
        return seen & (away >= 0) if self.causal else seen

    def _build(self, grid: Grid, num_heads: int) -> BlockMask:
        if self.part == "local":
            right = 0 if self.causal else self.stride
            return SlidingWindow(self.stride, right, self.alignment)._build(grid, num_heads)
        return along_diagonals(self, (Causal(self.alignment) if self.causal else Dense())._build(grid, num_heads))

    def _proposals(self, q_len: int, kv_len: int) -> Sequence[Proposal] | None:
        if self.part == "local" or self.stride == 1:
            return None
        if self.part == "summary":
            return [_residues(self, q_len, kv_len, self.stride, None, 0 if self.causal else None)]
        queries, keys = _positions(self, q_len, kv_len)
        local = Band(queries, keys, -self.stride, 0 if self.causal else self.stride)
        if self.causal:
            return [local, _residues(self, q_len, kv_len, self.stride, None, -2)]
        return [local, _residues(self, q_len, kv_len, self.stride, None, None)._replace(hole=(-1, 1))]


@register
@dataclass(frozen=True)
class Fixed(Pattern):
    """The keys of one's own segment, and the last `summary` keys of every segment. Child et al. 2019, section 4.3.

        local:    A1(i) = {j <= i : floor(j / stride) = floor(i / stride)}
        summary:  A2(i) = {j <= i : j mod stride >= stride - summary * (1 + shift), a run of `summary` keys}

    summary: c of the paper; stride: l, the length of a segment.
    shift: which run of a segment's keys summarises it, counted from its end: the paper gives each head its own (use
    `per_head`); 0 is the last.
    part: "both" is a merged head; "local" and "summary" are the factors.
    causal: as in the paper; False drops j <= i.
    alignment: as in `SlidingWindow`.
    """

    name = "fixed"
    formula = "softmax(QK^T)V over j <= i in i's segment, or at a segment's end"
    paper = "Child et al. 2019"
    complexity = "n (s + n c / s) d"

    stride: int = 128
    summary: int = 8
    shift: int = 0
    causal: bool = True
    part: str = "both"
    alignment: str | None = None

    def check(self) -> None:
        self._at_least(stride=1, summary=1, shift=0)
        check_choice(self, "part", PARTS)
        self._check_alignment()
        if self.summary * (1 + self.shift) > self.stride:
            raise InputError(
                f"{self.name}: summary * (1 + shift) = {self.summary * (1 + self.shift)} exceeds the segment, "
                f"stride={self.stride}"
            )

    @property
    def _run(self) -> tuple[int, int]:
        """First position of a segment that summarises it, and the one after the last."""
        stop = self.stride - self.summary * self.shift
        return stop - self.summary, stop

    def visible(self, i: Tensor, j: Tensor, q_len: int, kv_len: int, head: int = 0) -> Tensor:
        i = i + self._offset(q_len, kv_len)
        start, stop = self._run
        place = j % self.stride
        summary, local = (place >= start) & (place < stop), i // self.stride == j // self.stride
        seen = {"both": summary | local, "local": local, "summary": summary}[self.part]
        return seen & ((j <= i) | (not self.causal))

    def _build(self, grid: Grid, num_heads: int) -> BlockMask:
        first = self._offset(grid.q_len, grid.kv_len)
        top, left = first + torch.arange(grid.n_q)[:, None] * grid.block_q, torch.arange(grid.n_k) * grid.block_k
        bottom, right = top + grid.block_q - 1, left + grid.block_k - 1
        local = (top // self.stride <= right // self.stride) & (bottom // self.stride >= left // self.stride)
        start, stop = self._run
        # A block holds a summary when one starts in it, or one that started before has not ended.
        begins = (right - start) // self.stride > (left - 1 - start) // self.stride
        summary = begins | ((left % self.stride >= start) & (left % self.stride < stop))
        listed = {"both": local | summary, "local": local, "summary": summary.expand_as(local)}[self.part]
        listed = listed & (left <= bottom) if self.causal else listed
        rows, cols = listed.nonzero().unbind(1)
        top, left = first + rows * grid.block_q, cols * grid.block_k
        # Beyond this distance no pair shares a segment and the order is settled: only the key's place matters.
        far = self.stride + max(grid.block_q, grid.block_k)
        shift = (top - left).clamp(-far, far)
        near = torch.where(shift.abs() < far, top % self.stride, -1)
        return by_classes(
            lambda i, j: self.visible(i, j, grid.q_len, grid.kv_len),
            grid, rows, cols, shift, near, left % self.stride,
        )  # fmt: skip

    def _proposals(self, q_len: int, kv_len: int) -> Sequence[Proposal] | None:
        queries, keys = _positions(self, q_len, kv_len)
        past = 0 if self.causal else None
        (i, _, x), (j, _, y) = queries, keys
        local = Band(Line.of(i, x // self.stride, x), Line.of(j, y // self.stride, y), None, past)
        start, stop = self._run
        run = j[(j % self.stride >= start) & (j % self.stride < stop)]
        if self.part == "local":
            return [local]
        if run.numel() == 0:
            return None
        if self.part == "summary":
            return [Band(queries, Line.of(run), None, past)]
        far = Band(Line.of(i, 0, x // self.stride), Line.of(run, 0, run // self.stride), None, -1)
        return [local, far if self.causal else far._replace(high=None, hole=(0, 0))]


# --- some tokens are special ---


@register
@dataclass(frozen=True)
class Longformer(Pattern):
    """window / 2 keys to each side, and global tokens that see and are seen by all. Beltagy et al. 2020.

    window: even, both sides together as in the paper.
    global_tokens: the first so many positions are global.
    global_indices: and these ones. Positions beyond the end do nothing.
    alignment: as in `SlidingWindow`.
    """

    name = "longformer"
    formula = "softmax(QK^T)V over window + global tokens"
    paper = "Beltagy et al. 2020"
    complexity = "n (w + g) d"

    window: int = 512
    global_tokens: int = 1
    global_indices: tuple[int, ...] = ()
    alignment: str | None = None

    def check(self) -> None:
        self._at_least(window=0, global_tokens=0, global_indices=0)
        self._check_alignment()
        if self.window % 2:
            raise InputError(f"{self.name}: window counts both sides and must be even, got {self.window}")

    def visible(self, i: Tensor, j: Tensor, q_len: int, kv_len: int, head: int = 0) -> Tensor:
        i = i + self._offset(q_len, kv_len)
        return ((i - j).abs() <= self.window // 2) | self._is_global(i) | self._is_global(j)

    def _build(self, grid: Grid, num_heads: int) -> BlockMask:
        near = SlidingWindow(self.window // 2, self.window // 2, self.alignment)._build(grid, num_heads)
        queries = torch.arange(grid.q_len) + self._offset(grid.q_len, grid.kv_len)
        return near | cross(self._is_global(queries), self._is_global(torch.arange(grid.kv_len)), grid)

    def _proposals(self, q_len: int, kv_len: int) -> Sequence[Proposal] | None:
        (i, _, x), (j, _, y) = _positions(self, q_len, kv_len)
        by_query, by_key = self._is_global(x), self._is_global(y)
        side = self.window // 2
        near = between(i[~by_query], j[~by_key], x[~by_query], y[~by_key], -side, side)
        return [*near, *between(i, j[by_key]), *between(i[by_query], j[~by_key])]

    def _is_global(self, position: Tensor) -> Tensor:
        first = (position >= 0) & (position < self.global_tokens)
        return first | torch.isin(
            position, torch.tensor(self.global_indices, dtype=torch.int64, device=position.device)
        )


@register
@dataclass(frozen=True)
class PrefixLM(Pattern):
    """The first `prefix` keys, and those up to i: a prompt read in both directions. Raffel et al. 2020, section 3.2.1.

    alignment: as in `Causal`.
    """

    name = "prefix_lm"
    formula = "softmax(QK^T)V over j < prefix or j <= i"
    paper = "Raffel et al. 2020"
    complexity = "n^2 d / 2"

    prefix: int = 128
    alignment: str | None = None

    def check(self) -> None:
        self._at_least(prefix=0)
        self._check_alignment()

    def visible(self, i: Tensor, j: Tensor, q_len: int, kv_len: int, head: int = 0) -> Tensor:
        return (j < self.prefix) | (j <= i + self._offset(q_len, kv_len))

    def _build(self, grid: Grid, num_heads: int) -> BlockMask:
        size = (grid.block_q, grid.block_k)
        prefix = torch.tensor([min(self.prefix, grid.kv_len)])
        seen = BlockMask.from_lengths(prefix, q_len=grid.q_len, kv_len=grid.kv_len, block_size=size)
        return Causal(self.alignment)._build(grid, num_heads) | seen


@register
@dataclass(frozen=True)
class Documents(Pattern):
    """Packed sequences: a token sees its own document. `BlockMask.from_documents` takes ids instead, also in batches.

    lengths: of the documents, in order; together they are the sequence. A single one repeats (the last document may be
    shorter): chunks of one length.
    causal: and nothing after itself.
    """

    name = "documents"
    formula = "softmax(QK^T)V over j in i's document"
    paper = "Krell et al. 2021"
    complexity = "n l d"

    lengths: tuple[int, ...] = (512,)
    causal: bool = False

    def check(self) -> None:
        self._at_least(lengths=1)
        if not self.lengths:
            raise InputError(f"{self.name}: lengths must name at least one document")

    def visible(self, i: Tensor, j: Tensor, q_len: int, kv_len: int, head: int = 0) -> Tensor:
        ids = self._ids(q_len, kv_len).to(i.device)
        same = ids[i] == ids[j]
        return same & (j <= i) if self.causal else same

    def _build(self, grid: Grid, num_heads: int) -> BlockMask:
        mask = BlockMask.from_documents(self._ids(grid.q_len, grid.kv_len), block_size=(grid.block_q, grid.block_k))
        return mask & Causal()._build(grid, num_heads) if self.causal else mask

    def _ids(self, q_len: int, kv_len: int) -> Tensor:
        self._check_square(q_len, kv_len)
        if len(self.lengths) == 1:
            return torch.arange(q_len) // self.lengths[0]
        if sum(self.lengths) != q_len:
            raise InputError(
                f"{self.name}: the documents have {sum(self.lengths)} tokens together, the sequence has {q_len}"
            )
        return torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
