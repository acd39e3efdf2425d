"""Attention with what flash-attn does to scores besides masking them: a soft cap and ALiBi's distances.

    s_ij = cap(scale q_i k_j) - slope |i + offset - j|,   cap(x) = softcap tanh(x / softcap)

(Bello et al. 2016 for the cap, Press et al. 2022 for ALiBi.) On a CPU the kernels of `attention` do both. Elsewhere
they map to what is older: ALiBi to a bias, one number a key where keys to the right are hidden and otherwise made for
some rows at a time; a cap to plain PyTorch, for some rows at a time. Rows that were done are computed again in the
backward, so that memory stays O(n). Letters as in `functional`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..backends.call import accumulation_dtype
from ..backends.reference.attention import dropout_keep
from ..biases import ALiBi
from ..defaults import default_scale
from ..errors import InputError, InputTypeError
from ..functional import attention
from ..inputs import check_dropout, prepare_inputs, resolve_seed
from ..masks import BlockMask

BY_KERNELS = ("cpu",)  # devices whose kernels know both
PAIRS = 2**24  # scores, or numbers of a bias, that are made at a time
UNLIMITED = (-1, -1)
HALVES = (torch.bfloat16, torch.float16)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: tuple[int, int] = UNLIMITED,
    offset: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Nq, Dv) and lse (B, Hq, Nq) of `attention`, with a window, a soft cap and ALiBi.

    Args:
        window: (left, right): query i sees keys i + offset - left .. i + offset + right; -1 is without limit.
        offset: the key at which query 0 stands; Nk - Nq aligns the last query with the last key.
        softcap: 0, or the bound of the scaled scores.
        slopes: None, or ALiBi's, (Hq) or (B, Hq). They get no gradient.

    Raises:
        InputError, InputTypeError: what `attention` raises, a negative cap, slopes of another shape.
    """
    if softcap == 0.0 and slopes is None:
        return attention(
            query, key, value, mask=_window_mask(query, key, window, offset), scale=scale, dropout_p=dropout_p,
            dropout_seed=dropout_seed, return_lse=True, backend=backend,
        )  # fmt: skip
    query, key, value = prepare_inputs(query, key, value)
    check_dropout(dropout_p)
    cap = checked_cap(softcap)
    if query.device.type in BY_KERNELS and offset == key.shape[2] - query.shape[2]:
        return attention(
            query, key, value, mask=_window_mask(query, key, window, offset), scale=scale, softcap=cap,
            bias=alibi(slopes, query), dropout_p=dropout_p, dropout_seed=dropout_seed, return_lse=True, backend=backend,
        )  # fmt: skip
    slopes = None if slopes is None else _check_slopes(slopes, query)
    scale = default_scale(scale, query.shape[3])
    seed = resolve_seed(dropout_seed) if dropout_p > 0.0 else None
    options: dict[str, Any] = {"dropout_p": dropout_p, "seed": seed, "scale": scale, "backend": backend}
    if softcap > 0.0:
        some_rows: Any = functools.partial(_capped_rows, softcap=softcap, slopes=slopes, **options)
        size = _rows_of(query, key)
    elif slopes is not None and window[1] == 0 and query.dtype in HALVES:
        some_rows = functools.partial(_rows_by_key, slopes=slopes, **options)
        size = _rows_by_key_of(query, slopes)
    else:
        some_rows = functools.partial(_biased_rows, slopes=slopes, **options)
        size = _rows_of(query, key)
    return _by_rows(some_rows, size, query, key, value, window, offset)


def checked_cap(softcap: float) -> float | None:
    """flash-attn's cap as `attention` takes it, None for 0; raises InputError for a negative one."""
    if not softcap >= 0.0:
        raise InputError(f"softcap must be 0 (none) or positive, got {softcap}")
    return softcap or None


def alibi(slopes: Tensor | None, query: Tensor) -> ALiBi | None:
    """The bias of slopes (Hq) or (B, Hq); raises InputError, InputTypeError for others."""
    return None if slopes is None else ALiBi(_check_slopes(slopes, query).flatten(1), "bottom_right")


def _by_rows(
    some_rows: Any, size: int, query: Tensor, key: Tensor, value: Tensor, window: tuple[int, int], offset: int
) -> tuple[Tensor, Tensor]:
    """some_rows(query, key, value, window, offset, first) of `size` queries at a time and the keys that they see."""
    Nq, Nk = query.shape[2], key.shape[2]
    parts = []
    for first in range(0, max(Nq, 1), size):
        last = min(first + size, Nq) - 1
        low = 0 if window[0] < 0 else min(max(first + offset - window[0], 0), Nk)
        high = Nk if window[1] < 0 else max(min(last + offset + window[1] + 1, Nk), low)
        rows = query[:, :, first : last + 1], key[:, :, low:high], value[:, :, low:high]
        rest = (window, offset + first - low, first)
        if Nq > size and torch.is_grad_enabled():
            parts.append(checkpoint(some_rows, *rows, *rest, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(some_rows(*rows, *rest))
    if len(parts) == 1:
        return parts[0][0], parts[0][1]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def _rows_of(query: Tensor, key: Tensor) -> int:
    """How many queries have PAIRS scores."""
    return max(16, PAIRS // max(query.shape[0] * query.shape[1] * key.shape[2], 1) // 16 * 16)


def _window_mask(query: Tensor, key: Tensor, window: tuple[int, int], offset: int) -> BlockMask | None:
    if tuple(window) == UNLIMITED:
        return None
    return BlockMask(query.shape[2], key.shape[2], window=(window[0], window[1]), window_offset=offset)


# --- ALiBi ---


def _check_slopes(slopes: Tensor, query: Tensor) -> Tensor:
    """Slopes as (1 or B, Hq, 1, 1), in the dtype of scores."""
    B, Hq = query.shape[:2]
    if not isinstance(slopes, Tensor) or not slopes.is_floating_point():
        kind = slopes.dtype if isinstance(slopes, Tensor) else type(slopes).__name__
        raise InputTypeError(f"alibi_slopes must be a floating-point tensor, got {kind}")
    if tuple(slopes.shape) not in ((Hq,), (B, Hq)):
        raise InputError(f"alibi_slopes must be (Hq) = ({Hq},) or (B, Hq) = {(B, Hq)}, got {tuple(slopes.shape)}")
    if slopes.device != query.device:
        raise InputError(f"alibi_slopes are on {slopes.device}, the query on {query.device}; move them")
    return slopes.detach().to(accumulation_dtype(query.dtype)).view(-1, Hq, 1, 1)


def _distances(query: Tensor, key: Tensor, slopes: Tensor, offset: int) -> Tensor:
    """-slope |i + offset - j|, (1 or B, Hq, Nq, Nk)."""
    i = torch.arange(query.shape[2], device=query.device)[:, None] + offset
    return -slopes * (i - torch.arange(key.shape[2], device=query.device)).abs()


def _biased_rows(
    query: Tensor, key: Tensor, value: Tensor, window: tuple[int, int], offset: int, first: int, *,
    slopes: Any, scale: float, dropout_p: float, seed: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return attention(
        query, key, value, bias=_distances(query, key, slopes, offset), mask=_window_mask(query, key, window, offset),
        scale=scale, dropout_p=dropout_p, dropout_seed=None if seed is None else seed + first, return_lse=True,
        backend=backend,
    )  # fmt: skip


def _rows_by_key_of(query: Tensor, slopes: Tensor) -> int:
    """How many queries may share a bias of one number a key.

    Where j <= i, -slope (i - j) is slope (j - c) but for a number of the row alone, which only lse knows of. In float32
    slope (j - c) is known to 2^-23 of itself; next to the query that is slope times the rows that share c, and shall be
    a quarter of a unit in the last place of a weight near 1.
    """
    steepest = float(slopes.abs().max()) if slopes.numel() else 0.0
    reach = torch.finfo(query.dtype).eps / 4 * 2**23
    rows = max(query.shape[2], 16)
    return rows if steepest * rows <= reach else max(16, int(reach / steepest) // 16 * 16)


def _rows_by_key(
    query: Tensor, key: Tensor, value: Tensor, window: tuple[int, int], offset: int, first: int, *,
    slopes: Any, scale: float, dropout_p: float, seed: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    Nq = query.shape[2]
    centre = offset + Nq - 1
    bias = slopes * (torch.arange(key.shape[2], device=query.device) - centre)
    out, lse = attention(
        query, key, value, bias=bias, mask=_window_mask(query, key, window, offset), scale=scale, dropout_p=dropout_p,
        dropout_seed=None if seed is None else seed + first, return_lse=True, backend=backend,
    )  # fmt: skip
    behind = torch.arange(Nq - 1, -1, -1, device=query.device, dtype=lse.dtype)  # centre - (i + offset)
    return out, lse + slopes[..., 0] * behind


# --- a cap ---


def _capped_rows(
    query: Tensor, key: Tensor, value: Tensor, window: tuple[int, int], offset: int, first: int, *,
    softcap: float, slopes: Tensor | None, scale: float, dropout_p: float, seed: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition in PyTorch: scores (B, Hkv, G, Nq, Nk) in float32 (float64 for float64)."""
    if backend not in ("auto", "reference"):
        raise InputError(f"softcap={softcap} is computed by the reference alone; got backend={backend!r}, leave it out")
    dtype, (B, Hq, Nq, _), (Hkv, Nk) = query.dtype, query.shape, key.shape[1:3]
    query, key, value = (x.to(accumulation_dtype(dtype)) for x in (query, key, value))
    grouped = query.unflatten(1, (Hkv, Hq // max(Hkv, 1)))
    scores = grouped @ key[:, :, None].mT * scale
    scores = (torch.tanh(scores / softcap) * softcap).reshape(B, Hq, Nq, Nk)
    if slopes is not None:
        scores = scores + _distances(query, key, slopes, offset)
    shift = torch.arange(Nk, device=query.device) - torch.arange(Nq, device=query.device)[:, None] - offset
    hidden = torch.zeros_like(shift, dtype=torch.bool)
    hidden = hidden if window[0] < 0 else hidden | (shift < -window[0])
    hidden = hidden if window[1] < 0 else hidden | (shift > window[1])
    empty = hidden.all(-1)
    scores = scores.masked_fill(hidden & ~empty[:, None], -torch.inf)
    lse = scores.logsumexp(-1) if Nk else scores.sum(-1)
    weights = torch.exp(scores - lse[..., None]).masked_fill(hidden, 0.0)
    lse = lse.masked_fill(empty, -torch.inf)
    if dropout_p > 0.0:
        places = [torch.arange(size, device=query.device) for size in (B, Hq, Nq, Nk)]
        places[2] = places[2] + first
        kept = dropout_keep((B, Hq, Nq, Nk), dropout_p, seed, query.device, places)
        weights = weights.masked_fill(~kept, 0.0) / (1.0 - dropout_p)
    out = weights.unflatten(1, (Hkv, Hq // max(Hkv, 1))) @ value[:, :, None]
    return out.flatten(1, 2).to(dtype), lse
