"""How many floating-point operations our operators count for, in torch.utils.flop_counter.FlopCounterMode.

As PyTorch's own formulas they count matrix products alone, a multiply-add as two. Exact attention counts the pairs of
the blocks that it visits, B * Hq * pairs at the mask's block size (128 x 128 where a mask has no lists): listed blocks
that window and lengths touch, cut off where the sequences end, with every pair inside, also those that the mask hides.

    forward    2 pairs (D + Dv)            S = QK^T, O = PV
    backward   2 pairs (3 D + 2 Dv)        S again, dP = dO V^T, dV = P^T dO, dQ = dS K, dK = dS^T Q

Weights that are returned are of this S, and their gradient adds to this dP: they count nothing more.

Linear attention counts what its formula needs, F features and the normaliser as one more column of the values; causal
calls count as much, though their kernels add the triangles of their chunks:

    forward    2 F (Dv + 1) (queries + keys)        + 2 F D (queries + keys) for a projection
    backward   2 F (Dv + 1) (2 queries + 3 keys)    + twice that
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import register_flop_formula

from ..masks import MaskArrays, algebra
from ..masks.lists import BlockLists, Grid
from . import linear_attention as _linear_attention  # noqa: F401  (an operator exists before its formula)
from .attention import MASK_OPERANDS, mask_arrays


def visited_pairs(arrays: MaskArrays, batch: int, heads: int, q_len: int, kv_len: int) -> int:
    """Pairs of a call in the blocks that the mask's lists, window and lengths let a kernel visit, hidden ones included.

    Where values cannot be read (fake and meta tensors) every listed block counts in full, and lengths are ignored: an
    upper bound.
    """
    grid = Grid(q_len, kv_len, arrays.block_q, arrays.block_k)
    readable = not any(_valueless(t) for t in (arrays.indptr, arrays.kv_lengths) if t is not None)
    if arrays.indices is not None and not readable:
        listed = arrays.indices.shape[0] * grid.block_q * grid.block_k
        return listed * (batch // max(arrays.batch, 1)) * (heads // max(arrays.heads, 1))
    lists = None
    if arrays.indptr is not None:
        assert arrays.indices is not None and arrays.tile_ids is not None and arrays.tiles is not None
        lists = BlockLists(arrays.batch, arrays.heads, arrays.indptr, arrays.indices, arrays.tile_ids, arrays.tiles)
    window = (
        None if arrays.window_left < 0 else arrays.window_offset - arrays.window_left,
        None if arrays.window_right < 0 else arrays.window_offset + arrays.window_right,
    )
    with _disable_current_modes():  # what counts must not be counted, or turned into fakes
        lengths = arrays.kv_lengths
        if lengths is None or not readable:
            lengths = torch.tensor([kv_len], device=None if lists is None else lists.indptr.device)
        counted = algebra.visited_pairs(grid, lists, window, lengths.long())
    found_batch = lengths.numel() if lists is None else max(lengths.numel(), lists.batch)
    found_heads = 1 if lists is None else lists.heads
    return counted * (batch // max(found_batch, 1)) * (heads // max(found_heads, 1))


def attention_flops(arrays: MaskArrays, query: Any, value: Any, *, backward: bool = False) -> int:
    """Operations of exact attention for query (B, Hq, Nq, D) and value (B, Hkv, Nk, Dv), which have shapes."""
    B, Hq, Nq, D = query.shape
    Nk, Dv = value.shape[2:]
    pairs = visited_pairs(arrays, B, Hq, Nq, Nk)
    return 2 * pairs * (3 * D + 2 * Dv if backward else D + Dv)


def linear_attention_flops(query: Any, key: Any, value: Any, projection: Any, *, backward: bool = False) -> int:
    """Operations of linear attention for query (B, Hq, Nq, D), key (B, Hkv, Nk, D), value (B, Hkv, Nk, Dv) and a
    projection (F, D), (Hkv, F, D) or None, for which F is D."""
    B, Hq, Nq, D = query.shape
    Hkv, Nk, Dv = value.shape[1:]
    queries, keys = B * Hq * Nq, B * Hkv * Nk
    features = D if projection is None else projection.shape[-2]
    projected = 0 if projection is None else 2 * features * D * (queries + keys)
    if backward:
        return 2 * features * (Dv + 1) * (2 * queries + 3 * keys) + 2 * projected
    return 2 * features * (Dv + 1) * (queries + keys) + projected


def _valueless(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or tensor.device.type == "meta"


# --- what the counter asks: the operators' own arguments, and what they returned ---


@register_flop_formula(torch.ops.efficient_attn.attention_forward, get_raw=True)
def _attention_forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *rest: Any, out_val: Any) -> int:
    return attention_flops(mask_arrays(*rest[:MASK_OPERANDS]), query, value)


@register_flop_formula(torch.ops.efficient_attn.attention_with_weights, get_raw=True)
def _attention_with_weights(query: Tensor, key: Tensor, value: Tensor, *rest: Any, out_val: Any) -> int:
    return attention_flops(mask_arrays(*rest[1 : 1 + MASK_OPERANDS]), query, value)


@register_flop_formula(torch.ops.efficient_attn.attention_backward, get_raw=True)
def _attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, grad_weights: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
    *rest: Any, out_val: Any,
) -> int:  # fmt: skip
    return attention_flops(mask_arrays(*rest[3 : 3 + MASK_OPERANDS]), query, value, backward=True)


@register_flop_formula(torch.ops.efficient_attn.linear_attention_forward, get_raw=True)
def _linear_attention_forward(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, projection: Tensor | None, *rest: Any,
    out_val: Any,
) -> int:  # fmt: skip
    return linear_attention_flops(query, key, value, projection)


@register_flop_formula(torch.ops.efficient_attn.linear_attention_backward, get_raw=True)
def _linear_attention_backward(
    grad_out: Tensor, grad_normaliser: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
    key_mask: Tensor | None, projection: Tensor | None, *rest: Any, out_val: Any,
) -> int:  # fmt: skip
    return linear_attention_flops(query, key, value, projection, backward=True)
