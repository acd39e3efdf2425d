"""Tables of time series, long or wide, as `Series`: what is measured, what is known beside it, and when.

A wide table has a row a step and a column a series; a long one (`id`) has its series below one another, as the
columns unique_id, ds, y. Missing values stay missing (nan): the model has a mask for them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, InputError, UnsupportedError
from .base import read_csv
from .series_table import (
    Clock,
    check_even,
    check_measured,
    check_one_series,
    date_of,
    number_of,
    read_clock,
    step_of,
)

FILE = "series.json"
ROWS = "rows"
AGGREGATES = ("mean", "sum", "last")
CALENDAR = 6  # features of a time: sine and cosine in the day, the week and the year
Names = tuple[str, ...]


@dataclass(frozen=True)
class Series:
    """One table's series, or one of a long table.

    Fields:
        name: of the series in a long table. columns: what is measured.
        values: float64 [T, C], nan where missing. times: of each row, None if the table does not say.
        past, future: float64 [T, P] and [T, K], what is known beside it. static: float64 [F].
        step: the distance of rows, as `series_table.step_of` gives it, or ("offset", a frequency of pandas).
    """

    name: str
    columns: Names
    values: Tensor
    times: list[datetime] | None
    past: Tensor
    future: Tensor
    static: Tensor
    step: tuple[str, Any] | None

    def later(self, count: int) -> list[datetime] | None:
        """The times of the next `count` steps, if they are known."""
        if not self.times or self.step is None:
            return None
        last, (kind, size) = self.times[-1], self.step
        if kind == "offset":
            return list(pandas().date_range(last, periods=count + 1, freq=size)[1:].to_pydatetime())
        if kind == "seconds":
            return [last + timedelta(seconds=size * (number + 1)) for number in range(count)]
        offset = pandas().offsets.MonthEnd if (last + timedelta(days=1)).day == 1 else None
        if offset is not None:
            return [(last + offset(int(size) * (number + 1))).to_pydatetime() for number in range(count)]
        months = pandas().DateOffset
        return [(last + months(months=int(size) * (number + 1))).to_pydatetime() for number in range(count)]


@dataclass(frozen=True)
class SeriesReader:
    """How a table is read; saved beside a model (`series.json`), so that new tables are read alike.

    Fields:
        columns: to forecast; empty: all with numbers that have no other part.
        id: the column that names the series of a long table.
        frequency: of pandas ("D", "h", "MS"): rows are put on its grid, several in a step joined by `aggregate`,
            steps without a row missing; "rows": each row is a step whatever its time; None: rows at one distance.
        past, future, static: columns known for the past, for the horizon too, and of a whole series.
        calendar: the time of day, week and year as future covariates.
        season: observations in a season, for the baselines.
        step: the distance of the rows that a model learned from, as `Series` has it; tables of another are refused.
        centre, spread: of the covariates (past, future, static in a row), by which they are brought to size 1.

    Raises:
        InputError: an unknown aggregate, or a column with two parts.
    """

    columns: Names = ()
    id: str | None = None
    frequency: str | None = None
    aggregate: str = "mean"
    past: Names = ()
    future: Names = ()
    static: Names = ()
    calendar: bool = False
    season: int | None = None
    step: tuple[str, Any] | None = None
    centre: tuple[float, ...] = ()
    spread: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.aggregate not in AGGREGATES:
            raise InputError(f"--aggregate must be one of {', '.join(AGGREGATES)}; got {self.aggregate!r}")
        given = [*self.columns, *self.past, *self.future, *self.static, *([self.id] if self.id else [])]
        twice = sorted({name for name in given if given.count(name) > 1})
        if twice:
            raise InputError(f"column {', '.join(twice)} has two parts; each is either forecast or known beside it")

    def read(self, path: Path) -> list[Series]:
        """The series of a .csv file with a header.

        Raises:
            InputError: no such columns, cells that are no numbers, or rows whose order or distance is not clear.
        """
        header, cells = read_csv(path)
        if header and all(math.isfinite(number_of(name)) for name in header):
            raise InputError(
                f"the first row of {path} holds numbers instead of names; write the names of the columns above "
                "them, one row for each step (not one column)"
            )
        beside = [*self.past, *self.future, *self.static]
        asked = [*self.columns, *beside, *([self.id] if self.id else [])]
        missing = [name for name in asked if name not in header]
        if missing:
            raise InputError(f"{path} has no column {', '.join(missing)}; its columns: {', '.join(header)}")
        table = torch.tensor([[number_of(cell) for cell in row] for row in cells], dtype=torch.float64)
        known = {header.index(name) for name in asked}
        if self.columns:
            chosen = [header.index(name) for name in self.columns]
        else:
            chosen = [i for i in range(len(header)) if i not in known and len(cells) and table[:, i].isfinite().any()]
        if not chosen or not cells:
            seen = f"; {header[-1]!r} holds {cells[0][-1]!r}" if cells else ", and no rows"
            raise InputError(
                f"{path} has no column of numbers, written as 1234.5; its columns: {', '.join(header) or 'none'}{seen}"
            )
        for place in [*chosen, *(header.index(name) for name in beside)]:
            bad = table[:, place].isinf().nonzero()
            if len(bad):
                raise InputError(
                    f"{path}, column {header[place]!r} holds {cells[int(bad[0])][place]!r}, which is no number; repair "
                    f"it, or name the columns to forecast with --columns ({', '.join(header)})"
                )
        check_one_series(path, header, cells, known)
        groups: dict[str, list[int]] = {}
        for number, row in enumerate(cells):
            groups.setdefault(row[header.index(self.id)] if self.id else "", []).append(number)
        found = []
        for name, rows in groups.items():
            part = [cells[number] for number in rows]
            if not self.columns:
                check_measured(path, header, table[rows], chosen)
            clock = read_clock(path, header, part, table[rows], known)
            found.append(self._one(path, name, header, table[rows], chosen, clock))
            self._check_step(path, found[-1])
        return found

    def _check_step(self, path: Path, series: Series) -> None:
        if self.step is None or series.step is None or tuple(self.step) == series.step:
            return
        raise InputError(
            f"the rows of {path} are {_distance(series.step)} apart, and the model learned from rows that are "
            f"{_distance(self.step)} apart; give a table of such rows, or train on these"
        )

    def _one(
        self, path: Path, name: str, header: list[str], table: Tensor, chosen: list[int], clock: Clock | None
    ) -> Series:
        def of(names: Names) -> Tensor:
            return table[:, [header.index(one) for one in names]]

        values, past, future, static = table[:, chosen], of(self.past), of(self.future), of(self.static)
        where = f"{path}{f', series {name!r}' if name else ''}"
        for place, column in enumerate(self.static):
            known = static[:, place][~static[:, place].isnan()]
            if len(known.unique()) > 1:
                raise InputError(f"{where}: column {column!r} is no feature of the whole series, since it changes")
        for place in range(len(chosen)):
            if values[:, place].isnan().all():
                raise InputError(f"{where}: column {header[chosen[place]]!r} is empty")
        times = [date_of(time[0]) for time in clock.times] if clock is not None and clock.dated else None
        step: tuple[str, Any] | None = None
        if self.frequency not in (None, ROWS):
            if times is None:
                raise InputError(f"{where}: --frequency {self.frequency} needs a column of dates, and there is none")
            parts = (values, past, future)
            joined, times = self._on_grid(torch.cat(parts, dim=1), times)
            values, past, future = joined.split([part.shape[1] for part in parts], dim=1)
            step = ("offset", self.frequency)
        elif clock is not None:
            if self.frequency is None:
                check_even(path, clock)
            step = step_of(clock) if clock.dated else None
        if self.calendar:
            if times is None:
                raise InputError(f"{where}: --calendar needs a column of dates, and there is none")
            future = torch.cat([future, calendar(times)], dim=1)
        first = [column[~column.isnan()][:1].sum() for column in static.T]  # 0 where none is known
        constant = torch.tensor(first, dtype=torch.float64)
        columns = tuple(header[place] for place in chosen)
        return Series(name, columns, values, times, past, future, constant, step)

    def _on_grid(self, table: Tensor, times: list[datetime]) -> tuple[Tensor, list[datetime]]:
        """Rows at the steps of the frequency, nan where there is none."""
        frame = pandas().DataFrame(table.numpy(), index=pandas().DatetimeIndex(times))
        try:
            steps = frame.resample(self.frequency)
        except ValueError as error:
            raise InputError(
                f"--frequency {self.frequency!r} is none of pandas' ({error}); try D, B, h, W or MS"
            ) from None
        joined = steps.sum(min_count=1) if self.aggregate == "sum" else getattr(steps, self.aggregate)()
        return torch.from_numpy(joined.to_numpy(copy=True)), list(joined.index.to_pydatetime())

    def fitted(self, series: Sequence[Series], ends: Sequence[int]) -> SeriesReader:
        """With the distance of rows, and the covariates' centre and spread over the first rows (`ends`) of each."""
        steps = {one.step for one in series}
        reader = dataclasses.replace(self, step=steps.pop() if len(steps) == 1 else None)
        if not any((self.past, self.future, self.static, self.calendar)):
            return reader
        rows = [torch.cat([one.past[:end], one.future[:end]], dim=1) for one, end in zip(series, ends, strict=True)]
        whole = torch.cat(rows)
        static = torch.stack([one.static for one in series])
        found = [_size(column) for column in (*whole.T, *static.T)]
        return dataclasses.replace(
            reader, centre=tuple(centre for centre, _ in found), spread=tuple(spread for _, spread in found)
        )

    def scaled(self, series: Series) -> Series:
        """The series with covariates of size about 1."""
        if not self.centre:
            return series
        centre, spread = (torch.tensor(each, dtype=torch.float64) for each in (self.centre, self.spread))
        sizes = [series.past.shape[1], series.future.shape[1], series.static.shape[0]]
        (a, b, c), (d, e, f) = centre.split(sizes), spread.split(sizes)
        return dataclasses.replace(
            series,
            past=(series.past - a) / d,
            future=(series.future - b) / e,
            static=(series.static - c) / f,
        )

    # --- beside a model ---

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write series.json."""
        Path(folder, FILE).write_text(json.dumps(dataclasses.asdict(self), indent=2), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> SeriesReader:
        """What `save_pretrained` wrote.

        Raises:
            CheckpointError: no such file, or a damaged one.
        """
        path = Path(folder, FILE)
        try:
            fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            return cls(**values)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} does not say how tables are read ({error}); name a run of train forecast"
            ) from error


def _distance(step: tuple[str, Any]) -> str:
    kind, size = step
    if kind == "offset":
        return f"{size} (--frequency)"
    return f"{timedelta(seconds=size)}" if kind == "seconds" else f"{size:g} months"


def _size(column: Tensor) -> tuple[float, float]:
    known = column[~column.isnan()]
    if not len(known):
        return 0.0, 1.0
    spread = float(known.std(correction=0))
    return float(known.mean()), spread if spread > 0 else 1.0


def calendar(times: list[datetime]) -> Tensor:
    """float64 [T, 6]: sine and cosine of where each time is in its day, week and year."""
    turns = [
        (
            (time.hour * 3600 + time.minute * 60 + time.second) / 86400,
            time.weekday() / 7,
            (time.timetuple().tm_yday - 1) / 365.25,
        )
        for time in times
    ]
    angles = 2 * math.pi * torch.tensor(turns, dtype=torch.float64)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def pandas() -> Any:
    """The module pandas."""
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise UnsupportedError("calendars of time series need pandas; pip install 'efficient-attn[train]'") from error
    return pandas
