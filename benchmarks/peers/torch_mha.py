"""torch.nn.MultiheadAttention and ours with the same weights."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_attn import MultiheadAttention

from . import Pair, Peer, Shape, no_grad_of
from .formulas import torch_module


def _build(shape: Shape) -> Pair:
    theirs = no_grad_of(torch_module(shape.width, shape.heads, dtype=shape.dtype, device=shape.device))
    ours = MultiheadAttention(shape.width, shape.heads, batch_first=True, dtype=shape.dtype, device=shape.device)
    ours.load_state_dict(theirs.state_dict())
    ours = no_grad_of(ours)

    def call(module: torch.nn.MultiheadAttention) -> object:
        def forward(x: Tensor) -> Tensor:
            out: Tensor = module(x, x, x, need_weights=False)[0]
            return out

        return forward

    return Pair((shape.tokens(),), call(ours), call(theirs), shape.tolerance)  # type: ignore[arg-type]


PEERS = (Peer("torch_mha", "nn.MultiheadAttention, self-attention, evaluation", _build),)
