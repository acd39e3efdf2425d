"""xformers' memory_efficient_attention. Written from its documentation; it runs on NVIDIA GPUs."""

from __future__ import annotations

from torch import Tensor

from efficient_attn import attention

from . import Pair, Peer, Shape, needs_gpu


def _build(shape: Shape) -> Pair:
    from xformers.ops import memory_efficient_attention

    def theirs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # (B, N, H, D) there
        out: Tensor = memory_efficient_attention(*(x.transpose(1, 2) for x in (query, key, value)))
        return out.transpose(1, 2)

    return Pair(shape.qkv(), attention, theirs, 2e-2)


PEERS = (Peer("xformers", "exact attention", _build, "xformers", needs_gpu("xformers", "xformers")),)
