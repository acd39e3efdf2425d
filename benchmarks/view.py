"""What the terminal, the charts and the page show of records: flat rows, their names, and how a figure is written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from efficient_attn.measuring.clock import is_noisy
from efficient_attn.measuring.records import Record

from . import suites
from .suites import Chart, Claim, Suite

MIB = 2**20
# Samples and long texts stay in the JSONL.
LEFT_OUT = ("times", "reference_times", "traceback", "clock_mhz")

# What a figure depends on: no line of a chart joins two values of these, and a table shows those that differ.
APART = ("code", "threads", "dtype", "backend", "causal", "batch", "heads", "head_dim", "steps", "seed")

Row = dict[str, Any]


def latest(found: Iterable[Record]) -> list[Record]:
    """The cell records, of a cell that was measured more than once only the last, in order of first appearance."""
    cells: dict[str, Record] = {}
    for record in found:
        if record["type"] == "cell":
            cells[f"{record['suite']} {sorted(record['config'].items())}"] = record
    return list(cells.values())


def rows(found: Iterable[Record]) -> list[Row]:
    """The flat rows of some records, the last of each cell and version of the code.

    A row holds what names its cell, its configuration and its metrics, then `environment` (the number of its
    environment line), `noisy`, `shape` in words, what its suite adds, and `series`, the name of its line in charts.
    """
    last: dict[str, Row] = {}
    environment = -1
    for record in found:
        if record["type"] == "environment":
            environment += 1
        elif record["type"] == "cell":
            config = record["config"]
            row = {key: value for key, value in record.items() if key not in ("type", "config", *LEFT_OUT)}
            row |= {**config, "environment": environment, "shape": shape(config)}
            row["id"] = record.get("id") or f"row{len(last)}"
            if "peak_bytes" in row:
                row["peak_mib"] = round(row["peak_bytes"] / MIB, 3)
            row["noisy"] = is_noisy(row)
            # Two versions of the code stand side by side.
            last[f"{record['suite']} {sorted(config.items())} {record.get('code')}"] = row
    known = {suite.name: suite for suite in shown(last.values())}
    result = [
        shown_row
        for row in last.values()
        for shown_row in (known[row["suite"]].expand(row) if row["suite"] in known else [row])
    ]
    for name, suite in known.items():
        mine = [row for row in result if row["suite"] == name]
        labels = short_names(str(row[suite.series]) for row in mine if suite.series in row)
        for row in mine:
            row["series"] = labels.get(str(row.get(suite.series)), "")
    return [{"series": "", **row} for row in result]


def shape(config: Mapping[str, Any]) -> str:
    """`B1 H8 Hkv2 N4096 D64`, as much of it as a configuration says."""
    q_len, kv_len = config.get("q_len"), config.get("kv_len")
    both = kv_len if q_len in (None, kv_len) else None
    kv_heads = config.get("kv_heads")
    parts = {
        "B": config.get("batch"),
        "H": config.get("heads"),
        "Hkv": kv_heads if kv_heads != config.get("heads") else None,
        "N": config.get("seqlen", both),
        "Nq": None if both else q_len,
        "Nk": None if both else kv_len,
        "D": config.get("head_dim"),
    }
    return " ".join(f"{name}{value}" for name, value in parts.items() if value is not None)


def short_names(specs: Iterable[str]) -> dict[str, str]:
    """For each spec the names of its methods alone, or the whole spec where several have the same names."""
    known = list(dict.fromkeys(specs))
    short = {spec: "+".join(part.partition(":")[0] for part in spec.split("+")) for spec in known}
    counts = Counter(short.values())
    return {spec: name if counts[name] == 1 else spec for spec, name in short.items()}


def environments(found: Iterable[Record]) -> list[Record]:
    return [record for record in found if record["type"] == "environment"]


def shown(found: Iterable[Row]) -> list[Suite]:
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


def cell_name(cell: Mapping[str, Any]) -> str:
    """A cell, measured or not, in a few words."""
    return row_name({**cell["config"], "suite": cell["suite"], "shape": shape(cell["config"])})


def row_name(row: Row) -> str:
    """A row in a few words: its suite and the values of the suite's key columns."""
    try:
        parts = [text(row.get(column.key), column.form) for column in suites.get(row["suite"]).key]
    except KeyError:
        parts = [str(row.get("method", ""))]
    return " ".join(part for part in (row["suite"], *parts) if part)


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
