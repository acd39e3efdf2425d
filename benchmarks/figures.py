"""The charts of the suites as pictures: each alone as PNG and SVG for the page, the main ones together in one PNG."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import view
from .suites import Chart, Suite
from .view import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DASHES = ("-", "--", ":")
ACROSS = 3  # panels beside each other in the overview


@dataclass(frozen=True)
class Panel:
    """One picture: a chart's title with the values that it is split by, and its rows."""

    title: str
    chart: Chart
    rows: Sequence[Row]

    def described(self) -> dict[str, Any]:
        """For the page's script."""
        chart = {key: value for key, value in vars(self.chart).items() if key not in ("split", "where")}
        return {**chart, "title": self.title, "rows": [row["id"] for row in self.rows]}


def panels(suite: Suite, rows: Sequence[Row]) -> list[Panel]:
    """The pictures of a suite's rows, those of one chart after another."""
    ready = view.done(rows, suite.name)
    return [Panel(title, chart, group) for chart in suite.charts for title, group in view.panels(chart, ready)]


def save(panel: Panel, stem: Path) -> list[Path]:
    """Draws a panel into `stem.png` and `stem.svg`."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(7.2, 4.6), layout="constrained")
    draw(axis, panel, list(dict.fromkeys(row["series"] for row in panel.rows)))
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    written = [stem.with_name(f"{stem.name}.{form}") for form in ("png", "svg")]
    for path in written:
        figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return written


def overview(rows: Sequence[Row], path: Path, subtitle: str = "") -> bool:
    """Draws of each chart the panel with the most points into one PNG, those of a suite side by side with one legend.
    Returns False, and writes nothing, when there is none."""
    main = {suite.name: _main_panels(suite, rows) for suite in view.shown(rows)}
    lines: list[dict[str, list[Panel]]] = []  # as many suites in each as have room beside each other
    for name, chosen in main.items():
        if lines and sum(map(len, lines[-1].values())) + len(chosen) <= ACROSS:
            lines[-1][name] = chosen
        elif chosen:
            lines.append({name: chosen})
    if not lines:
        return False
    pyplot = _pyplot()
    figure = pyplot.figure(figsize=(5.2 * ACROSS, 4.0 * len(lines)), layout="constrained")
    for part, line in zip(figure.subfigures(len(lines), 1, squeeze=False).flat, lines, strict=True):
        widths = [len(chosen) for chosen in line.values()]
        room = ACROSS - sum(widths)
        parts = part.subfigures(1, len(widths) + bool(room), squeeze=False, width_ratios=widths + [room] * bool(room))
        for strip, (name, chosen) in zip(parts.flat, line.items(), strict=False):
            _draw_strip(strip, chosen, list(dict.fromkeys(row["series"] for row in view.done(rows, name))))
    figure.suptitle(subtitle or None, fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _main_panels(suite: Suite, rows: Sequence[Row]) -> list[Panel]:
    largest: dict[str, Panel] = {}
    for panel in panels(suite, rows):
        before = largest.get(panel.chart.title)
        if before is None or len(panel.rows) >= len(before.rows):
            largest[panel.chart.title] = panel
    return list(largest.values())


def _draw_strip(strip: Any, chosen: Sequence[Panel], labels: Sequence[str]) -> None:
    handles: dict[str, Any] = {}
    for axis, panel in zip(strip.subplots(1, len(chosen), squeeze=False).flat, chosen, strict=True):
        draw(axis, panel, labels)
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    strip.legend(handles.values(), handles, loc="outside right upper", fontsize=7, frameon=False)


def draw(axis: Axes, panel: Panel, labels: Sequence[str]) -> None:
    """One panel; a label keeps its colour in all panels that are given the same `labels`."""
    chart, order = panel.chart, panel.chart.order or panel.chart.x
    for index, label in enumerate(labels):
        line = sorted((row for row in panel.rows if row["series"] == label), key=lambda row: row[order])
        if line:
            style = DASHES[index // 10 % len(DASHES)] if chart.lines else "none"
            points = [row[chart.x] for row in line], [row[chart.y] for row in line]
            axis.plot(*points, linestyle=style, marker="o", markersize=4, color=f"C{index % 10}", label=label)
    for key, label in chart.references:
        line = reference(panel.rows, chart.x, key)
        if line:
            axis.plot(*zip(*line, strict=True), "k--", linewidth=1.2, label=label)
    axis.set_title(panel.title, fontsize="medium")
    axis.set(xlabel=chart.x_label, ylabel=chart.y_label)
    for side, key, logarithmic in ((axis.xaxis, chart.x, chart.log_x), (axis.yaxis, chart.y, chart.log_y)):
        if logarithmic:
            _log_scale(side, sorted({row[key] for row in panel.rows}), own=key == chart.x)
    axis.grid(True, which="major", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _log_scale(side: Any, values: Sequence[float], *, own: bool) -> None:
    """Logarithmic, with ticks that do not run into each other: at a few lengths themselves, else at 1, 2, 5, 10..."""
    from matplotlib.ticker import LogLocator, NullLocator

    side.axes.set(**{f"{side.axis_name}scale": "log"})
    if own and len(values) <= 7 and all(isinstance(value, int) for value in values):
        kept = [value for number, value in enumerate(values) if number == 0 or value / values[number - 1] > 1.3]
        side.set_ticks(kept, [f"{v // 1024}k" if v >= 1024 and v % 1024 == 0 else str(v) for v in kept])
    else:
        side.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if values[-1] < 100 * values[0] else (1.0,)))
        side.set_major_formatter("{x:g}")
    side.set_minor_locator(NullLocator())


def reference(rows: Sequence[Row], x: str, key: str) -> list[tuple[Any, float]]:
    """Another figure of the rows as one line: its median at each x."""
    at: dict[Any, list[float]] = {}
    for row in rows:
        if row.get(key) is not None:
            at.setdefault(row[x], []).append(row[key])
    return sorted((place, statistics.median(values)) for place, values in at.items())


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
