"""The self-attention of Longformer in Hugging Face transformers, without global tokens, and a window of ours."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_attn import SlidingWindow, attention

from . import Pair, Peer, Shape, missing, no_grad_of

WINDOW = 256  # their attention_window: 128 keys to each side


def _build(shape: Shape) -> Pair:
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    if shape.seqlen % WINDOW:
        raise NotImplementedError(f"their layer takes lengths that are multiples of {WINDOW}, got {shape.seqlen}")
    config = LongformerConfig(
        hidden_size=shape.width, num_attention_heads=shape.heads, num_hidden_layers=1, attention_window=[WINDOW]
    )
    module = no_grad_of(LongformerSelfAttention(config, layer_id=0)).to(dtype=shape.dtype, device=shape.device)
    local = torch.zeros(shape.batch, shape.seqlen, device=shape.device, dtype=shape.dtype)
    nowhere = torch.zeros(shape.batch, shape.seqlen, device=shape.device, dtype=torch.bool)
    window = SlidingWindow(left=WINDOW // 2, right=WINDOW // 2)

    def theirs(x: Tensor) -> Tensor:
        out: Tensor = module(
            x, attention_mask=local, is_index_masked=nowhere, is_index_global_attn=nowhere, is_global_attn=False
        )[0]
        return out

    def ours(x: Tensor) -> Tensor:
        query, key, value = (shape.heads_of(linear, x) for linear in (module.query, module.key, module.value))
        return attention(query, key, value, mask=window).transpose(1, 2).flatten(2)

    return Pair((shape.tokens(),), ours, theirs, shape.tolerance)


PEERS = (
    Peer(
        "hf_longformer",
        f"Longformer, {WINDOW // 2} keys to each side, with projections",
        _build,
        "transformers",
        missing("transformers", "transformers"),
    ),
)
