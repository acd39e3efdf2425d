"""What all pictures share, of benchmarks and of profiles: a figure, its axes, lines against length, the front."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError
from .records import describe

EXACT = 1e-4  # errors below are rounding: drawn at the bottom of the axis, not to scale


def figure(width: float, height: float) -> Any:
    """A figure of its own, beside whatever pyplot holds."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"pictures need {error.name}; pip install 'efficient-attn[bench]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def saved(drawn: Any, path: Path, environment: Mapping[str, Any] | None = None, dpi: int = 110) -> Path:
    """Write a figure, under a line about the machine."""
    if environment:
        drawn.suptitle(describe(environment), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=dpi)
    return path


def plain(axis: Any) -> None:
    """A light grid, and no frame."""
    axis.grid(True, which="major", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def log_scale(side: Any, values: Sequence[float], *, own: bool) -> None:
    """Logarithmic, with ticks that do not run into each other: at a few lengths themselves, else at 1, 2, 5, 10..."""
    from matplotlib.ticker import LogLocator, NullLocator

    side.axes.set(**{f"{side.axis_name}scale": "log"})
    if own and len(values) <= 7 and all(isinstance(value, int) for value in values):
        kept = [value for number, value in enumerate(values) if number == 0 or value / values[number - 1] > 1.3]
        side.set_ticks(kept, [length_name(int(value)) for value in kept])
    else:
        side.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if values[-1] < 100 * values[0] else (1.0,)))
        side.set_major_formatter("{x:g}")
    side.set_minor_locator(NullLocator())


def length_name(length: int) -> str:
    """4096 -> "4k", 1048576 -> "1M"."""
    for unit, letter in ((2**20, "M"), (2**10, "k")):
        if length >= unit and length % unit == 0:
            return f"{length // unit}{letter}"
    return str(length)


def front(axis: Any, points: Iterable[tuple[str, float, float, str, bool]], *, left_is_better: bool) -> None:
    """Error against cost or speed: points of (name, x, error, colour, bold), those that no other beats in both joined.

    Exact ones lie at the bottom. Names stand on the side where there is room.
    """
    found = list(points)
    inexact = [error for _, _, error, _, _ in found if error > EXACT]
    floor = min([*inexact, 0.2]) / 3
    ordered = sorted(found, key=lambda point: (point[1] if left_is_better else -point[1], point[2]))
    best: list[tuple[float, float]] = []
    for _, x, error, _, _ in ordered:
        if not best or max(error, floor) < best[-1][1]:
            best.append((x, max(error, floor)))
    axis.plot(*zip(*best, strict=True), color="0.6", linewidth=1.2, drawstyle="steps-post", zorder=1)
    middle = sorted(x for _, x, *_ in found)[len(found) // 2]
    for number, (name, x, error, colour, bold) in enumerate(sorted(found, key=lambda point: point[1])):
        at = x, max(error, floor)
        on_front = at in best
        axis.scatter(*at, color=colour, s=64 if bold else 34, alpha=1.0 if on_front or bold else 0.6, zorder=2)
        right = x > middle
        style: dict[str, Any] = {"ha": "right" if right else "left", "weight": "bold" if bold else "normal"}
        offset = (-7 if right else 7, 5 if number % 2 else -12)  # neighbours above and below, not on each other
        axis.annotate(name, at, offset, textcoords="offset points", fontsize=8, color=colour, **style)
    axis.set(xscale="log", yscale="log", ylabel="error against exact attention", ylim=(floor / 1.6, None))
    log_scale(axis.xaxis, [min(x for _, x, *_ in found), max(x for _, x, *_ in found)], own=False)
    log_scale(axis.yaxis, [floor, 1.0], own=False)
    marks = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    shown = [mark for mark in marks if 1.3 * floor < mark < 2 * max([*inexact, 0.2])]
    axis.set_yticks([floor, *shown], ["exact", *(f"{100 * mark:g}%" for mark in shown)])
    plain(axis)


def end_names(axis: Any, ends: Iterable[tuple[str, float, float, str]], apart: float = 1.65) -> None:
    """Names (text, x, y, colour) at the ends of lines on a logarithmic axis, pushed apart by this factor."""
    below = 0.0
    for name, x, y, colour in sorted(ends, key=lambda end: end[2]):
        below = max(y, below * apart)
        # To the text's edge: to its middle, as by default, the line runs through the names below.
        arrow = {"arrowstyle": "-", "color": colour, "alpha": 0.5, "linewidth": 0.8, "relpos": (0.0, 0.5)}
        axis.annotate(name, (x, y), (x * 1.5, below), fontsize=8, color=colour, va="center", arrowprops=arrow)


def duration(ms: float, _: Any = None) -> str:
    """A tick of an axis of milliseconds: 0.1 ms, 10 s, 1000 s."""
    return f"{ms / 1e3:g} s" if ms >= 1000 else f"{ms:g} ms"
