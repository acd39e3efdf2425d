"""`efficient-attn compare A B`: the cells that two runs share, their ratios, and whether B is worse.

The ratio is of medians; its interval is a percentile bootstrap (Efron, 1979) over the samples of both runs. Run the two
on the same idle machine; with `--relative` each sample is first divided by that of the peer in the same round of the
alternation, which takes out what slowed both.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy
import typer
from rich.console import Console
from rich.text import Text

from efficient_attn.errors import InputError
from efficient_attn.measuring import records
from efficient_attn.measuring.records import Record
from efficient_attn.measuring.terminal import console, make_table, named_errors

from . import view

RESAMPLES = 2000
FEWEST = 3  # samples on either side for an interval
IGNORED = ("budget_s", "patience_s")  # how long a cell was measured, not what

# Which way a figure gets better; the first pattern that fits decides. The last group says what was measured.
HIGHER = r"accuracy|exact|.*speedup.*|.*_per_s|efficiency|.*(_share|flops|_?gbs)|vs .*|density efficiency|share of .*"
LOWER = (
    r"(.*_)?ms|.*_bytes|bytes_per_token|(weights|time|memory)_ratio|(.*_)?error|loss|mase|smape|crps|difference|scores"
    r"|share|(.*_)?(spread|unsure|seconds)|trained_s"
)
NEUTRAL = (
    r"layers|changed|trials|score_before|density|parts|visited|parameters|tokens|windows|samples|tolerance"
    r"|baseline|load|most|least|predicted"
)
LOW_SCORES = ("loss", "mase", "naive_mase", "mae", "mse", "bits_per_character", "to_naive")


def direction(metric: str, record: Mapping[str, Any]) -> int:
    """1 where more of a metric is better, -1 where less is.

    Raises:
        InputError: a metric that describes the measurement, or one that no suite writes.
    """
    if metric == "score":  # a suite's own, named beside it
        return -1 if record.get("score_is") in LOW_SCORES else 1
    if metric == "figure":  # of a CPU target
        return -1 if record["config"].get("most") else 1
    for pattern, sign in ((HIGHER, 1), (LOWER, -1)):
        if re.fullmatch(pattern, metric):
            return sign
    if re.fullmatch(NEUTRAL, metric):
        raise InputError(f"--metric {metric} says what was measured; neither more nor less of it is better")
    raise InputError(f"--metric {metric}: no suite writes it; try ms, peak_bytes, error, loss, score or speedup_dense")


@dataclass(frozen=True)
class Comparison:
    """One cell in both runs. `ratio` is B over A; `interval` is None where there are too few samples.

    `verdict`: regression, improvement, same, unsure (no interval), failed (B has no figure where A has one), fixed.
    """

    name: str
    before: float | None
    after: float | None
    ratio: float | None
    interval: tuple[float, float] | None
    verdict: str


def compare(
    before: Sequence[Record],
    after: Sequence[Record],
    *,
    threshold: float = 0.1,
    confidence: float = 0.95,
    metric: str = "ms",
    relative: bool = False,
) -> list[Comparison]:
    """The cells that both sides have.

    Each metric gets better one way (see `direction`), and for one that should be low a regression is a ratio whose
    whole interval lies above `1 + threshold`, an improvement one whose whole interval lies below `1 / (1 + threshold)`;
    for one that should be high the other way round. A metric other than "ms" is one number: its interval is the ratio
    itself. A figure that becomes infinite or NaN is a regression, and so is a low one that was 0.

    Raises `InputError` when no cell is in both.
    """
    old, new = ({_key(record): record for record in side} for side in (before, after))
    shared = [key for key in old if key in new]
    if not shared:
        raise InputError("the two have no cell in common: compare runs of the same suites, methods and lengths")
    return [
        _one(old[key], new[key], threshold=threshold, confidence=confidence, metric=metric, relative=relative)
        for key in shared
    ]


def _key(record: Record) -> str:
    config = {"seed": 0, **record["config"]}  # which old rows do not name
    config = {key: value for key, value in config.items() if key not in IGNORED}
    return f"{record['suite']} {sorted(config.items())}"


def _one(old: Record, new: Record, *, threshold: float, confidence: float, metric: str, relative: bool) -> Comparison:
    name = view.cell_name(new)
    if new["status"] != "ok" or old["status"] != "ok":
        verdict = "failed" if old["status"] == "ok" else "fixed" if new["status"] == "ok" else "same"
        return Comparison(f"{name} ({old['status']} -> {new['status']})", None, None, None, None, verdict)
    a, b = (_samples(record, metric, relative) for record in (old, new))
    if not a or not b:
        verdict = "unsure" if relative or not (a or b) else "failed" if a else "fixed"
        shown = [float(numpy.median(samples)) if samples else None for samples in (a, b)]
        return Comparison(name, *shown, None, None, verdict)
    before, after = float(numpy.median(a)), float(numpy.median(b))
    sign = direction(metric, new)
    if not math.isfinite(before) or not math.isfinite(after):
        verdict = "same" if not math.isfinite(before) and not math.isfinite(after) else "regression"
        return Comparison(name, before, after, None, None, "fixed" if math.isfinite(after) else verdict)
    if before <= 0 or after <= 0:  # no ratio
        better, noise = sign * (after - before), threshold * abs(before)
        verdict = "improvement" if better > noise else "regression" if -better > noise else "same"
        return Comparison(name, before, after, None, None, verdict)
    ratio = after / before
    interval = (ratio, ratio) if metric != "ms" else bootstrap(a, b, confidence)
    if interval is None:
        verdict = "unsure"
    elif interval[0] > 1 + threshold:
        verdict = "regression" if sign < 0 else "improvement"
    elif interval[1] < 1 / (1 + threshold):
        verdict = "improvement" if sign < 0 else "regression"
    else:
        verdict = "same"
    return Comparison(name, before, after, ratio, interval, verdict)


def _samples(record: Mapping[str, Any], metric: str, relative: bool) -> list[float]:
    if metric != "ms":
        figure = record.get(metric)
        return [float(figure)] if isinstance(figure, (int, float)) else []
    times = record.get("times") or ([record["ms"]] if record.get("ms") is not None else [])
    if not relative:
        return [float(value) for value in times]
    reference = record.get("reference_times") or []
    if len(reference) != len(times):  # one of the two ran once only: no rounds to pair
        return []
    return [ours / peer for ours, peer in zip(times, reference, strict=True)]


def bootstrap(before: Sequence[float], after: Sequence[float], confidence: float) -> tuple[float, float] | None:
    """The percentile interval of median(after) / median(before); None with fewer than `FEWEST` samples."""
    if min(len(before), len(after)) < FEWEST:
        return None
    generator = numpy.random.default_rng(0)
    medians = []
    for samples in (before, after):
        values = numpy.asarray(samples)
        drawn = generator.integers(len(values), size=(RESAMPLES, len(values)))
        medians.append(numpy.median(values[drawn], axis=1))
    outside = (1 - confidence) / 2
    low, high = numpy.quantile(medians[1] / medians[0], (outside, 1 - outside))
    return float(low), float(high)


def print_comparison(found: Sequence[Comparison], metric: str, out: Console) -> None:
    """A table of all cells, the slowest change first, and a line with the geometric mean."""
    table = make_table("", ("cell", "A", "B", "B / A", "interval", "verdict"), {0}, "")
    colours = {"regression": "red", "failed": "red", "improvement": "green", "fixed": "green", "unsure": "yellow"}
    for one in sorted(found, key=lambda one: -(one.ratio or math.inf)):
        shown = [f"{value:.4g}" if value is not None else "" for value in (one.before, one.after, one.ratio)]
        between = f"{one.interval[0]:.3f} to {one.interval[1]:.3f}" if one.interval else ""
        colour = colours.get(one.verdict)
        table.add_row(one.name, *shown, between, Text(one.verdict, style=colour or ""))
    out.print(table)
    ratios = [one.ratio for one in found if one.ratio]
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        out.print(f"geometric mean of B / A ({metric}): {mean:.3f} over {len(ratios)} cells")
    counts = Counter(one.verdict for one in found)
    out.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))


def command(
    a: Annotated[Path, typer.Argument(metavar="A", help="A results.jsonl or the folder of a run.", exists=True)],
    b: Annotated[Path, typer.Argument(metavar="B", help="The run that must not be worse than A.", exists=True)],
    threshold: Annotated[float, typer.Option(min=0, help="How much worse counts: 0.1 is 10 %.")] = 0.1,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="Of the bootstrap interval.")] = 0.95,
    metric: Annotated[str, typer.Option(help="ms, or another figure of the rows: peak_bytes, error, loss...")] = "ms",
    relative: Annotated[
        bool, typer.Option("--relative", help="Compare times over the peer's of the same round, not times.")
    ] = False,
) -> None:
    """Compares two runs cell by cell. Exit code 1: a cell of B is worse beyond the threshold, or fails."""
    with named_errors():
        before, after = (view.latest(records.read(records.results_file(path))) for path in (a, b))
        found = compare(before, after, threshold=threshold, confidence=confidence, metric=metric, relative=relative)
    print_comparison(found, metric, console())
    if not any(one.before is not None for one in found):
        raise typer.BadParameter(f"--metric {metric}: no cell of both has this figure")
    raise typer.Exit(int(any(one.verdict in ("regression", "failed") for one in found)))
