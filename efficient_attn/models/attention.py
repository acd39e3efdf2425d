"""One attention layer of the shared Transformer: projections around `Method.attend`, with grouped heads and a cache.

It is not this package's `MultiheadAttention`, whose interface is torch.nn's and has neither grouped heads, nor rotary
positions, nor a cache. Letters: B batch, N queries, M keys, E features, Hq and Hkv heads, D head_dim.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..biases import ALiBi, PositionBias, T5Bias
from ..errors import InputError, UnsupportedError
from ..inputs import check_softcap
from ..methods import Hybrid, Method, parse
from ..methods.base import keep_state
from ..methods.continuation import continuation
from ..methods.left_padding import attend_from_first, left_padding
from ..patterns import Pattern
from .cache import LayerCache
from .positions import rotate

POSITION_BIASES = ("none", "alibi", "t5")


class Attention(nn.Module):
    """Attention of tokens to each other, or (cross) to those of a memory.

    Args:
        dim: E.
        num_heads, num_kv_heads: Hq, and Hkv that divides it.
        causal: each token sees itself and those before.
        cross: keys and values come from a memory.
        dropout: of attention weights, in training.
        attention: a spec, `Method` or `Pattern`.
        softcap: None or c > 0: scores x become c tanh(x / c) (Gemma 2).
        sinks: learn a logit for each head that stands beside those of the keys and has no value (gpt-oss).
        position_bias: one of `POSITION_BIASES`: "alibi", the paper's slopes, or "t5", a learned table of 32 buckets.

    Attributes:
        attention: the `Method`; `set_attention` changes it.
        method_state: the method's own parameters, None for a method without any.

    Raises:
        InputError: a softcap or position bias that is none.
        UnsupportedError: causal with a method that cannot be; a softcap, sinks or a position bias with a method that
            knows none (low rank, hybrids).
    """

    attention: Method
    method_state: nn.Module | None
    sinks: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        causal: bool = False,
        cross: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        attention: str | Method | Pattern = "dense",
        softcap: float | None = None,
        sinks: bool = False,
        position_bias: str = "none",
    ) -> None:
        super().__init__()
        check_softcap(softcap)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, dim // num_heads
        self.causal, self.cross, self.dropout = causal, cross, dropout
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, num_kv_heads * self.head_dim, bias=bias)
        self.out_proj = nn.Linear(dim, dim, bias=bias)
        self.softcap = softcap
        self.register_parameter("sinks", nn.Parameter(torch.zeros(num_heads)) if sinks else None)
        self.position_bias = make_position_bias(position_bias, num_heads, causal)
        self.method_state = None
        self.set_attention(attention)

    def set_attention(self, attention: str | Method | Pattern, *, method_state: nn.Module | None = None) -> None:
        """Attend by another method from now on; the one that it has already keeps its parameters.

        Args:
            method_state: another layer's, to share it.
        """
        method = parse(attention)
        check_causal(method, self.causal)
        check_modifiers(method, self.softcap, self.sinks is not None, self.position_bias is not None)
        if method_state is None and getattr(self, "attention", None) == method:
            return
        if method_state is None:
            like = self.q_proj.weight
            method_state = method.build(
                self.num_heads * self.head_dim, self.num_kv_heads, self.head_dim, device=like.device, dtype=like.dtype
            )
        self.attention = method
        self.counts_positions = method.counts_positions  # looked up here, since torch.compile cannot read it there
        self.method_state = None if method_state is None else method_state.train(self.training)

    def forward(
        self,
        x: Tensor,
        *,
        memory: Tensor | None = None,
        key_mask: Tensor | None = None,
        turn: tuple[Tensor, Tensor] | None = None,
        cache: LayerCache | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            x: (B, N, E).
            memory: (B, M, E), with cross; not read again where the cache holds its keys.
            key_mask: bool (B, M), True = attend; M counts the tokens in the cache too.
            turn: what `Rotary` gives for the positions of x.
            cache: the keys and values of earlier tokens, to which those of x are added.

        Returns:
            (B, N, E), and weights (B, Hq, N, M) or None.
        """
        query = self._heads(self.q_proj(x), self.num_heads)
        if self.cross:
            key, value = self._of_memory(memory, cache)
        else:
            key, value = (self._heads(project(x), self.num_kv_heads) for project in (self.k_proj, self.v_proj))
            if turn is not None:
                query, key = rotate(query, turn), rotate(key, turn)
            if cache is not None:
                key, value = cache.append(key, value)
        out, weights = self._attend(query, key, value, key_mask, need_weights)
        return self.out_proj(out.transpose(1, 2).flatten(2)), weights

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        method = self.attention
        call: dict[str, Any] = {"key_mask": key_mask, "need_weights": need_weights, "is_causal": self.causal}
        if self.softcap is not None:
            call["softcap"] = self.softcap
        if self.sinks is not None:
            call["sinks"] = self.sinks
        if self.position_bias is not None:
            call["bias"] = self.position_bias()
        N, M = query.shape[2], key.shape[2]
        attend = method.attend if self.cross else functools.partial(attend_from_first, method)
        if self.causal and N != M:
            left = left_padding(key_mask) if method.counts_positions else None
            method, call["mask"] = continuation(
                method, N, M, num_heads=self.num_heads, first=M - N, left=left, device=query.device
            )
            call["causal_alignment"] = "bottom_right"
            attend = method.attend
        return attend(
            query, key, value, state=self.method_state, dropout_p=self.dropout if self.training else 0.0, **call
        )

    def _of_memory(self, memory: Tensor | None, cache: LayerCache | None) -> tuple[Tensor, Tensor]:
        """Keys and values of the memory, projected once for all steps of a generation."""
        if cache is not None and cache.memory is not None:
            return cache.memory
        if memory is None:
            raise UnsupportedError("a decoder with cross-attention needs memory=, the encoder's output")
        key, value = (self._heads(project(memory), self.num_kv_heads) for project in (self.k_proj, self.v_proj))
        if cache is not None:
            cache.memory = (key, value)
        return key, value

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        """(B, N, H D) -> (B, H, N, D), a view."""
        return x.view(*x.shape[:2], heads, self.head_dim).transpose(1, 2)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        keep_state(self.method_state, state_dict, prefix, local_metadata)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        kinds = [kind for kind, is_so in (("causal", self.causal), ("cross", self.cross)) if is_so]
        return ", ".join([f"heads={self.num_heads}/{self.num_kv_heads}", f"attention={str(self.attention)!r}", *kinds])


def make_position_bias(kind: str, num_heads: int, causal: bool) -> PositionBias | None:
    """The module of a kind in `POSITION_BIASES`; None for "none"."""
    if kind not in POSITION_BIASES:
        raise InputError(f"position_bias must be one of {', '.join(POSITION_BIASES)}; got {kind!r}")
    if kind == "none":
        return None
    if kind == "alibi":
        return PositionBias(ALiBi(ALiBi.usual_slopes(num_heads)))
    return PositionBias(T5Bias(torch.zeros(32, num_heads), bidirectional=not causal))


def check_modifiers(method: Method, softcap: float | None, sinks: bool, position_bias: bool) -> None:
    """Raise UnsupportedError for a method that does not know what is done to a layer's scores."""
    has = {"softcap": softcap is not None, "sinks": sinks, "position_bias": position_bias}
    found = [name for name, present in has.items() if present]
    if found and not method.accepts_modifiers:
        raise UnsupportedError(f"{' and '.join(found)} cannot be served by {method}; use dense or a sparse method")


def check_causal(method: Method, causal: bool) -> None:
    """Raise UnsupportedError for a method that a causal layer cannot have."""
    last = method.tail if isinstance(method, Hybrid) else method
    if causal and not last.accepts_causal:
        raise UnsupportedError(
            f"{method} cannot be causal, as this layer is: it mixes positions before it compares them. Use performer, "
            "linear or a sparse method"
        )
