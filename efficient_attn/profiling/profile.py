"""A profile: measurements of a method or model against length, which show themselves as table, text and picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from .results import Measurements, Record
from .roofline import Ceilings
from .session import CEILINGS, MODEL, OPERATOR


class Profile(Measurements):
    """What `profile_op`, `profile_model` and `from_records` return; the fields are those of `Measurements`."""

    def table(self) -> Any:
        """The rows and what follows from them as a rich renderable; `str()` of a profile is the same as text."""
        from .tables import profile_table

        return profile_table(self)

    def __str__(self) -> str:
        from ..measuring.terminal import as_text

        return as_text(self.table())

    def plot(self, path: str | Path) -> Path:
        """Draw time, memory, phases and roofline into a PNG (or what matplotlib makes of another suffix)."""
        from .plots import profile_picture

        return profile_picture(self, Path(path))


def from_records(found: Iterable[Mapping[str, Any]], kind: str | None = None) -> Profile:
    """The profile that the records of a result file hold; of a cell that was measured more than once, the last one.

    Raises:
        InputError: none of its records comes from a profile.
    """
    cells: dict[str, Mapping[str, Any]] = {}
    environment: Record = {}
    for record in found:
        if record["type"] == "environment":
            environment = dict(record)
        elif record["suite"] in (OPERATOR, MODEL, CEILINGS) and not _is_trace(record):
            cells[f"{record['suite']} {sorted((k, str(v)) for k, v in record['config'].items())}"] = record
    ceilings = [c for c in cells.values() if c["suite"] == CEILINGS and c["status"] == "ok"]
    suites = {"op": OPERATOR, "model": MODEL}
    kind = kind or next((k for k, suite in suites.items() if any(c["suite"] == suite for c in cells.values())), None)
    rows = [_row(c) for c in cells.values() if kind is not None and c["suite"] == suites[kind]]
    if kind is None or not rows:
        raise InputError("there are no rows of a profile here; make some with efficient-attn profile --out FOLDER")
    limit = (environment.get("limits") or {}).get("memory_bytes")
    last = ceilings[-1] if ceilings else None
    names = [field.name for field in dataclasses.fields(Ceilings)]
    top = None if last is None else Ceilings(**{name: last[name] for name in names if name in last})
    return Profile(rows, top, limit, environment, kind)


def _is_trace(record: Mapping[str, Any]) -> bool:
    """Whether a cell was run for its trace: its figures are there already. One that failed is worth a row."""
    return "trace" in record["config"] and record["status"] == "ok"


def _row(record: Mapping[str, Any]) -> Record:
    config = record["config"]
    label = config.get("method") or config.get("attention") or "as it is"
    row = {"label": label, **{k: v for k, v in config.items() if k not in ("method", "attention", "trace")}}
    return row | {k: v for k, v in record.items() if k not in ("type", "id", "suite", "config", "traceback")}
