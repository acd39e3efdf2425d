"""torch.nn.functional.scaled_dot_product_attention with each of its backends."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from efficient_attn import attention

from . import Pair, Peer, Shape
from .formulas import sdpa


def _build(backend: SDPBackend, is_causal: bool, shape: Shape) -> Pair:
    def theirs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(query, key, value, is_causal=is_causal)

    return Pair(shape.qkv(), partial(attention, is_causal=is_causal), theirs, shape.tolerance)


def _absent(backend: SDPBackend) -> str | None:
    if backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION) and not torch.cuda.is_available():
        return f"PyTorch has {backend.name} on NVIDIA GPUs only, and there is none"
    return None


_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
PEERS = tuple(
    Peer(
        f"sdpa_{name}" + ("_causal" if causal else ""),
        "exact attention" + (", causal" if causal else ""),
        partial(_build, backend, causal),
        absent=partial(_absent, backend),
    )
    for name, backend in _BACKENDS.items()
    for causal in (False, True)
)
