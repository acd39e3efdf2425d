"""Forecasting of time series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import InputError
from ...models import ForecasterConfig, PatchForecaster, TransformerConfig
from ...models.forecasting import crps, seasonal_naive, smape
from ..data import series
from ..data.base import Batch, Splits
from ..data.series_reader import SeriesReader
from ..task import Task, Values, option

COVERED = (0.1, 0.9)
COVARIATES = ("past_covariates", "future_covariates", "static_features")


@dataclass(frozen=True)
class Forecast(Task):
    """A :class:`PatchForecaster`: quantiles of the next `horizon` steps from patches of the last `context`."""

    name: ClassVar[str] = "forecast"
    help: ClassVar[str] = "The next steps of a time series: sunspots, co2, elnino or a table."
    data_help: ClassVar[str | None] = (
        "A .csv file with a header, one row a step, oldest first; long with --id. Needs --season."
    )
    defaults: ClassVar[Mapping[str, Any]] = {"steps": 600, "batch": 32, "lr": 1e-3}
    metric: ClassVar[str] = "mase"

    series: str = option("sunspots", f"{', '.join(series.SERIES)}; --data names a table instead.")
    data: str | None = None
    columns: str | None = option(
        None, "Columns to forecast, joined by commas. Default: all with numbers and no other part."
    )
    season: int | None = option(None, "Steps in a season. Default: the series'.")
    id: str | None = option(None, "Column that names the series of a long table (unique_id, ds, y).")
    frequency: str | None = option(None, "Of pandas (D, B, h, MS): rows are put on its grid; rows: as they are.")
    aggregate: str = option("mean", "Of several rows in a step of --frequency: mean, sum or last.")
    past_covariates: str | None = option(None, "Columns known for the past, joined by commas.")
    future_covariates: str | None = option(None, "Columns known for the horizon too.")
    static_features: str | None = option(None, "Columns of numbers that belong to a whole series.")
    calendar: bool = option(False, "Time of day, week and year as future covariates.")
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
        self._config({})
        self._reader()

    @property
    def tokens(self) -> int:
        """Patches of a context."""
        return self._config({}).num_patches

    def splits(self, seed: int) -> Splits:
        source = self.series if self.data is None else Path(self.data)
        return series.load(
            source, context=self.context, horizon=self.horizon, season=self.season, reader=self._reader()
        )

    def _reader(self) -> SeriesReader:
        return SeriesReader(
            series.split_names(self.columns),
            self.id,
            self.frequency,
            self.aggregate,
            series.split_names(self.past_covariates),
            series.split_names(self.future_covariates),
            series.split_names(self.static_features),
            self.calendar,
        )

    def reader(self, about: Mapping[str, Any]) -> Any:
        return about["reader"]

    def _config(self, about: Mapping[str, Any]) -> ForecasterConfig:
        encoder = TransformerConfig(
            self.dim, self.layers, self.heads, dropout=self.dropout, attention=self.attention, mlp_dim=2 * self.dim
        )
        beside = {name: about.get(name, 0) for name in COVARIATES}
        return ForecasterConfig(self.context, self.horizon, self.patch, self.stride, encoder=encoder, **beside)

    def model(self, about: Mapping[str, Any]) -> PatchForecaster:
        return PatchForecaster(self._config(about))

    def loss(self, model: PatchForecaster, batch: Batch) -> Tensor:
        return model.loss(batch["past"], batch["future"], **covariates(batch))

    def evaluate(self, model: PatchForecaster, batch: Batch, about: Mapping[str, Any]) -> Values:
        past, future = batch["past"], batch["future"]
        quantiles = model.predict(past, **covariates(batch))
        levels = model.config.quantiles
        low, high = (quantiles[..., levels.index(level)] for level in COVERED)
        middle = quantiles[..., levels.index(0.5)]
        naive = naive_forecast(past, self.horizon, about["season"])
        found = measures(quantiles, middle, future, batch["scale"], levels)
        of_naive = measures(naive[..., None], naive, future, batch["scale"], (0.5,))
        inside = ((low <= future) & (future <= high)).float()
        return {
            "loss": model.loss(past, future, **covariates(batch)).expand(len(past)),
            **found,
            **{f"naive_{name}": value for name, value in of_naive.items()},
            "within_80%": inside.masked_fill(future.isnan(), torch.nan).nanmean(dim=(1, 2)),
        }

    def summary(self, values: Values, about: Mapping[str, Any]) -> dict[str, float]:
        found = {name: value.double().nanmean().item() for name, value in values.items()}
        return found | {"to_naive": found["mase"] / found["naive_mase"]}


def covariates(batch: Batch) -> dict[str, Tensor | None]:
    """What a batch of `data.series` has beside past and future."""
    return {name: batch[name] for name in COVARIATES if name in batch}


def naive_forecast(past: Tensor, horizon: int, season: int) -> Tensor:
    """`[B, L, C]` -> `[B, horizon, C]`: the last season, where missing values are the last ones before them."""
    return seasonal_naive(series.last_known(past.transpose(1, 2)), horizon, season).transpose(1, 2)


def measures(
    quantiles: Tensor, middle: Tensor, future: Tensor, scale: Tensor, levels: Sequence[float]
) -> dict[str, Tensor]:
    """MASE, sMAPE and CRPS (over the scale, so that series can be averaged) of each example, over what is known.

    Args:
        quantiles: `[B, S, C, Q]`, of `levels`. middle, future: `[B, S, C]`, the latter nan where missing.
        scale: `[B, C]`.
    """
    known = ~future.isnan()
    target = torch.where(known, future, 0)

    def mean(errors: Tensor) -> Tensor:
        return errors.masked_fill(~known, torch.nan).nanmean(dim=(1, 2))

    by = scale.to(future)[:, None]
    return {
        "mase": mean((middle - target).abs() / by),
        "smape": mean(smape(middle[..., None], target[..., None])),
        "crps": mean(crps(quantiles, target, levels) / by),
    }
