"""`PatchForecaster`: quantiles of many next steps, from patches of the past.

After PatchTST, Nie et al. 2023, arXiv:2211.14730, with quantile output, missing values and covariates.

    past (B, L, C) -> units of each channel -> patches -> linear map + positions -> Transformer -> linear map

Letters: B batch, L context, S horizon, C channels, Q quantiles, N patches, M patches of the horizon, E features of the
model, P, K and F past, future and static covariates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from .base import Model
from .forecasting import check_positive, check_quantiles, check_series, instance_statistics, quantile_loss
from .outputs import ForecastOutput, answer, either
from .transformer import Transformer, TransformerConfig

FARTHEST = 20.0  # deviations from the context's mean that the loss tells apart


@dataclass(frozen=True)
class ForecasterConfig:
    """A `PatchForecaster`.

    Fields:
        context: steps that it reads. horizon: steps that it forecasts.
        patch_len, stride: a token is patch_len steps, the next one starts stride steps later.
        quantiles: levels that it forecasts, increasing, between 0 and 1.
        encoder: the Transformer over patches; its dropout is that of embedding and head too.
        past_covariates: P, series that are known as far as the past reaches (weather that was measured).
        future_covariates: K, those that are known for the horizon too (the calendar, prices that are set).
        static_features: F, numbers that belong to a whole series (its place, its kind).

    Raises:
        InputError: values out of range, or patches longer than the context.
    """

    context: int = 96
    horizon: int = 24
    patch_len: int = 16
    stride: int = 8
    quantiles: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9)
    encoder: TransformerConfig = field(default_factory=TransformerConfig)
    past_covariates: int = 0
    future_covariates: int = 0
    static_features: int = 0

    def __post_init__(self) -> None:
        check_positive(self, "context", "horizon", "patch_len", "stride")
        if self.patch_len > self.context or self.stride > self.patch_len:
            raise InputError(
                "patches must fit into the context and leave no step out: stride <= patch_len <= context; got "
                f"{self.stride}, {self.patch_len}, {self.context}"
            )
        for name in ("past_covariates", "future_covariates", "static_features"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}")
        object.__setattr__(self, "quantiles", check_quantiles(self.quantiles))

    @property
    def num_patches(self) -> int:
        """N, of the context continued by one stride."""
        return (self.context - self.patch_len) // self.stride + 2

    @property
    def future_patches(self) -> int:
        """M, of the horizon, end to end; 0 without future covariates, which are all that is known of it."""
        return -(-self.horizon // self.patch_len) if self.future_covariates else 0


@dataclass(frozen=True)
class _Inputs:
    """What `_read` makes of the arguments.

    series float64 (B, C, L), without gaps; mean, std (B, C, 1); covariates as given, checked.
    """

    series: Tensor
    mean: Tensor
    std: Tensor
    past_covariates: Tensor | None
    future_covariates: Tensor | None
    static_features: Tensor | None


class PatchForecaster(Model):
    """Forecasts quantiles of the next steps of each channel from patches of its past.

        model = PatchForecaster(ForecasterConfig(context=132, horizon=24, patch_len=12, stride=6))
        model.loss(past, future).backward()   # (batch, 132, channels), (batch, 24, channels)
        model.predict(past)                   # (batch, 24, channels, quantiles), in order
        model(past_values=past, future_values=future, past_observed_mask=mask).loss   # as transformers' PatchTST

    Channels are separate series that share all parameters. Each is normalised by its own mean and deviation over
    the context, and the forecast is scaled back (`instance_statistics`): the forecast of a * x + b is a times that of
    x plus b, in any unit. A flat context has no scale; its forecast is its level. A missing value (nan, or 0 in the
    mask) has no influence: the last one before it stands in its place.

    Quantiles never cross: the model's are sorted, in training too, which only brings them nearer to the true ones
    (Chernozhukov et al. 2010).
    """

    config_class = ForecasterConfig

    def __init__(self, config: ForecasterConfig) -> None:
        super().__init__(config)
        E, tokens = config.encoder.hidden_dim, config.num_patches + config.future_patches
        self.embedding = nn.Linear(config.patch_len, E)
        self.positions = nn.Parameter(torch.empty(config.num_patches, E))
        self.dropout = nn.Dropout(config.encoder.dropout)
        self.encoder = Transformer(config.encoder)
        self.head = nn.Linear(tokens * E, config.horizon * len(config.quantiles))
        nn.init.trunc_normal_(self.positions, std=0.02)
        beside = config.past_covariates + config.future_covariates
        self.covariate_embedding = nn.Linear(config.patch_len * beside, E) if beside else None
        self.static_embedding = nn.Linear(config.static_features, E) if config.static_features else None
        self.future_embedding = None
        if config.future_covariates:
            self.future_embedding = nn.Linear(config.patch_len * config.future_covariates, E)
            self.future_positions = nn.Parameter(torch.empty(config.future_patches, E))
            nn.init.trunc_normal_(self.future_positions, std=0.02)

    def forward(
        self,
        past: Tensor | None = None,
        *,
        past_values: Tensor | None = None,
        future_values: Tensor | None = None,
        past_observed_mask: Tensor | None = None,
        future_observed_mask: Tensor | None = None,
        past_covariates: Tensor | None = None,
        future_covariates: Tensor | None = None,
        static_features: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Quantiles of the next steps.

        Args:
            past: (B, context, C), floating point, where nan is a missing value. past_values: the same.
            future_values: (B, horizon, C), what came next, nan where it is not known; with it there is a loss.
                labels: the same.
            past_observed_mask, future_observed_mask: bool or numbers of the same shapes, 0 = missing.
            past_covariates: (B, context, P). future_covariates: (B, context + horizon, K). static_features: (B, F).
                Those that the config has; in their usual size about 1, nan is not known.
            return_dict: see `outputs`.

        Returns:
            (B, horizon, C, Q), in order, in the units and dtype of `past`: give a series at a high level in float64;
            nan where a context has no value at all. With past_values or future_values a `ForecastOutput`.

        Raises:
            InputTypeError, InputError: other shapes or dtypes.
        """
        values = either("past_values", past, past_values)
        if labels is not None:
            future_values = either("future_values", future_values, labels)
        inputs = self._read(values, past_observed_mask, past_covariates, future_covariates, static_features)
        units = self._normalised(inputs)
        quantiles = (units * inputs.std[..., None] + inputs.mean[..., None]).transpose(1, 2).to(values.dtype)
        loss = None
        if future_values is not None:
            loss = self._loss_of(units, inputs, future_values, future_observed_mask)
        elif future_observed_mask is not None:
            raise InputError("future_observed_mask says which future_values are known; give both")
        output = ForecastOutput(
            loss,
            quantiles[..., self.middle],
            quantiles,
            *(one.transpose(1, 2).to(values.dtype) for one in (inputs.mean, inputs.std)),
        )
        by_name = past_values is not None or future_values is not None
        return answer(output, quantiles, by_name=by_name, return_dict=return_dict)

    def _read(
        self,
        past: Tensor,
        observed: Tensor | None = None,
        past_covariates: Tensor | None = None,
        future_covariates: Tensor | None = None,
        static_features: Tensor | None = None,
    ) -> _Inputs:
        """The arguments, checked.

        The mean is taken out in float64: float32 has no room for the changes of a series at a high level (+ 1e9), which
        are all that counts after that.
        """
        config: ForecasterConfig = self._config
        check_series(past, None, "(batch, time, channels)")
        if past.shape[1] != config.context:
            raise InputError(f"the model reads {config.context} steps, got {past.shape[1]}; cut or pad the past")
        B, whole = past.shape[0], config.context + config.horizon
        given = {
            "past_covariates": (past_covariates, (B, config.context, config.past_covariates)),
            "future_covariates": (future_covariates, (B, whole, config.future_covariates)),
            "static_features": (static_features, (B, config.static_features)),
        }
        for name, (value, shape) in given.items():
            if (value is not None) != (shape[-1] > 0) or (value is not None and value.shape != shape):
                wanted = f"must be {shape}" if shape[-1] else "are not in the config"
                raise InputError(f"{name} {wanted}, got {None if value is None else tuple(value.shape)}")
        series = past.to(torch.float64).transpose(1, 2)
        known = _observed("past_observed_mask", observed, past).transpose(1, 2)
        mean, std = instance_statistics(series, known)
        # The place of the last value at or before each step; before the first one there is the mean.
        steps = torch.where(known, torch.arange(series.shape[-1], device=series.device), -1).cummax(dim=-1).values
        filled = torch.where(steps < 0, mean, series.gather(-1, steps.clamp(min=0)))
        return _Inputs(filled, mean, std, past_covariates, future_covariates, static_features)

    def _in_units(self, series: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """(series - mean) / std, and 0 where the context is flat; in float32, or float64 for a float64 model."""
        wide = self.embedding.weight.dtype == torch.float64
        units = torch.where(std > 0, (series - mean) / torch.where(std > 0, std, 1), 0)
        return units.to(torch.float64 if wide else torch.float32)

    def _normalised(self, inputs: _Inputs) -> Tensor:
        """(B, C, S, Q), in units of std around mean and in order; dtype of `_in_units`."""
        config: ForecasterConfig = self._config
        B, C, L = inputs.series.shape
        dtype = self.embedding.weight.dtype
        units = self._in_units(inputs.series, inputs.mean, inputs.std)
        tokens = self.embedding(self._patches(units.reshape(B * C, 1, L)).to(dtype)) + self.positions
        tokens = tokens.view(B, C, config.num_patches, -1)
        beside = [inputs.past_covariates, inputs.future_covariates]
        series = [x[:, :L].transpose(1, 2).to(dtype) for x in beside if x is not None]
        if self.covariate_embedding is not None:
            patches = self._patches(torch.cat(series, dim=1).nan_to_num(0.0))
            tokens = tokens + self.covariate_embedding(patches)[:, None]
        if self.future_embedding is not None and inputs.future_covariates is not None:
            ahead = inputs.future_covariates[:, L:].transpose(1, 2).to(dtype).nan_to_num(0.0)
            ahead = F.pad(ahead, (0, config.future_patches * config.patch_len - config.horizon), mode="replicate")
            patches = ahead.unfold(2, config.patch_len, config.patch_len).transpose(1, 2).flatten(2)  # [B, M, ...]
            future = self.future_embedding(patches) + self.future_positions
            tokens = torch.cat([tokens, future[:, None].expand(-1, C, -1, -1)], dim=2)
        if self.static_embedding is not None and inputs.static_features is not None:
            tokens = tokens + self.static_embedding(inputs.static_features.to(dtype).nan_to_num(0.0))[:, None, None]
        hidden = self.dropout(self.encoder(self.dropout(tokens.flatten(0, 1))))
        forecast = self.head(hidden.flatten(1)).to(units.dtype).view(B, C, config.horizon, len(config.quantiles))
        ordered: Tensor = forecast.sort(dim=-1).values
        return ordered

    def _patches(self, series: Tensor) -> Tensor:
        """(B, c, L) -> (B, N, c patch_len), continued by one stride of the last value."""
        config: ForecasterConfig = self._config
        longer = F.pad(series, (0, config.stride), mode="replicate")
        return longer.unfold(2, config.patch_len, config.stride).transpose(1, 2).flatten(2)

    def _loss_of(self, units: Tensor, inputs: _Inputs, future: Tensor, observed: Tensor | None) -> Tensor:
        config: ForecasterConfig = self._config
        expected = (units.shape[0], config.horizon, units.shape[1])
        if not isinstance(future, Tensor) or future.shape != expected:
            got = tuple(future.shape) if isinstance(future, Tensor) else type(future).__name__
            raise InputError(f"future must be {expected}, got {got}")
        known = _observed("future_observed_mask", observed, future).transpose(1, 2)
        target = future.to(inputs.series.dtype).transpose(1, 2)
        target = self._in_units(torch.where(known, target, inputs.mean), inputs.mean, inputs.std)
        target = target.clamp(-FARTHEST, FARTHEST)
        return quantile_loss(units * (inputs.std > 0)[..., None], target, config.quantiles, known)

    def loss(self, past: Tensor, future: Tensor, **others: Tensor | None) -> Tensor:
        """The mean quantile loss in normalised units, in which all series weigh alike; a scalar.

        A future farther than 20 deviations from the context's mean counts as 20: a jump after a nearly flat context
        would outweigh all else, and quantiles within them stay what they are. Flat contexts count as 0, since no
        parameter changes their forecasts. Missing values of the future do not count.

        Args:
            past: as in `forward`. future: (B, horizon, C). others: masks and covariates, as in `forward`.

        Raises:
            InputTypeError, InputError: as `forward`, or a future of another shape.
        """
        mask = others.pop("future_observed_mask", None)
        inputs = self._read(past, others.pop("past_observed_mask", None), **others)
        return self._loss_of(self._normalised(inputs), inputs, future, mask)

    @torch.no_grad()
    def predict(self, past: Tensor, **others: Tensor | None) -> Tensor:
        """(B, context, C) -> (B, horizon, C, Q), quantiles in order. Call `eval()` first. Arguments as in `forward`."""
        found: Tensor = self.forward(past, **others)  # type: ignore[arg-type]
        return found

    def point(self, past: Tensor, **others: Tensor | None) -> Tensor:
        """(B, context, C) -> (B, horizon, C): the quantile next to the median."""
        return self.predict(past, **others)[..., self.middle]

    @property
    def middle(self) -> int:
        """The number of the quantile next to the median."""
        levels: Sequence[float] = self._config.quantiles
        return min(range(len(levels)), key=lambda i: abs(levels[i] - 0.5))

    def resized(self, tensors: dict[str, Tensor], before: Any, extend: str) -> dict[str, Tensor]:
        """A checkpoint of another context: the latest patches keep their positions and weights of the head, older ones
        begin with positions as if the context were repeated, and without weight in the answer."""
        now: ForecasterConfig = self._config
        found = super().resized(tensors, before, extend)
        if now.context == before.context:
            return found
        patches = (now.patch_len, now.stride)
        if patches != (before.patch_len, before.stride) or (now.context - before.context) % now.stride:
            raise InputError(
                f"the context can change by whole strides, of the same patches, from {before.context} (patch_len "
                f"{before.patch_len}, stride {before.stride}) on; got {now.context} with {patches[0]} and {patches[1]}"
            )
        old, new, E = before.num_patches, now.num_patches, now.encoder.hidden_dim
        ages = torch.arange(new).flip(0) % old  # 0: the last patch
        found["positions"] = tensors["positions"][old - 1 - ages]
        weight = tensors["head.weight"].unflatten(1, (-1, E))  # [S Q, N + M, E]
        recent, ahead = weight[:, max(old - new, 0) : old], weight[:, old:]
        older = weight.new_zeros(weight.shape[0], max(new - old, 0), E)
        found["head.weight"] = torch.cat([older, recent, ahead], dim=1).flatten(1)
        return found

    def head_prefixes(self) -> tuple[str, ...]:
        """The head may start fresh, for another horizon or other quantiles."""
        return ("head.",)


def _observed(name: str, mask: Tensor | None, values: Tensor) -> Tensor:
    """Bool of the values' shape, True = known: neither nan nor 0 in the mask."""
    known = ~values.isnan()
    if mask is None:
        return known
    if mask.shape != values.shape:
        raise InputError(f"{name} must be {tuple(values.shape)}, got {tuple(mask.shape)}")
    return known & (mask != 0)
