"""Time series: statsmodels' sunspots, co2 and elnino, or any table of numbers.

A series is divided in the order of time: the model is fitted on the first part and judged on the last one, which no
window that it learned from reaches. Forecasts are measured by the mean absolute scaled error (Hyndman and Koehler
2006, "Another look at measures of forecast accuracy"): the absolute error over that of the seasonal naive forecast
(the value one season ago) on the training part.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...errors import InputError, UnsupportedError
from .base import Batch, Splits, existing
from .series_table import fill_gaps, read_table

# Name -> observations in a season.
SERIES = {"sunspots": 11, "co2": 52, "elnino": 12}


@dataclass(frozen=True)
class Windows:
    """Pieces of a series: `past` float64 `[B, context, C]` and `future` `[B, horizon, C]` that follows it.

    float64 as it was read: in float32 a series of small changes at a high level would be rounded away.
    `starts` int64 `[windows]` are the places of the first observations of the futures.
    """

    values: Tensor  # [T, C]
    starts: Tensor
    context: int
    horizon: int

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, indices: Tensor) -> Batch:
        starts = self.starts[indices][:, None]
        past = self.values[starts + torch.arange(-self.context, 0)]
        return {"past": past, "future": self.values[starts + torch.arange(self.horizon)]}


def load(
    series: str | Path,
    *,
    context: int,
    horizon: int,
    season: int | None = None,
    columns: str | None = None,
    held_out: float = 0.2,
) -> Splits:
    """Windows of a series. The last `held_out` of the time is the test, as much before it (halved) the validation.

    Args:
        series: sunspots, co2, elnino, or a .csv file.
        season: observations in a season; known for the three, needed for a file.
        columns: of the file, joined by commas. Default: all but those of text and dates.

    `about` has `channels`, `season` and `scale`, float64 `[C]`: the mean absolute error of the seasonal naive
    forecast over the training part.

    Raises:
        InputError: an unknown name or file, a table of another layout (`series_table`), a series too short, or a season
            that is missing.
        UnsupportedError: statsmodels is not installed.
    """
    if isinstance(series, str):
        if series not in SERIES:
            raise InputError(
                f"there is no series {series!r}; choose from {', '.join(SERIES)}, or name a .csv by --data"
            )
        values, season = _from_statsmodels(series), season or SERIES[series]
    else:
        values = read_table(existing(series, "a .csv file with a header"), columns)
        if season is None:
            raise InputError(f"{series}: give --season, how many observations make one, such as 24 for hours of a day")
    if min(context, horizon, season) < 1:
        raise InputError(f"context, horizon and season must be at least 1, given {context}, {horizon}, {season}")
    total = len(values)
    test_from = total - max(horizon, round(total * held_out))
    valid_from = test_from - max(horizon, round(total * held_out / 2))
    if context < season:
        raise InputError(f"context {context} must reach back a season, {season}, as the naive forecast does")
    if valid_from < context + horizon or valid_from <= season:
        raise InputError(
            f"{total} observations are too few for context {context}, horizon {horizon} and season {season}: the "
            f"training part has {max(valid_from, 0)}; ask for less"
        )

    def windows(first: int, last: int) -> Windows:
        """Those whose future lies in [first, last)."""
        return Windows(values, torch.arange(max(first, context), last - horizon + 1), context, horizon)

    train = values[:valid_from]
    scale = (train[season:] - train[:-season]).abs().mean(dim=0)
    if not (scale > 0).all():
        raise InputError(f"a column of {series} repeats itself exactly each season: there is nothing to forecast")
    about = {"channels": values.shape[1], "season": season, "scale": scale, "context": context, "horizon": horizon}
    return Splits(windows(0, valid_from), windows(valid_from, test_from), windows(test_from, total), about)


def _from_statsmodels(name: str) -> Tensor:
    """A series that comes with statsmodels, float64 `[T, 1]`."""
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
    return fill_gaps(torch.tensor(values, dtype=torch.float64).unsqueeze(1))
