"""Profiles and recommendations as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError
from ..measuring.records import describe
from ..measuring.terminal import MIB
from .phases import PHASES
from .results import Choice, Measurements
from .tables import size

EXACT = 1e-4  # errors below are rounding: drawn at the bottom of the axis
SHADES = dict(zip(PHASES, ("#c44e52", "#4c72b0", "#55a868", "#8172b2", "#b0b0b0"), strict=True))


def profile_picture(profile: Measurements, path: Path) -> Path:
    """Time, memory, phases of the longest calls, and the roofline."""
    figure = _figure(11.5, 8.2)
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
        axis.grid(True, which="major", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return _saved(figure, path, profile.environment)


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
    figure = _figure(7.5, 5)
    axis = figure.subplots()
    floor = min([c.error for c in found.candidates if c.error > EXACT] + [max(found.budget, EXACT)]) / 4
    for candidate in found.candidates:
        on_front, exact = candidate in found.front, candidate.error < floor
        at = (candidate.relative, max(candidate.error, floor))
        axis.scatter(*at, color="C0" if on_front else "0.6", s=60 if candidate is found.pick else 28)
        name = candidate.method.partition(":")[0] + (f" ({candidate.error:.0e}, not to scale)" if exact else "")
        style: dict[str, Any] = {"weight": "bold" if candidate is found.pick else "normal"}
        style |= {"color": "k" if on_front else "0.45", "ha": "right" if candidate.relative > 0.4 else "left"}
        offset = (-6 if candidate.relative > 0.4 else 6, 4)
        axis.annotate(name, at, offset, textcoords="offset points", fontsize=8, **style)
    front = sorted((c.relative, max(c.error, floor)) for c in found.front)
    axis.plot(*zip(*front, strict=True), color="C0", linewidth=1, drawstyle="steps-post")
    axis.axhline(found.budget, color="C3", linestyle="--", linewidth=1)
    axis.set(
        title=found.title, xlabel="time relative to dense", ylabel="error against dense", xscale="log", yscale="log"
    )
    axis.grid(True, alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    return _saved(figure, path, found.environment)


def _saved(figure: Any, path: Path, environment: Mapping[str, Any]) -> Path:
    if environment:
        figure.suptitle(describe(environment), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _figure(width: float, height: float) -> Any:
    """A figure of its own, beside whatever pyplot holds."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"pictures need {error.name}; pip install 'efficient-attn[bench]'") from error
    return Figure(figsize=(width, height), layout="constrained")
