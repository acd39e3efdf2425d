"""Linear attention on CPUs in C++ (csrc/cpu/linear_attention*.h): the same functions as `reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import LinearCall, accumulation_dtype, readable
from ..features import key_shift_size
from ..words import DTYPES, pack_linear_attention, pack_linear_attention_gradients
from . import attention as cpu


def not_supported_reasons(call: LinearCall) -> list[str]:
    """Why this backend cannot serve `call`; any width will do."""
    reasons = cpu.device_reasons(call.device)
    if call.dtype not in DTYPES:
        reasons.append(f"it computes float32, float64, bfloat16 and float16, not {call.dtype}")
    return reasons


def linear_attention_forward(
    query: Tensor,  # (B, Hq, Nq, D)
    key: Tensor,  # (B, Hkv, Nk, D)
    value: Tensor,  # (B, Hkv, Nk, Dv)
    key_mask: Tensor | None,  # (B, Nk) bool
    projection: Tensor | None,  # (F, D) or (Hkv, F, D)
    is_causal: bool,
    causal_offset: int,
    feature_map: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out (B, Hq, Nq, Dv), the normaliser (B, Hq, Nq) and the key shift, as `reference`."""
    dtype = accumulation_dtype(value.dtype)
    out = value.new_empty(*query.shape[:3], value.shape[3])
    normaliser = value.new_empty(query.shape[:3], dtype=dtype)
    size = key_shift_size(query, key, projection, is_causal, feature_map)
    key_shift = value.new_empty(*key.shape[:2], size, dtype=dtype)
    if query.numel() == 0 or key.shape[2] == 0:
        return out.zero_(), normaliser.zero_(), key_shift.zero_()
    kept, words = pack_linear_attention(
        query, key, value, key_mask, projection, out, normaliser, key_shift,
        is_causal, causal_offset, feature_map, scale,
    )  # fmt: skip
    cpu._cpu.linear_attention_forward(words, torch.get_num_threads())
    del kept
    return out, normaliser, key_shift


def linear_attention_backward(
    grad_out: Tensor,  # (B, Hq, Nq, Dv)
    grad_normaliser: Tensor | None,  # (B, Hq, Nq)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    projection: Tensor | None,
    out: Tensor,
    normaliser: Tensor,
    key_shift: Tensor,
    is_causal: bool,
    causal_offset: int,
    feature_map: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, as `reference`."""
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device="cpu") for t in (query, key, value))
    if query.numel() == 0 or key.shape[2] == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    grad_out = readable(grad_out.to(value.dtype))
    grad_normaliser = None if grad_normaliser is None else grad_normaliser.to(normaliser.dtype).contiguous()
    kept, words = pack_linear_attention(
        query, key, value, key_mask, projection, out, normaliser, key_shift,
        is_causal, causal_offset, feature_map, scale,
    )  # fmt: skip
    words += pack_linear_attention_gradients(grad_out, dq, dk, dv, grad_normaliser)
    cpu._cpu.linear_attention_backward(words, torch.get_num_threads())
    del kept
    return dq, dk, dv
