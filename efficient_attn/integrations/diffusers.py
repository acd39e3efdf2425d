"""diffusers: a processor that computes attention by a method of this package, for `set_attn_processor`.

    unet.set_attn_processor(processors(unet, "sliding_window:left=64,right=64"))    # each layer keeps its own processor
    unet.set_attn_processor(EfficientAttnProcessor())                               # dense, around AttnProcessor2_0

`efficient_attn.convert` does the same without a processor, with a report, and reversibly.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import InputError, InputTypeError, UnsupportedError
from ..methods import Method, parse
from ..patterns import Pattern
from .routed import LayerMode


class _Call:
    """`__call__` with the signature of the processor within, from which diffusers learns what it may pass."""

    def __get__(self, processor: Any, owner: Any = None) -> Any:
        if processor is None:
            return self
        return functools.update_wrapper(functools.partial(_call, processor), processor.processor.__call__)


class EfficientAttnProcessor:
    """A processor of diffusers whose one call of scaled_dot_product_attention is served by a method.

    Everything around that call, projections, norms, masks and residuals, is done by the processor within. Queries that
    attend to something else, as to a text, do so by dense attention: patterns and low-rank methods are for
    self-attention. A method's parameters are held by the layer, as its `method_state`.

    Args:
        attention: a spec string, `Method` or `Pattern`.
        processor: the processor within; default diffusers' AttnProcessor2_0, right for layers of a UNet or a DiT. For
            models whose layers have others (SD3, Flux ...) use `processors`.

    Raises:
        UnsupportedError: diffusers is not installed. A call raises it for what the method cannot do, and for a
            processor that does not call scaled_dot_product_attention (xformers, sliced).
        InputTypeError: a processor that cannot be called.
    """

    __call__ = _Call()

    def __init__(self, attention: str | Method | Pattern = "dense", processor: Any = None) -> None:
        self.attention = parse(attention)
        if processor is None:
            if importlib.util.find_spec("diffusers") is None:
                raise UnsupportedError("diffusers is not installed; pip install 'efficient-attn[diffusers]'")
            from diffusers.models.attention_processor import AttnProcessor2_0

            processor = AttnProcessor2_0()
        if not callable(processor):
            raise InputTypeError(f"a processor is called with (attn, hidden_states, ...); got {processor!r}")
        self.processor = processor


def _call(processor: EfficientAttnProcessor, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
    within: Any = processor.processor
    mode = LayerMode(attn, processor.attention, cross=bool(getattr(attn, "is_cross_attention", False)))
    with mode:
        result = within(attn, *args, **kwargs)
    if not mode.reached:
        raise UnsupportedError(
            f"{type(within).__qualname__} did not call scaled_dot_product_attention, so {processor.attention} had no "
            "effect; set the model's default processors first"
        )
    return result


def processors(
    model: Any, attention: str | Method | Pattern | Mapping[str, str | Method | Pattern] = "dense"
) -> dict[str, Any]:
    """A processor for each attention layer of a model of diffusers, around the one that it has, for set_attn_processor.

    Args:
        model: with `attn_processors`, as UNets and transformers of diffusers have.
        attention: for every layer; or for some, by names in `attn_processors` ("mid_block....processor"). The others
            keep what they have.

    Raises:
        InputError: a model without attention processors, or names that it does not have.
    """
    held = getattr(model, "attn_processors", None)
    if not isinstance(held, Mapping) or not held:
        raise InputError(f"{type(model).__name__} has no attn_processors; pass a UNet or transformer of diffusers")
    wanted = attention if isinstance(attention, Mapping) else dict.fromkeys(held, attention)
    unknown = sorted(set(wanted) - set(held))
    if unknown:
        raise InputError(f"the model has no {', '.join(unknown)}; it has {', '.join(held)}")
    found = dict(held)
    for name, spec in wanted.items():
        own = held[name]
        found[name] = EfficientAttnProcessor(spec, own.processor if isinstance(own, EfficientAttnProcessor) else own)
    return found
