"""Dense attention as plain PyTorch operations, for torch.jit.trace and the ONNX exporter that stands on it.

A traced program holds the operations that ran on the sample, and runs them on other lengths, paddings and masks. So
nothing here is decided by a value or a length: masks are made by operations on sizes, which are tensors while tracing.
It is (Nq, Nk) memory, and runs wherever PyTorch does, without this package. What no query may see is kept out by its
score alone here: a NaN in a hidden key or value reaches every query, but for padding (key_mask), which is set to 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UnsupportedError


def check_traceable(mask: object, dropout_p: float, return_lse: bool) -> None:
    """Raise UnsupportedError for what a traced program would hold as it was in the sample."""
    refused = None
    if mask is not None and not (isinstance(mask, Tensor) and mask.dtype == torch.bool):
        refused = f"mask={type(mask).__name__}: what it shows is that of one length"
    elif dropout_p > 0.0:
        refused = "dropout, which would drop the same pairs in every call"
    elif return_lse:
        refused = "return_lse=True"
    if refused is not None:
        raise UnsupportedError(
            f"torch.jit.trace cannot record {refused}. Trace dense attention in eval mode, with a bool tensor as mask, "
            "key_mask, bias or is_causal; or use torch.export or torch.compile"
        )


def traced_attention(
    query: Tensor,  # (B, Hq, Nq, D)
    key: Tensor,  # (B, Hkv, Nk, D)
    value: Tensor,  # (B, Hkv, Nk, Dv)
    *,
    mask: Tensor | None,  # bool, broadcasts to (B, Hq, Nq, Nk)
    bias: Tensor | None,  # each dimension 1 or full, of (B, Hq, Nq, Nk)
    is_causal: bool,
    from_end: bool,
    scale: float,
    groups: int,
) -> Tensor:
    """`attention` on checked inputs, (B, Hq, Nq, Dv). from_end: the diagonal of is_causal ends in the last corner."""
    if groups > 1:
        key, value = (t[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for t in (key, value))
    visible = mask
    if is_causal:
        Nq, Nk = query.shape[2], key.shape[2]
        i, j = (torch.arange(n, device=query.device) for n in (Nq, Nk))
        last = i + (Nk - Nq) if from_end else i
        causal = j <= last[:, None]
        visible = causal if visible is None else visible & causal
    if bias is not None:
        shown = bias != -torch.inf
        visible = shown if visible is None else visible & shown
    if visible is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    empty = ~visible.any(-1, keepdim=True)  # a softmax over nothing is NaN: such a row sees all, and is set to 0
    allowed = torch.zeros((), dtype=query.dtype, device=query.device) if bias is None else bias
    scores = torch.where(visible, allowed, -torch.inf).masked_fill(empty, 0.0)
    dtype = query.dtype
    query, key, value = (t.to(scores.dtype) for t in (query, key, value))  # beside halves, -1e9 needs float32
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=scores, scale=scale)
    return out.to(dtype).masked_fill(empty, 0.0)
