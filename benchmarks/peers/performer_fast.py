"""performer-pytorch's FastAttention and ours with the same random features."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from efficient_attn.methods import performer_attention

from . import Pair, Peer, Shape, missing, no_grad_of

FEATURES = 128
NOTE = "theirs adds 1e-4 to every feature, ours adds nothing"


def _build(shape: Shape) -> Pair:
    if importlib.util.find_spec("distutils") is None:
        raise NotImplementedError(
            "performer-pytorch imports distutils, which Python 3.12 has no more: install setuptools"
        )
    from performer_pytorch import FastAttention

    module = no_grad_of(FastAttention(dim_heads=shape.head_dim, nb_features=FEATURES))
    module = module.to(dtype=shape.dtype, device=shape.device)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return performer_attention(query, key, value, module.projection_matrix)

    query, key, value = shape.qkv()
    # Smaller scores: with large ones most features are below the 1e-4 that theirs adds.
    return Pair((query / 4, key / 4, value), ours, module, 1e-2 if shape.dtype == torch.float32 else 5e-2, NOTE)


PEERS = (
    Peer(
        "performer_pytorch",
        f"Performer, {FEATURES} features, softmax kernel, not causal",
        _build,
        "performer-pytorch",
        missing("performer_pytorch", "performer-pytorch"),
    ),
)
