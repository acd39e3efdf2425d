"""Forecasting of time series."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ...errors import InputError
from ...models import ForecasterConfig, PatchForecaster, TransformerConfig
from ...models.forecasting import seasonal_naive
from ..data import series
from ..data.base import Batch, Splits
from ..task import Task, Values, option

COVERED = (0.1, 0.9)


@dataclass(frozen=True)
class Forecast(Task):
    """A :class:`PatchForecaster`: quantiles of the next `horizon` steps from patches of the last `context`."""

    name: ClassVar[str] = "forecast"
    help: ClassVar[str] = "The next steps of a time series: sunspots, co2, elnino or a table."
    data_help: ClassVar[str | None] = "A .csv file with a header, one row a step, oldest first. Needs --season."
    defaults: ClassVar[Mapping[str, Any]] = {"steps": 600, "batch": 32, "lr": 1e-3}
    metric: ClassVar[str] = "mase"

    series: str = option("sunspots", f"{', '.join(series.SERIES)}; --data names a table instead.")
    data: str | None = None
    columns: str | None = option(None, "Columns of the table, joined by commas. Default: all with numbers.")
    season: int | None = option(None, "Steps in a season. Default: the series'.")
    context: int = option(104, "Steps that are read.")
    horizon: int = option(11, "Steps that are forecast.")
    patch: int = option(8, "Steps in a token.")
    stride: int = option(4, "Steps from token to token.")
    dim: int = option(64, "Features of the model.")
    layers: int = option(2, "Layers of the model.")
    heads: int = option(4, "Attention heads.")
    dropout: float = option(0.2, "Dropout.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is None and self.series not in series.SERIES:
            raise InputError(f"there is no series {self.series!r}; choose from {', '.join(series.SERIES)}")
        self._config()

    def splits(self, seed: int) -> Splits:
        source = self.series if self.data is None else Path(self.data)
        return series.load(source, context=self.context, horizon=self.horizon, season=self.season, columns=self.columns)

    def _config(self) -> ForecasterConfig:
        encoder = TransformerConfig(
            self.dim, self.layers, self.heads, dropout=self.dropout, attention=self.attention, mlp_dim=2 * self.dim
        )
        return ForecasterConfig(self.context, self.horizon, self.patch, self.stride, encoder=encoder)

    def model(self, about: Mapping[str, Any]) -> PatchForecaster:
        return PatchForecaster(self._config())

    def loss(self, model: PatchForecaster, batch: Batch) -> Tensor:
        return model.loss(batch["past"], batch["future"])

    def evaluate(self, model: PatchForecaster, batch: Batch, about: Mapping[str, Any]) -> Values:
        past, future = batch["past"], batch["future"]
        scale = about["scale"].to(past.device)
        naive = seasonal_naive(past.transpose(1, 2), self.horizon, about["season"]).transpose(1, 2)
        quantiles = model.predict(past)
        levels = model.config.quantiles
        low, high = (quantiles[..., levels.index(level)] for level in COVERED)

        def scaled(forecast: Tensor) -> Tensor:
            errors: Tensor = ((forecast - future).abs() / scale).mean(dim=(1, 2))
            return errors

        return {
            "loss": model.loss(past, future).expand(len(past)),
            "mase": scaled(model.point(past)),
            "naive_mase": scaled(naive),
            "within_80%": ((low <= future) & (future <= high)).float().mean(dim=(1, 2)),
        }

    def summary(self, values: Values, about: Mapping[str, Any]) -> dict[str, float]:
        found = super().summary(values, about)
        return found | {"to_naive": found["mase"] / found["naive_mase"]}
