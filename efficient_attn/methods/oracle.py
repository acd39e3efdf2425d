"""What a rank can do at best: the truncated singular value decomposition of the attention matrix, an analysis tool."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.call import accumulation_dtype
from ..errors import InputError, InputTypeError
from ..functional import attention_weights
from ..inputs import MaskLike, add_to_bias, check_key_mask, prepare_inputs, select_keys


class LowRankOracle(NamedTuple):
    """The result of `truncated_svd_attention`.

    out: (B, Hq, Nq, Dv), what the best approximation of rank r makes of the values.
    error: (B, Hq), |P - P_r| / |P| in the Frobenius norm, 0 for an empty P.
    """

    out: Tensor
    error: Tensor


@torch.no_grad()
def truncated_svd_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rank: int,
    *,
    key_mask: Tensor | None = None,
    mask: MaskLike = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
    scale: float | None = None,
) -> LowRankOracle:
    """Attention with P = softmax(scale Q K^T + bias) replaced by its best approximation of rank r, P_r.

    P_r keeps the r largest singular values of each head's P (Eckart and Young, 1936): no method whose weights have rank
    r, Linformer, Nystrom or Performer with r columns included, comes closer to P in the Frobenius norm. It says
    nothing about time: n x n memory and O(n^3), for some thousand tokens. No gradients.

    Args:
        rank: r >= 1; min(Nq, Nk) and beyond give exact attention.
        The others: as in `attention`; key_mask as in `efficient_attn.methods.lowrank`. All shape P, so any is allowed.

    Raises:
        InputError, InputTypeError: arguments that do not belong together.
    """
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise InputTypeError(f"rank must be an integer, got {rank!r}")
    if rank < 1:
        raise InputError(f"rank must be >= 1, got {rank}")
    query, key, value = prepare_inputs(query, key, value)
    check_key_mask(key_mask, key)
    if key_mask is not None:
        key, value = select_keys(key_mask, key, value)
        bias = add_to_bias(bias, key_mask, query)
    weights = attention_weights(
        query, key, mask=mask, bias=bias, is_causal=is_causal, causal_alignment=causal_alignment, scale=scale
    )
    dtype = accumulation_dtype(query.dtype)
    left, values, right = torch.linalg.svd(weights.to(dtype), full_matrices=False)
    expanded = value.to(dtype).repeat_interleave(query.shape[1] // max(value.shape[1], 1), dim=1)
    out = (left[..., :rank] * values[..., None, :rank]) @ (right[..., :rank, :] @ expanded)
    total = values.square().sum(-1)
    lost = values[..., rank:].square().sum(-1)
    error = torch.sqrt(lost / total.masked_fill(total == 0, 1.0))
    return LowRankOracle(out.to(query.dtype), error)
