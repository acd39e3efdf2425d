"""Rotary positions (Su et al. 2021) from tables, for what is written into a cache and for the queries that read it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError


def rotate(x: Tensor, places: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """x (B, N, H, D) with its first features turned by rotary positions.

    Args:
        places: int64 (B, N), rows of cos and sin (positions, rotary_dim / 2).
        interleaved: features 2i and 2i + 1 are a pair, else i and i + rotary_dim / 2.

    Raises:
        InputError: tables of other shapes, or without a row that is asked for.
    """
    half = cos.shape[-1]
    if sin.shape != cos.shape or 2 * half > x.shape[-1]:
        raise InputError(
            f"rotary_cos and rotary_sin must be (positions, at most {x.shape[-1] // 2}); got {tuple(cos.shape)} and "
            f"{tuple(sin.shape)}"
        )
    if places.numel() and int(places.max()) >= cos.shape[0]:
        raise InputError(f"position {int(places.max())} is asked for, and rotary_cos has {cos.shape[0]}")
    c, s = (t.float()[places][:, :, None] for t in (cos, sin))  # [B, N, 1, half]
    turned, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    pair = (a * c - b * s, a * s + b * c)
    found = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([found.to(x.dtype), rest], -1)


def turned(x: Tensor, firsts: list[int], counts: list[int], cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """x (B, H, n, D) by rotary positions, its first `counts` tokens at `firsts` and behind; the others mean nothing."""
    first, count = (torch.tensor(numbers, device=x.device).view(-1, 1) for numbers in (firsts, counts))
    ahead = torch.arange(x.shape[2], device=x.device)
    places = torch.where(ahead < count, first + ahead, 0)
    return rotate(x.transpose(1, 2), places, cos, sin, interleaved=interleaved).transpose(1, 2)
