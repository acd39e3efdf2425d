"""Performer: random features for the softmax kernel (Choromanski et al., ICLR 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.features import RISE, MovingShift, exponents, map_features
from ..defaults import default_scale
from ..errors import InputError, InputTypeError, UnsupportedError
from ..inputs import check_alignment, check_key_mask, prepare_inputs
from ..options import check_choice, check_range, register
from ..tracing import shapes_only, without_autocast
from .base import MethodState, fill
from .linear import drop_unseen, exponential_weights, linear_attention, linear_attention_weights, run_operator
from .lowrank import LowRankMethod, drop_columns, drop_keys

FEATURES = ("softmax", "relu")


def performer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    *,
    feature: str = "softmax",
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """FAVOR+: linear attention with m random features whose products are exp(scale q . k) in expectation: O(N m Dv).

        softmax:  phi(x)_f = exp(w_f . x' - |x'|^2 / 2) / sqrt(m)      x' = sqrt(scale) x,  w_f rows of `projection`
        relu:     phi(x)_f = max(w_f . x', 0) / sqrt(m) + 1e-3         (a kernel of its own, no estimate of softmax)

    Choromanski et al., "Rethinking Attention with Performers", ICLR 2021, section 2. The variance of the estimate
    grows like exp(|q' + k'|^2): with large or peaked scores many features are needed.

    Args:
        query, key, value, scale: as in `attention`; scale must be positive.
        projection: (m, D), or (Hkv, m, D) with own features for each key/value head; see `random_projection`.
        feature: "softmax" or "relu".
        key_mask, dropout_p, dropout_seed: see `efficient_attn.methods.lowrank`.
        is_causal, causal_alignment: as in `attention`.

    Returns:
        out (B, Hq, Nq, Dv). Differentiable once in query, key and value.

    Raises:
        InputError, InputTypeError: arguments that do not belong together.
    """
    query, key, value = prepare_inputs(query, key, value)
    check_alignment(is_causal, causal_alignment, query.shape[2], key.shape[2])
    scale = _check_features(query, key, projection, feature, key_mask, scale)
    value = drop_keys(value, dropout_p, dropout_seed)
    if projection.requires_grad:  # the operator does not differentiate it: what it maps goes through autograd
        key, value, key_mask = drop_unseen(key, value, key_mask, query.shape[2], is_causal, causal_alignment)
        with without_autocast(query):
            if feature == "softmax":
                e = exponents(query, key, key_mask, projection, "performer_softmax", scale)
                a, b, name = e.query, e.key, "exp"
            else:
                a, b, *_ = map_features(query, key, key_mask, projection, is_causal, "performer_relu", scale)
                name = "identity"
        return linear_attention(
            a,
            b,
            value,
            key_mask=key_mask,
            is_causal=is_causal,
            causal_alignment=causal_alignment,
            feature_map=name,
            backend=backend,
        )
    out, _, _ = run_operator(
        query, key, value, key_mask, is_causal, causal_alignment, backend, f"performer_{feature}", projection, scale
    )
    return out


def performer_weights(
    query: Tensor,
    key: Tensor,
    projection: Tensor,
    *,
    feature: str = "softmax",
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
) -> Tensor:
    """The weights that `performer_attention` stands for, (B, Hq, Nq, Nk)."""
    query, key, _ = prepare_inputs(query, key, key)
    scale = _check_features(query, key, projection, feature, key_mask, scale)
    with without_autocast(query):
        if feature == "softmax":
            e = exponents(query, key, key_mask, projection, "performer_softmax", scale)
            weights = exponential_weights(e, key_mask, is_causal, causal_alignment)
        else:
            a, b, *_ = map_features(query, key, key_mask, projection, is_causal, "performer_relu", scale)
            weights = linear_attention_weights(
                a, b, key_mask=key_mask, is_causal=is_causal, causal_alignment=causal_alignment
            )
    return drop_columns(weights.to(query.dtype), key.shape[1], dropout_p, dropout_seed)


def performer_features(
    query: Tensor,
    key: Tensor,
    projection: Tensor,
    *,
    feature: str = "softmax",
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Features a (B, Hq, Nq, m) and b (B, Hkv, Nk, m), float32 (float64 for float64), for `linear_attention`.

    How softmax features are scaled, so that nothing overflows, is said in `backends.features`.

    Raises:
        InputError, InputTypeError: an unknown feature, a projection or key_mask that does not fit, a scale <= 0.
        UnsupportedError: causal features with a range that no single scale holds; `performer_attention` computes those.
    """
    scale = _check_features(query, key, projection, feature, key_mask, scale)
    with without_autocast(query):
        try:
            a, b, *_ = map_features(query, key, key_mask, projection, is_causal, f"performer_{feature}", scale)
        except MovingShift:
            raise UnsupportedError(
                f"the causal features of these keys span more than e^{RISE:.0f} beside those of the first key: no one "
                "scale holds them for every query. Call performer_attention, which rescales on the way, or scale keys"
            ) from None
    return a, b


def random_projection(
    features: int,
    head_dim: int,
    *,
    num_heads: int | None = None,
    orthogonal: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw w for `performer_attention`: (features, head_dim), or (num_heads, features, head_dim). Call again to redraw.

    Every row is N(0, I) by itself; `orthogonal` makes the rows of each block of head_dim rows orthogonal to each other,
    with the lengths of independent Gaussian rows, which lowers the variance (Choromanski et al. 2021, section 2.4).
    Drawn on the CPU in float64, so that a generator gives the same features on every device.
    """
    if features < 1 or head_dim < 1 or (num_heads is not None and num_heads < 1):
        raise InputError(f"features, head_dim and num_heads must be >= 1; got {features}, {head_dim}, {num_heads}")
    heads = 1 if num_heads is None else num_heads
    draw: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    gaussian = torch.randn(heads, features, head_dim, **draw)
    if orthogonal:
        blocks = -(-features // head_dim)
        square = torch.randn(heads, blocks, head_dim, head_dim, **draw)
        q, r = torch.linalg.qr(square)
        q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # uniform over rotations
        gaussian = q.flatten(1, 2)[:, :features] * gaussian.norm(dim=-1, keepdim=True)
    return (gaussian[0] if num_heads is None else gaussian).to(device=device, dtype=dtype)


def _check_features(
    query: Tensor, key: Tensor, projection: Any, feature: str, key_mask: Tensor | None, scale: float | None
) -> float:
    """Return the scale; raise what `performer_features` raises."""
    if feature not in FEATURES:
        raise InputError(f"feature must be one of {FEATURES}, got {feature!r}")
    if not isinstance(projection, Tensor) or not projection.is_floating_point():
        raise InputTypeError(f"projection must be a floating-point tensor, got {type(projection).__name__}")
    heads, D = key.shape[1], query.shape[-1]
    if projection.dim() not in (2, 3) or projection.shape[-1] != D or projection.shape[:-2] not in ((), (heads,)):
        raise InputError(
            f"projection must be (features, D) or (Hkv, features, D) with D={D}, Hkv={heads}; got "
            f"{tuple(projection.shape)}. random_projection(features, {D}) draws one"
        )
    check_key_mask(key_mask, key)
    scale = default_scale(scale, query.shape[-1])
    if not 0.0 < scale < math.inf:
        raise InputError(f"Performer needs a positive scale (features take its square root), got {scale}")
    return scale


class PerformerState(MethodState):
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
        if torch.compiler.is_compiling() or shapes_only(self.calls):
            raise UnsupportedError(
                f"performer: redraw_interval={interval} cannot be counted under torch.compile, or by fake and meta "
                "tensors; leave it 0 and call redraw() on the module's method_state between steps"
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
        drawn = random_projection(features, head_dim, orthogonal=self.method.orthogonal, generator=generator)
        fill(self.projection, drawn)
        self.draws.fill_(number)
        self.calls.zero_()


@register
@dataclass(frozen=True)
class Performer(LowRankMethod):
    """Random features whose products estimate the softmax kernel (see `performer_attention`).

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
    _attention = staticmethod(performer_attention)
    _weights = staticmethod(performer_weights)

    features: int = 256
    feature: str = "softmax"
    orthogonal: bool = True
    seed: int = 0
    redraw_interval: int = 0

    def check(self) -> None:
        check_range(self, "features", 1)
        check_range(self, "redraw_interval", 0)
        check_range(self, "seed", 0, 2**62)
        check_choice(self, "feature", FEATURES)

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

    def _options(self, state: Any, query: Tensor, key: Tensor, key_mask: Tensor | None) -> Mapping[str, Any]:
        return {"projection": state.current(), "feature": self.feature}
