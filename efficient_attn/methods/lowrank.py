"""Low-rank methods: those of `efficient_attn.lowrank`, with their parameters as modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import lowrank
from ..errors import InputError, UnsupportedError
from ..functional import resolve_seed
from ..masks import BlockMask
from ..options import check_choice, check_range, register
from .base import Method


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
        share: "headwise": E and F for all heads; "kv": one matrix for keys, values and all heads; "layerwise": that one
            for all layers too (`replace_attention` shares it); "none": own E and F for each head.
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

    def check(self) -> None:
        check_range(self, "rank", 1)
        check_range(self, "max_len", 1)
        check_range(self, "seed", 0, 2**62)
        check_choice(self, "share", ("headwise", "kv", "layerwise", "none"))
        check_choice(self, "init", ("pool", "normal"))
        if self.rank > self.max_len:
            raise InputError(
                f"linformer: rank={self.rank} exceeds max_len={self.max_len}; lower the rank or raise max_len"
            )

    @property
    def shares_state(self) -> bool:
        return self.share == "layerwise"

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

    def check(self) -> None:
        check_range(self, "landmarks", 1)
        check_range(self, "pinv_iterations", 1, 100)
        check_range(self, "conv", 0)
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
        seed: of the features, which every head shares, and of every later draw.
        redraw_interval: new features after so many forwards in training; 0: only when `state.redraw()` is called.
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
    redraw_interval: int = 0

    def check(self) -> None:
        check_range(self, "features", 1)
        check_range(self, "redraw_interval", 0)
        check_range(self, "seed", 0, 2**62)
        check_choice(self, "feature", lowrank.FEATURES)

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
        projection = state.current()

        def form(query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Tensor:
            return lowrank.performer_attention(query, key, value, projection, feature=self.feature, **keywords)

        def weigh(query: Tensor, key: Tensor, **keywords: Any) -> Tensor:
            return lowrank.performer_weights(query, key, projection, feature=self.feature, **keywords)

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
        if method.share in ("kv", "layerwise"):
            self.register_parameter("value_projection", None)
        else:
            self.value_projection = nn.Parameter(torch.empty_like(empty))
        self.reset_parameters()

    def value(self) -> Tensor:
        """F, which is E with share="kv" and "layerwise"."""
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
    """The random features of a Performer, (features, head_dim): buffers, saved with the model, for they define it.

    Draw number `draws` is a function of the method's seed and that number (unless `redraw` was given a generator);
    `calls` counts the forwards in training since. A loaded checkpoint goes on with the features, and the later draws,
    of the run that saved it.
    """

    projection: Tensor
    draws: Tensor
    calls: Tensor

    def __init__(
        self, method: Performer, head_dim: int, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.method = method
        self.register_buffer("projection", torch.empty(method.features, head_dim, device=device, dtype=dtype))
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start again with the features that the method's seed stands for."""
        self._draw(0)

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw new features in place: the next of the method's seed, or from a generator."""
        self._draw(int(self.draws) + 1, generator)

    def current(self) -> Tensor:
        """The features for one forward, counted in training, and drawn anew when `redraw_interval` is over.

        Raises:
            UnsupportedError: redraw_interval under torch.compile, whose graphs cannot count.
        """
        interval = self.method.redraw_interval
        if not interval or not self.training:
            return self.projection
        if torch.compiler.is_compiling():
            raise UnsupportedError(
                f"performer: redraw_interval={interval} cannot be counted under torch.compile; leave it 0 and call "
                "redraw() on the module's method_state between steps"
            )
        if torch._C._current_graph_task_id() == -1:  # else activation checkpointing repeats an earlier forward
            if int(self.calls) >= interval:
                self.redraw()
            self.calls += 1
        return self.projection.clone()  # autograd keeps it, and the next draw is in place

    def _draw(self, number: int, generator: torch.Generator | None = None) -> None:
        if generator is None:
            generator = torch.Generator().manual_seed((self.method.seed + number * 0x9E3779B97F4A7C15) % 2**63)
        features, head_dim = self.projection.shape
        drawn = lowrank.random_projection(features, head_dim, orthogonal=self.method.orthogonal, generator=generator)
        with torch.no_grad():
            self.projection.copy_(drawn)
            self.draws.fill_(number)
            self.calls.zero_()
