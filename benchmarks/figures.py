"""The charts of the report as files: one PNG and one SVG for each panel, drawn from the rows that the page shows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .suites import Chart
from .view import Row

DASHES = ("-", "--", ":")


@dataclass(frozen=True)
class Panel:
    """One picture: a chart's title with the values that it is split by, and the ids of its rows."""

    title: str
    chart: Chart
    rows: tuple[str, ...]

    def described(self) -> dict[str, Any]:
        """For the page's script."""
        chart = {key: value for key, value in vars(self.chart).items() if key not in ("split", "where")}
        return {**chart, "title": self.title, "rows": self.rows}


def save(panel: Panel, rows: Sequence[Row], stem: Path) -> list[Path]:
    """Draws a panel into ``stem.png`` and ``stem.svg``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chart, wanted = panel.chart, set(panel.rows)
    mine = [row for row in rows if row["id"] in wanted]
    figure, axis = pyplot.subplots(figsize=(7.2, 4.6), layout="constrained")
    order = chart.order or chart.x
    for index, label in enumerate(dict.fromkeys(row["series"] for row in mine)):
        line = sorted((row for row in mine if row["series"] == label), key=lambda row: row[order])
        style = DASHES[index // 10 % len(DASHES)] if chart.lines else ""
        points = [row[chart.x] for row in line], [row[chart.y] for row in line]
        axis.plot(*points, linestyle=style or "none", marker="o", markersize=4, color=f"C{index % 10}", label=label)
    for key, label in chart.references:
        line = reference(mine, chart.x, key)
        if line:
            axis.plot(*zip(*line, strict=True), "k--", linewidth=1.2, label=label)
    axis.set(title=panel.title, xlabel=chart.x_label, ylabel=chart.y_label)
    axis.set(xscale="log" if chart.log_x else "linear", yscale="log" if chart.log_y else "linear")
    axis.grid(True, which="major", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    written = [stem.with_name(f"{stem.name}.{form}") for form in ("png", "svg")]
    for path in written:
        figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return written


def reference(rows: Sequence[Row], x: str, key: str) -> list[tuple[Any, float]]:
    """Another figure of the rows as one line: its median at each x."""
    at: dict[Any, list[float]] = {}
    for row in rows:
        if row.get(key) is not None:
            at.setdefault(row[x], []).append(row[key])
    return sorted((place, statistics.median(values)) for place, values in at.items())
