"""The linformer package's self-attention and our operator behind the same projections."""

from __future__ import annotations

from torch import Tensor

from efficient_attn.methods import linformer_attention

from . import Pair, Peer, Shape, missing, no_grad_of

RANK = 128


def _build(shape: Shape) -> Pair:
    from linformer import LinformerSelfAttention

    module = no_grad_of(LinformerSelfAttention(shape.width, shape.seqlen, k=RANK, heads=shape.heads))
    module = module.to(dtype=shape.dtype, device=shape.device)
    key_projection, value_projection = module.proj_k.T.contiguous(), module.proj_v.T.contiguous()

    def ours(x: Tensor) -> Tensor:
        query, key, value = (shape.heads_of(linear, x) for linear in (module.to_q, module.to_k, module.to_v))
        mixed = linformer_attention(query, key, value, key_projection, value_projection)
        out: Tensor = module.to_out(mixed.transpose(1, 2).flatten(2))
        return out

    return Pair((shape.tokens(),), ours, module, shape.tolerance)


PEERS = (
    Peer(
        "linformer", f"Linformer, rank {RANK}, with projections", _build, "linformer", missing("linformer", "linformer")
    ),
)
