"""The one Transformer of all reference models: encoder, causal decoder, and decoder that also reads a memory.

    x -> num_layers times [attention, (cross-attention,) MLP, each with a residual connection and a norm] -> (norm) -> x

norm_first puts the norm before each part (GPT-2, ViT), else after the residual connection (BERT, Marian). Embeddings,
positions and heads belong to the models. Letters: B batch, N tokens, M tokens of the memory, E features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import sharding
from ..errors import InputError, InputTypeError, UnsupportedError
from ..inputs import MAX_HEAD_DIM, check_softcap
from ..methods import Method, parse
from ..patterns import Pattern
from .attention import POSITION_BIASES, Attention, check_causal, check_modifiers
from .cache import Cache, LayerCache
from .positions import Rotary

Spec: TypeAlias = str | Method | Pattern
Specs: TypeAlias = str | Method | Pattern | Sequence[str | Method | Pattern]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes and kinds of a `Transformer`.

    Fields:
        hidden_dim: E.
        num_layers, num_heads: heads divide E.
        num_kv_heads: of keys and values, None: num_heads; fewer are shared by groups of query heads.
        mlp_dim: hidden features of the MLP, None: 4 E.
        activation: one of `ACTIVATIONS`.
        norm_first: norm before each part, else after it.
        final_norm: norm at the end, None: as norm_first.
        norm_eps: epsilon of each LayerNorm.
        dropout: of what each part adds; attention_dropout: of attention weights; activation_dropout: in the MLP.
        bias: whether the linear layers have one.
        causal: each token sees itself and those before.
        cross_attention: each layer also attends to a memory.
        attention: a spec for all layers, or a tuple with one a layer; given as `Method` or `Pattern`, kept as text.
        memory_attention: the same for the cross-attention.
        rotary: rotary positions in each layer; rotary_base: their base.
        softcap, sinks, position_bias: what each self-attention does to its scores, see `Attention`.

    Raises:
        InputError, InputTypeError: values out of range, or specs that cannot be read.
        UnsupportedError: causal, softcap, sinks or position_bias with an attention that does not know it.
    """

    hidden_dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    mlp_dim: int | None = None
    activation: str = "gelu"
    norm_first: bool = True
    final_norm: bool | None = None
    norm_eps: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    bias: bool = True
    causal: bool = False
    cross_attention: bool = False
    attention: Specs = "dense"
    memory_attention: Specs = "dense"
    rotary: bool = False
    rotary_base: float = 10000.0
    softcap: float | None = None
    sinks: bool = False
    position_bias: str = "none"

    def __post_init__(self) -> None:
        for name in ("hidden_dim", "num_layers", "num_heads", "num_kv_heads", "mlp_dim"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"{name} must be an integer >= 1, got {value!r}")
        if self.hidden_dim % self.num_heads or self.hidden_dim // self.num_heads > MAX_HEAD_DIM:
            raise InputError(
                f"num_heads must divide hidden_dim into heads of at most {MAX_HEAD_DIM} features; got "
                f"hidden_dim={self.hidden_dim}, num_heads={self.num_heads}"
            )
        if self.num_heads % self.kv_heads:
            raise InputError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")
        if self.activation not in ACTIVATIONS:
            raise InputError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {self.activation!r}")
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        check_softcap(self.softcap)
        if self.position_bias not in POSITION_BIASES:
            raise InputError(f"position_bias must be one of {', '.join(POSITION_BIASES)}; got {self.position_bias!r}")
        for method in each_layer(self.attention, self.num_layers):
            check_causal(method, self.causal)
            check_modifiers(method, self.softcap, self.sinks, self.position_bias != "none")
        object.__setattr__(self, "attention", as_text(self.attention, self.num_layers))
        object.__setattr__(self, "memory_attention", as_text(self.memory_attention, self.num_layers))

    @property
    def kv_heads(self) -> int:
        """The number of key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def mlp_features(self) -> int:
        """The number of hidden features of the MLP."""
        return 4 * self.hidden_dim if self.mlp_dim is None else self.mlp_dim

    @property
    def ends_with_norm(self) -> bool:
        """Whether there is a norm at the end."""
        return self.norm_first if self.final_norm is None else self.final_norm


def each_layer(specs: Specs, num_layers: int) -> list[Method]:
    """The method of each layer: one spec for all, or a sequence with one a layer.

    Raises:
        InputError: another number of specs than layers.
    """
    if isinstance(specs, (str, Method, Pattern)):
        return [parse(specs)] * num_layers
    if not isinstance(specs, Sequence):
        raise InputTypeError(f"attention is a spec, or a list with one a layer; got {type(specs).__name__}")
    if len(specs) != num_layers:
        raise InputError(f"{len(specs)} specs for {num_layers} layers; give one for all, or one a layer")
    return [parse(spec) for spec in specs]


def as_text(specs: Specs, num_layers: int) -> str | tuple[str, ...]:
    """Specs as text, one where all layers have the same."""
    texts = tuple(str(method) for method in each_layer(specs, num_layers))
    return texts[0] if len(set(texts)) == 1 else texts


class Outputs(NamedTuple):
    """What `Transformer.forward(return_hidden=True)` returns.

    Fields:
        last: (B, N, E), what it returns otherwise.
        hidden: the input, then the output of each layer, each (B, N, E); the last one before the final norm.
        weights: with need_weights, the attention weights (B, Hq, N, M) of each layer's self-attention; else empty.
        memory_weights: the same of each layer's cross-attention.
    """

    last: Tensor
    hidden: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    memory_weights: tuple[Tensor, ...]


class MLP(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.fc1 = nn.Linear(config.hidden_dim, config.mlp_features, bias=config.bias)
        self.fc2 = nn.Linear(config.mlp_features, config.hidden_dim, bias=config.bias)
        self.dropout = nn.Dropout(config.activation_dropout)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc2(self.dropout(ACTIVATIONS[self.activation](self.fc1(x))))
        return found


class Layer(nn.Module):
    """Attention, cross-attention where the config has it, and an MLP."""

    def __init__(self, config: TransformerConfig, method: Method, memory_method: Method) -> None:
        super().__init__()

        def attention(cross: bool) -> Attention:
            return Attention(
                config.hidden_dim,
                config.num_heads,
                config.kv_heads,
                causal=config.causal and not cross,
                cross=cross,
                dropout=config.attention_dropout,
                bias=config.bias,
                attention=memory_method if cross else method,
                softcap=None if cross else config.softcap,
                sinks=config.sinks and not cross,
                position_bias="none" if cross else config.position_bias,
            )

        self.norm_first = config.norm_first
        self.attention = attention(cross=False)
        self.attention_norm = nn.LayerNorm(config.hidden_dim, config.norm_eps)
        self.cross_attention = attention(cross=True) if config.cross_attention else None
        self.cross_norm = nn.LayerNorm(config.hidden_dim, config.norm_eps) if config.cross_attention else None
        self.mlp = MLP(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_dim, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        turn: tuple[Tensor, Tensor] | None = None,
        cache: LayerCache | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns x (B, N, E), and with need_weights those of the attention and of the cross-attention."""
        memory_weights = None
        part, weights = self.attention(
            self._before(x, self.attention_norm), key_mask=key_mask, turn=turn, cache=cache, need_weights=need_weights
        )
        x = self._after(x, part, self.attention_norm)
        if self.cross_attention is not None and self.cross_norm is not None:
            part, memory_weights = self.cross_attention(
                self._before(x, self.cross_norm),
                memory=memory,
                key_mask=memory_mask,
                cache=cache,
                need_weights=need_weights,
            )
            x = self._after(x, part, self.cross_norm)
        return self._after(x, self.mlp(self._before(x, self.mlp_norm)), self.mlp_norm), weights, memory_weights

    def _before(self, x: Tensor, norm: nn.Module) -> Tensor:
        return norm(x) if self.norm_first else x

    def _after(self, x: Tensor, part: Tensor, norm: nn.Module) -> Tensor:
        x = x + self.dropout(part)
        return x if self.norm_first else norm(x)


class Transformer(nn.Module):
    """The layers of a config: see the head of this file."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self._config = config
        methods = each_layer(config.attention, config.num_layers)
        memory_methods = each_layer(config.memory_attention, config.num_layers)
        self.layers = nn.ModuleList(Layer(config, *pair) for pair in zip(methods, memory_methods, strict=True))
        self.norm = nn.LayerNorm(config.hidden_dim, config.norm_eps) if config.ends_with_norm else None
        self.rotary = Rotary(config.hidden_dim // config.num_heads, base=config.rotary_base) if config.rotary else None
        for layer in (*self._attentions(cross=False), *self._attentions(cross=True)):
            for linear in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj):
                initialise(linear)
        self._share(cross=False)
        self._share(cross=True)

    @property
    def config(self) -> TransformerConfig:
        """The config, with the attention that the layers have now."""
        now = {"attention": tuple(layer.attention for layer in self._attentions(cross=False))}
        if self._config.cross_attention:
            now["memory_attention"] = tuple(layer.attention for layer in self._attentions(cross=True))
        return dataclasses.replace(self._config, **now)  # type: ignore[arg-type]

    def check_attention(self, attention: Specs, *, cross: bool = False) -> list[Method]:
        """The method of each layer; raises what `set_attention` would, and changes nothing."""
        if cross and not self._config.cross_attention:
            raise InputError("this Transformer has no cross-attention")
        methods = each_layer(attention, self._config.num_layers)
        config = self._config
        for method in methods:
            check_causal(method, config.causal and not cross)
            if not cross:
                check_modifiers(method, config.softcap, config.sinks, config.position_bias != "none")
        return methods

    def set_attention(self, attention: Specs, *, cross: bool = False) -> None:
        """Attend by other methods from now on, on the same projections; a layer that keeps its method is untouched.

        Methods that have parameters start with fresh ones: make the optimiser after this.

        Args:
            attention: a spec for all layers, or one a layer. A spec can have several for the heads: "per_head(a; b)".
            cross: of the cross-attention, not of the self-attention.

        Raises:
            InputError: a spec that cannot be read, or as many specs as there are not layers.
            UnsupportedError: a method that cannot be causal, in a causal Transformer. Then nothing has changed.
        """
        methods = self.check_attention(attention, cross=cross)
        for layer, method in zip(self._attentions(cross=cross), methods, strict=True):
            layer.set_attention(method)
        self._share(cross=cross)

    def _attentions(self, *, cross: bool) -> list[Attention]:
        found = [getattr(layer, "cross_attention" if cross else "attention") for layer in self.layers]
        return [attention for attention in found if attention is not None]

    def _share(self, *, cross: bool) -> None:
        """Give layers whose method has one state for all of them (linformer:share=layerwise) that of the first."""
        first: dict[Method, nn.Module] = {}
        for layer in self._attentions(cross=cross):
            method, state = layer.attention, layer.method_state
            if method.shares_state and state is not None:
                layer.set_attention(method, method_state=first.setdefault(method, state))

    def make_cache(self, *, capacity: int = 0) -> Cache:
        """An empty cache for this decoder; `capacity`: tokens to make room for at once."""
        return Cache(self._config.num_layers, capacity=capacity)

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_padding_mask: Tensor | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        return_hidden: bool = False,
        need_weights: bool = False,
    ) -> Tensor | Outputs:
        """Run all layers.

        Args:
            x: (B, N, E).
            key_padding_mask: bool, True = padding, which no token sees: (B, N), or with a cache (B, cache.length + N).
            memory: (B, M, E), for a config with cross_attention; with a cache, read by the first call alone.
            memory_padding_mask: bool (B, M), True = padding.
            cache: what earlier calls saw (see `make_cache`); x continues it and is added.
            positions: int64 (N) or (B, N), for rotary positions; default cache.length + 0..N-1.
            return_hidden: return `Outputs`, with the outputs of all layers.
            need_weights: with return_hidden, the attention weights too: N x M memory.

        Inside `context_parallel` every rank passes the whole input and gets the whole output; between the two, in all
        layers, it has its part of the tokens.

        Returns:
            (B, N, E), or `Outputs`.

        Raises:
            InputError, InputTypeError: arguments that do not fit together.
            UnsupportedError: a cache for a Transformer that is not causal; what a method cannot do.
        """
        key_mask, memory_mask = self._check(x, key_padding_mask, memory, memory_padding_mask, cache)
        spread, length = sharding.active, x.shape[1]
        if spread is not None:
            if cache is not None:
                raise UnsupportedError("a cache holds a whole sequence; generate outside context_parallel")
            if self.rotary is not None:
                positions = torch.arange(length, device=x.device) if positions is None else positions
                positions = spread.split(positions, positions.dim() - 1)
            x = spread.split(x, 1)
            key_mask, memory_mask, memory = (
                None if part is None else spread.split(part, 1) for part in (key_mask, memory_mask, memory)
            )
        turn = None
        if self.rotary is not None:
            if positions is None:
                start = 0 if cache is None else cache.length
                positions = torch.arange(start, start + x.shape[1], device=x.device)
            turn = self.rotary(positions, x.dtype)
        hidden: list[Tensor] = [x] if return_hidden else []
        weights: list[Tensor] = []
        memory_weights: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            x, own, other = layer(
                x,
                key_mask=key_mask,
                memory=memory,
                memory_mask=memory_mask,
                turn=turn,
                cache=None if cache is None else cache.layers[number],
                need_weights=need_weights and return_hidden,
            )
            if return_hidden:
                hidden.append(x)
            weights += [] if own is None else [own]
            memory_weights += [] if other is None else [other]
        x = x if self.norm is None else self.norm(x)
        if spread is not None:
            x, hidden = spread.join(x, 1, length), [spread.join(part, 1, length) for part in hidden]
        return Outputs(x, tuple(hidden), tuple(weights), tuple(memory_weights)) if return_hidden else x

    def _check(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None,
        memory: Tensor | None,
        memory_padding_mask: Tensor | None,
        cache: Cache | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The padding masks as True = attend, (B, keys)."""
        config = self._config
        if x.dim() != 3 or x.shape[2] != config.hidden_dim:
            raise InputError(f"expected (batch, tokens, {config.hidden_dim}), got {tuple(x.shape)}")
        if cache is not None and not config.causal:
            raise InputError("a cache is of earlier tokens, and this Transformer is not causal")
        if cache is not None and len(cache.layers) != config.num_layers:
            raise InputError(f"the cache is of {len(cache.layers)} layers, not {config.num_layers}; use make_cache()")
        if (memory is not None or memory_padding_mask is not None) and not config.cross_attention:
            raise InputError("memory= is for a config with cross_attention=True")
        total = x.shape[1] + (0 if cache is None else cache.length)
        return (
            _attended("key_padding_mask", key_padding_mask, x.shape[0], total),
            _attended(
                "memory_padding_mask", memory_padding_mask, x.shape[0], None if memory is None else memory.shape[1]
            ),
        )


def _attended(name: str, padding: Tensor | None, batch: int, length: int | None) -> Tensor | None:
    if padding is None:
        return None
    if padding.dtype != torch.bool:
        raise InputTypeError(f"{name} must be bool with True = padding, got {padding.dtype}")
    if padding.dim() != 2 or padding.shape[0] != batch or (length is not None and padding.shape[1] != length):
        raise InputError(
            f"{name} must be ({batch}, {'keys' if length is None else length}), got {tuple(padding.shape)}"
        )
    return ~padding


def initialise(linear: nn.Linear) -> None:
    """Xavier-uniform weights and no bias, as torch.nn's Transformers start."""
    nn.init.xavier_uniform_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
