"""Statistics of the weights that a method applies: those of its mask, or of the matrix that it multiplies values with.

The output of a low-rank method is linear in the values, out = W V, so that what W adds up to is known without it: W^T r
is the gradient of sum_i r_i out_i for values of one column, and the share of a set of keys, or of a column of blocks of
the map, is attention whose value is the set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import biases
from ..backends.call import accumulation_dtype
from ..biases import BiasLike
from ..errors import InputError, UnsupportedError
from ..inputs import causal_mask
from ..methods import Method, Sparse
from ..methods.buckets import bucketed_inputs
from ..patterns import BucketPattern
from .statistics import (
    WANT,
    AttentionStatistics,
    attention_statistics,
    check_want,
    sets_of_keys,
    weightings_of_rows,
)

LINEAR_WANT = ("received", "map", "shares")  # what is known of a matrix through its products
COLUMNS = 64  # of the map, in one product


def method_statistics(
    method: Method,
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    *,
    state: nn.Module | None = None,
    key_mask: Tensor | None = None,
    mask: Any = None,
    bias: BiasLike = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    want: Sequence[str] | None = None,
    **options: Any,
) -> AttentionStatistics:
    """`attention_statistics` of the weights that `method.attend` applies; `state` is what `method.build` returned.

    Sparse methods have every statistic. Of low-rank and hybrid methods, whose weights may be negative and whose rows
    need not add up to 1, "received", "map" and "shares" are defined; None as `want` takes what there is.

    Raises:
        InputError: names that are no statistics; as `attention_statistics`.
        UnsupportedError: a statistic that needs the weights of a low-rank method one by one; softcap, sinks or a
            structured bias with a method that does not know them.
    """
    places: dict[str, Any] = {
        "key_mask": key_mask, "bias": bias, "is_causal": is_causal, "causal_alignment": causal_alignment, "scale": scale
    }  # fmt: skip
    modifiers: dict[str, Any] = {"softcap": softcap, "sinks": sinks}
    check_want(() if want is None else want)
    if isinstance(method, Sparse):
        method.pattern.check_scores(bias, softcap)
        query, key, mask, places["bias"] = pairs(method, query, key, mask=mask, **places)
        wanted = WANT if want is None else want
        if want is None and causal_alignment is None and query.shape[2] != key.shape[2]:
            wanted = [name for name in WANT if name != "distance"]
        found: AttentionStatistics = attention_statistics(
            query, key, value, mask=mask, want=wanted, **places, **modifiers, **options
        )
        return found
    undefined = [name for name in want or () if name not in LINEAR_WANT]
    if undefined:
        raise UnsupportedError(
            f"{undefined} need the weights of {method} one by one; {list(LINEAR_WANT)} are known without n x n memory"
        )
    arguments = {"mask": mask, **places, **modifiers}
    return _of_products(method, query, key, state, LINEAR_WANT if want is None else want, arguments, options)


def pairs(
    method: Sparse,
    query: Tensor,
    key: Tensor,
    *,
    key_mask: Tensor | None = None,
    mask: Any = None,
    bias: BiasLike = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Any, BiasLike]:
    """The query, key, mask and bias with which `attention` does what a sparse method does, padding and causality aside.

    Raises: what `method.attend` raises.
    """
    method.check_call(query, key, key_mask, is_causal, causal_alignment)
    if method.is_dense:
        return query, key, mask, bias
    counted = key_mask
    dense, structured = biases.split(bias)
    if method.by_content:
        mask, counted = method.seen(query, key, key_mask, mask, dense, is_causal, causal_alignment, scale)
    if isinstance(method.pattern, BucketPattern):
        query, key, _ = bucketed_inputs(method.pattern, query, key, key, counted)
    causal = causal_mask(query.shape[2], key.shape[2], is_causal, causal_alignment)
    mask, dense = method.restricted(
        mask, dense, query, key, scale=scale, key_mask=counted, causal=causal, alignment=causal_alignment
    )
    return query, key, mask, biases.join(dense, structured)


def _of_products(
    method: Method, query: Tensor, key: Tensor, state: nn.Module | None, want: Sequence[str],
    arguments: dict[str, Any], options: dict[str, Any],
) -> AttentionStatistics:  # fmt: skip
    (B, Hq, Nq, _), (_, Hkv, Nk, _) = query.shape, key.shape
    dtype = accumulation_dtype(query.dtype)
    row_weights = options.get("row_weights")
    sets = sets_of_keys(options.get("key_sets"), B, Nk, key.device) if "shares" in want else {}
    rows = torch.ones(1, B, Hq, Nq, dtype=dtype, device=query.device)
    if row_weights is not None:
        rows = torch.cat([rows, weightings_of_rows(row_weights, query)])
    arguments = {name: argument for name, argument in arguments.items() if argument is not None}
    groups = Hq // Hkv
    received = rows.new_zeros(rows.shape[0], B, Hq, Nk)
    shares = rows.new_zeros(B, Hq, Nq, len(sets))
    size = options.get("map_block", 64)
    if size < 1:
        raise InputError(f"map_block must be at least 1; got {size}")
    cells = rows.new_zeros(B, Hq, -(-Nq // size), -(-Nk // size)) if "map" in want else None
    for member in range(groups):  # one query head of each group at a time: products know only the sum over a group
        heads = slice(member, None, groups)
        value = key.new_zeros(B, Hkv, Nk, 1).requires_grad_()
        with torch.enable_grad():
            out, _ = method.attend(query[:, heads].detach(), key.detach(), value, state=state, **arguments)
        for number, weighting in enumerate(rows):
            grown = weighting[:, heads, :, None].to(out.dtype)
            (gradient,) = torch.autograd.grad(out, value, grown, retain_graph=True)
            received[number, :, heads] = gradient[..., 0].to(dtype)
        if sets:
            members = torch.stack([s.expand(B, -1) for s in sets.values()], -1)[:, None].to(key.dtype)
            with torch.no_grad():
                part, _ = method.attend(query[:, heads], key, members.expand(-1, Hkv, -1, -1), state=state, **arguments)
            shares[:, heads] = part.to(dtype)
        if cells is not None:
            for first in range(0, cells.shape[3], COLUMNS):
                columns = torch.arange(first, min(first + COLUMNS, cells.shape[3]), device=key.device)
                block = (torch.arange(Nk, device=key.device)[:, None] // size == columns).to(key.dtype)
                with torch.no_grad():
                    part, _ = method.attend(
                        query[:, heads], key, block.expand(B, Hkv, -1, -1), state=state, **arguments
                    )
                sums = F.pad(part.to(dtype), (0, 0, 0, -Nq % size)).unflatten(2, (-1, size)).sum(3)
                cells[:, heads, :, columns[0] : columns[-1] + 1] = sums
    return AttentionStatistics(
        lse=rows.new_full((B, Hq, Nq), torch.nan),
        entropy=None, top_weights=None, top_keys=None, distance=None, nearby=None, map=cells,
        received=received[0] if "received" in want else None,
        received_weighted=received[1:] if row_weights is not None else None,
        shares={name: shares[..., n] for n, name in enumerate(sets)} if sets else None,
    )  # fmt: skip
