"""The forward of one attention layer that writes its attention out: which of its products are scores, see scores.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..methods import Method
from .lazy import Lazy
from .routed import LayerMode
from .scores import Scores, letters

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "num_attn_heads", "num_attention_head")
ZEROS_FIRST = ("GPTNeoXJapaneseAttention",)  # add their product to zeros, which take no memory here


class ScoreMode(LayerMode):
    """The forward of one attention layer: its products of queries and keys, and its calls of PyTorch's attention.

    Attributes:
        cached: whether its keys come from a cache.
        weights: whether the caller wants the attention weights.
    """

    def __init__(self, layer: nn.Module, method: Method, *, cross: bool, cached: bool, weights: bool) -> None:
        super().__init__(layer, method, cross=cross)
        self.cached, self.weights, self.paused = cached, weights, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused or any(issubclass(kind, Lazy) for kind in types):
            return func(*args, **kwargs)
        if func is torch.zeros and len(args) == 3 and type(self.layer).__name__ in ZEROS_FIRST:  # (B Hq, Nq, Nk)
            return torch.zeros((), **kwargs).expand(args)
        made = _product(self, getattr(func, "__name__", ""), args, kwargs)
        if made is not None:
            return made
        if func is F.multi_head_attention_forward and not kwargs.get("need_weights", True):
            return super().__torch_function__(func, types, args, kwargs)
        if func is F.multi_head_attention_forward:
            if self.weights:
                raise UnsupportedError(
                    f"{type(self.layer).__qualname__} returns averaged weights, which it does not have when "
                    "efficient_attn serves it; leave output_attentions out"
                )
            return super().__torch_function__(func, types, args, {**kwargs, "need_weights": False})
        return super().__torch_function__(func, types, args, kwargs)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """A range in which products are made, as in our own code."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before


def _product(mode: ScoreMode, name: str, args: Any, kwargs: Any) -> Scores | None:
    """The scores that a product of two tensors, with at least three dimensions, may be; None for what is no such."""
    name = name.strip("_")
    if name in ("matmul", "bmm"):
        a, b = args[0], args[1] if len(args) > 1 else kwargs.get("other", kwargs.get("mat2"))
        return _made(mode, a, b.transpose(-1, -2)) if _fits(a, b) else None
    if name == "baddbmm":
        base, a, b = (*args, *(kwargs[n] for n in ("batch1", "batch2") if n in kwargs))[:3]
        if not _fits(a, b):
            return None
        made = _made(mode, a, b.transpose(-1, -2)).scaled(kwargs.get("alpha", 1))
        beta = kwargs.get("beta", 1)
        if beta == 0 or (base.dim() == 3 and base.stride() == (0, 0, 0)):
            return made
        with mode.pause():
            return made.plus(base if beta == 1 else base * beta)
    if name == "einsum" and len(args) == 3:
        return _einsum(mode, *args)
    return None


def _fits(a: Any, b: Any) -> bool:
    both = isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() == b.dim() >= 3
    return both and a.shape[-1] == b.shape[-2] and a.is_floating_point() and a.numel() > 0 and b.numel() > 0


def _made(mode: ScoreMode, query: Tensor, key: Tensor) -> Scores:
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    heads = next((n for n in (getattr(mode.layer, name, None) for name in HEADS) if isinstance(n, int)), 1)
    made = Scores(mode, query, key, lead)
    if len(lead) == 1 and heads > 1 and lead[0] % heads == 0 and query.shape[0] == key.shape[0]:
        return replace(made.stored((lead[0] // heads, heads)), lead=tuple(lead))
    return made


def _einsum(mode: ScoreMode, equation: str, a: Any, b: Any) -> Scores | None:
    """Scores of a product such as "bind,bjnd->bnij", whose last two letters are free."""
    left, right, out = letters(equation)
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or len(out) < 3 or "." in equation:
        return None
    batch = out[:-2]
    summed = [x for x in left if x in right and x not in out]
    if any(x not in left or x not in right for x in batch) or len(summed) != 1:
        return None
    if set(left) != {*batch, out[-2], *summed} or set(right) != {*batch, out[-1], *summed}:
        return None
    query = a.permute([left.index(x) for x in (*batch, out[-2], *summed)])
    return _made(mode, query, b.permute([right.index(x) for x in (*batch, out[-1], *summed)]))
