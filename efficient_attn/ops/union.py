"""Attention over a union of disjoint parts, each in its own order of tokens: one call of a backend for each part.

    out_i = sum_p exp(lse_p(i) - lse(i)) out_p(i)        lse(i) = log sum_p exp(lse_p(i))

Backwards every part is a call with the joined out and lse, and gradients add up: with delta_i = dout_i . out_i - dlse_i
of the joined rows, P_ij = exp(s_ij - lse_i) and all that follows from it are those of the whole softmax. Parts are
joined in their order, so that the bits are the same each time.

An lse of 1e4 has no digit left for the shares of parts that differ by 1e-4: a row whose lse is beyond COARSE_LSE,
as a bias of finfo.min makes it, is computed by the mask without parts; the others keep their bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..masks import MaskArrays, PartedMask
from .attention import attention_backward, is_only_watched, operands, too_coarse, watched

COARSE_LSE = 1024.0  # where kernels stop to trust it, too (csrc/cpu/attention_backward_rows.h)


class Parts(NamedTuple):
    """A union as a call takes it."""

    mask: PartedMask
    arrays: tuple[MaskArrays, ...]  # of its parts, as the backend reads them
    backend: str


def union_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    parts: Parts,
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out and lse of a union, on plain tensors (see `is_plain`); differentiable twice."""
    found: tuple[Tensor, Tensor] = _Union.apply(query, key, value, bias, parts, scale, dropout_p, dropout_seed)
    return found


def union_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    parts: Parts,
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same without a gradient."""
    backend = BACKENDS[parts.backend]
    forward = backend.attention.attention_forward
    out, lse = forward(query, key, value, bias, parts.arrays[0], scale, dropout_p, dropout_seed)
    for arrays in parts.arrays[1:]:
        rows = _few_rows(arrays, query) if bias is None and dropout_p == 0.0 else None
        if rows is None and backend.JOINS_PARTS:
            forward(query, key, value, bias, arrays, scale, dropout_p, dropout_seed, joined=(out, lse))
        elif rows is None:
            join(out, lse, *forward(query, key, value, bias, arrays, scale, dropout_p, dropout_seed))
        else:  # a result for all rows would cost more than the part
            few = forward(
                query.index_select(2, rows), key, value, None, arrays._replace(query_order=None), scale, 0.0, None
            )
            own = out.index_select(2, rows), lse.index_select(2, rows)
            join(*own, *few)
            out.index_copy_(2, rows, own[0])
            lse.index_copy_(2, rows, own[1])
    return mended(query, key, value, bias, parts, scale, dropout_p, dropout_seed, out, lse)


def mended(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, parts: Parts, scale: float, dropout_p: float,
    dropout_seed: Tensor | None, out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The joined results, with those of the mask without parts where lse is too coarse to join by."""
    coarse = _coarse_rows(lse, bias, parts)
    if coarse is None:
        return out, lse
    forward = BACKENDS[parts.backend].attention.attention_forward
    whole = forward(query, key, value, bias, parts.mask.arrays(), scale, dropout_p, dropout_seed)
    return torch.where(coarse[..., None], whole[0], out), torch.where(coarse, whole[1], lse)


def forward_of_pointers(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, parts: Parts, scale: float
) -> Callable[[int, int, int, int, int, int, int], None] | None:
    """The forward before it is mended, as `backends.cpu.attention.forward_of_pointers` has that of one mask."""
    one = BACKENDS[parts.backend].attention.forward_of_pointers
    runs: list[Any] = [
        None if n and _few_rows(arrays, query) is not None else one(query, key, value, out, arrays, scale, joined=n > 0)
        for n, arrays in enumerate(parts.arrays)
    ]
    if any(run is None for run in runs):
        return None

    def forward(*addresses: int) -> None:
        for run in runs:
            run(*addresses)

    return forward


def _few_rows(arrays: MaskArrays, query: Tensor) -> Tensor | None:
    """The queries (B, H, N, D) that a part names, if they are few and the same in every head."""
    order = arrays.query_order
    if order is None or order.shape[0] > 1 or 4 * order.shape[1] > query.shape[2]:
        return None
    return order[0].long()


def _coarse_rows(lse: Tensor, bias: Tensor | None, parts: Parts) -> Tensor | None:
    """The rows (B, H, N) whose lse is too large to join parts by; -inf is that of a row that sees nothing."""
    # Without a bias a row's scores are themselves of few digits, and the answer is not worth a wait for the GPU.
    if len(parts.arrays) == 1 or (lse.is_cuda and bias is None):
        return None
    coarse = (lse.abs() >= COARSE_LSE) & (lse != -torch.inf)
    return coarse if bool(coarse.any()) else None


def join(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Join another part (B, H, N, Dv), (B, H, N) into out and lse, in place."""
    share = torch.sigmoid(other_lse - lse)  # of the other part
    share.masked_fill_((lse == -torch.inf) & (other_lse == -torch.inf), 0.0)
    out.mul_((1.0 - share)[..., None]).addcmul_(other, share[..., None])
    torch.logaddexp(lse, other_lse, out=lse)


class _Union(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, parts: Parts,
        scale: float, dropout_p: float, dropout_seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, lse = union_forward(query, key, value, bias, parts, scale, dropout_p, dropout_seed)
        ctx.save_for_backward(query, key, value, bias, out, lse, dropout_seed)
        ctx.numbers = (parts, scale, dropout_p, ctx.needs_input_grad[3])
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        *tensors, dropout_seed = ctx.saved_tensors
        parts, scale, dropout_p, bias_requires_grad = ctx.numbers
        grad_out = torch.zeros_like(tensors[4]) if grad_out is None else grad_out
        last = (scale, dropout_p, dropout_seed, bias_requires_grad)
        totals: Any
        differentiated = torch.is_grad_enabled() or not is_only_watched(grad_out, grad_lse, *tensors)
        if differentiated or too_coarse(parts.backend, tensors[3], None, tensors[5]):
            whole = operands(parts.mask.arrays(BACKENDS[parts.backend].NEEDS_TRANSPOSED))  # has a derivative again
            call = (grad_out, grad_lse, None, *tensors, *whole, *last, 0.0, None, None, False, parts.backend)
            totals = attention_backward(*call)
        else:
            with watched("union_attention_backward"):
                totals = backward_by_parts(grad_out, grad_lse, tensors, parts, last)
        return *totals[:3], totals[3] if bias_requires_grad else None, None, None, None, None


def backward_by_parts(
    grad_out: Tensor, grad_lse: Tensor | None, tensors: list[Any], parts: Parts, last: tuple[Any, ...]
) -> Any:
    """The gradients of query, key, value and bias. tensors: these four, out and lse; last: scale, dropout_p,
    dropout_seed and whether the bias wants one."""
    backend = BACKENDS[parts.backend]
    backward = backend.attention.attention_backward
    coarse = _coarse_rows(tensors[5], tensors[3], parts)
    of_rows = [(grad_out, grad_lse, arrays) for arrays in parts.arrays]
    if coarse is not None:  # each row has its gradient from one of the two
        whole = parts.mask.arrays(backend.NEEDS_TRANSPOSED)
        rest, own = (_only(rows, grad_out, grad_lse) for rows in (~coarse, coarse))
        of_rows = [*((*rest, arrays) for arrays in parts.arrays), (*own, whole)]
    (do, dlse, arrays), *others = of_rows
    totals: Any = backward(do, dlse, None, *tensors, arrays, *last)
    for do, dlse, arrays in others:
        into: dict[str, Any] = {"added_to": totals[:3]} if backend.JOINS_PARTS else {}
        gradients = backward(do, dlse, None, *tensors, arrays, *last, **into)
        for total, gradient in zip(totals, gradients, strict=True):
            if total is not None and total is not gradient:
                total.add_(gradient)
    return totals


def _only(rows: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of some rows (B, H, N) alone."""
    return grad_out.masked_fill(~rows[..., None], 0.0), None if grad_lse is None else grad_lse.masked_fill(~rows, 0.0)
