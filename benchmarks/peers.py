"""What others offer, callable as ours is. An optional peer says why it is absent."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from efficient_attn.masks import BlockMask


def sdpa(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """PyTorch's scaled_dot_product_attention; ``mask`` is a bool tensor (True = attend) or an additive bias."""
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)


def flex(block_mask: BlockMask) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Compiled FlexAttention under our mask; compiles at its first call. On CPU it has no backward."""
    from torch.nn.attention.flex_attention import flex_attention

    theirs = block_mask.to_flex()
    compiled = torch.compile(flex_attention)
    return lambda query, key, value: compiled(query, key, value, block_mask=theirs)


def torch_module(embed_dim: int, num_heads: int, **options: Any) -> torch.nn.MultiheadAttention:
    """torch.nn.MultiheadAttention with the batch first."""
    return torch.nn.MultiheadAttention(embed_dim, num_heads, batch_first=True, **options)


def absent_reason(peer: str) -> str | None:
    """Why a peer cannot run here, or None when it can."""
    if peer == "flex" and not (shutil.which("g++") or shutil.which("clang++")):
        return "compiled FlexAttention on CPU needs a C++ compiler (g++ or clang++)"
    return None
