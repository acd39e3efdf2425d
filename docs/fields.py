"""Writes the table of fields.md from the rows of the suite `fields`: python docs/fields.py RESULTS.jsonl"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from efficient_attn.measuring import records

PAGE = Path(__file__).resolve().parent / "fields.md"
MARKS = ("<!-- fields: made by docs/fields.py -->", "<!-- end of fields -->")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One row a field and method: means over seeds, and the standard deviation of the score."""
    lines = [
        "| field | tokens | method | score | seeds | step, ms | speed beside dense | MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    cells: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["field"], row["method"]), []).append(row)
    for (field, method), mine in cells.items():
        scores = [row["score"] for row in mine]
        spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
        ms, times, peak = (statistics.mean(row[key] for row in mine) for key in ("ms", "speedup_dense", "peak_bytes"))
        lines.append(
            f"| {field} | {mine[0]['tokens']:,} | `{method}` "
            f"| {mine[0]['score_is']} {statistics.mean(scores):.3f}{spread} "
            f"| {len(mine)} | {ms:.0f} | {times:.2f} | {peak / 2**20:.0f} |"
        )
    return "\n".join(lines)


def main(path: Path) -> None:
    found = [record for record in records.read(path) if record["suite"] == "fields" and record["status"] == "ok"]
    rows = [{**record["config"], **record["metrics"]} for record in found]
    order = {name: place for place, name in enumerate(("text", "image", "series", "clip"))}
    rows.sort(key=lambda row: order[row["field"]])
    text = PAGE.read_text(encoding="utf-8")
    begin, end = (text.index(mark) for mark in MARKS)
    PAGE.write_text(f"{text[:begin]}{MARKS[0]}\n{table(rows)}\n{text[end:]}", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
