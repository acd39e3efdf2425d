"""One HTML file that shows the records of some runs without a network, with pictures and CSV in a folder beside it.

The page is `page/page.html` with its style, its script and the rows as JSON put inside; the script draws.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from efficient_attn.measuring import records
from efficient_attn.measuring.clock import UNSURE
from efficient_attn.measuring.records import Record

from . import figures, view
from .suites import Column, Suite
from .summary import Summary, group

PAGE = Path(__file__).parent / "page"


def write(found: Sequence[Record], path: Path, sources: Sequence[str], *, pictures: bool = True) -> list[Path]:
    """Writes the page to `path` and, into the folder `<stem>_files` beside it, every panel as PNG and SVG, and CSV
    files: one a suite and `rows.csv` with all.

    Args:
        found: the records of one or more result files, in their order.
        sources: what the page says they were read from.
        pictures: without, the page alone is written.

    Returns:
        The files written, the page first.
    """
    rows = view.rows(found)
    suites = view.shown(rows)
    panels = {suite.name: figures.panels(suite, rows) for suite in suites}
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {
        "about": _about(found, rows, sources),
        "environments": [_environment(record) for record in view.environments(found)],
        "suites": [_suite(suite, rows, panels[suite.name]) for suite in suites],
        "story": _story(rows),
        "claims": [{"suite": name, "text": claim.text, "rows": claim.rows} for name, claim in view.claims(rows)],
        "rows": [_row(row) for row in rows],
    }
    path.write_text(page(data), encoding="utf-8")
    if not pictures:
        return [path]
    folder = path.parent / f"{path.stem}_files"
    folder.mkdir(exist_ok=True)
    written = [path, write_csv(rows, folder / "rows.csv")]
    for suite in suites:
        columns = [*suite.key, *suite.columns]
        written.append(
            write_csv([row for row in rows if row["suite"] == suite.name], folder / f"{suite.name}.csv", columns)
        )
        for number, panel in enumerate(panels[suite.name], start=1):
            written += figures.save(panel, folder / f"{suite.name}-{number}")
    return written


def page(data: Mapping[str, Any]) -> str:
    """The page with its parts inside."""
    text = (PAGE / "page.html").read_text(encoding="utf-8")
    # In a script element only "<" can end it; JSON may write it as an escape.
    embedded = json.dumps(_plain(data), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"style": (PAGE / "page.css").read_text(encoding="utf-8"), "data": embedded}
    parts["script"] = "\n".join((PAGE / name).read_text(encoding="utf-8") for name in ("page.js", "story.js"))
    for name, part in parts.items():
        before, marker, after = text.partition(f"/*{name}*/")
        assert marker, f"page.html has no place for its {name}"
        text = before + part + after
    return text


def write_csv(rows: Sequence[view.Row], path: Path, columns: Sequence[Column] | None = None) -> Path:
    """All fields of the rows, or those of some columns and what names a row."""
    if columns is None:
        names = list(dict.fromkeys(key for row in rows for key in row))
    else:
        names = ["id", "status", *(column.key for column in columns), "spread", "samples", "code", "message"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def _story(rows: Sequence[view.Row]) -> dict[str, Any] | None:
    """What the first screens show: the sentences, and of the suite ops one shape with its methods; None without it."""
    summary = Summary(rows)
    if not summary.ops:
        return None
    first = next(iter(summary.ops.values()))
    shape = view.shape({key: first.get(key) for key in ("batch", "heads", "head_dim")})
    return {
        "rows": [row["id"] for row in summary.ops.values()],
        "methods": {
            row["method"]: {
                "name": summary.names[row["method"]],
                "group": group(row["method"]),
                "series": row["series"],
            }
            for row in summary.ops.values()
        },
        "sentences": [{"text": claim.text, "rows": claim.rows} for claim in summary.sentences()],
        "about": f"{first['dtype']}, {shape}{', causal' if first.get('causal') else ''}, {first['threads']} threads: "
        "the operator on patches of photographs, each method beside torch SDPA in one alternation.",
        "unsure": UNSURE,
    }


def _suite(suite: Suite, rows: Sequence[view.Row], panels: Iterable[figures.Panel]) -> dict[str, Any]:
    mine = [row for row in rows if row["suite"] == suite.name]
    return {
        "name": suite.name,
        "about": suite.about,
        "key": [vars(column) for column in suite.key],
        "columns": [vars(column) for column in suite.columns],
        "series": list(dict.fromkeys(row["series"] for row in mine)),
        "meaning": {row["series"]: str(row.get(suite.series, "")) for row in mine},
        "panels": [panel.described() for panel in panels],
        "published": suite.published,
    }


def _row(row: view.Row) -> dict[str, Any]:
    words = [str(value) for value in row.values() if isinstance(value, (str, int))]
    return {**row, "words": " ".join(words).lower(), "run": row["environment"] + 1}


def _about(found: Sequence[Record], rows: Sequence[view.Row], sources: Sequence[str]) -> str:
    lines = [records.describe(record) for record in view.environments(found)[-1:]]
    failed = sum(row["status"] != "ok" for row in rows)
    noisy = sum(row["noisy"] for row in rows)
    less = [f"{n} {what}" for n, what in ((failed, "without a figure"), (noisy, "noisy (~)")) if n]
    counts = f"{len(rows)} rows from {', '.join(sources)}"
    return ". ".join([*lines, ": ".join(filter(None, (counts, ", ".join(less))))]) + "."


def _environment(record: Record) -> dict[str, str]:
    machine, versions = record.get("machine", {}), record.get("versions", {})
    fields = {
        "started": record.get("started"),
        "command": "efficient-attn " + " ".join(record.get("argv", [])),
        "code": record.get("code"),
        "processor": machine.get("cpu"),
        "cores": machine.get("cores"),
        "clock, MHz": ", ".join(map(str, machine.get("clock_mhz", []))),
        "memory": f"{machine.get('memory_bytes', 0) / 2**30:.1f} GiB",
        "system": machine.get("system"),
        "python": record.get("python"),
        "threads": record.get("threads"),
        "load at the start": record.get("load"),
        "noise at the start": record.get("noise"),
        "seed": record.get("seed"),
        "limits": record.get("limits"),
        **{name: version for name, version in versions.items() if version},
    }
    return {name: str(value) for name, value in fields.items() if value is not None}


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
