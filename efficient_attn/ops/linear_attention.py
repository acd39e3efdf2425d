"""`efficient_attn::linear_attention_forward` and `efficient_attn::linear_attention_backward`.

Built like `ops.attention`: tensors and numbers only. Causal means that query i sees the keys j <= i + causal_offset.
The backward operator has no derivative of its own: asking for one raises.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..backends import reference_linear, triton_linear
from ..backends.reference import accumulation_dtype
from ..errors import InputError, UnsupportedError

BACKENDS: dict[str, ModuleType] = {"triton": triton_linear, "reference": reference_linear}

_library = torch.library.Library("efficient_attn", "FRAGMENT")
_library.define(
    "linear_attention_forward(Tensor query_features, Tensor key_features, Tensor value, Tensor? key_mask, "
    "bool is_causal, SymInt causal_offset, str backend) -> (Tensor out, Tensor normaliser)"
)
_library.define(
    "linear_attention_backward(Tensor grad_out, Tensor? grad_normaliser, Tensor query_features, Tensor key_features, "
    "Tensor value, Tensor? key_mask, Tensor out, Tensor normaliser, bool is_causal, SymInt causal_offset, str backend) "
    "-> (Tensor dq, Tensor dk, Tensor dv)"
)


def not_supported_reasons(query_features: Tensor, key_features: Tensor, value: Tensor) -> dict[str, list[str]]:
    """Every backend with the reasons why it cannot serve; an empty list means that it can."""
    return {
        name: module.not_supported_reasons(query_features, key_features, value) for name, module in BACKENDS.items()
    }


def select(backend: str, query_features: Tensor, key_features: Tensor, value: Tensor) -> str:
    """The backend that will serve: the one asked for, or with "auto" the first that can (on CPU tensors the
    definition).

    Raises InputError for an unknown name and UnsupportedError, with the reasons, when the one asked for cannot serve.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise InputError(f"backend={backend!r} does not exist for linear attention; choose from {['auto', *BACKENDS]}")
    reasons = not_supported_reasons(query_features, key_features, value)
    if backend == "auto":
        return "reference" if value.device.type == "cpu" or reasons["triton"] else "triton"
    if reasons[backend]:
        raise UnsupportedError(
            f"backend={backend!r} cannot serve this call: {'; '.join(reasons[backend])}. "
            "Use backend='auto' or 'reference'"
        )
    return backend


# --- the kernels -----------------------------------------------------------------------------------------------------


def _forward(
    query_features: Tensor,
    key_features: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    is_causal: bool,
    causal_offset: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(value.device.type, enabled=False):  # the sums stay in the accumulation dtype
        return BACKENDS[backend].linear_attention_forward(
            query_features, key_features, value, key_mask, is_causal, causal_offset
        )


def _backward(
    grad_out: Tensor,
    grad_normaliser: Tensor | None,
    query_features: Tensor,
    key_features: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    normaliser: Tensor,
    is_causal: bool,
    causal_offset: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(value.device.type, enabled=False):
        return BACKENDS[backend].linear_attention_backward(
            grad_out, grad_normaliser, query_features, key_features, value, key_mask, out, normaliser,
            is_causal, causal_offset,
        )  # fmt: skip


_library.impl("linear_attention_forward", _forward, "CompositeExplicitAutograd")
_library.impl("linear_attention_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("efficient_attn::linear_attention_forward", lib=_library)
def _forward_fake(query_features: Tensor, key_features: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows = query_features.shape[:3]
    out = value.new_empty(*rows, value.shape[-1])
    return out, value.new_empty(rows, dtype=accumulation_dtype(value.dtype))


@torch.library.register_fake("efficient_attn::linear_attention_backward", lib=_library)
def _backward_fake(
    grad_out: Tensor,
    grad_normaliser: Tensor | None,
    query_features: Tensor,
    key_features: Tensor,
    value: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        query_features.new_empty(query_features.shape),
        key_features.new_empty(key_features.shape),
        value.new_empty(value.shape),
    )


# --- gradients -------------------------------------------------------------------------------------------------------


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.is_causal, ctx.causal_offset, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _forward_grad(ctx: Any, grad_out: Tensor | None, grad_normaliser: Tensor | None) -> tuple[Any, ...]:
    query_features, key_features, value, key_mask, out, normaliser = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    gradients = torch.ops.efficient_attn.linear_attention_backward(
        grad_out, grad_normaliser, query_features, key_features, value, key_mask, out, normaliser,
        ctx.is_causal, ctx.causal_offset, ctx.backend,
    )  # fmt: skip
    wanted = ctx.needs_input_grad
    return (*(g if w else None for g, w in zip(gradients, wanted, strict=False)), *([None] * 4))


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Nothing is kept: there is no second derivative."""


def _backward_grad(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
    raise UnsupportedError(
        "linear attention has a first derivative only; a second one (create_graph=True) is not defined"
    )


torch.library.register_autograd(
    "efficient_attn::linear_attention_forward", _forward_grad, setup_context=_forward_setup, lib=_library
)
torch.library.register_autograd(
    "efficient_attn::linear_attention_backward", _backward_grad, setup_context=_backward_setup, lib=_library
)


# --- vmap: the mapped dimension joins the batch ----------------------------------------------------------------------


def _mapped(operator: Any, tensors: int) -> Any:
    """A vmap rule for an operator whose first `tensors` arguments have the batch as their first dimension."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        def fold(tensor: Tensor | None, dim: int | None) -> Tensor | None:
            if tensor is None:
                return None
            tensor = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            return tensor.flatten(0, 1)

        folded = [fold(tensor, dim) for tensor, dim in zip(args[:tensors], in_dims[:tensors], strict=True)]
        results = operator(*folded, *args[tensors:])
        return tuple(r.unflatten(0, (info.batch_size, r.shape[0] // info.batch_size)) for r in results), (0,) * len(
            results
        )

    return rule


torch.library.register_vmap(
    "efficient_attn::linear_attention_forward",
    _mapped(torch.ops.efficient_attn.linear_attention_forward, 4),
    lib=_library,
)
torch.library.register_vmap(
    "efficient_attn::linear_attention_backward",
    _mapped(torch.ops.efficient_attn.linear_attention_backward, 8),
    lib=_library,
)
