"""Writes the times in insight.md from the rows of the suite `statistics`: python docs/insight_times.py RESULTS.jsonl"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from efficient_attn.measuring import records

PAGE = Path(__file__).resolve().parent / "insight.md"
MARKS = ("<!-- statistics: made by docs/insight_times.py -->", "<!-- end of statistics -->")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One row a pattern and length."""
    lines = [
        "| pattern | tokens | statistics | forward | time | statistics | forward | memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda row: (row["method"], row["seqlen"])):
        peaks = [f"{row[key] / 2**20:.1f} MiB" for key in ("peak_bytes", "forward_peak_bytes")]
        times = [f"{row[key]:,.0f} ms" if row[key] >= 10 else f"{row[key]:.1f} ms" for key in ("ms", "forward_ms")]
        lines.append(
            f"| `{row['method']}` | {row['seqlen']:,} | {' | '.join(times)} | {row['time_ratio']:.2f} "
            f"| {' | '.join(peaks)} | {row['memory_ratio']:.2f} |"
        )
    return "\n".join(lines)


def main(path: Path) -> None:
    found = [r for r in records.read(path) if r.get("suite") == "statistics" and r["status"] == "ok"]
    text = PAGE.read_text(encoding="utf-8")
    begin, end = (text.index(mark) for mark in MARKS)
    made = table([{**record["config"], **record} for record in found])
    PAGE.write_text(f"{text[:begin]}{MARKS[0]}\n{made}\n{text[end:]}", encoding="utf-8")
    print(made)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
