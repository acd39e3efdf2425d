"""What a user passes as `bias`: a tensor, a structured bias, or a list of both, which add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..errors import InputTypeError
from .base import Bias, RelativePosition

BiasLike = Tensor | Bias | Sequence[Tensor | Bias] | None


def split(bias: BiasLike) -> tuple[Tensor | None, list[Bias]]:
    """The tensors of what a user passes as `bias`, added up, and the rest. Raises InputTypeError for anything else."""
    if bias is None or type(bias) is Tensor:
        return bias, []
    parts = list(bias) if isinstance(bias, (list, tuple)) else [bias]
    for part in parts:
        if not isinstance(part, (Tensor, Bias)):
            raise InputTypeError(
                "bias must be a floating-point tensor, a structured bias (ALiBi, RelativeBias, T5Bias, LowRankBias, "
                f"RelativeBias2D, DecomposedBias2D), or a list of them; got {type(part).__name__}"
            )
    dense: Tensor | None = None
    for part in parts:
        if isinstance(part, Tensor):
            dense = part if dense is None else dense + part
    return dense, [part for part in parts if isinstance(part, Bias)]


def join(dense: Tensor | None, others: list[Bias]) -> BiasLike:
    """What `split` took apart."""
    return dense if not others else [*others] if dense is None else [dense, *others]


def aligned(others: list[Bias], alignment: str | None) -> list[Bias]:
    """The biases, those that name no alignment with this one."""
    return [
        replace(part, alignment=alignment)  # type: ignore[call-arg]
        if isinstance(part, RelativePosition) and getattr(part, "alignment", None) is None
        else part
        for part in others
    ]
