"""The nystrom-attention package's self-attention and our operator behind the same projections."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_attn.methods import nystrom_attention

from . import Pair, Peer, Shape, missing, no_grad_of

LANDMARKS = 64
NOTE = "theirs starts the pseudo-inverse from norms over the whole batch, ours from those of each head"


def _build(shape: Shape) -> Pair:
    from nystrom_attention import NystromAttention

    size = {"dim_head": shape.head_dim, "heads": shape.heads, "num_landmarks": LANDMARKS}
    module = no_grad_of(NystromAttention(shape.width, residual=False, **size))
    module = module.to(dtype=shape.dtype, device=shape.device)

    def ours(x: Tensor) -> Tensor:
        joint = module.to_qkv(x).unflatten(-1, (3, shape.heads, shape.head_dim))
        query, key, value = joint.permute(2, 0, 3, 1, 4)
        mixed = nystrom_attention(query, key, value, landmarks=LANDMARKS)
        out: Tensor = module.to_out(mixed.transpose(1, 2).flatten(2))
        return out

    # After 6 iterations the two starts have not met to the last digit.
    return Pair((shape.tokens(),), ours, module, 5e-2 if shape.dtype == torch.float32 else 1e-1, NOTE)


PEERS = (
    Peer(
        "nystrom_attention",
        f"Nystromformer, {LANDMARKS} landmarks, with projections",
        _build,
        "nystrom-attention",
        missing("nystrom_attention", "nystrom-attention"),
    ),
)
