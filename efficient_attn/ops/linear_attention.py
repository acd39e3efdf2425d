"""`efficient_attn::linear_attention_forward` and `efficient_attn::linear_attention_backward`.

Built like `ops.attention`: tensors and numbers only. Causal means that query i sees the keys j <= i + causal_offset.
The feature map is part of the operator, so that a kernel need not write the features to memory; a projection is not
differentiated. The backward operator has no derivative of its own: asking for one raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..backends.call import accumulation_dtype
from ..backends.features import MovingShift, key_shift_size
from ..errors import UnsupportedError
from ..tracing import without_autocast
from .operator import in_one_batch, one_by_one, register

# --- the kernels ---


def _forward(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, projection: Tensor | None,
    is_causal: bool, causal_offset: int, feature_map: str, scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    arguments = query, key, value, key_mask, projection, is_causal, causal_offset, feature_map, scale
    with without_autocast(value):  # the sums stay in the accumulation dtype
        try:
            return BACKENDS[backend].linear_attention.linear_attention_forward(*arguments)
        except MovingShift:  # of keys whose exponents span more than a kernel with one shift can hold
            return BACKENDS["reference"].linear_attention.linear_attention_forward(*arguments)


def _backward(
    grad_out: Tensor, grad_normaliser: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
    key_mask: Tensor | None, projection: Tensor | None, out: Tensor, normaliser: Tensor, key_shift: Tensor,
    is_causal: bool, causal_offset: int, feature_map: str, scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    arguments = (
        grad_out, grad_normaliser, query, key, value, key_mask, projection, out, normaliser, key_shift,
        is_causal, causal_offset, feature_map, scale,
    )  # fmt: skip
    with without_autocast(value):
        try:
            return BACKENDS[backend].linear_attention.linear_attention_backward(*arguments)
        except MovingShift:
            return BACKENDS["reference"].linear_attention.linear_attention_backward(*arguments)


def _forward_fake(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, projection: Tensor | None,
    is_causal: bool, causal_offset: int, feature_map: str, scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, dtype = query.shape[:3], accumulation_dtype(value.dtype)
    size = key_shift_size(query, key, projection, is_causal, feature_map)
    out = value.new_empty(*rows, value.shape[-1])
    return out, value.new_empty(rows, dtype=dtype), value.new_empty(*key.shape[:2], size, dtype=dtype)


def _backward_fake(
    grad_out: Tensor, grad_normaliser: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


# --- gradients ---


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.is_causal, ctx.causal_offset, ctx.feature_map, ctx.scale, ctx.backend = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _forward_grad(ctx: Any, grad_out: Tensor | None, grad_normaliser: Tensor | None, _: Any) -> tuple[Any, ...]:
    query, key, value, key_mask, projection, out, normaliser, key_shift = ctx.saved_tensors
    if ctx.needs_input_grad[4]:
        raise UnsupportedError("the projection of a fused feature map has no gradient; map the features first")
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    gradients = linear_attention_backward(
        grad_out, grad_normaliser, query, key, value, key_mask, projection, out, normaliser, key_shift,
        ctx.is_causal, ctx.causal_offset, ctx.feature_map, ctx.scale, ctx.backend,
    )  # fmt: skip
    wanted = ctx.needs_input_grad
    return (*(g if w else None for g, w in zip(gradients, wanted, strict=False)), *([None] * 7))


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Nothing is kept: there is no second derivative."""


def _backward_grad(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
    raise UnsupportedError(
        "linear attention has a first derivative only; a second one (create_graph=True) is not defined"
    )


# --- vmap ---


def _vmap(
    operator: Any, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...], tensors: int, projection: int
) -> tuple[Any, Any]:
    """Fold the mapped dimension into the batch of the first `tensors` arguments. The projection has no batch: mapped
    over it, the calls run one by one."""
    if args[projection] is not None and in_dims[projection] is not None:
        return one_by_one(operator, info, in_dims, args)
    return in_one_batch(operator, info, in_dims, args, set(range(tensors)) - {projection})


def _forward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    return _vmap(torch.ops.efficient_attn.linear_attention_forward, info, in_dims, args, 5, 4)


def _backward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    return _vmap(torch.ops.efficient_attn.linear_attention_backward, info, in_dims, args, 10, 6)


linear_attention_forward = register(
    "linear_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor? projection, "
    "bool is_causal, SymInt causal_offset, str feature_map, float scale, str backend) "
    "-> (Tensor out, Tensor normaliser, Tensor key_shift)",
    kernel=_forward, fake=_forward_fake, setup=_forward_setup, gradient=_forward_grad, vmap=_forward_vmap,
)  # fmt: skip
linear_attention_backward = register(
    "linear_attention_backward(Tensor grad_out, Tensor? grad_normaliser, Tensor query, Tensor key, Tensor value, "
    "Tensor? key_mask, Tensor? projection, Tensor out, Tensor normaliser, Tensor key_shift, bool is_causal, "
    "SymInt causal_offset, str feature_map, float scale, str backend) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    kernel=_backward, fake=_backward_fake, setup=_backward_setup, gradient=_backward_grad, vmap=_backward_vmap,
)  # fmt: skip
