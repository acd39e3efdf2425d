"""The attention methods that a user names: `parse("bigbird:block=64")`, `BigBird(block=64)`, or JSON.

A spec is `name` or `name:key=value,key=value`. Tuples are written with x (`64x128`), nothing as `none`. Sparse methods
are the patterns of `patterns.py`, run by exact attention; low-rank ones those of `lowrank`, with their parameters.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import lowrank, patterns, specs
from .errors import InputError, InputTypeError, UnsupportedError
from .functional import as_block_mask, attention_weights, resolve_seed
from .masks import BlockMask
from .padding import add_to_bias, check_key_mask, padded_attention, select_keys

METHODS: dict[str, type[Method]] = {}


class Method:
    """A way to attend. Subclasses are frozen dataclasses: their fields are the options, with usable defaults.

    Class attributes say what it is: `name` (in specs), `formula`, `paper`, `complexity` (time), `exact` (softmax
    attention over the pairs it looks at, none of them approximated), and what calls may ask of it: `accepts_causal`,
    `accepts_mask` (any mask of pairs), `accepts_bias`.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    paper: ClassVar[str]
    complexity: ClassVar[str]
    exact: ClassVar[bool] = False
    accepts_causal: ClassVar[bool] = False
    accepts_mask: ClassVar[bool] = False
    accepts_bias: ClassVar[bool] = False

    def build(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module | None:
        """Make what `attend` needs as `state`: learned parameters and random features; None for methods without any.

        Draws nothing from PyTorch's global generator: a model's other parameters start the same with any method.
        """
        return None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        state: nn.Module | None = None,
        key_mask: Tensor | None = None,
        mask: BlockMask | Tensor | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
        causal_alignment: str | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        dropout_seed: int | Tensor | None = None,
        backend: str = "auto",
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend by this method.

        Args:
            query, key, value: (B, Hq, Nq, D), (B, Hkv, Nk, D), (B, Hkv, Nk, Dv), as in `attention`.
            state: what `build` returned.
            key_mask: bool (B, Nk), True = attend: padding. What a masked key holds, NaN included, has no influence.
            mask, bias, is_causal, causal_alignment, scale, dropout_p, dropout_seed, backend: as in `attention`.
            need_weights: also return what this method multiplies the values with, dropout included: n x n memory.

        Returns:
            out (B, Hq, Nq, Dv) and weights (B, Hq, Nq, Nk) or None.

        Raises:
            UnsupportedError: what the class attributes say this method does not accept.
            InputError, InputTypeError: arguments that do not belong together, or a missing state.
        """
        raise NotImplementedError

    def to_json(self) -> str:
        """The method with all its options as a JSON object, which `from_json` reads."""
        return json.dumps({"method": self.name, **specs.options(self)})

    def __str__(self) -> str:
        """The shortest spec that `parse` turns into this method: options at their default are left out."""
        changed = [
            f"{field.name}={specs.write(getattr(self, field.name))}"
            for field in dataclasses.fields(typing.cast(Any, self))
            if getattr(self, field.name) != specs.default(field)
        ]
        return self.name + (":" + ",".join(changed) if changed else "")


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: make a method known to `parse`, `from_json` and the table."""
    METHODS[cls.name] = cls
    return cls


# --- from text and back ----------------------------------------------------------------------------------------------


def parse(spec: str | Method | patterns.Pattern) -> Method:
    """The method that a spec names; a `Method` is returned as it is, a `Pattern` as the method of the same name.

    Raises:
        InputError: unknown names or options, values out of range. InputTypeError: not a spec.
        UnsupportedError: a hybrid `a+b`.
    """
    if isinstance(spec, Method):
        return spec
    if isinstance(spec, patterns.Pattern):
        return _from_pattern(spec)
    if not isinstance(spec, str):
        raise InputTypeError(
            f"a method is a spec such as 'bigbird:block=64', a Method or a Pattern; got {type(spec).__name__}"
        )
    if "+" in spec:
        raise UnsupportedError(
            f"{spec!r} joins methods with '+'; only single methods can be run. Choose one of the parts"
        )
    name, colon, rest = spec.strip().partition(":")
    cls = _lookup(name.strip())
    given: dict[str, str] = {}
    for part in rest.split(",") if colon else []:
        option, equals, text = (piece.strip() for piece in part.partition("="))
        if not equals or not option or not text:
            raise InputError(f"cannot read {part.strip()!r} in {spec!r}; write options as {name}:key=value,key=value")
        if option in given:
            raise InputError(f"{spec!r} gives {option} twice; give it once")
        given[option] = text
    kinds = specs.kinds(cls, given)
    return cls(**{option: specs.read(text, kinds[option], cls.name, option) for option, text in given.items()})


def from_json(text: str | Mapping[str, Any]) -> Method:
    """The method that a JSON object (its text, or the decoded mapping) describes; options left out have their default.

    Raises:
        InputError: not such an object, unknown names or options, values out of range. InputTypeError: wrong types.
    """
    if isinstance(text, str):
        try:
            text = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"this is not JSON ({error}); a method is like {Dense().to_json()}") from None
    if not isinstance(text, Mapping) or not isinstance(text.get("method"), str):
        raise InputError(f"a method in JSON is an object with a 'method' name, like {Dense().to_json()}; got {text!r}")
    given = {str(option): value for option, value in text.items() if option != "method"}
    cls = _lookup(text["method"])
    kinds = specs.kinds(cls, given)
    return cls(**{option: specs.convert(value, kinds[option], cls.name, option) for option, value in given.items()})


def methods_table() -> list[dict[str, str]]:
    """One row a method, for documentation: name, formula, paper, complexity, exact, causal, mask, parameters."""
    return [
        {
            "name": cls.name,
            "formula": cls.formula,
            "paper": cls.paper,
            "complexity": cls.complexity,
            "exact": "yes" if cls.exact else "no",
            "causal": "yes" if cls.accepts_causal else "no",
            "mask": "yes" if cls.accepts_mask else "padding only",
            "parameters": ", ".join(f"{k}={specs.write(v)}" for k, v in specs.options(cls()).items()) or "-",
        }
        for cls in METHODS.values()
    ]


def _lookup(name: str) -> type[Method]:
    if name not in METHODS:
        raise InputError(
            f"there is no method {name!r}{specs.hint(name, METHODS)}; choose from {', '.join(sorted(METHODS))}"
        )
    return METHODS[name]


def _check_range(method: Method, option: str, least: float, most: float = math.inf) -> None:
    value = getattr(method, option)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputTypeError(f"{method.name}: {option} must be an integer, got {value!r}")
    if not least <= value <= most:
        limit = f">= {least}" if most == math.inf else f"from {least} to {most}"
        raise InputError(f"{method.name}: {option} must be {limit}, got {value}")


def _check_choice(method: Method, option: str, allowed: tuple[str, ...]) -> None:
    value = getattr(method, option)
    if value not in allowed:
        raise InputError(f"{method.name}: {option} must be one of {', '.join(allowed)}; got {value!r}")


# --- sparse: exact attention over the pairs of a pattern -------------------------------------------------------------


class SparseMethod(Method):
    """A pattern as a method: exact attention where the pattern, the mask, the lengths and causality all allow it."""

    exact = True
    accepts_causal = True
    accepts_mask = True
    accepts_bias = True

    if typing.TYPE_CHECKING:
        block_mask: Callable[..., BlockMask]

    __str__ = Method.__str__

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        state: nn.Module | None = None,
        key_mask: Tensor | None = None,
        mask: BlockMask | Tensor | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
        causal_alignment: str | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        dropout_seed: int | Tensor | None = None,
        backend: str = "auto",
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        check_key_mask(key_mask, key)
        mask, bias = self._join(mask, bias, query, key)
        if dropout_p > 0.0:
            dropout_seed = resolve_seed(dropout_seed)  # one seed: output and weights drop alike
        shared: dict[str, Any] = {
            "mask": mask,
            "is_causal": is_causal,
            "causal_alignment": causal_alignment,
            "scale": scale,
            "dropout_p": dropout_p,
            "dropout_seed": dropout_seed,
        }
        out = padded_attention(query, key, value, key_mask, bias=bias, backend=backend, **shared)
        if not need_weights:
            return out, None
        if key_mask is not None:
            (key,) = select_keys(key_mask, key)
            bias = add_to_bias(bias, key_mask, query)
        return out, attention_weights(query, key, bias=bias, **shared)

    def _join(
        self, mask: BlockMask | Tensor | None, bias: Tensor | None, query: Tensor, key: Tensor
    ) -> tuple[BlockMask | Tensor | None, Tensor | None]:
        """The pattern's mask and the user's in one, and the bias."""
        pattern = self.block_mask(query.shape[2], key.shape[2], num_heads=query.shape[1], device=query.device)
        if mask is None:
            return pattern, bias
        if pattern.indptr is not None and torch.compiler.is_compiling():
            # How many blocks both list depends on values, which a traced program must not: -inf in a bias does not.
            if isinstance(mask, Tensor) and mask.dtype == torch.bool:
                return pattern, torch.where(mask, query.new_zeros(()) if bias is None else bias, -torch.inf)
            if isinstance(mask, BlockMask) and mask.indptr is not None:
                raise UnsupportedError(
                    f"torch.compile cannot join the lists of {self.name} with those of a BlockMask. Join them outside, "
                    "pattern.block_mask(...) & mask, and use attention(mask=...), or pass the mask as a bool tensor"
                )
        return pattern & as_block_mask(mask, query, key), bias


@register
class Dense(SparseMethod, patterns.Dense):
    """Every pair."""

    name = "dense"
    formula = "softmax(QK^T)V"
    paper = "Vaswani et al. 2017"
    complexity = "n^2 d"

    def _join(
        self, mask: BlockMask | Tensor | None, bias: Tensor | None, query: Tensor, key: Tensor
    ) -> tuple[BlockMask | Tensor | None, Tensor | None]:
        return mask, bias


@register
class Causal(SparseMethod, patterns.Causal):
    """Every pair of a query and itself or an earlier key."""

    name = "causal"
    formula = "softmax(QK^T)V over j <= i"
    paper = "Vaswani et al. 2017"
    complexity = "n^2 d / 2"


@register
class SlidingWindow(SparseMethod, patterns.SlidingWindow):
    """Keys at a limited distance to the left and right."""

    name = "sliding_window"
    formula = "softmax(QK^T)V over i - left <= j <= i + right"
    paper = "Beltagy et al. 2020"
    complexity = "n w d"


@register
class Dilated(SparseMethod, patterns.Dilated):
    """Every dilation-th key at a limited distance."""

    name = "dilated"
    formula = "softmax(QK^T)V over j = i + t dilation"
    paper = "Beltagy et al. 2020"
    complexity = "n w d dilation"


@register
class Strided(SparseMethod, patterns.Strided):
    """The last `stride` keys, and every stride-th before."""

    name = "strided"
    formula = "softmax(QK^T)V over i - j <= s or s | i - j"
    paper = "Child et al. 2019"
    complexity = "n^2 d"


@register
class Longformer(SparseMethod, patterns.Longformer):
    """A window, and global tokens that see and are seen by all."""

    name = "longformer"
    formula = "softmax(QK^T)V over window + global tokens"
    paper = "Beltagy et al. 2020"
    complexity = "n (w + g) d"


@register
class BigBird(SparseMethod, patterns.BigBird):
    """Blocks: a window, global ones, and random ones."""

    name = "bigbird"
    formula = "softmax(QK^T)V over window + global + random blocks"
    paper = "Zaheer et al. 2020"
    complexity = "n b (w + g + r) d"


def _from_pattern(pattern: patterns.Pattern) -> Method:
    for cls in METHODS.values():
        if issubclass(cls, type(pattern)) and issubclass(cls, SparseMethod):
            return cls(**{f.name: getattr(pattern, f.name) for f in dataclasses.fields(typing.cast(Any, pattern))})
    raise UnsupportedError(f"{type(pattern).__name__} is no registered method; pass it as mask= to attention()")


# --- low rank --------------------------------------------------------------------------------------------------------


class LowRankMethod(Method):
    """A method of `lowrank`: it knows padding, causality where it accepts that, no masks of pairs and no bias."""

    needs_state: ClassVar[bool] = True

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        state: nn.Module | None = None,
        key_mask: Tensor | None = None,
        mask: BlockMask | Tensor | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
        causal_alignment: str | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        dropout_seed: int | Tensor | None = None,
        backend: str = "auto",
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        for what, given in (("mask of pairs", mask), ("bias", bias)):
            if given is not None:
                raise UnsupportedError(
                    f"{self} forms no scores of pairs, so it cannot apply a {what}. Pass padding as key_mask"
                    + (", causality as is_causal=True" if self.accepts_causal else "")
                    + ", or use dense or a sparse method"
                )
        if is_causal and not self.accepts_causal:
            raise UnsupportedError(
                f"{self} cannot be causal: it mixes positions before it compares them. Use performer, linear or a "
                "sparse method"
            )
        if self.needs_state and state is None:
            raise InputError(f"{self} needs state: pass what build(embed_dim, num_heads, head_dim) returned")
        keywords: dict[str, Any] = {"key_mask": key_mask, "scale": scale, "dropout_p": dropout_p}
        keywords["dropout_seed"] = resolve_seed(dropout_seed) if dropout_p > 0.0 else None
        if self.accepts_causal:
            keywords |= {"is_causal": is_causal, "causal_alignment": causal_alignment}
        form, weigh = self.functions(state, query, key, key_mask)
        out = form(query, key, value, backend=backend, **keywords)
        return out, weigh(query, key, **keywords) if need_weights else None

    def functions(
        self, state: Any, query: Tensor, key: Tensor, key_mask: Tensor | None
    ) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        """The function of `lowrank` and its companion for weights, with this method's options filled in."""
        raise NotImplementedError


@register
@dataclass(frozen=True)
class Linformer(LowRankMethod):
    """Keys and values mixed down to `rank` by learned matrices (see `lowrank.linformer_attention`).

    Fields:
        rank: r, the number of mixtures.
        max_len: the longest sequence of keys.
        share: "headwise": E and F for all heads; "kv": one matrix for keys, values and all heads; "none": own for each.
        init: "pool" starts as means over max_len / rank consecutive positions: attention at a lower resolution;
            "normal" as random mixtures of N(0, 1 / max_len), which keep the scale of the keys.
        seed: of "normal".
    """

    name = "linformer"
    formula = "softmax(Q(EK)^T)(FV), E and F learned"
    paper = "Wang et al. 2020"
    complexity = "n r d"

    rank: int = 64
    max_len: int = 512
    share: str = "headwise"
    init: str = "pool"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_range(self, "rank", 1)
        _check_range(self, "max_len", 1)
        _check_range(self, "seed", 0, 2**62)
        _check_choice(self, "share", ("headwise", "kv", "none"))
        _check_choice(self, "init", ("pool", "normal"))
        if self.rank > self.max_len:
            raise InputError(
                f"linformer: rank={self.rank} exceeds max_len={self.max_len}; lower the rank or raise max_len"
            )

    def build(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        return LinformerState(self, num_heads, device=device, dtype=dtype)

    def functions(
        self, state: Any, query: Tensor, key: Tensor, key_mask: Tensor | None
    ) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        def form(query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Tensor:
            return lowrank.linformer_attention(query, key, value, state.key_projection, state.value(), **keywords)

        def weigh(query: Tensor, key: Tensor, **keywords: Any) -> Tensor:
            return lowrank.linformer_weights(query, key, state.key_projection, state.value(), **keywords)

        return form, weigh


@register
@dataclass(frozen=True)
class Nystrom(LowRankMethod):
    """The softmax matrix interpolated from landmarks (see `lowrank.nystrom_attention`).

    In self-attention (Nq = Nk) the key mask also says which queries shape the landmarks.

    Fields:
        landmarks: m.
        pinv_iterations: steps of the pseudo-inverse.
        conv: width of the depthwise convolution of the values, odd; 0 is none. The filters are learned, from zero.
    """

    name = "nystrom"
    formula = "softmax(QK~^T) pinv(softmax(Q~K~^T)) softmax(Q~K^T)V"
    paper = "Xiong et al. 2021"
    complexity = "n m d"
    needs_state = False

    landmarks: int = 32
    pinv_iterations: int = 6
    conv: int = 0

    def __post_init__(self) -> None:
        _check_range(self, "landmarks", 1)
        _check_range(self, "pinv_iterations", 1, 100)
        _check_range(self, "conv", 0)
        if self.conv and self.conv % 2 == 0:
            raise InputError(f"nystrom: conv must be 0 or odd, got {self.conv}")

    def build(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module | None:
        return NystromState(self, num_heads, device=device, dtype=dtype) if self.conv else None

    def functions(
        self, state: Any, query: Tensor, key: Tensor, key_mask: Tensor | None
    ) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        if self.conv and state is None:
            raise InputError(f"{self} needs state: pass what build(embed_dim, num_heads, head_dim) returned")
        options: dict[str, Any] = {
            "landmarks": self.landmarks,
            "pinv_iterations": self.pinv_iterations,
            "conv_weight": state.conv_weight if self.conv else None,
            "query_mask": key_mask if query.shape[2] == key.shape[2] else None,
        }

        def form(query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Tensor:
            return lowrank.nystrom_attention(query, key, value, **options, **keywords)

        def weigh(query: Tensor, key: Tensor, **keywords: Any) -> Tensor:
            return lowrank.nystrom_weights(query, key, **options, **keywords)

        return form, weigh


@register
@dataclass(frozen=True)
class Performer(LowRankMethod):
    """Random features whose products estimate the softmax kernel (see `lowrank.performer_attention`).

    Fields:
        features: m, the number of random features.
        feature: "softmax" or "relu".
        orthogonal: whether the features are orthogonal in blocks.
        seed: of the features, which every head shares. `state.redraw()` draws new ones.
    """

    name = "performer"
    formula = "phi(Q)(phi(K)^T V) / phi(Q)(phi(K)^T 1), phi random"
    paper = "Choromanski et al. 2021"
    complexity = "n m d"
    accepts_causal = True

    features: int = 256
    feature: str = "softmax"
    orthogonal: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _check_range(self, "features", 1)
        _check_range(self, "seed", 0, 2**62)
        _check_choice(self, "feature", lowrank.FEATURES)
        if not isinstance(self.orthogonal, bool):
            raise InputTypeError(f"performer: orthogonal must be true or false, got {self.orthogonal!r}")

    def build(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        return PerformerState(self, head_dim, device=device, dtype=dtype)

    def functions(
        self, state: Any, query: Tensor, key: Tensor, key_mask: Tensor | None
    ) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        def form(query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Tensor:
            return lowrank.performer_attention(query, key, value, state.projection, feature=self.feature, **keywords)

        def weigh(query: Tensor, key: Tensor, **keywords: Any) -> Tensor:
            return lowrank.performer_weights(query, key, state.projection, feature=self.feature, **keywords)

        return form, weigh


@register
@dataclass(frozen=True)
class Linear(LowRankMethod):
    """Linear attention with the feature map elu(x) + 1 (see `lowrank.elu_attention`)."""

    name = "linear"
    formula = "phi(Q)(phi(K)^T V) / phi(Q)(phi(K)^T 1), phi = elu + 1"
    paper = "Katharopoulos et al. 2020"
    complexity = "n d^2"
    accepts_causal = True
    needs_state = False

    def functions(
        self, state: Any, query: Tensor, key: Tensor, key_mask: Tensor | None
    ) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        return lowrank.elu_attention, lowrank.elu_weights


# --- parameters ------------------------------------------------------------------------------------------------------


class LinformerState(nn.Module):
    """E and F of a Linformer: (rank, max_len), or (num_heads, rank, max_len) with share="none"."""

    key_projection: nn.Parameter
    value_projection: nn.Parameter | None

    def __init__(
        self, method: Linformer, num_heads: int, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.method = method
        heads = (num_heads,) if method.share == "none" else ()
        empty = torch.empty(*heads, method.rank, method.max_len, device=device, dtype=dtype)
        self.key_projection = nn.Parameter(empty)
        if method.share == "kv":
            self.register_parameter("value_projection", None)
        else:
            self.value_projection = nn.Parameter(torch.empty_like(empty))
        self.reset_parameters()

    def value(self) -> Tensor:
        """F, which is E with share="kv"."""
        return self.key_projection if self.value_projection is None else self.value_projection

    def reset_parameters(self) -> None:
        """Start again as the method's `init` says."""
        generator = torch.Generator().manual_seed(self.method.seed)
        rank, max_len = self.method.rank, self.method.max_len
        segment = torch.arange(max_len) * rank // max_len == torch.arange(rank)[:, None]
        for parameter in self.parameters():
            if self.method.init == "pool":
                initial = segment / segment.sum(-1, keepdim=True)
            else:
                initial = torch.randn(parameter.shape, generator=generator) * max_len**-0.5
            with torch.no_grad():
                parameter.copy_(initial)


class NystromState(nn.Module):
    """The filters of Nystrom's convolution, (num_heads, conv)."""

    def __init__(
        self, method: Nystrom, num_heads: int, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.conv_weight = nn.Parameter(torch.empty(num_heads, method.conv, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at zero: the plain approximation, from which training departs."""
        nn.init.zeros_(self.conv_weight)


class PerformerState(nn.Module):
    """The random features of a Performer, (features, head_dim): a buffer, saved with the model, for it defines it."""

    projection: Tensor

    def __init__(
        self, method: Performer, head_dim: int, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.method = method
        self.register_buffer("projection", torch.empty(method.features, head_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the features that the method's seed stands for."""
        self.redraw(torch.Generator().manual_seed(self.method.seed))

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw new features in place, from PyTorch's global CPU generator unless one is given."""
        features, head_dim = self.projection.shape
        drawn = lowrank.random_projection(features, head_dim, orthogonal=self.method.orthogonal, generator=generator)
        with torch.no_grad():
            self.projection.copy_(drawn)
