"""What a backend is asked about before it is chosen, and what all of them answer where there is nothing to do."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor


class Call(NamedTuple):
    """The facts of one attention call on which a backend may decide; hashable, so that the choice is cached."""

    device: torch.device
    dtype: torch.dtype
    bias_dtype: torch.dtype | None
    B: int
    Hq: int
    Hkv: int
    Nq: int
    Nk: int
    D: int
    Dv: int
    has_lists: bool
    dropout_p: float


Gradients = TypeVar("Gradients", bound="tuple[Tensor | None, ...]")


def zeroed(gradients: Gradients) -> Gradients:
    """The gradients of a call without a visible key, as they are returned."""
    for gradient in gradients:
        if gradient is not None:
            gradient.zero_()
    return gradients
