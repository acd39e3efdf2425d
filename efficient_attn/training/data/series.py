"""Time series: statsmodels' sunspots, co2 and elnino, or any table of numbers.

A series is divided in the order of time: the model is fitted on the first part and judged on the last one, which no
window that it learned from reaches. Forecasts are measured by the mean absolute scaled error (Hyndman and Koehler
2006, "Another look at measures of forecast accuracy"): the absolute error over that of the seasonal naive forecast
(the value one season ago) on the training part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...errors import InputError, UnsupportedError
from .base import Batch, Splits, existing
from .series_reader import Series, SeriesReader

# Name -> observations in a season.
SERIES = {"sunspots": 11, "co2": 52, "elnino": 12}


@dataclass(frozen=True)
class Windows:
    """Pieces of series: `past` float64 `[B, context, C]` and `future` `[B, horizon, C]` after it, nan where missing.

    float64 as it was read: in float32 a series of small changes at a high level would be rounded away. `scale` `[B, C]`
    is the naive forecast's error. Where there are some: `past_covariates`, `future_covariates`, `static_features`.
    `places` int64 `[windows, 2]` are the number of a series and of the first row of the future.
    """

    series: Sequence[Series]
    places: Tensor
    context: int
    horizon: int
    scale: Tensor  # [series, C]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def starts(self) -> Tensor:
        """The first rows of the futures."""
        return self.places[:, 1]

    @property
    def values(self) -> Tensor:
        """What the first series measures, `[T, C]`."""
        return self.series[0].values

    def batch(self, indices: Tensor) -> Batch:
        found: dict[str, list[Tensor]] = {}
        for number, start in self.places[indices].tolist():
            for name, value in window(self.series[number], start, self.context, self.horizon).items():
                found.setdefault(name, []).append(value)
        batch = {name: torch.stack(values) for name, values in found.items()}
        return batch | {"scale": self.scale[self.places[indices][:, 0]]}


def window(series: Series, start: int, context: int, horizon: int) -> dict[str, Tensor]:
    """What a model reads and what it shall forecast, around the row `start`."""
    found = {"past": series.values[start - context : start], "future": series.values[start : start + horizon]}
    if series.past.shape[1]:
        found["past_covariates"] = series.past[start - context : start]
    if series.future.shape[1]:
        found["future_covariates"] = series.future[start - context : start + horizon]
    if len(series.static):
        found["static_features"] = series.static
    return found


def load(
    series: str | Path,
    *,
    context: int,
    horizon: int,
    season: int | None = None,
    columns: str | None = None,
    reader: SeriesReader | None = None,
    held_out: float = 0.2,
) -> Splits:
    """Windows of series. The last `held_out` of each one's time is the test, half as much before it the validation.

    Args:
        series: sunspots, co2, elnino, or a .csv file.
        season: observations in a season; known for the three, needed for a file.
        columns: of the file, joined by commas. Default: all but those of text and dates.
        reader: how the file is read, instead of `columns`.

    `about` has `channels`, `season`, `scale`, float64 `[series, C]`: the mean absolute error of the seasonal naive
    forecast over the training part, and `reader`.

    Raises:
        InputError: an unknown name or file, a table of another layout (`series_table`), a series too short, or a season
            that is missing.
        UnsupportedError: statsmodels is not installed.
    """
    reader = reader or SeriesReader(columns=split_names(columns))
    if isinstance(series, str):
        if series not in SERIES:
            raise InputError(
                f"there is no series {series!r}; choose from {', '.join(SERIES)}, or name a .csv by --data"
            )
        read, season = [_from_statsmodels(series)], season or SERIES[series]
        reader = SeriesReader()
    else:
        read = reader.read(existing(series, "a .csv file with a header"))
        if season is None:
            raise InputError(f"{series}: give --season, how many observations make one, such as 24 for hours of a day")
    return divide(read, reader, context, horizon, season, held_out=held_out)


def divide(
    read: Sequence[Series], reader: SeriesReader, context: int, horizon: int, season: int, *, held_out: float = 0.2
) -> Splits:
    """Windows of series that are read; arguments and errors as in `load`."""
    if min(context, horizon, season) < 1:
        raise InputError(f"context, horizon and season must be at least 1, given {context}, {horizon}, {season}")
    if context < season:
        raise InputError(f"context {context} must reach back a season, {season}, as the naive forecast does")
    bounds = []
    for one in read:
        total = len(one.values)
        test_from = total - max(horizon, round(total * held_out))
        valid_from = test_from - max(horizon, round(total * held_out / 2))
        if valid_from < context + horizon or valid_from <= season:
            who = f"series {one.name!r}: " if one.name else ""
            raise InputError(
                f"{who}{total} observations are too few for context {context}, "
                f"horizon {horizon} and season {season}: the training part has {max(valid_from, 0)}; ask for less"
            )
        bounds.append((0, valid_from, test_from, total))
    reader = dataclasses.replace(reader, season=season).fitted(read, [valid_from for _, valid_from, *_ in bounds])
    scale = torch.stack([naive_error(one.values[: bound[1]], season) for one, bound in zip(read, bounds, strict=True)])
    if not (scale > 0).all():
        raise InputError("a column repeats itself exactly each season: there is nothing to forecast")
    scaled = [reader.scaled(one) for one in read]

    def windows(part: int) -> Windows:
        """Those whose future lies in a part of the time and holds something to be compared with."""
        places = []
        for number, (one, bound) in enumerate(zip(scaled, bounds, strict=True)):
            known = ~one.values.isnan().all(dim=1)
            for start in range(max(bound[part], context), bound[part + 1] - horizon + 1):
                if known[start : start + horizon].any() and known[start - context : start].any():
                    places.append((number, start))
        return Windows(scaled, torch.tensor(places, dtype=torch.int64).view(-1, 2), context, horizon, scale)

    about = {
        "channels": read[0].values.shape[1],
        "season": season,
        "scale": scale,
        "context": context,
        "horizon": horizon,
        "past_covariates": read[0].past.shape[1],
        "future_covariates": read[0].future.shape[1],
        "static_features": len(read[0].static),
        "reader": reader,
    }
    return Splits(windows(0), windows(1), windows(2), about)


def naive_error(values: Tensor, season: int) -> Tensor:
    """The mean absolute error of the value one season ago, float64 `[C]`, over steps where both are known."""
    errors = (values[season:] - values[:-season]).abs()
    return torch.where(errors.isnan().all(dim=0), 0, errors.nanmean(dim=0))


def last_known(values: Tensor) -> Tensor:
    """`[..., T]` with each missing value as the last one before it, or the first known one; nan if there is none."""
    steps = torch.arange(values.shape[-1], device=values.device)
    known = ~values.isnan()
    places = torch.where(known, steps, -1).cummax(dim=-1).values
    first = known.int().argmax(dim=-1, keepdim=True)
    return values.gather(-1, torch.where(places < 0, first, places))


def split_names(text: str | None) -> tuple[str, ...]:
    """The names in a text that joins them by commas."""
    return tuple(name.strip() for name in text.split(",")) if text else ()


def read_table(path: Path, columns: str | None) -> Tensor:
    """What a wide table measures, float64 `[T, C]`; arguments and errors as of `SeriesReader`."""
    return SeriesReader(columns=split_names(columns)).read(path)[0].values


def _from_statsmodels(name: str) -> Series:
    """A series that comes with statsmodels, one channel."""
    try:
        import statsmodels.datasets
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"{name} comes with statsmodels; pip install 'efficient-attn[train]'") from error
    table = getattr(statsmodels.datasets, name).load_pandas().data
    if name == "sunspots":
        values = table["SUNACTIVITY"].to_numpy()
    elif name == "co2":
        values = table["co2"].to_numpy()
    else:  # elnino: a row a year, a column a month
        values = table.drop(columns="YEAR").to_numpy().reshape(-1)
    column = torch.tensor(values, dtype=torch.float64).unsqueeze(1)
    nothing = torch.zeros(len(column), 0, dtype=torch.float64)
    return Series("", (name,), column, None, nothing, nothing, torch.zeros(0, dtype=torch.float64), None)
