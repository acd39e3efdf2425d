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

from efficient_attn.benchmarks import figures, report, view
from efficient_attn.measuring import records
from efficient_attn.methods import methods_table

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
METHODS = ROOT / "docs" / "methods.md"
PICTURE = ROOT / "docs" / "benchmark.png"
SHOWN = ("dense", "sliding_window", "bigbird", "linformer", "nystrom", "performer", "linear")
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


def in_picture(cell: records.Record) -> bool:
    """There is room for one method of a kind, forward; the page of the run has everything."""
    config = cell["config"]
    method = config.get("method", "")
    shown = method.partition(":")[0] in SHOWN and "+" not in method
    return shown and cell["suite"] == "ops" and config["mode"] == "fwd"


def in_table(cell: records.Record) -> bool:
    """README prints one table: the operator on 2048 tokens."""
    return cell["config"]["seqlen"] == 2048


def with_figures(text: str, results: Path) -> str:
    """README's text with the table of a run, drawing the picture on the way; cells of changed sources are left out."""
    found = [record for record in records.read(results) if is_clean(record)]
    cells = [cell for cell in view.latest(found) if in_picture(cell)]
    environment = next(record for record in reversed(found) if record["type"] == "environment")
    about = records.describe(environment)
    figures.overview(view.rows(cells), PICTURE, about)
    printed = io.StringIO()
    console = Console(file=printed, width=118, color_system=None)
    console.print(about)
    report.print_report([cell for cell in cells if in_table(cell)], console)
    lines = [line.rstrip() for line in printed.getvalue().splitlines()]
    command = "$ efficient-attn " + " ".join(environment["argv"])
    return replaced(text, "figures", "\n".join(["```", command, *lines, "```"]))


def main(arguments: Sequence[str]) -> None:
    """Write both files; with an argument, a run's figures too."""
    readme = replaced(README.read_text(encoding="utf-8"), "methods", short_table())
    for results in arguments[:1]:
        readme = with_figures(readme, Path(results))
    README.write_text(readme, encoding="utf-8")
    METHODS.write_text(replaced(METHODS.read_text(encoding="utf-8"), "methods", full_table()), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
