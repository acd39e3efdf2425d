"""Writes the table of fields.md from rows of the suites fields and fields_cost: python docs/fields.py RESULTS..."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from efficient_attn.measuring import records

PAGE = Path(__file__).resolve().parent / "fields.md"
MARKS = ("<!-- fields: made by docs/fields.py -->", "<!-- end of fields -->")
Cells = Mapping[tuple[str, str], list[Mapping[str, Any]]]


def cells(found: Iterable[Mapping[str, Any]], suite: str) -> Cells:
    """The rows of a suite by field and method."""
    rows: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in found:
        if record.get("suite") == suite and record["status"] == "ok":
            config = record["config"]
            rows.setdefault((config["field"], config["method"]), []).append({**config, **record})
    return rows


def table(scores: Cells, costs: Cells) -> str:
    """One row a field and method: mean and standard deviation of the score over seeds, and what a step takes."""
    lines = [
        "| field | tokens | method | score | seeds | step, ms | beside dense | MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    fields = list(dict.fromkeys(field for field, _ in costs))
    for field, method in sorted(costs, key=lambda cell: fields.index(cell[0])):
        cost, mine = costs[field, method][-1], scores.get((field, method), [])
        found = [row["score"] for row in mine]
        spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
        score = f"{mine[0]['score_is']} {statistics.mean(found):.3f}{spread}" if mine else "-"
        lines.append(
            f"| {field} | {cost['tokens']:,} | `{method}` | {score} | {len(mine)} | {cost['ms']:.0f} "
            f"| {cost['speedup_dense']:.1f}x | {cost['peak_bytes'] / 2**20:.0f} |"
        )
    return "\n".join(lines)


def main(paths: Iterable[Path]) -> None:
    found = [record for path in paths for record in records.read(path)]
    made = table(cells(found, "fields"), cells(found, "fields_cost"))
    text = PAGE.read_text(encoding="utf-8")
    begin, end = (text.index(mark) for mark in MARKS)
    PAGE.write_text(f"{text[:begin]}{MARKS[0]}\n{made}\n{text[end:]}", encoding="utf-8")
    print(made)


if __name__ == "__main__":
    main(map(Path, sys.argv[1:]))
