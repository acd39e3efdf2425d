"""What forecasting needs beside a model: instance normalisation, the quantile loss, the seasonal-naive baseline, and
measures: MASE, sMAPE, CRPS.

Series are (..., time) here, so that the functions serve one series as well as batches of many channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, InputTypeError


def instance_statistics(series: Tensor, observed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every series over its time, (..., 1) each: what RevIN takes out and puts back.

    (x - mean) / std is the model's input and forecast * std + mean the result, so that level and scale, which drift in
    real series, need not be learned. Kim et al. 2022, "Reversible instance normalization". Without their learned
    affine map, as in PatchTST, and without their eps: nothing is added to the variance, since whatever is small
    compared with it depends on the unit. std is exactly 0 where a series is flat, and only there.

    Both are computed by differences from the first value in units of the largest one, so that neither a high level
    nor a tiny or huge unit costs digits. Gradients do not pass through them.

    Args:
        observed: bool, of the series' shape: only values where it is True count. A series without any has the mean
            nan, and the deviation 0.
    """
    with torch.no_grad():
        if observed is None:
            first = series[..., :1]
            moved = series - first
        else:
            first = series.gather(-1, observed.int().argmax(dim=-1, keepdim=True))
            moved = torch.where(observed, series - first, 0)
        unit = moved.abs().amax(dim=-1, keepdim=True)
        moved = moved / torch.where(unit > 0, unit, 1)
        if observed is None:
            variance, mean = torch.var_mean(moved, dim=-1, keepdim=True, correction=0)
            return first + mean * unit, variance.sqrt() * unit
        count = observed.sum(dim=-1, keepdim=True)
        mean = moved.sum(dim=-1, keepdim=True) / count.clamp(min=1)
        variance = torch.where(observed, moved - mean, 0).square().sum(dim=-1, keepdim=True) / count.clamp(min=1)
        return torch.where(count > 0, first + mean * unit, torch.nan), variance.sqrt() * unit


def check_quantiles(quantiles: Sequence[float]) -> tuple[float, ...]:
    """The quantiles as a tuple.

    Raises:
        InputError: none, not increasing, or not between 0 and 1.
    """
    levels = tuple(float(q) for q in quantiles)
    increasing = all(low < high for low, high in itertools.pairwise(levels))
    if not levels or not increasing or levels[0] <= 0 or levels[-1] >= 1:
        raise InputError(f"quantiles must be increasing and between 0 and 1, such as (0.1, 0.5, 0.9); got {levels}")
    return levels


def quantile_loss(
    forecast: Tensor, target: Tensor, quantiles: Sequence[float], observed: Tensor | None = None
) -> Tensor:
    """The mean pinball loss, max(q (y - f), (q - 1) (y - f)); at q = 0.5 half the absolute error.

    Koenker and Bassett 1978. Its minimum over forecasts is the q-quantile.

    Args:
        forecast: (..., Q). target: (...). quantiles: Q levels.
        observed: bool (...): the mean is over targets where it is True, and 0 where none is.

    Raises:
        InputError: shapes or quantiles that do not belong together.
    """
    losses = pinball(forecast, target, quantiles)
    if observed is None:
        return losses.mean()
    losses = torch.where(observed[..., None], losses, 0)
    return losses.sum() / (observed.sum() * losses.shape[-1]).clamp(min=1)


def pinball(forecast: Tensor, target: Tensor, quantiles: Sequence[float]) -> Tensor:
    """The losses that `quantile_loss` is the mean of, (..., Q)."""
    levels = check_quantiles(quantiles)
    if forecast.shape != (*target.shape, len(levels)):
        raise InputError(
            f"a forecast of {len(levels)} quantiles for a target of {tuple(target.shape)} is "
            f"{(*target.shape, len(levels))}, got {tuple(forecast.shape)}"
        )
    q = torch.tensor(levels, dtype=forecast.dtype, device=forecast.device)
    error = target.unsqueeze(-1) - forecast
    return torch.maximum(q * error, (q - 1) * error)


def crps(forecast: Tensor, target: Tensor, quantiles: Sequence[float]) -> Tensor:
    """Continuous ranked probability score as far as quantiles tell it, (...): twice the mean pinball loss over levels.

    In the series' unit; of a single median it is the absolute error. Gneiting and Raftery 2007; Laio and Tamea 2007.

    Args:
        forecast: (..., Q). target: (...).
    """
    return 2 * pinball(forecast, target, quantiles).mean(dim=-1)


def smape(forecast: Tensor, target: Tensor) -> Tensor:
    """Symmetric mean absolute percentage error of each series, (..., horizon) -> (...), from 0 to 200 %.

    200 % times the mean of |y - f| / (|y| + |f|), where 0 / 0 counts as 0. Makridakis 1993, as in the M4 competition.
    """
    size = forecast.abs() + target.abs()
    return 200 * (torch.where(size == 0, 0, forecast - target).abs() / torch.where(size == 0, 1, size)).mean(dim=-1)


def seasonal_naive(history: Tensor, horizon: int, season: int) -> Tensor:
    """(..., time) -> (..., horizon): the last season again and again, the baseline that a forecast must beat.

    Raises:
        InputError: a history shorter than the season, or sizes below 1.
    """
    _check_season(history, season)
    if horizon < 1:
        raise InputError(f"horizon must be at least 1, got {horizon}")
    steps = torch.arange(horizon, device=history.device) % season
    return history[..., -season:].index_select(-1, steps)


def mase(forecast: Tensor, target: Tensor, history: Tensor, season: int = 1) -> Tensor:
    """Mean absolute scaled error of each series, (...): below 1 the forecast errs less than seasonal-naive steps did.

    mean |y - f| / mean |y_t - y_{t - season}|, the latter over the history. Hyndman and Koehler 2006. Infinite
    where the history repeats itself exactly.

    Args:
        forecast, target: (..., horizon). history: (..., time), what was known before; longer than the season.

    Raises:
        InputError: shapes that do not belong together, or a history that is not longer than the season.
    """
    _check_season(history, season)
    if forecast.shape != target.shape or history.shape[:-1] != target.shape[:-1] or history.shape[-1] <= season:
        raise InputError(
            f"MASE takes forecast and target of one shape (..., horizon) and a history (..., time) longer than the "
            f"season {season}; got {tuple(forecast.shape)}, {tuple(target.shape)}, {tuple(history.shape)}"
        )
    scale = (history[..., season:] - history[..., :-season]).abs().mean(dim=-1)
    return (forecast - target).abs().mean(dim=-1) / scale


def _check_season(history: Tensor, season: int) -> None:
    if season < 1 or history.dim() < 1 or history.shape[-1] < season:
        raise InputError(
            f"season must be at least 1 and the history at least that long; got season={season} and a history of "
            f"{tuple(history.shape)}"
        )


def check_positive(config: Any, *names: str) -> None:
    """Raise InputError unless these fields of a config are whole numbers from 1 on."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be an integer >= 1, got {value!r}")


def check_series(series: Tensor, features: int | None, layout: str) -> Tensor:
    """The series, unless it is no floating-point tensor of three dimensions: InputTypeError, InputError."""
    if not isinstance(series, Tensor) or not series.is_floating_point():
        kind = series.dtype if isinstance(series, Tensor) else type(series).__name__
        raise InputTypeError(f"a series must be a floating-point tensor, got {kind}")
    if series.dim() != 3 or (features is not None and series.shape[2] != features):
        raise InputError(f"a series must be {layout.format(features)}, got {tuple(series.shape)}")
    return series
