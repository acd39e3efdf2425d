"""What a profile found: rows, and what follows from them. `table()`, `to_json()`, `plot(path)`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..measuring.fit import Crossing, PowerLaw, crossing, fit_tail
from .roofline import Ceilings, Roofline, roofline
from .session import CEILINGS, MODEL, OPERATOR

Record = dict[str, Any]


@dataclass(frozen=True)
class Growth:
    """How one series grows, and what is predicted from that.

    Attributes:
        label, mode: the series. shortest: its first length.
        time, memory: power laws of milliseconds and of bytes (inputs, and the peak of a call above them; parameters of
            a model do not grow and are left out), fitted to the longer half of the lengths; None for fewer than two.
        memory_end: the longest length for which memory is predicted to suffice; None without a limit or a law.
        overtakes: where the series becomes faster than dense attention; None if it does not, or is dense itself.
    """

    label: str
    mode: str
    shortest: int
    time: PowerLaw | None
    memory: PowerLaw | None
    memory_end: float | None
    overtakes: Crossing | None


@dataclass
class Profile:
    """Measurements of a method or model against length.

    Attributes:
        rows: one dictionary a cell: ``label``, ``mode``, ``seqlen``, ``status`` ("ok", or why there are no figures,
            then ``message``), ``ms`` with its ``spread``, ``peak_bytes``, ``input_bytes``, ``flops``, ``bytes``,
            ``attention_flops``, ``attention_bytes``, ``phases`` (shares of the time), and where there are:
            ``dense_ms``, ``plan_ms``, ``density``, ``mask_bytes``, ``modules``, ``fixed_bytes`` (parameters).
        ceilings: what the machine can do, None where that was not measured.
        memory_bytes: what a process may take, for `Growth.memory_end`.
        environment: machine, versions, code, limits.
        kind: "op" or "model".
    """

    rows: list[Record]
    ceilings: Ceilings | None = None
    memory_bytes: int | None = None
    environment: Record = field(default_factory=dict)
    kind: str = "op"

    def series(self) -> dict[tuple[str, str], list[Record]]:
        """The rows with figures by (label, mode), shortest first."""
        found: dict[tuple[str, str], list[Record]] = {}
        for row in sorted(self.rows, key=lambda row: int(row["seqlen"])):
            if row["status"] == "ok":
                found.setdefault((row["label"], row["mode"]), []).append(row)
        return found

    def growth(self) -> list[Growth]:
        """What each series grows like, and where it ends and overtakes dense attention."""
        series = self.series()
        return [self._growth(label, mode, rows, series) for (label, mode), rows in series.items()]

    def _growth(self, label: str, mode: str, rows: Sequence[Record], series: Mapping[Any, list[Record]]) -> Growth:
        lengths = [row["seqlen"] for row in rows]
        time = fit_tail(lengths, [row["ms"] for row in rows])
        fixed = rows[-1].get("fixed_bytes", 0)
        memory = fit_tail(lengths, [row["input_bytes"] + max(row["peak_bytes"], 0) - fixed for row in rows])
        end = None
        if memory is not None and self.memory_bytes is not None:
            end = memory.length_for(max(self.memory_bytes - fixed, 1))
        return Growth(label, mode, lengths[0], time, memory, end, self._overtakes(label, mode, rows, series))

    def _overtakes(
        self, label: str, mode: str, rows: Sequence[Record], series: Mapping[Any, list[Record]]
    ) -> Crossing | None:
        if label == "dense":
            return None
        # A method has dense attention beside it, in alternation; a model has it as a series of its own.
        dense = {row["seqlen"]: row["ms"] for row in series.get(("dense", mode), [])}
        dense |= {row["seqlen"]: row["dense_ms"] for row in rows if "dense_ms" in row}
        both = [row for row in rows if row["seqlen"] in dense]
        return crossing(
            [row["seqlen"] for row in both], [row["ms"] for row in both], [dense[row["seqlen"]] for row in both]
        )

    def roofline(self, row: Mapping[str, Any]) -> Roofline | None:
        """A row under the machine's ceilings: all of a method's matrix operations, of a model those of attention over
        the time of its kernels. None without ceilings or without such work."""
        if self.ceilings is None or row["status"] != "ok":
            return None
        part, ms = ("", row["ms"]) if self.kind == "op" else ("attention_", row["ms"] * row["phases"]["kernel"])
        flops, moved = row[f"{part}flops"], row[f"{part}bytes"]
        return roofline(flops, moved, ms, self.ceilings, row["dtype"]) if flops and ms else None

    def table(self) -> Any:
        """The rows and what follows from them as a rich renderable; `str()` of a profile is the same as text."""
        from .tables import profile_table

        return profile_table(self)

    def __str__(self) -> str:
        from ..measuring.terminal import as_text

        return as_text(self.table())

    def to_json(self) -> str:
        """Everything, as a JSON object: rows, ceilings, growth (infinite numbers as null), environment."""
        found = {
            "kind": self.kind,
            "environment": self.environment,
            "ceilings": None if self.ceilings is None else dataclasses.asdict(self.ceilings),
            "memory_bytes": self.memory_bytes,
            "rows": self.rows,
            "growth": [dataclasses.asdict(found) for found in self.growth()],
        }
        return json.dumps(_finite(found), indent=1)

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
    top = None if last is None else Ceilings(**{field.name: last[field.name] for field in dataclasses.fields(Ceilings)})
    return Profile(rows, top, limit, environment, kind)


def _is_trace(record: Mapping[str, Any]) -> bool:
    """Whether a cell was run for its trace: its figures are there already. One that failed is worth a row."""
    return "trace" in record["config"] and record["status"] == "ok"


def _row(record: Mapping[str, Any]) -> Record:
    config = record["config"]
    label = config.get("method") or config.get("attention") or "as it is"
    row = {"label": label, **{k: v for k, v in config.items() if k not in ("method", "attention", "trace")}}
    return row | {k: v for k, v in record.items() if k not in ("type", "id", "suite", "config", "traceback")}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list) else value
