"""What a table of time series says, and whether it says it clearly: order and distance of its rows, what is measured.

What a table means can often only be guessed, and a wrong guess (several series read as one, time run backwards, the
year forecast as if it were measured) gives a forecast that looks like any other. So whatever speaks of another layout
is an error that says what to do. `series_reader` puts these checks together.
"""

from __future__ import annotations

import math
from calendar import monthrange
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from ...errors import InputError

# Names of columns in small letters. A calendar is what the parts of a date are in, from the longest on.
TIMES = frozenset({"ds", "date", "datetime", "time", "timestamp", "index", "step", "t", "unnamed: 0", ""})
CALENDAR = ("year", "quarter", "month", "week", "day", "hour", "minute", "second")
IDENTITIES = frozenset({"unique_id", "item_id", "series_id", "ts_id", "series", "id", "item", "series_name"})
DATES = (
    *("%Y/%m/%d", "%Y.%m.%d", "%m/%d/%Y", "%d/%m/%Y", "%d.%m.%Y", "%d-%m-%Y", "%m-%d-%Y", "%Y-%m", "%Y/%m", "%m/%Y"),
    *("%d %b %Y", "%d-%b-%Y", "%b %d, %Y", "%d %B %Y", "%B %d, %Y", "%b %Y", "%B %Y", "%b-%y", "%d-%b-%y", "%m/%d/%y"),
)
CLOCKS = ("", " %H:%M", " %H:%M:%S")

Time = tuple[float, ...]  # seconds since 1970, a number, or (year, month, ...)


@dataclass(frozen=True)
class Clock:
    """What says the time of each row: the column's name, the times, and whether they are dates."""

    name: str
    times: list[Time]
    dated: bool


def check_one_series(path: Path, header: Sequence[str], cells: Sequence[Sequence[str]], named: Collection[int]) -> None:
    """Raise InputError for a column that names series, of which there are several."""
    for place, name in enumerate(header):
        found = {row[place] for row in cells}
        if place not in named and name.strip().lower() in IDENTITIES and 1 < len(found) < len(cells):
            raise InputError(
                f"{path} holds {len(found)} series below one another (column {name!r}: {', '.join(sorted(found)[:3])}, "
                f"...), and would be read as one; say so by --id {name}. If it is measured, name it with --columns"
            )


def read_clock(
    path: Path, header: Sequence[str], cells: Sequence[Sequence[str]], table: Tensor, named: Collection[int]
) -> Clock | None:
    """When each row is, as far as any column says; None if none does.

    Raises:
        InputError: a row that is not later than the one above it.
    """
    names = [name.strip().lower() for name in header]
    clocks: list[tuple[str, list[list[Time]], bool]] = []  # what says the time, how it may be read, whether as a date
    found: Clock | None = None
    for place, name in enumerate(header):
        if place in named:
            names[place] = ""
            continue
        column = [row[place] for row in cells]
        if table[:, place].isinf().any():
            read = _times(column)
            if read:
                clocks.append((name, read, True))
            elif names[place] in TIMES | {"day", "month", "week", "quarter"} and len(set(column)) == len(column):
                raise InputError(
                    f"{path}: column {name!r} holds {min(column, key=len)!r}, which cannot be read as a time, so that "
                    "the order of the rows is not known; write dates as 2024-12-31, or take the column out"
                )
        elif names[place] in TIMES:
            dates = _compact_dates(column)
            numbers: list[Time] = [(value,) for value in table[:, place].tolist()]
            clocks.append((name, [numbers if dates is None else dates], dates is not None))
    parts = [part for part in CALENDAR if part in names and not table[:, names.index(part)].isinf().any()]
    if "year" in parts and not any(_rises(times) for _, ways, _ in clocks for times in ways):
        rows = table[:, [names.index(part) for part in parts]].tolist()
        clocks.append((" ".join(parts), [[tuple(row) for row in rows]], False))
    for name, ways, dated in clocks:
        rising = [times for times in ways if _rises(times)]
        if rising:
            even = next(
                (times for times in rising if dated and step_of(Clock(name, times, True)) is not None), rising[0]
            )
            found = found or Clock(name, even, dated)
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
    return found


def step_of(clock: Clock) -> tuple[str, float] | None:
    """The distance between rows: ("months", n), ("seconds", n) or, of what are no dates, ("numbers", n).

    None if it is not always the same. Months go from any day to the same one, or from their last day to the last.
    """
    if len(clock.times) < 2:
        return None
    if clock.name == "year month":
        count = [12 * time[0] + time[1] for time in clock.times]
        distances = {later - one for one, later in pairwise(count)}
        return ("numbers", distances.pop()) if len(distances) == 1 else None
    values = [time[0] for time in clock.times]
    distances = {round(later - one, 6) for one, later in pairwise(values)}
    if len(distances) == 1:
        return ("seconds" if clock.dated else "numbers", distances.pop())
    if not clock.dated:
        return None
    dates = [date_of(value) for value in values]
    months = {12 * (later.year - one.year) + later.month - one.month for one, later in pairwise(dates)}
    same_day = len({(date.day, date.time()) for date in dates}) == 1
    last_day = all(date.day == monthrange(date.year, date.month)[1] for date in dates)
    return ("months", months.pop()) if len(months) == 1 and (same_day or last_day) else None


def check_even(path: Path, clock: Clock) -> None:
    """Raise InputError unless rows follow one another at one distance; the first and the usual one are named."""
    in_parts = len(clock.times[0]) > 1
    if step_of(clock) is not None or (in_parts and clock.name != "year month") or len(clock.times) < 3:
        return
    values = [12 * time[0] + time[1] if in_parts else time[0] for time in clock.times]
    steps = [later - one for one, later in pairwise(values)]
    usual = max(set(steps), key=steps.count)
    odd = next(number for number, step in enumerate(steps) if step != usual)
    at = str(date_of(values[odd])) if clock.dated else f"{values[odd]:g}"
    shown = [f"{step / 86400:g} days" if clock.dated else f"{step:g}" for step in (usual, steps[odd])]
    raise InputError(
        f"{path}: the rows are not at one distance in column {clock.name!r}: mostly {shown[0]}, and {shown[1]} after "
        f"{at}; give --frequency, such as D, B (business days), h or MS, by which steps without a row are missing "
        "values, or --frequency rows to take each row as a step whatever its time"
    )


def check_measured(path: Path, header: Sequence[str], table: Tensor, chosen: Sequence[int]) -> None:
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


def date_of(second: float) -> datetime:
    """The date of a second that `read_clock` gave, in UTC, without zone."""
    return datetime.fromtimestamp(second, timezone.utc).replace(tzinfo=None)


def _compact_dates(column: Sequence[str]) -> list[Time] | None:
    """Times written as 20241231; None if one is not."""
    if not all(len(cell.strip()) == 8 for cell in column):
        return None  # strptime would take fewer digits, which may be a count
    try:
        return [_second(datetime.strptime(cell.strip(), "%Y%m%d")) for cell in column]
    except ValueError:
        return None


def _rises(times: Sequence[Time]) -> bool:
    return all(one < other for one, other in pairwise(times))


def _times(column: Sequence[str]) -> list[list[Time]]:
    """The column's times, in every way in which all of its cells can be read; 3/4/2024 can in two."""
    ways: list[list[Time]] = []
    try:
        ways.append([_second(datetime.fromisoformat(cell.strip().replace("Z", "+00:00"))) for cell in column])
    except ValueError:
        for form in (date + clock for date in DATES for clock in CLOCKS):
            try:
                ways.append([_second(datetime.strptime(cell.strip(), form)) for cell in column])
            except ValueError:
                continue
    return ways


def _second(time: datetime) -> Time:
    return ((time if time.tzinfo else time.replace(tzinfo=timezone.utc)).timestamp(),)


def number_of(cell: str) -> float:
    """A number; nan for an empty cell, inf for what is no finite number."""
    cell = cell.strip()
    if cell.lower() in ("", "nan", "na", "null", "none"):
        return float("nan")
    try:
        value = float(cell)
    except ValueError:
        return float("inf")
    return value if abs(value) < float("inf") else float("inf")
