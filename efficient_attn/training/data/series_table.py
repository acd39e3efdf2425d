"""A table as a time series: one row a step, oldest first, one column a series. Every other layout is refused by name.

What a table means can often only be guessed, and a wrong guess (several series read as one, time run backwards, the
year forecast as if it were measured) gives a forecast that looks like any other. So whatever speaks of another layout
is an error that says what to do.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ...errors import InputError
from .base import read_csv

# Names of columns in small letters. A calendar is what the parts of a date are in, from the longest on.
TIMES = frozenset({"ds", "date", "datetime", "time", "timestamp", "index", "step", "t", "unnamed: 0", ""})
CALENDAR = ("year", "quarter", "month", "week", "day", "hour", "minute", "second")
IDENTITIES = frozenset({"unique_id", "item_id", "series_id", "ts_id", "series", "id", "item", "series_name"})
DATES = (
    *("%Y/%m/%d", "%Y.%m.%d", "%m/%d/%Y", "%d/%m/%Y", "%d.%m.%Y", "%d-%m-%Y", "%m-%d-%Y", "%Y-%m", "%Y/%m", "%m/%Y"),
    *("%d %b %Y", "%d-%b-%Y", "%b %d, %Y", "%d %B %Y", "%B %d, %Y", "%b %Y", "%B %Y", "%b-%y", "%d-%b-%y", "%m/%d/%y"),
)
CLOCKS = ("", " %H:%M", " %H:%M:%S")


def read_table(path: Path, columns: str | None) -> Tensor:
    """Columns of a .csv file with a header, float64 `[T, C]`; gaps are filled by the line between their ends.

    Args:
        columns: names joined by commas. Default: all columns, but for those of text and dates.

    Raises:
        InputError: no such columns, cells that are no numbers, or another layout than one row a step, oldest first.
    """
    header, cells = read_csv(path)
    table = torch.tensor([[_number(cell) for cell in row] for row in cells], dtype=torch.float64)
    if header and all(math.isfinite(_number(name)) for name in header):
        raise InputError(
            f"the first row of {path} holds numbers instead of names; write the names of the columns above them, one "
            "row for each step (not one column)"
        )
    if columns is not None:
        asked = [name.strip() for name in columns.split(",")]
        missing = [name for name in asked if name not in header]
        if missing:
            raise InputError(f"{path} has no column {', '.join(missing)}; its columns: {', '.join(header)}")
        chosen = [header.index(name) for name in asked]
    else:
        chosen = [place for place in range(len(header)) if table[:, place].isfinite().any()]
    if not chosen or not cells:
        raise InputError(f"{path} has no column of numbers; its columns: {', '.join(header) or 'none'}")
    for place in chosen:
        bad = table[:, place].isinf().nonzero()
        if len(bad):
            raise InputError(
                f"{path}, column {header[place]!r} holds {cells[int(bad[0])][place]!r}, which is no number; repair it, "
                f"or name the columns to forecast with --columns ({', '.join(header)})"
            )
    named = set() if columns is None else set(chosen)  # known to be measured, whatever their names
    _check_one_series(path, header, cells, named)
    if columns is None:
        _check_measured(path, header, table, chosen)
    _check_order(path, header, cells, table, named)
    return fill_gaps(table[:, chosen])


def _check_one_series(
    path: Path, header: Sequence[str], cells: Sequence[Sequence[str]], named: Collection[int]
) -> None:
    for place, name in enumerate(header):
        found = {row[place] for row in cells}
        if place not in named and name.strip().lower() in IDENTITIES and 1 < len(found) < len(cells):
            raise InputError(
                f"{path} holds {len(found)} series below one another (column {name!r}: {', '.join(sorted(found)[:3])}, "
                "...), and would be read as one; give each a column of its own, or a file. If it is measured, "
                "name it with --columns"
            )


def _check_order(
    path: Path, header: Sequence[str], cells: Sequence[Sequence[str]], table: Tensor, named: Collection[int]
) -> None:
    """Raise InputError unless each row is later than the one above it, as far as any column says when it is."""
    names = [name.strip().lower() for name in header]
    clocks: list[tuple[str, list[list[tuple[float, ...]]]]] = []  # what says the time, and how it may be read
    for place, name in enumerate(header):
        if place in named:
            names[place] = ""
            continue
        column = [row[place] for row in cells]
        if table[:, place].isinf().any():
            read = _times(column)
            if read:
                clocks.append((name, read))
            elif names[place] in TIMES | {"day", "month", "week", "quarter"} and len(set(column)) == len(column):
                raise InputError(
                    f"{path}: column {name!r} holds {min(column, key=len)!r}, which cannot be read as a time, so that "
                    "the order of the rows is not known; write dates as 2024-12-31, or take the column out"
                )
        elif names[place] in TIMES:
            clocks.append((name, [[(value,) for value in table[:, place].tolist()]]))
    parts = [part for part in CALENDAR if part in names and not table[:, names.index(part)].isinf().any()]
    if "year" in parts and not any(_rises(times) for _, ways in clocks for times in ways):
        rows = table[:, [names.index(part) for part in parts]].tolist()
        clocks.append((" ".join(parts), [[tuple(row) for row in rows]]))
    for name, ways in clocks:
        if any(_rises(times) for times in ways):
            continue
        times = ways[0]
        if any(math.isnan(part) for time in times for part in time):
            wrong = "has gaps; fill them, or leave out the rows"
        elif any(_rises(list(reversed(way))) for way in ways):
            wrong = "runs backwards; turn the rows around, oldest first"
        elif len(set(times)) < len(times):
            wrong = "says the same more than once: are there several series below one another? Give each a column"
        else:
            wrong = "runs to and fro; sort the rows, oldest first"
        raise InputError(f"{path}: one row must be one step, oldest first, but the time in column {name!r} {wrong}")


def _check_measured(path: Path, header: Sequence[str], table: Tensor, chosen: Sequence[int]) -> None:
    """Raise InputError for a column of numbers that is rather a time or a count than something to be forecast."""
    for place in chosen:
        known = table[:, place][~table[:, place].isnan()]
        steps = known.diff()
        counts = len(steps) > 1 and steps[0] != 0 and bool((steps == steps[0]).all()) and len(known) == len(table)
        name = header[place].strip().lower()
        if counts or name in TIMES or name in CALENDAR or name in IDENTITIES:
            others = [header[other] for other in chosen if other != place]
            raise InputError(
                f"{path}: column {header[place]!r} looks like a time or a count and would be forecast too; name the "
                f"columns to forecast, such as --columns {','.join(others) or header[place]}"
            )


def _rises(times: Sequence[tuple[float, ...]]) -> bool:
    return all(one < other for one, other in pairwise(times))


def _times(column: Sequence[str]) -> list[list[tuple[float, ...]]]:
    """The column's times, in every way in which all of its cells can be read; 3/4/2024 can in two."""
    ways: list[list[tuple[float, ...]]] = []
    try:
        ways.append([_second(datetime.fromisoformat(cell.strip().replace("Z", "+00:00"))) for cell in column])
    except ValueError:
        for form in (date + clock for date in DATES for clock in CLOCKS):
            try:
                ways.append([_second(datetime.strptime(cell.strip(), form)) for cell in column])
            except ValueError:
                continue
    return ways


def _second(time: datetime) -> tuple[float, ...]:
    return ((time if time.tzinfo else time.replace(tzinfo=timezone.utc)).timestamp(),)


def _number(cell: str) -> float:
    """A number; nan for an empty cell, inf for what is no finite number."""
    cell = cell.strip()
    if cell.lower() in ("", "nan", "na", "null", "none"):
        return float("nan")
    try:
        value = float(cell)
    except ValueError:
        return float("inf")
    return value if abs(value) < float("inf") else float("inf")


def fill_gaps(values: Tensor) -> Tensor:
    """Each missing (nan) value from the line between its neighbours in time, float64 `[T, C]`."""
    import numpy as np

    filled = values.clone()
    time = np.arange(len(values))
    for column in filled.T:
        known = ~column.isnan().numpy()
        if not known.any():
            raise InputError("a column of the series is empty")
        column.copy_(torch.from_numpy(np.interp(time, time[known], column.numpy()[known])))
    return filled
