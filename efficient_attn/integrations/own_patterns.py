"""Layers of transformers with a pattern of their own, served as exactly that pattern: Longformer's, and LED's encoder.

A token sees the tokens of a window around it and those that are marked global; a global token sees all, by projections
of its own (Beltagy et al., "Longformer", 2020). Global keys are put before the others, so that what a query sees is one
mask, O(n) memory: all of those and a window of these.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..masks import BlockMask
from ..methods import DENSE


def window_with_globals(
    layer: Any,
    hidden_states: Tensor,  # (B, N, E)
    attention_mask: Tensor,  # (B, N): 0, below 0 for padding, above 0 for global tokens
    is_index_masked: Tensor,
    is_index_global_attn: Tensor,
    is_global_attn: bool,
    output_attentions: bool = False,
) -> tuple[Tensor]:
    """The forward of `LongformerSelfAttention`: (B, N, E).

    Raises:
        UnsupportedError: weights are asked for, which the layer gives in a shape of its own.
    """
    if output_attentions:
        raise UnsupportedError(
            f"{type(layer).__qualname__} returns weights by window, which efficient_attn does not make; leave "
            "output_attentions out, or leave the layer out with convert(predicate=...)"
        )
    B, N, E = hidden_states.shape
    dropout = float(layer.dropout) if layer.training else 0.0

    def heads(projection: Any, x: Tensor) -> Tensor:
        projected: Tensor = projection(x)
        split: Tensor = projected.unflatten(-1, (layer.num_heads, layer.head_dim))
        return split.transpose(1, 2)

    query, key, value = (heads(getattr(layer, name), hidden_states) for name in ("query", "key", "value"))
    alone, count = attention_mask == 0, 0
    if is_global_attn:
        count = int(is_index_global_attn.sum(1).max())
        places = (~is_index_global_attn).to(torch.int8).argsort(dim=1, stable=True)[:, :count]  # (B, G)
        real = is_index_global_attn.gather(1, places)
        at = places[:, None, :, None].expand(-1, layer.num_heads, -1, layer.head_dim)
        key, value = (torch.cat([x.gather(2, at), x], 2) for x in (key, value))
        alone = torch.cat([real, alone], 1)
    mask = _mask(N, count, int(layer.one_sided_attn_window_size), hidden_states.device)
    out, _ = DENSE.attend(query, key, value, mask=mask, key_mask=alone, dropout_p=dropout)
    out = out.transpose(1, 2).reshape(B, N, E).masked_fill(is_index_masked[..., None], 0.0)
    if is_global_attn:
        chosen = hidden_states.gather(1, places[..., None].expand(-1, -1, E))
        query = heads(layer.query_global, chosen)
        key, value = heads(layer.key_global, hidden_states), heads(layer.value_global, hidden_states)
        found, _ = DENSE.attend(query, key, value, key_mask=~is_index_masked, dropout_p=dropout)
        found = found.transpose(1, 2).reshape(B, count, E).to(out.dtype)
        batch, row = real.nonzero(as_tuple=True)
        out = out.index_put((batch, places[batch, row]), found[batch, row])
    return (out,)


@functools.lru_cache(maxsize=16)
def _mask(N: int, count: int, reach: int, device: torch.device) -> BlockMask:
    """What N queries see of `count` global keys and the N keys behind them."""
    window = BlockMask(N, count + N, window=(reach, reach), window_offset=count)
    if count == 0:
        return window
    return (BlockMask.from_lengths(torch.tensor([count]), q_len=N, kv_len=count + N) | window).to(device)
