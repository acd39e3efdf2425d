"""Writes the generated parts of README.md: the table of methods, and on request the picture and figures of a run.

python docs/readme.py                      the table of methods
python docs/readme.py results.jsonl        also docs/benchmark.png and the printed tables, from that run
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from rich.console import Console

from efficient_attn.benchmarks import plot, report
from efficient_attn.measuring import records
from efficient_attn.methods import methods_table

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "benchmark.png"
SUITES = ("ops", "vit")
METHODS = ("dense", "sliding_window", "bigbird", "linformer", "nystrom", "performer", "linear")


def methods_markdown() -> str:
    """methods_table() as Markdown."""
    rows = methods_table()
    columns = ("name", "formula", "complexity", "exact", "causal", "mask", "parameters", "backends", "paper")
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [row[column].replace("|", "\\|") for column in columns]
        cells[0], cells[1], cells[6] = (f"`{cell}`" if cell != "-" else cell for cell in (cells[0], cells[1], cells[6]))
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "`...+centroid` stands behind a sparse method: `sliding_window+centroid`. [docs/methods.md](docs/methods.md)",
    ]
    lines[-1] += " has the definitions, and what each method loses on the activations of a trained model."
    return "\n".join(lines)


def replaced(text: str, part: str, content: str) -> str:
    """``text`` with what stands between the markers of ``part`` replaced."""
    start, end = f"<!-- {part}: made by docs/readme.py -->", f"<!-- end of {part} -->"
    before, found_start, rest = text.partition(start)
    _, found_end, after = rest.partition(end)
    if not (found_start and found_end):
        raise ValueError(f"{README} has no part {part!r} between {start!r} and {end!r}; put the markers back")
    return f"{before}{start}\n{content}\n{end}{after}"


def with_methods(text: str) -> str:
    """README's text with a fresh table of methods."""
    return replaced(text, "methods", methods_markdown())


def _is_shown(cell: records.Record) -> bool:
    """README has room for one method of a kind, in two suites; the page of the run has them all."""
    name = cell["config"].get("method", "").partition(":")[0]
    return cell["suite"] in SUITES and name in METHODS and "+" not in cell["config"]["method"]


def with_figures(text: str, results: Path) -> str:
    """README's text with the tables of a run, drawing the picture on the way."""
    found = list(records.read(results))
    cells = [cell for cell in report.latest(found) if _is_shown(cell)]
    environment = next(record for record in reversed(found) if record["type"] == "environment")
    about = records.describe(environment)
    plot.save(cells, PICTURE, about)
    printed = io.StringIO()
    console = Console(file=printed, width=118, color_system=None)
    console.print(about)
    report.print_report(cells, console)
    lines = [line.rstrip() for line in printed.getvalue().splitlines()]
    command = "$ efficient-attn " + " ".join(environment["argv"])
    return replaced(text, "figures", "\n".join(["```", command, *lines, "```"]))


if __name__ == "__main__":
    new = with_methods(README.read_text(encoding="utf-8"))
    for argument in sys.argv[1:2]:
        new = with_figures(new, Path(argument))
    README.write_text(new, encoding="utf-8")
