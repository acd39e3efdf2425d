"""Attention modules of other libraries whose forward calls scaled_dot_product_attention: that call gets a method.

Projections, norms, rotary positions, gates and output stay the module's own code; `route` lets its forward run inside a
TorchFunctionMode that serves this one call, see torch_sdpa.py. So known are, by the library that a class comes from,

    timm        every attention with `fused_attn`, such as Attention and AttentionRope
    open_clip   Attention of its custom blocks (its other blocks hold nn.MultiheadAttention)
    diffusers   every attention with a processor, whatever processor it has
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedError
from ..methods import DENSE, Method
from .layer_state import layer_state
from .torch_sdpa import SDPAMode


class LayerMode(SDPAMode):
    """The calls of one attention layer, which holds the method's state.

    Attributes:
        reached: whether a call has come.
    """

    def __init__(self, layer: nn.Module, method: Method, *, cross: bool = False) -> None:
        super().__init__(method)
        self.layer, self.cross, self.reached = layer, cross, False

    def method_for(self, call: dict[str, Any]) -> Method:
        """The method, or dense for queries that attend to something else: a pattern says nothing about that."""
        self.reached = True
        if self.method.is_dense or call["query"].is_nested:
            return self.method
        return DENSE if self.cross or call["query"].shape[-2] != call["key"].shape[-2] else self.method

    def state_for(self, method: Method, query: Tensor, key: Tensor) -> nn.Module | None:
        return layer_state(method, self.layer, query, key)


def library_of(module: nn.Module) -> str | None:
    """The library whose attention a module is, of those that `route` knows."""
    for cls in type(module).__mro__:
        library, _, place = cls.__module__.partition(".")
        if library == "timm" and isinstance(getattr(module, "fused_attn", None), bool):
            return library
        if library == "open_clip" and cls.__name__ == "Attention":
            return library
        if library == "diffusers" and place.startswith("models.") and hasattr(module, "set_processor"):
            return library
    return None


def why_not_routed(module: nn.Module) -> str | None:
    """Why `route` cannot serve a module that `library_of` knows, or None."""
    if getattr(module, "logit_scale", None) is not None:
        return f"{type(module).__qualname__} with a learned scale of its scores (scaled cosine attention)"
    return None


def route(module: nn.Module, method: Method) -> Callable[[], None]:
    """Give a module's call of scaled_dot_product_attention a method, in place. Returns what undoes it."""
    held: dict[str, Any] = vars(module)
    names = ("forward", "efficient_attn_method", "fused_attn")
    old = {name: held[name] for name in names if name in held}
    if not is_routed(module):
        own = held.get("forward")  # set on the instance, as tools that wrap modules do
        module.forward = functools.partial(_routed_forward, module, own)
    module.efficient_attn_method = method  # type: ignore[assignment]
    if isinstance(held.get("fused_attn"), bool):
        module.fused_attn = True  # type: ignore[assignment]

    def undo() -> None:
        for name in names:
            held.pop(name, None)
        held.update(old)

    return undo


def is_routed(module: nn.Module) -> bool:
    """Whether `route` has given the module a method."""
    return "efficient_attn_method" in vars(module)


def _routed_forward(module: nn.Module, own: Callable[..., Any] | None, /, *args: Any, **kwargs: Any) -> Any:
    """A module's forward, its attention served by the method that it holds."""
    held: Any = module
    method: Method = held.efficient_attn_method
    mode = LayerMode(module, method, cross=bool(getattr(module, "is_cross_attention", False)))
    with mode:  # torch.compile loses its attributes behind an `as`
        result = type(module).forward(module, *args, **kwargs) if own is None else own(*args, **kwargs)
    if not mode.reached:
        raise UnsupportedError(
            f"{type(module).__qualname__} did not call scaled_dot_product_attention, so {method} had no effect; leave "
            "it out with convert(predicate=...)"
        )
    return result
