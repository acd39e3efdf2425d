"""torch.nn.MultiheadAttention and ours, side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from efficient_attn.multihead import MultiheadAttention

SPARSE = "sliding_window:left=2,right=2"
E, H = 12, 4
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"kdim": 5, "vdim": 7},
    {"kdim": 5, "bias": False, "add_bias_kv": True},
]


def pair(attention: str = "dense", **options: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """The parent and ours from one seed, biases made non-zero so that they count."""
    torch.manual_seed(7)
    theirs = nn.MultiheadAttention(E, H, **options)
    torch.manual_seed(7)
    ours = MultiheadAttention(E, H, attention=attention, **options)
    for modules in zip(theirs.parameters(), ours.parameters(), strict=False):
        if modules[0].dim() == 1:
            value = torch.randn_like(modules[0])
            for parameter in modules:
                parameter.data.copy_(value)
    return theirs, ours


def causal_mask(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The parent's causal mask, to add to scores."""
    return nn.Transformer.generate_square_subsequent_mask(length, dtype=dtype)
