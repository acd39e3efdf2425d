"""What tables, charts and the page show of records: flat rows, and how a figure is written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from efficient_attn.measuring.clock import NOISY
from efficient_attn.measuring.records import Record

from . import suites
from .suites import Chart, Claim, Suite

MIB = 2**20
# Samples and long texts stay in the JSONL.
LEFT_OUT = ("times", "reference_times", "traceback", "clock_mhz")

# What no line of a chart may join, whatever the chart is split by.
APART = ("code", "threads", "dtype", "backend", "causal", "batch", "heads", "head_dim", "steps", "seed")

Row = dict[str, Any]


def rows(found: Iterable[Record]) -> list[Row]:
    """One flat mapping for each cell, the last of those that were measured again: what names it, its configuration, its
    metrics, the number of its environment among the environment lines, and ``noisy``."""
    latest: dict[str, Row] = {}
    environment = -1
    for record in found:
        if record["type"] == "environment":
            environment += 1
        elif record["type"] == "cell":
            config = record["config"]
            row = {key: value for key, value in record.items() if key not in ("type", "config", *LEFT_OUT)}
            row = {**row, **config, "environment": environment}
            row["id"] = record.get("id") or f"row{len(latest)}"
            if "peak_bytes" in row:
                row["peak_mib"] = round(row["peak_bytes"] / MIB, 3)
            row["noisy"] = row.get("spread", 0) > NOISY
            # Two versions of the code stand side by side.
            latest[f"{record['suite']} {sorted(config.items())} {record.get('code')}"] = row
    return list(latest.values())


def environments(found: Iterable[Record]) -> list[Record]:
    return [record for record in found if record["type"] == "environment"]


def shown(found: Sequence[Row]) -> list[Suite]:
    """The suites that have rows, in the order of their first."""
    result = []
    for name in dict.fromkeys(row["suite"] for row in found):
        try:
            result.append(suites.get(name))
        except KeyError:
            continue  # of a file that was not loaded, or of another version
    return result


def done(found: Iterable[Row], suite: str) -> list[Row]:
    """The rows of a suite that have figures."""
    return [row for row in found if row["suite"] == suite and row["status"] == "ok"]


def claims(found: Sequence[Row]) -> list[tuple[str, Claim]]:
    """What the rows support, with the suite of each sentence."""
    result = []
    for suite in shown(found):
        ready = done(found, suite.name)
        noisy = {row["id"] for row in ready if row["noisy"]}
        for claim in suite.claims(ready) if ready else ():
            if noisy.intersection(claim.rows):
                claim = replace(claim, text=f"{claim.text} Noisy: measured on a busy machine.")
            result.append((suite.name, claim))
    return result


def panels(chart: Chart, ready: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The pictures of a chart: a title and its rows for each combination of the values that it is split by, and of
    what decides a figure without being shown."""
    kept = [row for row in ready if all(row.get(key) == value for key, value in chart.where)]
    kept = [
        row for row in kept if _drawable(row.get(chart.x), chart.log_x) and _drawable(row.get(chart.y), chart.log_y)
    ]
    own = (chart.x, chart.y, *chart.split)
    split = (*chart.split, *(key for key in APART if key not in own))
    values = {key: list(dict.fromkeys(row.get(key) for row in kept)) for key in split}
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in kept:
        groups.setdefault(tuple(row.get(key) for key in split), []).append(row)
    result = []
    for chosen, group in groups.items():
        parts = [f"{key} {value}" for key, value in zip(split, chosen, strict=True) if len(values[key]) > 1]
        result.append((", ".join([chart.title, *parts]), group))
    return result


def _drawable(value: Any, logarithmic: bool) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and (value > 0 or not logarithmic)


def text(value: Any, form: str) -> str:
    """A figure as tables write it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return str(value)
    match form:
        case "ms":
            return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
        case "times":
            return f"{value:.2f}x"
        case "percent":
            return f"{value:.1%}"
        case "share":
            return f"{value:.3f}"
        case "mib":
            return f"{value / MIB:.1f}"
        case "error":
            return f"{value:.1e}"
        case "integer":
            return f"{value:.0f}"
        case _:
            return f"{value:.4g}"
