"""Time series: a Transformer that reads steps and answers at the last one, and a patched forecaster of many steps.

Letters: T time, B batch, F features, L context, S horizon, C channels, Q quantiles, N patches, E features of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, InputTypeError
from .base import Model
from .forecasting import check_quantiles, instance_statistics, quantile_loss
from .positions import check_length, make_positions
from .transformer import Specs, Transformer, TransformerConfig

# --- steps in, an answer at the last one ---


@dataclass(frozen=True)
class TimeSeriesConfig:
    """A `TimeSeriesTransformer`.

    Fields:
        input_dim, output_dim: features of a step, and of the answer.
        batch_first: (batch, time, features) instead of (time, batch, features).
        positions: "sinusoidal", "learned" or "none" (for an encoder with rotary positions).
        max_len: longest sequence.
        encoder: the Transformer; its dropout is that of the embedding too.

    Raises:
        InputError: values out of range.
    """

    input_dim: int = 1
    output_dim: int = 1
    batch_first: bool = False
    positions: str = "sinusoidal"
    max_len: int = 4096
    encoder: TransformerConfig = field(default_factory=TransformerConfig)

    def __post_init__(self) -> None:
        _check_positive(self, "input_dim", "output_dim", "max_len")


class TimeSeriesTransformer(Model):
    """Reads a sequence of steps and answers at the last one: the next value, a class, a state.

        model = TimeSeriesTransformer(input_dim=3, hidden_dim=64, nhead=4, num_layers=2)
        model(torch.randn(100, 8, 3))  # (time, batch, features) -> (batch, output_dim)

    Args:
        input_dim: features of a step, or a whole `TimeSeriesConfig` and nothing else.
        hidden_dim, nhead, num_layers: of the Transformer.
        output_dim, batch_first, max_len: see `TimeSeriesConfig`.
        dropout: of the Transformer. attention: a spec, or one a layer.
        causal: each step sees itself and those before.

    Raises:
        InputError: values out of range. UnsupportedError: causal with an attention that cannot be.
    """

    config_class = TimeSeriesConfig

    def __init__(
        self,
        input_dim: int | TimeSeriesConfig,
        hidden_dim: int = 64,
        nhead: int = 4,
        num_layers: int = 2,
        *,
        output_dim: int = 1,
        dropout: float = 0.1,
        batch_first: bool = False,
        max_len: int = 4096,
        causal: bool = False,
        attention: Specs = "dense",
    ) -> None:
        if isinstance(input_dim, TimeSeriesConfig):
            config = input_dim
        else:
            encoder = TransformerConfig(
                hidden_dim, num_layers, nhead, dropout=dropout, causal=causal, attention=attention
            )
            config = TimeSeriesConfig(input_dim, output_dim, batch_first, max_len=max_len, encoder=encoder)
        super().__init__(config)
        E = config.encoder.hidden_dim
        self.embedding = nn.Linear(config.input_dim, E)
        self.positions = make_positions(config.positions, config.max_len, E)
        self.dropout = nn.Dropout(config.encoder.dropout)
        self.encoder = Transformer(config.encoder)
        self.head = nn.Linear(E, config.output_dim)

    def forward(self, series: Tensor, *, key_padding_mask: Tensor | None = None) -> Tensor:
        """The answer at the last step.

        Args:
            series: (T, B, F), or (B, T, F) with batch_first, floating point.
            key_padding_mask: bool (B, T), True = padding; the answer is then at the last step that is not padding.

        Returns:
            (B, output_dim).

        Raises:
            InputTypeError, InputError: other shapes or dtypes, no step, or more than max_len.
        """
        config: TimeSeriesConfig = self._config
        x = _check_series(series, config.input_dim, "(batch, time, {})" if config.batch_first else "(time, batch, {})")
        x = x if config.batch_first else x.transpose(0, 1)
        B, T = x.shape[:2]
        check_length(T, config.max_len)
        if T < 1:
            raise InputError("a series needs at least one step")
        x = self.embedding(x.to(self.embedding.weight.dtype))
        if self.positions is not None:
            x = x + self.positions(torch.arange(T, device=x.device)).to(x.dtype)
        hidden = self.encoder(self.dropout(x), key_padding_mask=key_padding_mask)
        if key_padding_mask is None:
            last = hidden[:, -1]
        else:
            steps = torch.arange(T, device=x.device)
            at = torch.where(key_padding_mask, -1, steps).amax(dim=1).clamp(min=0)
            last = hidden[torch.arange(B, device=x.device), at]
        answer: Tensor = self.head(last)
        return answer

    def loss(self, series: Tensor, target: Tensor, *, key_padding_mask: Tensor | None = None) -> Tensor:
        """Mean squared error, a scalar.

        Args:
            series, key_padding_mask: as in `forward`. target: (B, output_dim).

        Raises:
            InputTypeError, InputError: as `forward`, or a target of another shape.
        """
        answer = self.forward(series, key_padding_mask=key_padding_mask)
        if target.shape != answer.shape:
            raise InputError(f"target must be {tuple(answer.shape)}, got {tuple(target.shape)}")
        return F.mse_loss(answer, target.to(answer.dtype))

    def head_prefixes(self) -> tuple[str, ...]:
        """The head may start fresh."""
        return ("head.",)


# --- a context in, quantiles of many steps out ---

FARTHEST = 20.0  # deviations from the context's mean that the loss tells apart


@dataclass(frozen=True)
class ForecasterConfig:
    """A `PatchForecaster`.

    Fields:
        context: steps that it reads. horizon: steps that it forecasts.
        patch_len, stride: a token is patch_len steps, the next one starts stride steps later.
        quantiles: levels that it forecasts, increasing, between 0 and 1.
        encoder: the Transformer over patches; its dropout is that of embedding and head too.

    Raises:
        InputError: values out of range, or patches longer than the context.
    """

    context: int = 96
    horizon: int = 24
    patch_len: int = 16
    stride: int = 8
    quantiles: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9)
    encoder: TransformerConfig = field(default_factory=TransformerConfig)

    def __post_init__(self) -> None:
        _check_positive(self, "context", "horizon", "patch_len", "stride")
        if self.patch_len > self.context or self.stride > self.patch_len:
            raise InputError(
                "patches must fit into the context and leave no step out: stride <= patch_len <= context; got "
                f"{self.stride}, {self.patch_len}, {self.context}"
            )
        object.__setattr__(self, "quantiles", check_quantiles(self.quantiles))

    @property
    def num_patches(self) -> int:
        """N, of the context continued by one stride."""
        return (self.context - self.patch_len) // self.stride + 2


class PatchForecaster(Model):
    """Forecasts quantiles of the next steps of each channel from patches of its past.

    After PatchTST, Nie et al. 2023, arXiv:2211.14730, with quantile output.

        model = PatchForecaster(ForecasterConfig(context=132, horizon=24, patch_len=12, stride=6))
        model.loss(past, future).backward()   # (batch, 132, channels), (batch, 24, channels)
        model.predict(past)                   # (batch, 24, channels, quantiles)

    Channels are separate series that share all parameters. Each is normalised by its own mean and deviation over
    the context, and the forecast is scaled back (`instance_statistics`): the forecast of a * x + b is a times that of
    x plus b, in any unit. A flat context has no scale; its forecast is its level.
    """

    config_class = ForecasterConfig

    def __init__(self, config: ForecasterConfig) -> None:
        super().__init__(config)
        E, N = config.encoder.hidden_dim, config.num_patches
        self.embedding = nn.Linear(config.patch_len, E)
        self.positions = nn.Parameter(torch.empty(N, E))
        self.dropout = nn.Dropout(config.encoder.dropout)
        self.encoder = Transformer(config.encoder)
        self.head = nn.Linear(N * E, config.horizon * len(config.quantiles))
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, past: Tensor) -> Tensor:
        """Quantiles of the next steps, which training does not force into order (`predict` does).

        Args:
            past: (B, context, C), floating point, without gaps.

        Returns:
            (B, horizon, C, Q), in the units and dtype of `past`: give a series at a high level in float64.

        Raises:
            InputTypeError, InputError: other shapes or dtypes.
        """
        series = self._series(past)
        mean, std = instance_statistics(series)
        forecast = self._normalised(series, mean, std)
        return (forecast * std[..., None] + mean[..., None]).transpose(1, 2).to(past.dtype)

    def _series(self, past: Tensor) -> Tensor:
        """(B, L, C) -> (B, C, L) in float64, in which the mean is taken out: float32 has no room for the changes of a
        series at a high level (+ 1e9), which are all that counts after that."""
        _check_series(past, None, "(batch, time, channels)")
        if past.shape[1] != self._config.context:
            raise InputError(f"the model reads {self._config.context} steps, got {past.shape[1]}; cut or pad the past")
        return past.to(torch.float64).transpose(1, 2)

    def _in_units(self, series: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """(series - mean) / std, and 0 where the context is flat; in float32, or float64 for a float64 model."""
        wide = self.embedding.weight.dtype == torch.float64
        units = torch.where(std > 0, (series - mean) / torch.where(std > 0, std, 1), 0)
        return units.to(torch.float64 if wide else torch.float32)

    def _normalised(self, series: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """(B, C, L) -> (B, C, S, Q), in units of std around mean; dtype of `_in_units`."""
        config: ForecasterConfig = self._config
        B, C, L = series.shape
        units = self._in_units(series, mean, std)
        x = F.pad(units.reshape(B * C, 1, L), (0, config.stride), mode="replicate")
        patches = x.squeeze(1).unfold(1, config.patch_len, config.stride)  # [B C, N, patch_len]
        tokens = self.embedding(patches.to(self.embedding.weight.dtype)) + self.positions
        hidden = self.dropout(self.encoder(self.dropout(tokens)))
        forecast: Tensor = self.head(hidden.flatten(1)).to(units.dtype)
        return forecast.reshape(B, C, config.horizon, len(config.quantiles))

    def loss(self, past: Tensor, future: Tensor) -> Tensor:
        """The mean quantile loss in normalised units, in which all series weigh alike; a scalar.

        A future farther than 20 deviations from the context's mean counts as 20: a jump after a nearly flat context
        would outweigh all else, and quantiles within them stay what they are. Flat contexts count as 0, since no
        parameter changes their forecasts.

        Args:
            past: as in `forward`. future: (B, horizon, C).

        Raises:
            InputTypeError, InputError: as `forward`, or a future of another shape.
        """
        config: ForecasterConfig = self._config
        series = self._series(past)
        expected = (past.shape[0], config.horizon, past.shape[2])
        if future.shape != expected:
            raise InputError(f"future must be {expected}, got {tuple(future.shape)}")
        mean, std = instance_statistics(series)
        target = self._in_units(future.to(series.dtype).transpose(1, 2), mean, std).clamp(-FARTHEST, FARTHEST)
        forecast = self._normalised(series, mean, std) * (std > 0)[..., None]
        return quantile_loss(forecast, target, config.quantiles)

    @torch.no_grad()
    def predict(self, past: Tensor) -> Tensor:
        """(B, context, C) -> (B, horizon, C, Q), quantiles in order. Call `eval()` first.

        They are sorted, which only brings them nearer to the true ones (Chernozhukov et al. 2010).
        """
        return self.forward(past).sort(dim=-1).values

    def point(self, past: Tensor) -> Tensor:
        """(B, context, C) -> (B, horizon, C): the quantile next to the median."""
        levels: Sequence[float] = self._config.quantiles
        middle = min(range(len(levels)), key=lambda i: abs(levels[i] - 0.5))
        return self.predict(past)[..., middle]

    def head_prefixes(self) -> tuple[str, ...]:
        """The head may start fresh, for another horizon or other quantiles."""
        return ("head.",)


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be an integer >= 1, got {value!r}")


def _check_series(series: Tensor, features: int | None, layout: str) -> Tensor:
    if not isinstance(series, Tensor) or not series.is_floating_point():
        kind = series.dtype if isinstance(series, Tensor) else type(series).__name__
        raise InputTypeError(f"a series must be a floating-point tensor, got {kind}")
    if series.dim() != 3 or (features is not None and series.shape[2] != features):
        raise InputError(f"a series must be {layout.format(features)}, got {tuple(series.shape)}")
    return series
