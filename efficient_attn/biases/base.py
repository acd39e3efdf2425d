"""What a structured bias is. Letters as in `functional`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..defaults import ALIGNMENTS, alignment_offset
from ..errors import InputError, InputTypeError


class Bias:
    """A bias by a few numbers."""


class Appended(Bias):
    """A bias that is a dot product: columns beside queries and keys, which no kernel tells from their own."""

    def columns(self, query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Columns (B, Hq, Nq, R) and (B, Hkv, Nk, R) whose product times the scale is the bias."""
        raise NotImplementedError


class Pairwise(Bias):
    """A bias of pairs that is neither: made of its numbers for some queries at a time."""

    def rows(self, first: int, last: int, query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
        """(1 | B, 1 | Hq, last - first, Nk): what is added to the pairs of the queries first .. last."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class RelativePosition(Bias):
    """A bias that goes by d alone; `alignment` says where queries stand where Nq != Nk, None leaves it to the call."""

    def line(self, distance: Tensor) -> Tensor:
        """The bias (n), (Hq | 1, n) or (B, Hq | 1, n) at the distances d (n), int64."""
        raise NotImplementedError

    def diagonals(self, query: Tensor, key: Tensor, alignment: str | None, dtype: torch.dtype) -> Tensor:
        """(1 | B, 1 | Hq, Nq + Nk - 1): what is added to pair (i, j) stands at i - j + Nk - 1.

        Raises:
            InputError: Nq != Nk without an alignment, or numbers for another batch or number of heads.
        """
        (B, Hq, Nq, _), Nk = query.shape, key.shape[2]
        own = getattr(self, "alignment", None)
        chosen = alignment if own is None else own
        if chosen is None and Nq != Nk:
            raise InputError(
                f"{type(self).__name__} with {Nq} queries and {Nk} keys is ambiguous; say alignment='top_left' or "
                "'bottom_right' (the last query stands at the last key), in it or as causal_alignment of the call"
            )
        count = max(Nq + Nk - 1, 0)
        apart = Nk - 1 - torch.arange(count, device=query.device)  # j - i
        line = self.line(apart - alignment_offset(chosen, Nq, Nk)).to(query.device, dtype)
        line = line[(None,) * (3 - line.dim())]
        if line.shape[0] not in (1, B) or line.shape[1] not in (1, Hq):
            raise InputError(
                f"{type(self).__name__} is for batch {line.shape[0]} and {line.shape[1]} heads; this call has {B} and "
                f"{Hq}"
            )
        return line


def check(name: str, tensor: Any, dims: Sequence[int], alignment: str | None) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise InputTypeError(f"{name} must be a floating-point tensor, got {kind}")
    if tensor.dim() not in dims:
        raise InputError(f"{name} must have {' or '.join(map(str, dims))} dimensions, got {tuple(tensor.shape)}")
    if alignment is not None and alignment not in ALIGNMENTS:
        raise InputError(f"alignment must be one of {ALIGNMENTS} or None, got {alignment!r}")
