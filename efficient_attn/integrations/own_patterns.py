"""Layers of transformers with a pattern of their own, served as exactly that pattern.

Longformer's, and LED's encoder: a token sees the tokens of a window around it and those that are marked global; a
global token sees all, by projections of its own (Beltagy et al., "Longformer", 2020). Global keys are put before the
others, so that what a query sees is one mask, O(n) memory: all of those and a window of these.

BigBird's, and BigBird-Pegasus's encoder: a block of tokens sees itself, its neighbours, the first and the last block
and some random ones; the first and the last block see all (Zaheer et al., "Big Bird", 2020).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..functional import merge_attention, padded_attention
from ..masks import BlockMask
from ..methods import DENSE
from . import huggingface


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


def blocks_with_random(
    layer: Any,
    hidden_states: Tensor,  # (B, N, E), N a multiple of the block
    band_mask: Tensor | None = None,
    from_mask: Tensor | None = None,  # (B, 1, N, 1): 1, 0 for padding
    to_mask: Tensor | None = None,  # (B, 1, 1, N)
    from_blocked_mask: Tensor | None = None,
    to_blocked_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The forward of `BigBirdBlockSparseAttention`: (B, N, E).

    The layer concatenates the keys of all blocks that a block sees, so that a block that its random choice names again
    counts as often as it is named: in eval mode all of them name the first. Attention to what each random choice names
    is a part of its own, joined by lse with the rest.

    Raises:
        UnsupportedError: weights are asked for, or N is no multiple of the block.
    """
    if huggingface.weights_wanted(kwargs):
        raise UnsupportedError(
            f"{type(layer).__qualname__} returns weights of its blocks, which efficient_attn does not make; leave "
            "output_attentions out, or leave the layer out with convert(predicate=...)"
        )
    N = hidden_states.shape[1]
    block, H = int(layer.block_size), int(layer.num_attention_heads)
    if N % block:
        raise UnsupportedError(f"{N} tokens are no whole number of blocks of {block}, of which the layer is made")
    query, key, value = (
        getattr(layer, name)(hidden_states).unflatten(-1, (H, -1)).transpose(1, 2) for name in ("query", "key", "value")
    )
    key_mask = None if to_mask is None else to_mask[:, 0, 0].bool()
    chosen = _random_blocks(layer, N)  # [H, N / block - 2, r]
    parts, counts = [_band_and_ends(N, block, hidden_states.device)], [1]
    named, times = torch.unique(chosen, dim=2, return_counts=True)
    for r, count in enumerate(times.tolist()):
        parts.append(_one_block_each(named[:, :, r], N, block).to(hidden_states.device))
        counts.append(count)
    found = [padded_attention(query, key, value, key_mask, mask=mask, return_lse=True) for mask in parts]
    lses = [lse + math.log(count) for (_, lse), count in zip(found, counts, strict=True)]
    out, _ = merge_attention([out for out, _ in found], lses)
    if from_mask is not None:
        out = out * from_mask.to(out.dtype)
    return out.transpose(1, 2).flatten(2), None


def _random_blocks(layer: Any, N: int) -> Tensor:
    """The blocks that the layer draws for each head and each block of queries but the first and the last, int64
    (heads, N / block - 2, random blocks): by its own code, from its own seed, in training; else zeros."""
    import numpy as np  # which the layer itself draws with

    block, H, wanted = int(layer.block_size), int(layer.num_attention_heads), int(layer.num_random_blocks)
    if layer.training:
        np.random.seed(layer.seed)
    if N in (1024, 3072, 4096):  # lengths that it draws for in another way
        most = layer.max_seqlen
        rows = [layer._bigbird_block_rand_mask(most, most, block, block, wanted, last_idx=1024) for _ in range(H)]
        rows = [drawn[: N // block - 2] for drawn in rows]
    else:
        length, number = layer._get_rand_attn_plan(N, block, wanted)
        rows = layer._bigbird_block_rand_mask_with_head(
            from_seq_length=N, to_seq_length=N, from_block_size=block, to_block_size=block, num_heads=H,
            plan_from_length=length, plan_num_rand_blocks=number,
        )  # fmt: skip
    return torch.as_tensor(np.stack(rows, axis=0), dtype=torch.int64)


@functools.lru_cache(maxsize=16)
def _band_and_ends(N: int, block: int, device: torch.device) -> BlockMask:
    """What blocks see besides the random ones."""
    n = N // block
    i, j = torch.arange(n)[:, None], torch.arange(n)
    return _of_blocks(((i - j).abs() <= 1) | (i % (n - 1) == 0) | (j % (n - 1) == 0), N, block).to(device)


def _one_block_each(chosen: Tensor, N: int, block: int) -> BlockMask:
    """The mask in which block i sees block chosen[h, i - 1], and the first and the last none; chosen (heads, n - 2)."""
    n = N // block
    pairs = torch.zeros(chosen.shape[0], n, n, dtype=torch.bool)
    pairs[:, 1:-1].scatter_(2, chosen[..., None], True)
    return _of_blocks(pairs, N, block)


def _of_blocks(pairs: Tensor, N: int, block: int) -> BlockMask:
    """The mask of blocks (heads | 1, n, n) that see blocks. Lists have blocks of a multiple of 16: others are asked."""
    pairs = pairs.expand(1, *pairs.shape) if pairs.dim() == 2 else pairs
    if block % 16 == 0:
        counts = pairs.sum(2).flatten()
        indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        indices = pairs.nonzero()[:, 2]
        return BlockMask.from_csr(indptr, indices, q_len=N, kv_len=N, block_size=block, heads=pairs.shape[0])
    return BlockMask.from_predicate(
        lambda b, h, i, j: pairs[h, i // block, j // block], q_len=N, kv_len=N, heads=pairs.shape[0]
    )
