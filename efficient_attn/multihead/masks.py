"""The masks of `torch.nn.MultiheadAttention`, True = leave out or numbers to add, as `Method.attend` takes them.

Letters: N batch, L queries, S keys, E embed_dim, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..inputs import may_read
from ..methods import Method
from ..tracing import shapes_only, unwrapped

_functional: Any = F  # the parent's own checks, private there, so that errors are the parent's too


def check_mask_dtype(name: str, mask: Tensor | None, other_name: str = "", other: Tensor | None = None) -> None:
    """Let PyTorch's own rule judge the dtype (an empty mask will do, so nothing of L x S is allocated)."""
    if mask is not None:
        _functional._canonical_mask(
            mask.new_empty(0),
            name,
            _functional._none_or_dtype(other),
            other_name,
            torch.float32,
            check_other=other is not None,
        )


def _as_bias(mask: Tensor, query: Tensor) -> Tensor:
    """A float mask in a dtype that `attention` takes; float32 beside half inputs stays, for -1e9 is -inf in float16."""
    if mask.dtype == torch.float32 and query.dtype in (torch.float16, torch.bfloat16):
        return mask
    return mask.to(query.dtype)


def _padding_as_bool(key_padding_mask: Tensor, method: Method) -> Tensor:
    """A float padding mask of 0 and -inf, which is what nn.TransformerEncoder makes of a bool one, as bool again."""
    padded = key_padding_mask == -torch.inf
    only_padding = (padded | (key_padding_mask == 0)).all()
    message = (
        f"attention={str(method)!r} cannot add a float key_padding_mask to its scores; it takes a bool mask, or a "
        "float one of 0 and -inf only"
    )
    if torch.compiler.is_compiling() or shapes_only(key_padding_mask):
        torch._assert_async(only_padding, message)
    elif not unwrapped(only_padding).all():  # for every sample of a vmap
        raise UnsupportedError(message)
    return padded


def read_masks(
    module: nn.MultiheadAttention,
    method: Method,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    q: Tensor,
    extra: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Turn the module's masks (True = leave out) into key_mask (N, S), mask (N|1, H|1, L, S) and bias for `attend`.

    Bool masks become True = attend, float masks become bias; the `extra` appended columns are always visible.
    """
    key_mask = mask = bias = None
    if attn_mask is not None:
        heads = (1, 1) if attn_mask.dim() == 2 else (q.shape[0], module.num_heads)
        attn_mask = attn_mask.reshape(*heads, *attn_mask.shape[-2:])
        if attn_mask.dtype == torch.bool:
            mask = F.pad(~attn_mask, (0, extra), value=True)
        else:
            bias = F.pad(_as_bias(attn_mask, q), (0, extra))
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask.reshape(q.shape[0], -1)
        if key_padding_mask.dtype != torch.bool and not method.accepts_bias:
            key_padding_mask = _padding_as_bool(key_padding_mask, method)
        elif key_padding_mask.dtype != torch.bool and method.counts_positions:
            # From the end of padding on the left: -inf is padding, as nn.TransformerEncoder writes it.
            padded = key_padding_mask == -torch.inf
            key_mask = F.pad(~padded, (0, extra), value=True)
            left = key_padding_mask.masked_fill(padded, 0.0)
            needed = left.requires_grad or not may_read(left) or bool(left.any())
            key_padding_mask = left if needed else None
        if key_padding_mask is None:
            pass
        elif key_padding_mask.dtype == torch.bool:
            key_mask = F.pad(~key_padding_mask, (0, extra), value=True)
        else:
            per_key = F.pad(_as_bias(key_padding_mask, q), (0, extra))[:, None, None, :]
            bias = per_key if bias is None else bias + per_key
    return key_mask, mask, bias


def fits(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> bool:
    """Whether sizes belong together; dimensions have been checked."""
    if (module.bias_k is None) != (module.bias_v is None):
        return False
    if (query.shape[-1], key.shape[-1], value.shape[-1]) != (module.embed_dim, module.kdim, module.vdim):
        return False
    lengths = 0 if query.dim() == 2 or not module.batch_first else 1
    N, L, S = 1, query.shape[lengths], key.shape[lengths]
    if query.dim() == 3:
        N = query.shape[1 - lengths]
        if key.shape[1 - lengths] != N:
            return False
    if key.shape[:-1] != value.shape[:-1]:
        return False
    if attn_mask is not None and attn_mask.shape not in ((L, S), (N * module.num_heads, L, S)):
        return False
    return key_padding_mask is None or key_padding_mask.shape in ((N, S), (S,))
