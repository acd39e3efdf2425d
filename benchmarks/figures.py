"""The charts of the suites as pictures: each alone as PNG and SVG for the page, the main ones together in one PNG."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efficient_attn.measuring import charts
from efficient_attn.measuring.records import Record

from . import view
from .suites import Chart, Suite
from .summary import Summary, group
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
    figure = charts.figure(7.2, 4.6)
    axis = figure.subplots()
    draw(axis, panel, list(dict.fromkeys(row["series"] for row in panel.rows)))
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    written = [stem.with_name(f"{stem.name}.{form}") for form in ("png", "svg")]
    for path in written:
        charts.saved(figure, path, dpi=130)
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
    figure = charts.figure(5.2 * ACROSS, 4.0 * len(lines))
    for part, line in zip(figure.subfigures(len(lines), 1, squeeze=False).flat, lines, strict=True):
        widths = [len(chosen) for chosen in line.values()]
        room = ACROSS - sum(widths)
        parts = part.subfigures(1, len(widths) + bool(room), squeeze=False, width_ratios=widths + [room] * bool(room))
        for strip, (name, chosen) in zip(parts.flat, line.items(), strict=False):
            _draw_strip(strip, chosen, list(dict.fromkeys(row["series"] for row in view.done(rows, name))))
    figure.suptitle(subtitle or None, fontsize=9)
    charts.saved(figure, path)
    return True


GROUP_COLOURS = {
    "exact": "#3c4652", "windows": "#1769c2", "global": "#0c857c", "content": "#c2570a", "image": "#8a6d0b",
    "low-rank": "#7a45b8", "hybrid": "#c2257a", "other": "#667078",
}  # fmt: skip


def story(rows: Sequence[Row], path: Path, environment: Record) -> bool:
    """The picture of an overview: time of a head against length, up to a million tokens where the run has them, beside
    speed against error at the longest length. Returns False, and writes nothing, where there is nothing to show."""
    summary = Summary(rows)
    lengths = summary.lengths("fwd")
    if not lengths:
        return False
    figure = charts.figure(12.5, 5.0)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    last = summary.at("fwd", lengths[-1])
    heads = last[0]["heads"]
    million = [row for row in summary.rows if row["suite"] == "million" and row["mode"] == "fwd"]
    ends: list[tuple[str, float, float, str]] = []
    for method in summary.methods:
        line = [row for n in lengths for row in summary.at("fwd", n) if row["method"] == method]
        if not line:
            continue
        colour, name = GROUP_COLOURS[group(method)], summary.names[method]
        x, y = [row["seqlen"] for row in line], [row["ms"] / heads for row in line]
        left.plot(x, y, color=colour, marker="o", markersize=3.5, linewidth=1.5)
        sure = [row.get("unsure") or 0.0 for row in line]
        low, high = ([ms * (1 + u) ** sign for ms, u in zip(y, sure, strict=True)] for sign in (-1, 1))
        left.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        ends.append((name, x[-1], y[-1], colour))
    charts.end_names(left, ends)
    sdpa = [(n, summary.at("fwd", n)[0]["sdpa_ms"] / heads) for n in lengths]
    left.plot(*zip(*sdpa, strict=True), color="k", linestyle="--", linewidth=1.6)
    if million:
        end = max(row["seqlen"] for row in million)
        beyond = [(n, sdpa[-1][1] * (n / sdpa[-1][0]) ** 2) for n in (sdpa[-1][0], end)]
        left.plot(*zip(*beyond, strict=True), color="k", linestyle=":", linewidth=1.4)
        minutes = beyond[-1][1] / 6e4
        left.annotate(f"torch SDPA: {minutes:.0f} minutes, predicted", beyond[-1], (-6, 2), textcoords="offset points",
                      ha="right", fontsize=9)  # fmt: skip
        for number, row in enumerate(sorted(million, key=lambda row: row["ms"])):
            colour = GROUP_COLOURS[group(row["method"])]
            left.scatter(row["seqlen"], row["ms"], color=colour, s=60, zorder=3)
            name = row["method"].partition(":")[0]
            text = f"{name}:\n{charts.length_name(row['seqlen'])} tokens in {row['ms'] / 1e3:.2g} s"
            below = {"va": "bottom" if number else "top", "ha": "right", "fontsize": 10, "weight": "bold"}
            at = row["seqlen"], row["ms"]
            left.annotate(text, at, (4, 9 if number else -9), textcoords="offset points", color=colour, **below)
    ticks = sorted({*lengths, *(row["seqlen"] for row in million)})
    charts.log_scale(left.yaxis, [min(row["ms"] for row in last), 1e9], own=False)
    charts.log_scale(left.xaxis, ticks, own=True)
    left.yaxis.set_major_formatter(charts.duration)
    left.set(title=f"Time of a head, forward, {last[0]['threads']} threads", xlabel="sequence length")
    charts.plain(left)
    names = {row["method"]: summary.names[row["method"]].replace("sliding_", "") for row in last}
    points = [
        (names[row["method"]], row["speedup_sdpa"], row["error"], GROUP_COLOURS[group(row["method"])], False)
        for row in last
    ]
    charts.front(right, [*points, ("torch SDPA", 1.0, 0.0, "k", False)], left_is_better=False)
    title = f"Speed against error at {charts.length_name(lengths[-1])} tokens, forward"
    right.set(title=title, xlabel="times the speed of torch SDPA")
    charts.saved(figure, path, environment)
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
            charts.log_scale(side, sorted({row[key] for row in panel.rows}), own=key == chart.x)
    charts.plain(axis)


def reference(rows: Sequence[Row], x: str, key: str) -> list[tuple[Any, float]]:
    """Another figure of the rows as one line: its median at each x."""
    at: dict[Any, list[float]] = {}
    for row in rows:
        if row.get(key) is not None:
            at.setdefault(row[x], []).append(row[key])
    return sorted((place, statistics.median(values)) for place, values in at.items())
