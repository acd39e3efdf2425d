"""What a backend is asked about before it is chosen."""

from __future__ import annotations

from typing import NamedTuple

import torch


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
