"""Linear attention in Triton (kernels/linear_attention.py): the same functions as `reference`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import LinearCall, readable
from ..features import given_or_mapped, input_gradients, some_columns
from . import shared
from .launch import launch

MAX_FEATURES = 256
PROGRAMS_PER_PROCESSOR = 4


def not_supported_reasons(call: LinearCall) -> list[str]:
    """Why this backend cannot serve `call`."""
    reasons = shared.device_reasons(call.device)
    if call.dtype not in (*shared.HALF, torch.float32):
        reasons.append(f"it computes float32, bfloat16 and float16, not {call.dtype}")
    if call.width > MAX_FEATURES:
        reasons.append(f"it takes up to {MAX_FEATURES} features and value dimensions; got {call.width}")
    return reasons


def linear_attention_forward(
    query: Tensor,  # (B, Hq, Nq, D)
    key: Tensor,  # (B, Hkv, Nk, D)
    value: Tensor,  # (B, Hkv, Nk, Dv)
    key_mask: Tensor | None,  # (B, Nk) bool, True = attend
    projection: Tensor | None,  # (F, D) or (Hkv, F, D)
    is_causal: bool,
    causal_offset: int,
    feature_map: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out (B, Hq, Nq, Dv), the normaliser (B, Hq, Nq) and the key shift, as `reference`."""
    mapped = given_or_mapped(query, key, key_mask, projection, is_causal, feature_map, scale)
    a, b, key_shift = mapped.a, mapped.b, mapped.key_shift
    a, b, v = map(readable, (a, b, some_columns(value)))
    out = value.new_empty(*a.shape[:3], v.shape[3])
    normaliser = value.new_empty(a.shape[:3], dtype=torch.float32)
    if a.numel() == 0 or b.shape[2] == 0:
        out.zero_()
        normaliser.zero_()
    else:
        times = _times(a, b, v, is_causal, causal_offset)
        alive = _alive(key_mask)
        with shared.on_device(v.device):
            keys = _Side(b, times.offset, alive=alive)
            values = _Side(v, times.offset, alive=alive)
            _sums(_Side(a, 0), keys, values, out, times, is_causal, False, normaliser)
    return (out if value.shape[3] else value.new_empty(*a.shape[:3], 0)), normaliser, key_shift


def linear_attention_backward(
    grad_out: Tensor,  # (B, Hq, Nq, Dv)
    grad_normaliser: Tensor | None,  # (B, Hq, Nq)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    projection: Tensor | None,
    out: Tensor,  # (B, Hq, Nq, Dv)
    normaliser: Tensor,  # (B, Hq, Nq)
    key_shift: Tensor,  # (B, Hkv, S) or (B, Hkv, 0)
    is_causal: bool,
    causal_offset: int,
    feature_map: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, each shaped and typed like its input."""
    mapped = given_or_mapped(query, key, key_mask, projection, is_causal, feature_map, scale)
    a, b = mapped.a, mapped.b
    v, out, grad_out = map(some_columns, (value, out, grad_out))
    da, db, dv = _feature_gradients(
        grad_out, grad_normaliser, a, b, v, key_mask, out, normaliser, is_causal, causal_offset
    )
    dq, dk = input_gradients(
        da, db, mapped.a_slope, mapped.b_slope, query, key, key_mask, projection, feature_map, scale
    )
    return dq.to(query.dtype), dk.to(key.dtype), (dv if value.shape[3] else torch.empty_like(value))


def _feature_gradients(
    grad_out: Tensor,
    grad_normaliser: Tensor | None,
    a: Tensor,
    b: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    normaliser: Tensor,
    is_causal: bool,
    causal_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the features a (B, Hq, Nq, F) and b (B, Hkv, Nk, F) and of v, each in its own dtype."""
    da, db, dv = (t.new_empty(t.shape) for t in (a, b, v))
    if a.numel() == 0 or b.shape[2] == 0:
        return da.zero_(), db.zero_(), dv.zero_()
    a, b, v, grad_out, out = map(readable, (a, b, v, grad_out, out))
    normaliser = normaliser.contiguous()
    k = shared.kernels()
    times = _times(a, b, v, is_causal, causal_offset)
    alive = _alive(key_mask)
    B, Hq, Nq, Dv = out.shape
    terms = torch.empty_like(normaliser)
    with shared.on_device(v.device):
        rows, block = B * Hq * Nq, 32
        grad_n = None if grad_normaliser is None else grad_normaliser.to(torch.float32).contiguous()
        launch(k.terms_kernel, -(-rows // block),
            shared.rows_of(out), shared.rows_of(grad_out), normaliser, grad_n, terms, rows, Hq, Nq,
            Dv, k.padded(Dv), block, warps=4,
        )  # fmt: skip
        keys = {"b": _Side(b, times.offset, alive=alive), "v": _Side(v, times.offset, alive=alive)}
        a_rows, g_rows = _Side(a, 0), _Side(grad_out, 0, norm=normaliser)
        h_rows = g_rows._replace(extra=terms)
        _sums(h_rows, keys["v"], keys["b"], da, times, is_causal, False, None, True)
        _sums(keys["v"], h_rows, a_rows, db, times, is_causal, True, None, True)
        _sums(keys["b"], a_rows, g_rows, dv, times, is_causal, True, None)
    return da, db, dv


def _half(*tensors: Tensor) -> bool:
    return all(tensor.dtype in shared.HALF for tensor in tensors)


class _Side(NamedTuple):
    """Rows of one operand: divided by `norm` (B, H, N), with the factor `extra` (B, H, N), left out where not alive."""

    rows: Tensor  # (B, H, N, dim)
    shift: int  # row of time t: t + shift
    norm: Tensor | None = None
    extra: Tensor | None = None
    alive: Tensor | None = None  # uint8 (B, N)


class _Times(NamedTuple):
    """How time is cut: `slots` segments of `chunks` chunks of `chunk` rows from `first`."""

    offset: int
    first: int
    slots: int
    chunks: int
    chunk: int


def _times(a: Tensor, b: Tensor, v: Tensor, is_causal: bool, offset: int) -> _Times:
    """Segments long enough to make the states small beside the rows, and enough of them to fill the GPU."""
    B, _, Nq, F = a.shape
    Hkv, Nk = b.shape[1:3]
    offset = min(max(offset, -Nq), Nk) if is_causal else 0  # beyond these bounds nothing changes
    chunk = shared.kernels().linear_config(max(F, v.shape[3]), _half(a, b, v), shared.capability(a.device)).chunk
    first, last = min(0, -offset), max(Nq, Nk - offset)
    wanted = -(-PROGRAMS_PER_PROCESSOR * shared.processors(a.device) // max(B * Hkv, 1))
    chunks = max(1, min(2048 // chunk, (last - first) // (chunk * wanted)))
    return _Times(offset, first, -(-(last - first) // (chunk * chunks)), chunks, chunk)


def _sums(
    x: _Side,
    y: _Side,
    u: _Side,
    out: Tensor,
    times: _Times,
    causal: bool,
    reverse: bool,
    normaliser: Tensor | None,
    extra: bool = False,
) -> None:
    """Fill out_s = sum_t (x_s . y_t + e_s f_t) u_t; see kernels/linear_attention.py."""
    k, device = shared.kernels(), out.device
    B, x_heads, _, E = x.rows.shape
    y_heads, R = y.rows.shape[1], u.rows.shape[3]
    spread = y_heads // x_heads if reverse else 1
    lines = B * y_heads // spread
    states = torch.empty(lines, times.slots, E, R, dtype=torch.float32, device=device)
    wide = E if normaliser is not None else R
    vectors = torch.empty(lines, times.slots, wide, dtype=torch.float32, device=device)
    half = _half(x.rows, y.rows, u.rows)
    _, block_r, warps, stages = k.linear_config(max(E, R), half, shared.capability(device))
    block_r = min(block_r, k.padded(R))
    r_tiles = -(-R // block_r)
    precision = "tf32" if half or torch.get_float32_matmul_precision() != "highest" else "ieee"
    config = {"warps": warps, "stages": stages}
    constants = k.LinearConstants(
        E, R, k.padded(E), block_r, times.chunk, spread, extra, normaliser is not None, causal, reverse, precision
    )
    cut = k.Times(times.slots, times.chunks, times.first)
    x_side, y_side, u_side = map(_side, (x, y, u))
    launch(
        k.state_kernel, lines * times.slots * r_tiles,
        y_side, u_side, states, vectors, cut, r_tiles, constants, **config,
    )  # fmt: skip
    for array, size in ((states, E * R), (vectors, wide)):
        if array is states or extra or normaliser is not None:
            block = 256
            launch(
                k.scan_kernel, lines * -(-size // block), array, times.slots, size, not causal, reverse, block, warps=4
            )
    launch(
        k.sums_kernel, B * x_heads * times.slots * r_tiles,
        x_side, y_side, u_side, shared.rows_of(out), states, vectors, normaliser, cut, r_tiles, constants, **config,
    )  # fmt: skip


def _side(side: _Side) -> Any:
    """An operand as the kernels read it."""
    heads, length = side.rows.shape[1:3]
    rows = shared.rows_of(side.rows)
    return shared.kernels().Side(*rows, side.norm, side.extra, side.alive, heads, length, side.shift)


def _alive(key_mask: Tensor | None) -> Any:
    return None if key_mask is None else key_mask.contiguous().view(torch.uint8)
