"""Parameters and random features of methods, held by the layers of other libraries as their `method_state`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..methods import Method

LAYER_METHOD = (
    "efficient_attn_layer_method"  # attribute of a layer that has a method of its own, whatever its model has
)


def layer_state(method: Method, module: nn.Module, query: Tensor, key: Tensor) -> nn.Module | None:
    """The method's state for a layer, which holds it as `method_state` from its first call with queries on.

    Args:
        query, key: (..., Hq, Nq, D) and (..., Hkv, Nk, D), of that call.

    Raises:
        UnsupportedError: one state for all layers, or parameters that would appear while training.
    """
    if type(method).build is Method.build:
        return None
    held = getattr(module, "method_state", None)
    if isinstance(held, nn.Module) and getattr(module, "method_state_of", None) == method:
        return held
    if method.shares_state:
        raise UnsupportedError(
            f"layers of other libraries cannot share one state as {method} does; choose another share="
        )
    heads, head_dim = query.shape[-3], query.shape[-1]
    like = next((p for p in module.parameters() if p.is_floating_point()), query)
    with torch.inference_mode(False):  # else it could never be trained
        state = method.build(heads * head_dim, key.shape[-3], head_dim, device=like.device, dtype=like.dtype)
    if state is None:
        return None
    if module.training and torch.is_grad_enabled() and any(True for _ in state.parameters()):
        raise UnsupportedError(
            f"{method} has parameters, and an optimiser made before them would not train them; make them first with "
            "efficient_attn.convert(model, attention=..., sample=...)"
        )
    module.method_state, module.method_state_of = state.train(module.training), method  # type: ignore[assignment]
    return state


def state_restorer(model: nn.Module) -> Callable[[], None]:
    """A function that gives every layer in the model the state back that it has now; those without one lose theirs."""
    states: list[tuple[Any, Any, Any]] = [
        (m, m._modules.get("method_state"), vars(m).get("method_state_of")) for m in model.modules()
    ]

    def restore() -> None:
        for module, state, method in states:
            if state is None and vars(module).pop("method_state_of", None) is not None:
                del module.method_state
            elif method is not None:
                module.method_state, module.method_state_of = state, method

    return restore
