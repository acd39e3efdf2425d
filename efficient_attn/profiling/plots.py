"""Profiles and recommendations as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..measuring import charts
from ..measuring.terminal import MIB
from .phases import PHASES
from .results import Choice, Measurements
from .tables import size

SHADES = dict(zip(PHASES, ("#c44e52", "#4c72b0", "#55a868", "#8172b2", "#b0b0b0"), strict=True))


def profile_picture(profile: Measurements, path: Path) -> Path:
    """Time, memory, phases of the longest calls, and the roofline."""
    figure = charts.figure(11.5, 8.2)
    axes = figure.subplots(2, 2)
    series = profile.series()
    colours = {key: f"C{number}" for number, key in enumerate(series)}
    labels = {key: ", ".join(key) for key in series}
    growth = {(found.label, found.mode): found for found in profile.growth()}
    for key, rows in series.items():
        lengths = [row["seqlen"] for row in rows]
        style: dict[str, Any] = {"color": colours[key], "marker": "o", "markersize": 4}
        law = growth[key].time
        note = "" if law is None else f"  $n^{{{law.exponent:.2f}}}$"
        axes[0, 0].plot(lengths, [row["ms"] for row in rows], label=labels[key] + note, **style)
        beside = [(row["seqlen"], row["dense_ms"]) for row in rows if "dense_ms" in row]
        if beside:
            axes[0, 0].plot(*zip(*beside, strict=True), color=colours[key], linestyle=":", linewidth=1)
        memory = [max((row["input_bytes"] + max(row["peak_bytes"], 0)) / MIB, 1e-3) for row in rows]
        axes[0, 1].plot(lengths, memory, label=labels[key], **style)
    dotted = any("dense_ms" in row for rows in series.values() for row in rows)
    axes[0, 0].set(title="Time" + (" (dotted: dense beside it)" if dotted else ""), ylabel="ms")
    axes[0, 1].set(title="Memory: inputs and peak of a call", ylabel="MiB")
    if profile.memory_bytes:
        axes[0, 1].axhline(profile.memory_bytes / MIB, color="k", linestyle="--", linewidth=1)
    for axis in axes[0]:
        _lengths(axis, sorted({row["seqlen"] for rows in series.values() for row in rows}))
    axes[0, 0].legend(frameon=False, fontsize=8)
    _phases(axes[1, 0], series)
    _roof(axes[1, 1], profile, series, colours)
    for axis in axes.flat:
        charts.plain(axis)
    return charts.saved(figure, path, profile.environment)


def _lengths(axis: Any, lengths: Sequence[int]) -> None:
    axis.set(xlabel="sequence length", xscale="log", yscale="log")
    axis.set_xticks(lengths, [size(n) for n in lengths])
    axis.minorticks_off()


def _phases(axis: Any, series: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]) -> None:
    """One bar for each series: where the time of its longest call goes."""
    for position, (key, rows) in enumerate(reversed(list(series.items()))):
        left = 0.0
        for name, colour in SHADES.items():
            share = 100 * rows[-1]["phases"].get(name, 0.0)
            axis.barh(position, share, left=left, color=colour, label=name if position == 0 else None)
            left += share
        axis.text(1, position, f"{', '.join(key)}, N = {size(rows[-1]['seqlen'])}", va="center", fontsize=8)
    axis.set(title="Phases of the longest call", xlabel="% of the time", yticks=[], xlim=(0, 100))
    axis.legend(frameon=False, fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.5, -0.28))


def _roof(axis: Any, profile: Measurements, series: Any, colours: Mapping[Any, str]) -> None:
    found = {key: [profile.roofline(row) for row in rows] for key, rows in series.items()}
    points = [point for some in found.values() for point in some if point is not None]
    axis.set(title="Roofline (larger: longer)", xlabel="operations a byte", ylabel="GFLOP/s")
    if not points or profile.ceilings is None:
        axis.text(0.5, 0.5, "no ceilings measured", ha="center", transform=axis.transAxes)
        return
    peak = profile.ceilings.flops_for(profile.rows[0]["dtype"])
    ridge = peak / profile.ceilings.gbytes
    low = min(*(p.intensity for p in points), ridge) / 2
    high = max(*(p.intensity for p in points), ridge) * 2
    axis.plot([low, ridge, high], [low * profile.ceilings.gbytes, peak, peak], "k-", linewidth=1.5)
    for key, some in found.items():
        for number, point in enumerate(some):
            if point is not None:
                axis.scatter(point.intensity, point.attained, s=18 + 14 * number, color=colours[key], alpha=0.7)
    axis.set(xscale="log", yscale="log")


def recommendation_picture(found: Choice, path: Path) -> Path:
    """Error against time of every candidate, the front as a line, the budget and the pick marked."""
    figure = charts.figure(7.5, 5)
    axis = figure.subplots()
    charts.front(
        axis,
        [
            (c.method.partition(":")[0], c.relative, c.error, "C0" if c in found.front else "0.6", c is found.pick)
            for c in found.candidates
        ],
        left_is_better=True,
    )
    axis.axhline(max(found.budget, charts.EXACT), color="C3", linestyle="--", linewidth=1)
    axis.set(title=found.title, xlabel="time relative to dense")
    return charts.saved(figure, path, found.environment)
