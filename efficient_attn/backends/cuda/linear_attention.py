"""Linear attention in CUDA C++ (csrc/cuda): the same functions as `reference`, on tensor cores.

EXPERIMENTAL like `cuda`: never yet run on a GPU, taken only when asked for by name. Feature maps other than the
identity are applied by PyTorch first, in float32, as the Triton backend does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import LinearCall, readable, zeroed
from ..features import given_or_mapped, input_gradients, some_columns
from ..words import pack_linear_attention, pack_linear_attention_gradients
from . import attention as cuda

MAX_WIDTH = 256  # features and value dimensions


def not_supported_reasons(call: LinearCall) -> list[str]:
    """Why this backend cannot serve `call`."""
    reasons = cuda.device_reasons(call.device, call.dtype)
    if call.width > MAX_WIDTH:
        reasons.append(f"it takes up to {MAX_WIDTH} features and value dimensions; got {call.width}")
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
    v = some_columns(value)
    out = value.new_empty(*a.shape[:3], v.shape[3])
    normaliser = value.new_empty(a.shape[:3], dtype=torch.float32)
    if a.numel() == 0 or b.shape[2] == 0:
        out.zero_()
        normaliser.zero_()
    else:
        kept, words = _pack(a, b, v, key_mask, out, normaliser, is_causal, causal_offset)
        _launch("forward", words, out)
        del kept
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
    v, out = some_columns(value), some_columns(out)
    da, db, dv = (t.new_empty(t.shape) for t in (a, b, v))
    if a.numel() == 0 or b.shape[2] == 0:
        zeroed((da, db, dv))
    else:
        grad_out = readable(some_columns(grad_out).to(value.dtype))
        grad_normaliser = None if grad_normaliser is None else grad_normaliser.to(torch.float32).contiguous()
        kept, words = _pack(a, b, v, key_mask, out, normaliser, is_causal, causal_offset)
        words += pack_linear_attention_gradients(grad_out, da, db, dv, grad_normaliser)
        _launch("backward", words, out)
        del kept
    dq, dk = input_gradients(
        da, db, mapped.a_slope, mapped.b_slope, query, key, key_mask, projection, feature_map, scale
    )
    return dq.to(query.dtype), dk.to(key.dtype), (dv if value.shape[3] else torch.empty_like(value))


def _launch(direction: str, words: bytes, out: Tensor) -> None:
    """Run the kernels of one direction on workspace of O(n)."""
    kernels, processors = cuda.kernels(), cuda.processors(out.device)
    floats = kernels.linear_attention_workspace(words, direction == "backward", processors)
    workspace = out.new_empty(floats, dtype=torch.float32)
    call = getattr(kernels, f"linear_attention_{direction}")
    call(words, processors, workspace.data_ptr(), *cuda.place(out.device))


def _pack(
    a: Tensor,
    b: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    normaliser: Tensor,
    is_causal: bool,
    causal_offset: int,
) -> tuple[tuple[Tensor | None, ...], bytes]:
    """The words that csrc/common/words.h reads, for given features, and the tensors that must outlive the call."""
    shift = normaliser.new_empty(0)
    return pack_linear_attention(
        a, b, v, key_mask, None, out, normaliser, shift, is_causal, causal_offset, "identity", 1.0
    )
