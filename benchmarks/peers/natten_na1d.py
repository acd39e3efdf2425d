"""NATTEN's na1d: a window that is shifted inside at the borders. Written from its documentation; needs a GPU."""

from __future__ import annotations

from torch import Tensor

from efficient_attn import Neighborhood, attention

from . import Pair, Peer, Shape, needs_gpu

KERNEL = 255


def _build(shape: Shape) -> Pair:
    from natten import na1d

    pattern = Neighborhood(kernel=KERNEL, axes=1)

    def theirs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # (B, N, H, D) there
        out: Tensor = na1d(*(x.transpose(1, 2) for x in (query, key, value)), kernel_size=KERNEL)
        return out.transpose(1, 2)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value, mask=pattern)

    return Pair(shape.qkv(), ours, theirs, 2e-2)


PEERS = (Peer("natten", f"neighborhood of {KERNEL} tokens", _build, "natten", needs_gpu("natten", "natten")),)
