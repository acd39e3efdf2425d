"""`efficient_attn::pattern_attention`: attention by a pattern that is a union of parts, as one operator.

The lists of a mask are operands of the other operators, which torch.compile traces; orders of tokens are not, and a
mask of all pairs takes many times as long. So a compiled program holds the pattern itself, as its JSON, and asks for
the plan, which is kept, when it runs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .backends import BACKENDS
from .backends.call import accumulation_dtype
from .errors import UnsupportedError
from .inputs import MaskLike
from .masks import BlockMask, PartedMask
from .ops.operator import in_one_batch, one_by_one, register
from .ops.union import Parts, backward_by_parts, union_forward
from .patterns import Pattern, past_of


def pattern_of(mask: MaskLike, is_causal: bool, alignment: str | None) -> str:
    """The JSON of a pattern that a compiled call shall hold as that; empty for other masks."""
    if not isinstance(mask, Pattern) or not mask.has_orders or not torch.compiler.is_compiling():
        return ""
    if torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active():
        return (
            ""  # exported programs hold operators that other runtimes know; torch.func may ask for a second derivative
        )
    return (past_of(mask, alignment) if is_causal else mask.aligned(alignment)).to_json()


@functools.lru_cache(maxsize=64)
def _pattern(text: str) -> Pattern:
    return Pattern.from_json(text)


def _mask(text: str, query: Tensor, key: Tensor) -> BlockMask:
    return _pattern(text).block_mask(query.shape[2], key.shape[2], num_heads=query.shape[1], device=query.device)


def _parts(mask: BlockMask, backend: str, transposed: bool) -> Parts | None:
    if not isinstance(mask, PartedMask) or not BACKENDS[backend].TAKES_ORDERS:
        return None
    return Parts(mask, mask.part_arrays(transposed), backend)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, pattern: str, scale: float, dropout_p: float,
    dropout_seed: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    mask = _mask(pattern, query, key)
    parts = _parts(mask, backend, False)
    if parts is not None:
        return union_forward(query, key, value, None, parts, scale, dropout_p, dropout_seed)
    forward = BACKENDS[backend].attention.attention_forward
    found: tuple[Tensor, Tensor] = forward(query, key, value, None, mask.arrays(), scale, dropout_p, dropout_seed)
    return found


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    pattern: str, scale: float, dropout_p: float, dropout_seed: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    mask, transposed = _mask(pattern, query, key), BACKENDS[backend].NEEDS_TRANSPOSED
    tensors = [query, key, value, None, out, lse]
    last = (scale, dropout_p, dropout_seed, False)
    parts = _parts(mask, backend, transposed)
    found: Any
    if parts is not None:
        found = backward_by_parts(grad_out, grad_lse, tensors, parts, last)
    else:
        backward = BACKENDS[backend].attention.attention_backward
        found = backward(grad_out, grad_lse, None, *tensors, mask.arrays(transposed), *last)
    return found[0], found[1], found[2]


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = query.shape[:3]
    return query.new_empty(*shape, value.shape[-1]), query.new_empty(shape, dtype=accumulation_dtype(query.dtype))


def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, pattern, scale, dropout_p, dropout_seed, backend = inputs
    ctx.save_for_backward(query, key, value, *output, dropout_seed)
    ctx.call = pattern, scale, dropout_p, backend
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    query, key, value, out, lse, dropout_seed = ctx.saved_tensors
    pattern, scale, dropout_p, backend = ctx.call
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    gradients = pattern_attention_backward(
        grad_out, grad_lse, query, key, value, out, lse, pattern, scale, dropout_p, dropout_seed, backend
    )
    return *gradients, None, None, None, None, None


def _no_second(ctx: Any, *_: Any) -> Any:
    raise UnsupportedError(
        "a compiled call by a pattern has a first derivative; for a second one do not compile it, or give the mask as "
        "pattern.block_mask(...)"
    )


def _forward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    mapped = torch.ops.efficient_attn.pattern_attention
    drops = args[5] > 0.0  # by the number of a batch element
    return one_by_one(mapped, info, in_dims, args) if drops else in_one_batch(mapped, info, in_dims, args, range(3))


def _backward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    return one_by_one(torch.ops.efficient_attn.pattern_attention_backward, info, in_dims, args)


_OPTIONS = "str pattern, float scale, float dropout_p, Tensor? dropout_seed, str backend"
pattern_attention = register(
    f"pattern_attention(Tensor query, Tensor key, Tensor value, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    kernel=_forward, fake=_forward_fake, setup=_setup, gradient=_gradient, vmap=_forward_vmap,
)  # fmt: skip
pattern_attention_backward = register(
    "pattern_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor lse, {_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv)",
    kernel=_backward, fake=_backward_fake, setup=lambda *_: None, gradient=_no_second, vmap=_backward_vmap,
)  # fmt: skip
