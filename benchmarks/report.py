"""The records of a result file as tables, with the sentences that they support and the cells that failed.

A table is data (`Table`), made of what a suite declares; it is written with rich in a terminal and as plain text where
rich is missing. A file of an unfinished run is fine.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from efficient_attn.measuring.clock import UNSURE
from efficient_attn.measuring.records import Record

from . import suites, view
from .suites import Column
from .view import Row

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 120  # of a note in plain text


@dataclass(frozen=True)
class Table:
    """Headings, and cells under heads; a `failed` line ends with its status instead of figures."""

    title: str
    columns: Sequence[Column]
    sections: Sequence[tuple[str, Sequence[tuple[list[str], bool]]]]  # head, lines of (cells, failed)
    note: str


def tables(rows: Sequence[Row]) -> dict[str, Table]:
    """The table of each suite that has rows."""
    result = {}
    for name in dict.fromkeys(row["suite"] for row in rows):
        mine = [row for row in rows if row["suite"] == name]
        try:
            result[name] = _table(suites.get(name), mine)
        except KeyError:
            result[name] = _unknown(name, mine)
    return result


def _table(suite: suites.Suite, rows: Sequence[Row]) -> Table:
    """What the suite declares of these rows, without columns in which none has a figure."""
    heads = [column for column in suite.key if column.key in suite.sections]
    common, differing = _conditions(suite, rows)
    keys = [column for column in (*suite.key, *differing) if column not in heads]
    ready = [row for row in rows if row["status"] == "ok"]
    figures = [c for c in suite.columns if any(row.get(c.key) not in (None, "") for row in ready)] or suite.columns[:1]
    noisy = next((column.key for column in figures if column.key == "ms"), figures[0].key)
    sections: dict[str, list[tuple[list[str], bool]]] = {}
    for row in (row for row in rows if row["status"] != "unsupported"):  # its reason is a line of its own
        head = ", ".join(
            text if column.form == "text" else f"{column.label} {text}"
            for column in heads
            if (text := view.text(row.get(column.key), column.form))
        )
        failed = row["status"] != "ok"
        cells = [row["series"] if c.key == suite.series else view.text(row.get(c.key), c.form) for c in keys]
        if failed:
            cells.append(row["status"])
        else:
            mark = "~" if row["noisy"] else ""
            cells += [view.text(row.get(c.key), c.form) + (mark if c.key == noisy else "") for c in figures]
        sections.setdefault(head, []).append((cells, failed))
    meant = sorted({str(row[suite.series]) for row in rows if row["series"] not in ("", str(row.get(suite.series)))})
    legend = f" Here {', '.join(meant)}." if meant else ""
    note = f"{suite.about} ~ noisy: unsure by more than {UNSURE:.0%}.{legend}"
    title = f"{suite.name}: {common}" if common else suite.name
    return Table(title, [*keys, *figures], list(sections.items()), note)


def _conditions(suite: suites.Suite, rows: Sequence[Row]) -> tuple[str, list[Column]]:
    """What all rows were measured under, in words, and a column for each condition in which they differ."""
    told = {column.key for column in suite.key}
    told |= {"batch", "heads", "head_dim"} if told & {"shape", "case"} else set()
    values = {key: {row.get(key) for row in rows} for key in view.APART if key not in told}
    differing = [Column(key, key, "text") for key, found in values.items() if len(found) > 1]
    common = {key: found.pop() for key, found in values.items() if len(found) == 1}
    words = [common.get("dtype"), view.shape(common), "causal" if common.get("causal") else None]
    more = {"threads": "{} threads", "steps": "{} steps", "backend": "backend {}", "seed": "seed {}"}
    words += [form.format(common[key]) for key, form in more.items() if common.get(key) not in (None, 0, "auto")]
    return ", ".join(word for word in words if word), differing


def _unknown(name: str, rows: Sequence[Row]) -> Table:
    """The rows as they are, of a suite whose file is not loaded now."""
    hidden = ("suite", "status", "id", "series", "shape", "noisy", "environment")
    lines = [([row["status"], str({k: v for k, v in row.items() if k not in hidden})], False) for row in rows]
    columns = [Column("status", "status", "text"), Column("row", "row", "text")]
    return Table(f"{name}, which is not loaded: --load its file", columns, [("", lines)], "")


def failures(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Status and text of what has no figure; rows that say the same are one line."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            groups.setdefault((row["status"], row.get("message", "")), []).append(view.row_name(row))
    return [
        (status, f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {message[:300]}")
        for (status, message), names in groups.items()
    ]


def print_report(cells: Sequence[Record], console: Console) -> None:
    """Prints for each suite its table and findings, then a line for each cell that failed."""
    from efficient_attn.measuring.terminal import note

    rows = view.rows(cells)
    claims = view.claims(rows)
    for name, table in tables(rows).items():
        print_table(table, console)
        for suite, claim in claims:
            if suite == name:
                console.print(f"  {claim.text}")
    for status, text in failures(rows):
        note(console, status, f": {text}")


def print_table(table: Table, console: Console) -> None:
    """Prints a table with its notes."""
    from rich.text import Text

    from efficient_attn.measuring.terminal import make_table

    text_columns = {number for number, column in enumerate(table.columns) if column.form == "text"}
    drawn = make_table(table.title, [column.label for column in table.columns], text_columns, table.note)
    for head, lines in table.sections:
        if head:
            drawn.add_section()
            drawn.add_row(Text(head, style="bold"))
        for texts, failed in lines:
            drawn.add_row(*texts[:-1], Text(texts[-1], style="yellow") if failed else texts[-1])
    console.print(drawn)


def plain(cells: Sequence[Record]) -> str:
    """What `print_report` prints, without rich: for a machine that has PyTorch and little else."""
    rows = view.rows(cells)
    claims = view.claims(rows)
    parts = []
    for name, table in tables(rows).items():
        lines = [line for _, section in table.sections for line in section]
        texts = [[column.label for column in table.columns], *(cells for cells, failed in lines if not failed)]
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]

        def written(cells: Sequence[str], table: Table = table, widths: Sequence[int] = widths) -> str:
            aligned = zip(cells, table.columns, widths, strict=False)  # a failed line is shorter
            return "  ".join(
                text.ljust(width) if column.form == "text" else text.rjust(width) for text, column, width in aligned
            ).rstrip()

        parts += ["", table.title, "", written([column.label for column in table.columns])]
        for head, section in table.sections:
            parts += [head] if head else []
            parts += [written(cells) for cells, _ in section]
        parts += [*textwrap.wrap(table.note, WIDTH), *(f"  {claim.text}" for suite, claim in claims if suite == name)]
    return "\n".join([*parts, *(f"{status}: {text}" for status, text in failures(rows))]).lstrip("\n")
