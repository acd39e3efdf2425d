"""`efficient_attn::attention_forward` and `efficient_attn::attention_backward`.

The operators take tensors and numbers only, so that torch.compile, torch.export and torch.func can see through a call
without knowing what a BlockMask is:

    block_lists   [] without a list, else [indptr, indices, tile_ids, tiles, t_indptr, t_indices, t_tile_ids]; the
                  transposed lists are there only when a gradient may be wanted
    block_shape   [batch, heads, block_q, block_k] of these lists
    window        [left, right, offset]; -1 is unlimited

The backward operator has a derivative of its own (double backward): it replays the reference formula on slices of
query rows, so that its memory is O(n) too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import BACKENDS, reference
from ..errors import UnsupportedError
from ..masks import MaskArrays

DOUBLE_BACKWARD_ROWS = 256  # query rows replayed at a time

_library = torch.library.Library("efficient_attn", "DEF")
_library.define(
    "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? kv_lengths, Tensor[] block_lists, "
    "SymInt[] block_shape, SymInt[] window, float scale, float dropout_p, Tensor? dropout_seed, str backend) "
    "-> (Tensor out, Tensor lse)"
)
_library.define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor? bias, "
    "Tensor out, Tensor lse, Tensor? kv_lengths, Tensor[] block_lists, SymInt[] block_shape, SymInt[] window, "
    "float scale, float dropout_p, Tensor? dropout_seed, bool bias_requires_grad, str backend) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)"
)


def mask_arrays(
    kv_lengths: Tensor | None, block_lists: Sequence[Tensor], block_shape: Sequence[int], window: Sequence[int]
) -> MaskArrays:
    """Rebuild what `operands` took apart."""
    lists = tuple(block_lists) + (None,) * (7 - len(block_lists))
    return MaskArrays(*block_shape, *lists, *window, kv_lengths)


def operands(arrays: MaskArrays) -> tuple[Tensor | None, list[Tensor], list[int], list[int]]:
    """Take a mask apart into kv_lengths, block_lists, block_shape and window, as the operators want it."""
    lists = [t for t in arrays[4:11] if t is not None]
    return arrays.kv_lengths, lists, list(arrays[:4]), list(arrays[11:14])


# --- the kernels -----------------------------------------------------------------------------------------------------


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    kv_lengths: Tensor | None,
    block_lists: Sequence[Tensor],
    block_shape: Sequence[int],
    window: Sequence[int],
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    mask = mask_arrays(kv_lengths, block_lists, block_shape, window)
    return BACKENDS[backend].attention_forward(query, key, value, bias, mask, scale, dropout_p, dropout_seed)


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kv_lengths: Tensor | None,
    block_lists: Sequence[Tensor],
    block_shape: Sequence[int],
    window: Sequence[int],
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    bias_requires_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask = mask_arrays(kv_lengths, block_lists, block_shape, window)
    dq, dk, dv, dbias = BACKENDS[backend].attention_backward(
        grad_out, grad_lse, query, key, value, bias, out, lse, mask, scale, dropout_p, dropout_seed, bias_requires_grad
    )
    return dq, dk, dv, query.new_empty(0) if dbias is None else dbias


_library.impl("attention_forward", _forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("efficient_attn::attention_forward", lib=_library)
def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, Hq, Nq, _D = query.shape
    lse_dtype = reference.accumulation_dtype(query.dtype)
    return query.new_empty(B, Hq, Nq, value.shape[-1]), query.new_empty(B, Hq, Nq, dtype=lse_dtype)


@torch.library.register_fake("efficient_attn::attention_backward", lib=_library)
def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias_requires_grad = rest[-2]
    dbias = bias.new_empty(bias.shape) if bias is not None and bias_requires_grad else query.new_empty(0)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), dbias


# --- gradients -------------------------------------------------------------------------------------------------------


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bias, kv_lengths, block_lists, *numbers, dropout_seed, backend = inputs
    ctx.save_for_backward(query, key, value, bias, *output, kv_lengths, dropout_seed, *block_lists)
    ctx.numbers, ctx.backend = numbers, backend
    ctx.bias_requires_grad = ctx.needs_input_grad[3]
    ctx.set_materialize_grads(False)


def _forward_grad(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    query, key, value, bias, out, lse, kv_lengths, dropout_seed, *block_lists = ctx.saved_tensors
    block_shape, window, scale, dropout_p = ctx.numbers
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    if len(block_lists) == 4:
        raise UnsupportedError(
            "this attention call was made without gradients in mind and kept no transposed block lists; "
            "call it with grad mode enabled and inputs that require a gradient"
        )
    dq, dk, dv, dbias = torch.ops.efficient_attn.attention_backward(
        grad_out, grad_lse, query, key, value, bias, out, lse, kv_lengths, block_lists, block_shape, window,
        scale, dropout_p, dropout_seed, ctx.bias_requires_grad, ctx.backend,
    )  # fmt: skip
    wanted = ctx.needs_input_grad
    return (
        dq if wanted[0] else None,
        dk if wanted[1] else None,
        dv if wanted[2] else None,
        dbias if ctx.bias_requires_grad else None,
        *([None] * 8),
    )


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, kv_lengths, block_lists, block_shape, window, scale, dropout_p, seed, bias_requires_grad, _ = inputs
    ctx.save_for_backward(*tensors, kv_lengths, seed, *block_lists)
    ctx.numbers = (block_shape, window, scale, dropout_p, bias_requires_grad)


def _backward_grad(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    """Vector-Jacobian product of the backward: autograd through the reference formula, one slice of rows at a time."""
    if torch.is_grad_enabled():
        raise UnsupportedError("attention has first and second derivatives; a third one (create_graph=True) is not defined")
    *tensors, kv_lengths, dropout_seed = ctx.saved_tensors[:10]
    block_shape, window, scale, dropout_p, bias_requires_grad = ctx.numbers
    mask = mask_arrays(kv_lengths, ctx.saved_tensors[10:], block_shape, window)
    leaves = [t.detach().requires_grad_() if t is not None else None for t in tensors]
    totals = [torch.zeros_like(t) if t is not None else None for t in tensors]
    cotangents = list(gradients) if bias_requires_grad else list(gradients[:3])
    for start in range(0, tensors[2].shape[2], DOUBLE_BACKWARD_ROWS):
        rows = slice(start, start + DOUBLE_BACKWARD_ROWS)
        with torch.enable_grad():
            grad_out, grad_lse, query, key, value, bias, out, lse = leaves
            results = reference.attention_backward(
                grad_out[:, :, rows], _rows(grad_lse, rows), query[:, :, rows], key, value, _rows(bias, rows),
                out[:, :, rows], lse[:, :, rows], mask, scale, dropout_p, dropout_seed, bias_requires_grad, start,
            )  # fmt: skip
        slices = [cotangents[0][:, :, rows], *cotangents[1:3], *(_rows(g, rows) for g in cotangents[3:])]
        inputs = [(k, leaf) for k, leaf in enumerate(leaves) if leaf is not None]
        found = torch.autograd.grad(results[: len(slices)], [leaf for _, leaf in inputs], slices, allow_unused=True)
        for (k, _), gradient in zip(inputs, found, strict=True):
            if gradient is not None:
                totals[k] += gradient
    return (*totals, *([None] * 9))


def _rows(tensor: Tensor | None, rows: slice) -> Tensor | None:
    """The given query rows of a bias (.., Nq, Nk) or lse (B, Hq, Nq); a broadcast bias row serves every slice."""
    if tensor is None or (tensor.dim() == 4 and tensor.shape[2] == 1):
        return tensor
    return tensor[:, :, rows]


torch.library.register_autograd(
    "efficient_attn::attention_forward", _forward_grad, setup_context=_forward_setup, lib=_library
)
torch.library.register_autograd(
    "efficient_attn::attention_backward", _backward_grad, setup_context=_backward_setup, lib=_library
)


# --- vmap ------------------------------------------------------------------------------------------------------------


def _one_by_one(operator: Any, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """Call `operator` for each element of the mapped dimension: right for any combination of mapped arguments."""

    def element(argument: Any, dim: Any, index: int) -> Any:
        if isinstance(argument, (list, tuple)):
            dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(argument)
            return [element(a, d, index) for a, d in zip(argument, dims, strict=True)]
        return argument if dim is None else argument.select(dim, index)

    results = [
        operator(*(element(a, d, index) for a, d in zip(args, in_dims, strict=True))) for index in range(info.batch_size)
    ]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])


@torch.library.register_vmap("efficient_attn::attention_forward", lib=_library)
def _forward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """Fold the mapped dimension into the batch where only query, key and value carry it, else call one by one."""
    operator = torch.ops.efficient_attn.attention_forward
    query, key, value, bias, kv_lengths, block_lists, block_shape, *rest = args
    dropout_p = rest[2]
    batched_mask = kv_lengths is not None or (len(block_lists) > 0 and block_shape[0] != 1)
    per_batch_bias = bias is not None and (in_dims[3] is not None or bias.shape[0] != 1)
    others = [d for dims in in_dims[4:] for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
    if batched_mask or per_batch_bias or dropout_p > 0.0 or any(d is not None for d in others):
        return _one_by_one(operator, info, in_dims, args)

    def fold(tensor: Tensor, dim: int | None) -> Tensor:
        tensor = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return tensor.flatten(0, 1)

    folded = [fold(tensor, dim) for tensor, dim in zip(args[:3], in_dims[:3], strict=True)]
    out, lse = operator(*folded, *args[3:])
    batch = (info.batch_size, out.shape[0] // info.batch_size)
    return (out.unflatten(0, batch), lse.unflatten(0, batch)), (0, 0)


@torch.library.register_vmap("efficient_attn::attention_backward", lib=_library)
def _backward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    return _one_by_one(torch.ops.efficient_attn.attention_backward, info, in_dims, args)
