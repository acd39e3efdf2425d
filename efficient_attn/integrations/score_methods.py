"""Layers of transformers past its attention interface whose scores are one method, `_attn`: that method is served.

Projections, rotary positions, caches and output stay the layer's own code. So known are

    GPTJAttention, CodeGenAttention, GPTNeoXJapaneseAttention    scores of their own scale
    GPTNeoSelfAttention, ImageGPTAttention                       and a causal or local mask of their own

Such models make their mask as a tensor, (B, 1, Nq, Nk) of numbers that are added to scores; that stays as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import Method
from . import huggingface

# class -> the factor of its scores
SCALES: dict[str, Callable[[Any], float]] = {
    "GPTJAttention": lambda layer: 1.0 / float(layer.scale_attn),
    "CodeGenAttention": lambda layer: 1.0 / float(layer.scale_attn),
    "GPTNeoXJapaneseAttention": lambda layer: 1.0 / float(layer.norm_factor),
    "GPTNeoSelfAttention": lambda layer: 1.0,
    "ImageGPTAttention": lambda layer: (
        (float(layer.head_dim) ** -0.5 if layer.scale_attn_weights else 1.0)
        / (float(layer.layer_idx + 1) if layer.scale_attn_by_inverse_layer_idx else 1.0)
    ),
}
MASKED = ("GPTNeoSelfAttention", "ImageGPTAttention")  # with a bool buffer `bias`, the pairs that a query may see


def kind_of(module: nn.Module) -> str | None:
    """The name in the table above that a layer is of, or None."""
    for cls in type(module).__mro__:
        if cls.__name__ in SCALES and cls.__module__.startswith("transformers."):
            return cls.__name__
    return None


def serve(module: nn.Module, method: Method) -> Callable[[], None]:
    """Give a layer's `_attn` a method, in place. Returns what undoes it."""
    held: dict[str, Any] = vars(module)
    names = ("_attn", "efficient_attn_method", "efficient_attn_weights")
    old = {name: held[name] for name in names if name in held}
    held |= {"_attn": functools.partial(_attend, module), "efficient_attn_method": method}
    hook = module.register_forward_pre_hook(_remember_request, with_kwargs=True)

    def undo() -> None:
        hook.remove()
        for name in names:
            held.pop(name, None)
        held.update(old)

    return undo


def _remember_request(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Whether this forward returns weights, which `_attn` is not told."""
    vars(layer)["efficient_attn_weights"] = bool(kwargs.get("output_attentions"))


def _attend(
    layer: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """What `_attn` returns: out (B, H, Nq, D), and the weights where the model was asked for them."""
    kind = kind_of(layer)
    assert kind is not None
    Nq, Nk = query.shape[2], key.shape[2]
    if kind in MASKED and not getattr(layer, "is_cross_attention", False):
        own = layer.bias[:, :, Nk - Nq : Nk, :Nk]
        if attention_mask is None:
            attention_mask = own
        else:
            attention_mask = attention_mask.masked_fill(~own, torch.finfo(attention_mask.dtype).min)
    dropout = getattr(layer, "attn_dropout", None) or getattr(layer, "attention_dropout", None)
    out, weights = huggingface.attend(
        layer.efficient_attn_method, layer, query.to(value.dtype), key.to(value.dtype), value, attention_mask,
        dropout=dropout.p if isinstance(dropout, nn.Dropout) and layer.training else 0.0, scaling=SCALES[kind](layer),
        is_causal=False, output_attentions=vars(layer).get("efficient_attn_weights", False),
    )  # fmt: skip
    return out.transpose(1, 2), weights
