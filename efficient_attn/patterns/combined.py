"""Patterns of patterns: joined by & and |, and a different one for each head."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, InputTypeError, UnsupportedError
from ..masks import BlockMask
from ..masks.lists import BlockLists, Grid, assemble, entry_rows, expand
from ..options import Named, check_choice, register
from .base import Pattern
from .orders import Band, Proposal
from .tokens import Causal


class _OfParts(Pattern):
    """A pattern with a field `parts`."""

    parts: tuple[Pattern, ...]

    def check(self) -> None:
        if not self.parts:
            raise InputError(f"{self.name}: parts must be at least one pattern")
        for part in self.parts:
            if not isinstance(part, Pattern):
                error = UnsupportedError if isinstance(part, Named) else InputTypeError
                raise error(f"{part} is no pattern of pairs; &, | and per_head join patterns only")

    def aligned(self, alignment: str | None) -> Pattern:
        if alignment is None:
            return self
        return self._with(parts=tuple([part.aligned(alignment) for part in self.parts]))

    @property
    def _may_begin_later(self) -> bool:
        return all(part._may_begin_later for part in self.parts)

    def _alike_in_part(self, first: int) -> bool:
        return all(part._alike_in_part(first) for part in self.parts)

    @property
    def by_content(self) -> bool:
        return any(part.by_content for part in self.parts)

    @property
    def bounds_loss(self) -> bool:
        return any(part.bounds_loss for part in self.parts)

    @property
    def _own_block(self) -> tuple[int, int]:
        sizes = [part._own_block for part in self.parts if not part._analytic] or [(128, 128)]
        return (min(q for q, _ in sizes), min(k for _, k in sizes))


def past_of(pattern: Pattern, alignment: str | None) -> Pattern:
    """A pattern of which queries see the past alone, as is_causal says in a call."""
    return pattern.aligned(alignment) & Causal(alignment or "top_left")


@register
@dataclass(frozen=True)
class Combined(_OfParts):
    """Several patterns joined by & ("and") or | ("or").

    With & a part that looks at queries and keys chooses among what the other parts show.
    """

    name = "combined"
    formula = "softmax(QK^T)V over the pairs of all parts, or of any"
    paper = "this package"
    complexity = "that of its parts"

    operator: str = "and"
    parts: tuple[Pattern, ...] = ()

    def check(self) -> None:
        check_choice(self, "operator", ("and", "or"))
        super().check()

    def visible(self, i: Tensor, j: Tensor, q_len: int, kv_len: int, head: int = 0) -> Tensor:
        return functools.reduce(self._join, (part.visible(i, j, q_len, kv_len, head) for part in self.parts))

    def _proposals(self, q_len: int, kv_len: int) -> Sequence[Proposal] | None:
        """Those of a pattern of which only the past is shown."""
        pattern, *others = sorted(self.parts, key=lambda part: part.has_orders, reverse=True)
        if self.operator != "and" or len(others) != 1 or not isinstance(others[0], Causal):
            return None
        offset = others[0]._offset(q_len, kv_len)
        proposed = pattern._proposals(q_len, kv_len) or ()
        bands = [each.past(offset) if isinstance(each, Band) else None for each in proposed]
        return None if None in bands else [band for band in bands if band is not None]

    @property
    def has_orders(self) -> bool:
        return self.operator == "and" and any(part.has_orders for part in self.parts)

    def for_inputs(
        self,
        query: Tensor,
        key: Tensor,
        *,
        scale: float | None = None,
        key_mask: Tensor | None = None,
        within: BlockMask | None = None,
    ) -> BlockMask:
        options: dict[str, Any] = {"scale": scale, "key_mask": key_mask}
        if not self.by_content:
            return super().for_inputs(query, key, **options, within=within)
        if self.operator == "or":
            return functools.reduce(
                operator.or_, (part.for_inputs(query, key, **options, within=within) for part in self.parts)
            )
        fixed = [part.for_inputs(query, key, **options) for part in self.parts if not part.by_content]
        shown = functools.reduce(operator.and_, fixed) if fixed else None
        if within is not None:
            within = within if shown is None else within & shown
        chosen = [
            part.for_inputs(query, key, **options, within=shown if within is None else within)
            for part in self.parts
            if part.by_content
        ]
        return functools.reduce(operator.and_, chosen if shown is None else [shown, *chosen])

    @property
    def _analytic(self) -> bool:
        return self.operator == "and" and all(part._analytic for part in self.parts)

    @property
    def _heads_differ(self) -> bool:
        return any(part._heads_differ for part in self.parts)

    def _build(self, grid: Grid, num_heads: int) -> BlockMask:
        return functools.reduce(self._join, (part._build(grid, num_heads) for part in self.parts))

    def __str__(self) -> str:
        texts = (f"({part})" if isinstance(part, Combined) else str(part) for part in self.parts)
        return (" & " if self.operator == "and" else " | ").join(texts)

    def _join(self, a: Any, b: Any) -> Any:
        return (operator.and_ if self.operator == "and" else operator.or_)(a, b)


@register
@dataclass(frozen=True)
class PerHead(_OfParts):
    """A pattern for each head: head h has parts[h mod len(parts)]. The number of heads is a multiple of the parts'."""

    name = "per_head"
    formula = "softmax(Q_h K_h^T)V_h over the pairs of head h's part"
    paper = "this package"
    complexity = "that of its parts"

    parts: tuple[Pattern, ...] = ()

    def visible(self, i: Tensor, j: Tensor, q_len: int, kv_len: int, head: int = 0) -> Tensor:
        return self.parts[head % len(self.parts)].visible(i, j, q_len, kv_len, head)

    def for_inputs(
        self,
        query: Tensor,
        key: Tensor,
        *,
        scale: float | None = None,
        key_mask: Tensor | None = None,
        within: BlockMask | None = None,
    ) -> BlockMask:
        if not self.by_content:
            return super().for_inputs(query, key)
        self._check_heads(query.shape[1])
        options: dict[str, Any] = {"scale": scale, "key_mask": key_mask, "within": within}
        return stack_heads([part.for_inputs(query, key, **options) for part in self.parts], query.shape[1])

    @property
    def _heads_differ(self) -> bool:
        return True

    def _build(self, grid: Grid, num_heads: int) -> BlockMask:
        self._check_heads(num_heads)
        masks = [part._build(grid, num_heads).reblock((grid.block_q, grid.block_k)) for part in self.parts]
        return stack_heads(masks, num_heads)

    def __str__(self) -> str:
        return f"per_head({'; '.join(map(str, self.parts))})"

    def _check_heads(self, num_heads: int) -> None:
        if num_heads % len(self.parts):
            raise InputError(
                f"{self.name}: {num_heads} heads cannot be shared out among {len(self.parts)} patterns; their number "
                "must be a multiple. Name one for each head"
            )


def per_head(parts: Sequence[Pattern]) -> PerHead:
    """A pattern for each head, in turn: `per_head([Strided(part="local"), Strided(part="summary")])`."""
    return PerHead(tuple(parts))


def stack_heads(masks: Sequence[BlockMask], num_heads: int) -> BlockMask:
    """One mask in which head h is that of masks[h mod len(masks)], its own head h where it has several."""
    size = tuple(min(sides) for sides in zip(*(mask.block_size for mask in masks), strict=True))
    masks = [mask.reblock((size[0], size[1])) for mask in masks]
    device = next((mask.device for mask in masks if mask.device is not None), torch.device("cpu"))
    grid, batch = masks[0].grid, max(mask.shape[0] for mask in masks)
    all_lists = [expand(mask.to(device).explicit_lists(), grid.n_q, batch, num_heads) for mask in masks]
    entries, n_tiles = [], 0
    for first, lists in enumerate(all_lists):
        rows = entry_rows(lists)
        own = rows // max(grid.n_q, 1) % num_heads % len(masks) == first
        ids = lists.tile_ids[own].long()
        entries.append((rows[own], lists.indices[own].long(), torch.where(ids < 0, ids, ids + n_tiles)))
        n_tiles += lists.tiles.shape[0]
    rows, cols, classes = (torch.cat(column) for column in zip(*entries, strict=True))
    order = (rows * max(grid.n_k, 1) + cols).argsort()
    tiles = torch.cat([lists.tiles for lists in all_lists])
    lists = assemble(grid, batch, num_heads, rows[order], cols[order], classes[order], tiles)
    return BlockMask.from_lists(grid, BlockLists(*lists))
