"""`efficient_attn::attention_forward`, `attention_with_weights` and their one backward, `attention_backward`.

The second is the first that also returns the weights, (B, Hq | 1, Nq, Nk); the backward pays for a gradient of theirs
only where there is one. The operators take tensors and numbers only, so that torch.compile, torch.export and torch.func
can see through a call without knowing what a BlockMask is:

    indptr ... t_tile_ids   the lists of a MaskArrays; the transposed ones are there when a gradient may be wanted
    block_shape             [batch, heads, block_q, block_k] of these lists
    window                  [left, right, offset]; -1 is unlimited
    softcap                 0.0 is none
    sinks                   (Hq), and diagonals (1 | B, 1 | Hq, Nq + Nk - 1), see backends/reference

The backward operator has a derivative of its own (double backward), see second_derivative.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import BACKENDS
from ..backends.call import accumulation_dtype
from ..errors import UnsupportedError
from ..masks import MaskArrays
from ..masks.lists import BlockLists, Grid, transpose
from .operator import in_one_batch, one_by_one, register
from .second_derivative import backward_gradients, gradients

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))

MASK = (
    "SymInt[] block_shape, Tensor? indptr, Tensor? indices, Tensor? tile_ids, Tensor? tiles, "
    "Tensor? t_indptr, Tensor? t_indices, Tensor? t_tile_ids, SymInt[] window, Tensor? kv_lengths"
)
MASK_OPERANDS = 10
MODIFIERS = "float softcap, Tensor? sinks, Tensor? diagonals"


def mask_arrays(block_shape: Sequence[int], *lists_window_lengths: Any) -> MaskArrays:
    """Rebuild what `operands` took apart."""
    *lists, window, kv_lengths = lists_window_lengths
    fields: list[Any] = [*block_shape, *lists, *window, kv_lengths]
    return MaskArrays(*fields)


def operands(arrays: MaskArrays) -> tuple[Any, ...]:
    """Take a mask apart into the operands that the schema's `MASK` names."""
    return (list(arrays[:4]), *arrays[4:11], list(arrays[11:14]), arrays.kv_lengths)


# --- the kernels ---

# Backends that make a row's weights anew from its lse alone, and from where on half an ulp of it is no longer small.
FROM_LSE_ALONE = ("triton", "cuda")
COARSE_LSE = 2.0**10


def too_coarse(backend: str, bias: Tensor | None, diagonals: Tensor | None, lse: Tensor) -> bool:
    """Whether a bias that is one large number for all that a row sees has left its lse without digits.

    Asks the device, once, where there is a bias; a CUDA graph that is being recorded cannot be asked.
    """
    if (bias is None and diagonals is None) or backend not in FROM_LSE_ALONE:
        return False
    if lse.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return bool(((lse.abs() >= COARSE_LSE) & lse.isfinite()).any())


def _forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    *mask, scale, dropout_p, dropout_seed, softcap, sinks, diagonals, backend = rest
    forward = BACKENDS[backend].attention.attention_forward
    modifiers = (softcap, sinks, diagonals)
    return forward(query, key, value, bias, mask_arrays(*mask), scale, dropout_p, dropout_seed, *modifiers)


def _with_weights(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *mask, scale, dropout_p, dropout_seed, average, softcap, sinks, diagonals, backend = rest
    call = (mask_arrays(*mask), scale, dropout_p, dropout_seed, average, softcap, sinks, diagonals)
    arguments = (query, key, value, bias, *call)
    found: tuple[Tensor, ...] = BACKENDS[backend].attention.attention_with_weights(*arguments)
    if too_coarse(backend, bias, diagonals, found[1]):
        return (*found[:2], BACKENDS["reference"].attention.attention_with_weights(*arguments)[2])
    return found


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, grad_weights: Tensor | None, query: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    key, value, bias, out, lse, *options, backend = rest
    tensors = (grad_out, grad_lse, grad_weights, query, key, value, bias, out, lse)
    call = (mask_arrays(*options[:MASK_OPERANDS]), *options[MASK_OPERANDS:])
    found: Any
    if too_coarse(backend, bias, call[7], lse):
        found = gradients(tensors, *call)
    else:
        found = BACKENDS[backend].attention.attention_backward(*tensors, *call)
    return tuple(query.new_empty(0) if gradient is None else gradient for gradient in found)


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, Hq, Nq, _D = query.shape
    lse_dtype = accumulation_dtype(query.dtype)
    return query.new_empty(B, Hq, Nq, value.shape[-1]), query.new_empty(B, Hq, Nq, dtype=lse_dtype)


def _with_weights_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    average = rest[1 + MASK_OPERANDS + 3]
    B, Hq, Nq, _D = query.shape
    return *_forward_fake(query, key, value), query.new_empty(B, 1 if average else Hq, Nq, key.shape[2])


def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    bias_requires_grad, _softcap, sinks, diagonals, diagonals_require_grad, _backend = rest[-6:]
    wanted = (bias if bias_requires_grad else None, sinks, diagonals if diagonals_require_grad else None)
    results = (query.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in wanted)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), *results


# --- gradients ---


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, (block_shape, *lists, window, kv_lengths) = inputs[:4], inputs[4 : 4 + MASK_OPERANDS]
    scale, dropout_p, dropout_seed, *_, softcap, sinks, diagonals, backend = inputs[4 + MASK_OPERANDS :]
    ctx.save_for_backward(*tensors, *output[:2], *lists, kv_lengths, dropout_seed, sinks, diagonals)
    needs = ctx.needs_input_grad[: len(inputs)]  # torch.library appends what is its own
    ctx.numbers = (block_shape, window, scale, dropout_p, needs[3], softcap, needs[-2], backend)
    ctx.count = len(needs)
    ctx.set_materialize_grads(False)


def _forward_grad(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, grad_weights: Tensor | None = None
) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    query, key, value, bias, out, lse, *lists, kv_lengths, dropout_seed, sinks, diagonals = saved
    block_shape, window, scale, dropout_p, bias_requires_grad, softcap, diagonals_require_grad, backend = ctx.numbers
    no_values = grad_out is None and grad_weights is not None
    if no_values:  # as if the values had one column: the products with them cost next to nothing
        wide, value, out = value, value[..., :1], out[..., :1]
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    if lists[0] is not None and lists[4] is None and BACKENDS[backend].NEEDS_TRANSPOSED:
        batch, heads, block_q, block_k = block_shape
        grid = Grid(query.shape[2], key.shape[2], block_q, block_k)
        lists[4:] = transpose(BlockLists(batch, heads, *lists[:4]), grid)
    others = (grad_lse, grad_weights, *saved)
    backward = _backward if goes_back_plainly(grad_out, *others) else attention_backward
    dq, dk, dv, dbias, dsinks, ddiagonals = backward(
        grad_out, grad_lse, grad_weights, query, key, value, bias, out, lse, block_shape, *lists, window, kv_lengths,
        scale, dropout_p, dropout_seed, bias_requires_grad, softcap, sinks, diagonals, diagonals_require_grad, backend,
    )  # fmt: skip
    if no_values:
        dv = torch.zeros_like(wide) if ctx.needs_input_grad[2] else None
    dsinks = None if sinks is None else dsinks
    ddiagonals = ddiagonals if diagonals_require_grad else None
    between = [None] * (ctx.count - 7)
    return dq, dk, dv, dbias if bias_requires_grad else None, *between, dsinks, ddiagonals, None


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, (block_shape, *lists, window, kv_lengths) = inputs[:9], inputs[9 : 9 + MASK_OPERANDS]
    scale, dropout_p, dropout_seed, *modifiers = inputs[9 + MASK_OPERANDS :]
    bias_requires_grad, softcap, sinks, diagonals, diagonals_require_grad, _ = modifiers
    ctx.save_for_backward(*tensors, sinks, diagonals, *lists, kv_lengths, dropout_seed)
    ctx.numbers = (block_shape, window, scale, dropout_p, bias_requires_grad, softcap, diagonals_require_grad)


def _backward_grad(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    """Vector-Jacobian product of the backward."""
    if torch.is_grad_enabled():
        raise UnsupportedError(
            "attention has first and second derivatives; a third one, or torch.func.grad inside torch.func.grad, is "
            "not defined. Second derivatives: torch.autograd.grad with create_graph=True, once"
        )
    *tensors, kv_lengths, dropout_seed = ctx.saved_tensors
    tensors, lists = tensors[:11], tensors[11:]
    block_shape, window, *numbers = ctx.numbers
    mask = mask_arrays(block_shape, *lists, window, kv_lengths)
    *totals, sinks, diagonals = backward_gradients(tensors, gradients, mask, dropout_seed, *numbers)
    return *totals, *([None] * (MASK_OPERANDS + 5)), sinks, diagonals, None, None


# --- vmap ---


def _forward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    return _folded(torch.ops.efficient_attn.attention_forward, info, in_dims, args)


def _with_weights_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    return _folded(torch.ops.efficient_attn.attention_with_weights, info, in_dims, args)


def _folded(operator: Any, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """Fold the mapped dimension into the batch where only query, key and value carry it, else call one by one."""
    bias, block_shape, indptr = args[3:6]
    kv_lengths, _scale, dropout_p = args[3 + MASK_OPERANDS : 6 + MASK_OPERANDS]
    diagonals = args[-2]
    per_batch = kv_lengths is not None or (indptr is not None and block_shape[0] != 1) or dropout_p > 0.0
    per_batch |= bias is not None and (in_dims[3] is not None or bias.shape[0] != 1)
    per_batch |= diagonals is not None and (in_dims[-2] is not None or diagonals.shape[0] != 1)
    mapped = [dim for argument, dim in zip(args[4:], in_dims[4:], strict=True) if isinstance(argument, Tensor)]
    if per_batch or any(dim is not None for dim in mapped):
        return one_by_one(operator, info, in_dims, args)
    return in_one_batch(operator, info, in_dims, args, range(3))


def _backward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    return one_by_one(torch.ops.efficient_attn.attention_backward, info, in_dims, args)


attention_forward = register(
    f"attention_forward(Tensor query, Tensor key, Tensor value, Tensor? bias, {MASK}, "
    f"float scale, float dropout_p, Tensor? dropout_seed, {MODIFIERS}, str backend) -> (Tensor out, Tensor lse)",
    kernel=_forward, fake=_forward_fake, setup=_forward_setup, gradient=_forward_grad, vmap=_forward_vmap,
)  # fmt: skip
attention_with_weights = register(
    f"attention_with_weights(Tensor query, Tensor key, Tensor value, Tensor? bias, {MASK}, "
    f"float scale, float dropout_p, Tensor? dropout_seed, bool average, {MODIFIERS}, str backend) "
    "-> (Tensor out, Tensor lse, Tensor weights)",
    kernel=_with_weights, fake=_with_weights_fake, setup=_forward_setup, gradient=_forward_grad,
    vmap=_with_weights_vmap,
)  # fmt: skip
attention_backward = register(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor? grad_weights, Tensor query, Tensor key, "
    f"Tensor value, Tensor? bias, Tensor out, Tensor lse, {MASK}, float scale, float dropout_p, Tensor? dropout_seed, "
    f"bool bias_requires_grad, {MODIFIERS}, bool diagonals_require_grad, str backend) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks, Tensor ddiagonals)",
    kernel=_backward, fake=_backward_fake, setup=_backward_setup, gradient=_backward_grad, vmap=_backward_vmap,
)  # fmt: skip


# --- the way past the dispatcher ---


class _Direct(torch.autograd.Function):
    """`attention_forward` with its gradient, for tensors that are plain: an operator written in Python takes longer to
    pass the dispatcher than a short call to compute."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, arrays: MaskArrays,
        scale: float, dropout_p: float, dropout_seed: Tensor | None, softcap: float, sinks: Tensor | None,
        diagonals: Tensor | None, backend: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        forward = BACKENDS[backend].attention.attention_forward
        options = (scale, dropout_p, dropout_seed, softcap, sinks, diagonals)
        output: tuple[Tensor, Tensor] = forward(query, key, value, bias, arrays, *options)
        _forward_setup(ctx, (query, key, value, bias, *operands(arrays), *options, backend), output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        return _forward_grad(ctx, grad_out, grad_lse)


def direct_attention(*operands: Any) -> tuple[Tensor, Tensor]:
    """`attention_forward` with a gradient, on tensors that are plain; the mask comes as its arrays."""
    results: tuple[Tensor, Tensor] = _Direct.apply(*operands)
    return results


def goes_back_plainly(grad: Tensor, *tensors: Tensor | None) -> bool:
    """Whether a backward can pass the dispatcher by: nobody differentiates it, and it is of one gradient.

    With is_grads_batched=True autograd gives it many, in a tensor that looks plain.
    """
    batched = torch._C._functorch.is_legacy_batchedtensor(grad)
    return not batched and not torch.is_grad_enabled() and is_plain(grad, *tensors)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether a call on these tensors can pass the dispatcher by: no subclass, transformation, mode, tracer or profiler
    would see anything of it."""
    return is_only_watched(*tensors) and not (
        torch._C._len_torch_function_stack() or torch._C._autograd._profiler_enabled()
    )


def is_only_watched(*tensors: Tensor | None) -> bool:
    """Whether nothing but a profiler and modes of torch functions, such as a default device, stands against passing the
    dispatcher by: see `watched`."""
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:  # a loop: a generator costs a short call as much as all that is asked here
        if type(tensor) not in _PLAIN or (tensor is not None and (tensor.is_neg() or tensor.is_meta)):
            return False  # is_neg: a view whose sign the dispatcher turns
    return not (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


@contextmanager
def watched(name: str) -> Iterator[None]:
    """A range that profilers see by its name, and in which modes of torch functions see and change nothing."""
    with torch._C.DisableTorchFunction(), torch.autograd.profiler.record_function(f"efficient_attn::{name}"):
        yield
