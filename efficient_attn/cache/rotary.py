"""Rotary positions (Su et al. 2021) from tables, for what is written into a cache and for the queries that read it."""

from __future__ import annotations

from operator import add

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
    _check_tables(x, cos, sin, int(places.max()) if places.numel() else -1)
    c, s = (t[places].float()[:, :, None] for t in (cos, sin))  # [B, N, 1, half]
    return _turn(x, c, s, interleaved)


def turned(x: Tensor, firsts: list[int], counts: list[int], cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """x (B, H, n, D) by rotary positions, its first `counts` tokens at `firsts` and behind; the others mean nothing."""
    n = x.shape[2]
    _check_tables(x, cos, sin, max(map(add, firsts, counts), default=0) - 1)
    if len(set(firsts)) == 1 and min(counts) == n:  # the same rows for every sequence
        c, s = (t[firsts[0] : firsts[0] + n].float() for t in (cos, sin))  # [n, half]
    else:
        first, count = (torch.tensor(numbers, device=x.device).view(-1, 1) for numbers in (firsts, counts))
        ahead = torch.arange(n, device=x.device)
        places = torch.where(ahead < count, first + ahead, 0)
        c, s = (t[places].float()[:, None] for t in (cos, sin))  # [B, 1, n, half]
    return _turn(x, c, s, interleaved)


def _check_tables(x: Tensor, cos: Tensor, sin: Tensor, last: int) -> None:
    if sin.shape != cos.shape or 2 * cos.shape[-1] > x.shape[-1]:
        raise InputError(
            f"rotary_cos and rotary_sin must be (positions, at most {x.shape[-1] // 2}); got {tuple(cos.shape)} and "
            f"{tuple(sin.shape)}"
        )
    if last >= cos.shape[0]:
        raise InputError(f"position {last} is asked for, and rotary_cos has {cos.shape[0]}")


def _turn(x: Tensor, c: Tensor, s: Tensor, interleaved: bool) -> Tensor:
    """x (..., D), its first features turned by angles of which c and s (..., half) are cosine and sine."""
    half = c.shape[-1]
    whole = 2 * half == x.shape[-1]
    first = (x if whole else x[..., : 2 * half]).float()
    a, b = (first[..., ::2], first[..., 1::2]) if interleaved else (first[..., :half], first[..., half:])
    pair = (a * c - b * s, a * s + b * c)
    found = (torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)).to(x.dtype)
    return found if whole else torch.cat([found, x[..., 2 * half :]], -1)
