"""Writes the generated parts of README.md and docs/methods.md: the tables of methods, and on request a run's figures.

python docs/readme.py                      the tables of methods
python docs/readme.py results.jsonl        also docs/benchmark.png and the printed table, from that run
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from efficient_attn.benchmarks import cases, figures, report, view
from efficient_attn.benchmarks.summary import Summary
from efficient_attn.measuring import records
from efficient_attn.methods import methods_table

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
METHODS = ROOT / "docs" / "methods.md"
PICTURE = ROOT / "docs" / "benchmark.png"
ATTENTION = "softmax(QK^T)V"


def markdown(rows: Sequence[dict[str, str]], columns: dict[str, str], code: Sequence[str]) -> str:
    """A table: `columns` are heading -> key in a row, those of `code` in backticks."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [f"`{row[key]}`" if key in code and row[key] != "-" else row[key] for key in columns.values()]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def short_table() -> str:
    """README's table: five columns. What a sparse method sees is what its softmax goes over."""
    rows = [row | {"sees": row["formula"].removeprefix(f"{ATTENTION} over ")} for row in methods_table()]
    for row in rows:
        if row["sees"] == ATTENTION:
            row["sees"] = "every key"
    columns = {"name": "name", "what it sees": "sees", "cost": "complexity", "causal": "causal", "backends": "backends"}
    return markdown(rows, columns, code=("name",))


def full_table() -> str:
    """The table of docs/methods.md: all that `methods_table` knows."""
    rows = methods_table()
    return markdown(rows, {key: key for key in rows[0]}, code=("name", "formula", "parameters"))


def replaced(text: str, part: str, content: str) -> str:
    """`text` with what stands between the markers of `part` replaced.

    Raises:
        ValueError: the text has no such markers.
    """
    start, end = f"<!-- {part}: made by docs/readme.py -->", f"<!-- end of {part} -->"
    before, found_start, rest = text.partition(start)
    _, found_end, after = rest.partition(end)
    if not (found_start and found_end):
        raise ValueError(f"there is no part {part!r} between {start!r} and {end!r}; put the markers back")
    return f"{before}{start}\n{content}\n{end}{after}"


def is_clean(record: records.Record) -> bool:
    """Whether the record is of a commit that can be checked out, not of changed sources."""
    return not record["code"].endswith("-dirty")


def in_readme(cell: records.Record) -> bool:
    """There is room for the methods of an overview, also where a run has more; its page has everything."""
    method = cell["config"].get("method")
    return cell["suite"] != "ops" or method in cases.OVERVIEW_METHODS


def with_figures(text: str, results: Path) -> str:
    """README's text with the table of a run, drawing the picture on the way; cells of changed sources are left out."""
    found = [record for record in records.read(results) if is_clean(record)]
    rows = view.rows([cell for cell in view.latest(found) if in_readme(cell)])
    environment = next(record for record in reversed(found) if record["type"] == "environment")
    summary = Summary(rows)
    table = summary.table()
    if table is None:
        raise ValueError(f"{results} has no clean cell of the suite ops; make one with efficient-attn bench")
    figures.story(rows, PICTURE, environment)
    printed = io.StringIO()
    console = Console(file=printed, width=128, color_system=None)
    console.print(records.describe(environment))
    report.print_table(table, console)
    lines = [line.rstrip() for line in printed.getvalue().splitlines()]
    command = "$ efficient-attn " + " ".join(environment["argv"])
    block = ["```", command, *lines, "```", "", *(f"* {claim.text}" for claim in summary.sentences())]
    return replaced(replaced(text, "figures", "\n".join(block)), "lead", lead(summary))


def lead(summary: Summary) -> str:
    """README's first sentence: what no exact attention can do on this machine; without such a cell, another."""
    text = (summary.million() or summary.sentences()[1]).text
    return f"**{text}**\n\n![Time up to a million tokens, and speed against error](docs/benchmark.png)"


def main(arguments: Sequence[str]) -> None:
    """Write both files; with an argument, a run's figures too."""
    readme = replaced(README.read_text(encoding="utf-8"), "methods", short_table())
    for results in arguments[:1]:
        readme = with_figures(readme, Path(results))
    README.write_text(readme, encoding="utf-8")
    METHODS.write_text(replaced(METHODS.read_text(encoding="utf-8"), "methods", full_table()), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
