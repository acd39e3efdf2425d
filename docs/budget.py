"""Writes the table of insight.md from the rows of the suite `budget`: python docs/budget.py RESULTS.jsonl"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from efficient_attn.measuring import records

PAGE = Path(__file__).resolve().parent / "insight.md"
MARKS = ("<!-- budget: made by docs/budget.py -->", "<!-- end of budget -->")
ORDER = ("minilm", "image", "lm", "series", "clip")
MOST = 2  # plans that are named


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One row a model and budget: the largest errors over seeds, means of speed and score, and what was chosen."""
    lines = [
        "| model | tokens | budget | measured error | on other samples | speed-up | score before | after | chosen |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    cells: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["source"], row["limit"]), []).append(row)
    for (source, limit), mine in sorted(cells.items(), key=lambda cell: (ORDER.index(cell[0][0]), cell[0][1])):
        error, fresh = (max(row[key] for row in mine) for key in ("error", "fresh_error"))
        speeds = [row["speedup_dense"] for row in mine]
        before, after = (statistics.mean(row[key] for row in mine) for key in ("score_before", "score"))
        lines.append(
            f"| {source} | {mine[0]['tokens']:,} | {limit:g} | {error:.3f} | {fresh:.3f} "
            f"| {statistics.mean(speeds):.2f} ({min(speeds):.2f} to {max(speeds):.2f}) "
            f"| {mine[0]['score_is']} {before:.3f} | {after:.3f} | {_chosen(mine)} |"
        )
    return "\n".join(lines)


def _chosen(rows: Sequence[Mapping[str, Any]]) -> str:
    """What layers became, the commonest first, or that nothing is gained."""
    counts: dict[str, int] = {}
    for row in rows:
        for spec in row["plan"].values():
            counts[spec] = counts.get(spec, 0) + 1
    layers, idle = sum(row["layers"] for row in rows), sum(not row["plan"] for row in rows)
    if idle == len(rows):
        return "nothing gained"
    named = sorted(counts, key=lambda spec: -counts[spec])
    text = ", ".join(f"`{spec}`" for spec in named[:MOST]) + (f" and {len(named) - MOST} more" if named[MOST:] else "")
    text = f"{sum(counts.values())} of {layers} layers: {text}"
    return f"{text}; nothing gained with {idle} of {len(rows)} seeds" if idle else text


def main(path: Path) -> None:
    found = [record for record in records.read(path) if record.get("suite") == "budget" and record["status"] == "ok"]
    rows = [{**record["config"], **record} for record in found]
    text = PAGE.read_text(encoding="utf-8")
    begin, end = (text.index(mark) for mark in MARKS)
    PAGE.write_text(f"{text[:begin]}{MARKS[0]}\n{table(rows)}\n{text[end:]}", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
