"""The picture of a run: time, memory, error against speed, and accuracy of the small vision transformer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efficient_attn.measuring.records import Record

from .report import short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIB = 2**20
DRAWN = ("ops", "vit", "memory")  # the page has a chart of every suite


def save(cells: Sequence[Record], path: Path, subtitle: str = "") -> bool:
    """Draws what the cells hold into ``path`` (PNG). Returns False, and writes nothing, when that is nothing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    done = [cell for cell in cells if cell["status"] == "ok" and cell["suite"] in DRAWN]
    names = short_names(done)  # parameters differ between suites, a method's colour must not
    done = [{**cell, "label": names[cell["config"]["method"]]} for cell in done]
    operators = [cell for cell in done if cell["suite"] == "ops"]
    mode = max((cell["config"]["mode"] for cell in operators), default="")  # forward and backward when it was measured
    operators = [cell for cell in operators if cell["config"]["mode"] == mode]
    vit = [cell for cell in done if cell["suite"] == "vit"]
    memory = [cell for cell in done if cell["suite"] == "memory"]
    panels: list[tuple[Any, Sequence[Record]]] = []
    if operators:
        panels += [(_time, operators), (_memory, operators), (_error, operators)]
    if memory:
        panels.append((_memory, memory))
    if vit:
        panels.append((_accuracy, vit))
    if not panels:
        return False

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(5.6 * columns, 4.0 * rows), squeeze=False, layout="constrained"
    )
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(cell["label"] for cell in done))}
    for axis, (draw, records) in zip(axes.flat, panels, strict=False):
        draw(axis, records, colours)
        axis.grid(True, which="major", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    handles = [Line2D([], [], color=colour, marker="o", label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    if subtitle:
        figure.suptitle(subtitle, fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _time(axis: Axes, records: Sequence[Record], colours: dict[str, str]) -> None:
    _lines(axis, records, colours, lambda r: r["ms"])
    dense = [r for r in records if r["label"] == "dense"]
    axis.plot([r["config"]["seqlen"] for r in dense], [r["sdpa_ms"] for r in dense], "k--", label="torch SDPA")
    axis.legend(frameon=False)
    axis.set(title=f"Time, {records[0]['config']['mode']}", ylabel="ms")


def _memory(axis: Axes, records: Sequence[Record], colours: dict[str, str]) -> None:
    _lines(axis, records, colours, lambda r: max(r["peak_bytes"], 1) / MIB)
    axis.set(title=f"Peak extra memory, {records[0]['config']['mode']}", ylabel="MiB")


def _error(axis: Axes, records: Sequence[Record], colours: dict[str, str]) -> None:
    longest = max(r["config"]["seqlen"] for r in records)
    for r in records:
        if r["config"]["seqlen"] == longest:
            axis.scatter(r["speedup_sdpa"], max(r["error"], 1e-8), color=colours[r["label"]], s=45)
    axis.set(title=f"Error against speed, N = {longest}", xlabel="speed-up over torch SDPA", ylabel="relative error")
    axis.set(xscale="log", yscale="log")
    low, high = axis.get_xlim()
    ticks = [2.0**power for power in range(-10, 11) if low <= 2.0**power <= high]
    axis.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axis.minorticks_off()


def _accuracy(axis: Axes, records: Sequence[Record], colours: dict[str, str]) -> None:
    for r in records:
        axis.scatter(r["ms"], 100 * r["accuracy"], color=colours[r["label"]], s=45)
    axis.margins(0.15)
    axis.set(title="Digits: accuracy against training time", xlabel="ms a step", ylabel="test accuracy, %")


def _lines(axis: Axes, records: Sequence[Record], colours: dict[str, str], value: Any) -> None:
    for name, colour in colours.items():
        points = sorted((r["config"]["seqlen"], value(r)) for r in records if r["label"] == name)
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour)
    axis.set(xlabel="sequence length", xscale="log", yscale="log")
    lengths = sorted({r["config"]["seqlen"] for r in records})
    axis.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths], minor=False)
    axis.minorticks_off()
