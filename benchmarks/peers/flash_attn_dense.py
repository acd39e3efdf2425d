"""flash-attn's flash_attn_func. Written from its documentation; it runs on NVIDIA GPUs only."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from efficient_attn import attention

from . import Pair, Peer, Shape, needs_gpu


def _build(shape: Shape) -> Pair:
    from flash_attn import flash_attn_func

    options: dict[str, Any] = {"causal": True}

    def theirs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # (B, N, H, D) there
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out: Tensor = flash_attn_func(query, key, value, **options)
        return out.transpose(1, 2)

    return Pair(shape.qkv(), partial(attention, is_causal=True), theirs, 2e-2)


PEERS = (Peer("flash_attn", "exact attention, causal", _build, "flash-attn", needs_gpu("flash_attn", "flash-attn")),)
