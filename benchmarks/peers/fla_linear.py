"""flash-linear-attention's chunk_linear_attn: causal linear attention. Written from its source; needs an NVIDIA GPU."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import elu

from efficient_attn import linear_attention

from . import Pair, Peer, Shape, needs_gpu


def _build(shape: Shape) -> Pair:
    from fla.ops.linear_attn import chunk_linear_attn

    def theirs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # (B, N, H, D) there
        query, key, value = (x.transpose(1, 2) for x in (elu(query) + 1, elu(key) + 1, value))
        out: Tensor = chunk_linear_attn(query, key, value, scale=1.0, normalize=True)[0]
        return out.transpose(1, 2)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return linear_attention(query, key, value, is_causal=True, feature_map="elu")

    return Pair(shape.qkv(), ours, theirs, 2e-2)


PEERS = (
    Peer(
        "fla",
        "linear attention, elu + 1, causal",
        _build,
        "flash-linear-attention",
        needs_gpu("fla", "flash-linear-attention"),
    ),
)
