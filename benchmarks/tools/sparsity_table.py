"""The table of sparse methods beside their density, from rows of `efficient-attn bench sparsity`.

    python -m efficient_attn.benchmarks.tools.sparsity_table FOLDER... [--page docs/benchmarks.md]

Efficiency is density x the time of exact attention over the time of the method, in one alternation. With --page the
table takes the place of the one there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from efficient_attn.measuring import records

from .. import view
from .call_table import write

MARKS = ("<!-- sparsity: made by benchmarks/tools/sparsity_table.py -->", "<!-- end of sparsity -->")

# The least efficiency that each is built for, forward, at 4096 and at 16384 tokens.
TARGETS: Mapping[str, tuple[float, float]] = {
    "sliding_window": (0.80, 0.87),
    "bigbird": (0.80, 0.87),
    "longformer": (0.65, 0.75),
    "dilated": (0.40, 0.55),
    "neighborhood": (0.40, 0.55),
    "axial": (0.45, 0.60),
    "strided": (0.45, 0.60),
    "fixed": (0.45, 0.60),
    "lsh": (0.40, 0.55),
    "sorted_buckets": (0.40, 0.55),
    "topk_blocks": (0.75, 0.85),
}
LENGTHS = (4096, 16384)


def rows_of(folders: Iterable[Path]) -> list[Mapping[str, Any]]:
    """The rows of methods in some runs; of a cell that was measured again the last."""
    found = [record for folder in folders for record in records.read(folder / "results.jsonl")]
    cells = view.latest([r for r in found if r["type"] != "cell" or r["suite"] == "sparsity"])
    return [row for row in view.rows(cells) if row.get("efficiency") is not None and row["percent"] is None]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each method, length and dtype: what it sees and visits, its efficiency beside the target, and its time
    as a share of that of exact attention."""
    places: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        places.setdefault((row["seqlen"], row["dtype"], row["pattern"]), {})[row["mode"]] = row
    lines = [
        "| N | dtype | method | visible | visited | parts | forward, ms | efficiency | target | of exact "
        "| forward + backward, ms | efficiency | of exact |",
        "| --- " * 13 + "|",
    ]
    for (length, dtype, method), modes in sorted(places.items(), key=lambda item: item[0][:2]):
        any_row = next(iter(modes.values()))
        aims = TARGETS.get(method.partition(":")[0])
        aim = f"{aims[LENGTHS.index(length)]:.2f}" if aims and length in LENGTHS else ""
        forward, both = (_figures(modes.get(mode)) for mode in ("fwd", "fwd_bwd"))
        seen = f"{any_row['density']:.1%} | {any_row['visited']:.1%} | {any_row['parts']}"
        lines.append(
            f"| {length} | {dtype} | `{method}` | {seen} | {forward[0]} | {forward[1]} | {aim} | {forward[2]} "
            f"| {' | '.join(both)} |"
        )
    return "\n".join(lines)


def _figures(row: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if row is None:
        return "", "", ""
    return f"{row['ms']:.3g}", f"{row['efficiency']:.2f}", f"{1 / row['speedup_dense']:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="folders of runs, the newest last")
    parser.add_argument("--page", type=Path, help="the page with the marks of the table")
    given = parser.parse_args(arguments)
    text = table(rows_of(given.folders))
    print(text)
    if given.page is not None:
        write(given.page, text, MARKS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
