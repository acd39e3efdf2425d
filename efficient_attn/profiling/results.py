"""What was measured, as data: a profile's rows and what follows from them, and the candidates of a recommendation.

profile.py and recommendation.py show them, by tables.py and plots.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..measuring.clock import is_noisy
from ..measuring.fit import Crossing, PowerLaw, crossing, fit_tail
from .roofline import Ceilings, Roofline, roofline

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
        noisy: "time" or "overtakes" or both: what the machine was too busy for; such a figure is None.
    """

    label: str
    mode: str
    shortest: int
    time: PowerLaw | None
    memory: PowerLaw | None
    memory_end: float | None
    overtakes: Crossing | None
    noisy: tuple[str, ...] = ()


@dataclass
class Measurements:
    """Measurements of a method or model against length, as data.

    Attributes:
        rows: one dictionary a cell: `label`, `mode`, `seqlen`, `status` ("ok", or why there are no figures,
            then `message`), `ms` with its `spread`, `peak_bytes`, `input_bytes`, `flops`, `bytes`,
            `attention_flops`, `attention_bytes`, `phases` (shares of the time), and where there are:
            `dense_ms`, `plan_ms`, `density`, `mask_bytes`, `modules`, `fixed_bytes` (parameters).
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
        sure = [row for row in rows if not is_noisy(row)]
        time = None
        if len(sure) == len(rows) or len(sure) > 2:  # two points that noise has left are no line
            time = fit_tail([row["seqlen"] for row in sure], [row["ms"] for row in sure])
        fixed = rows[-1].get("fixed_bytes", 0)
        lengths = [row["seqlen"] for row in rows]
        memory = fit_tail(lengths, [row["input_bytes"] + max(row["peak_bytes"], 0) - fixed for row in rows])
        end = None
        if memory is not None and self.memory_bytes is not None:
            end = memory.length_for(max(self.memory_bytes - fixed, 1))
        overtakes, too_noisy = self._overtakes(label, mode, rows, series)
        noisy = [name for name, is_so in (("time", time is None and len(rows) > 1), ("overtakes", too_noisy)) if is_so]
        return Growth(label, mode, lengths[0], time, memory, end, overtakes, tuple(noisy))

    def _overtakes(
        self, label: str, mode: str, rows: Sequence[Record], series: Mapping[Any, list[Record]]
    ) -> tuple[Crossing | None, bool]:
        """Where a series becomes faster than dense attention, and whether noise is why that is not known."""
        if label == "dense":
            return None, False
        # A method has dense attention beside it, in alternation; a model has it as a series of its own.
        dense = {row["seqlen"]: (row["ms"], is_noisy(row), _unsure(row)) for row in series.get(("dense", mode), [])}
        for row in rows:
            if "dense_ms" in row:
                beside = {"unsure": row.get("dense_unsure"), "spread": row.get("dense_spread", 0)}
                dense[row["seqlen"]] = row["dense_ms"], is_noisy(beside), _unsure(beside)
        both = [row for row in rows if row["seqlen"] in dense]
        sure = [row for row in both if not is_noisy(row) and not dense[row["seqlen"]][1]]
        lengths, ours = [row["seqlen"] for row in sure], [row["ms"] for row in sure]
        found = crossing(lengths, ours, [dense[length][0] for length in lengths])
        if found is None:
            return None, len(sure) < min(2, len(both))
        if found.measured:
            return found, False
        # Beyond the last length the two curves part by the difference of their exponents: it must exceed its doubt.
        theirs = fit_tail(lengths, [dense[length][0] for length in lengths])
        law = fit_tail(lengths, ours)
        doubt = sum(_unsure(row) + dense[row["seqlen"]][2] for row in (sure[0], sure[-1])) / math.log(
            lengths[-1] / lengths[0]
        )
        supported = law is not None and theirs is not None and theirs.exponent - law.exponent > doubt
        return (found, False) if supported else (None, True)

    def roofline(self, row: Mapping[str, Any]) -> Roofline | None:
        """A row under the machine's ceilings: all of a method's matrix operations, of a model those of attention over
        the time of its kernels. None without ceilings or without such work."""
        if self.ceilings is None or row["status"] != "ok":
            return None
        part, ms = ("", row["ms"]) if self.kind == "op" else ("attention_", row["ms"] * row["phases"]["kernel"])
        flops, moved = row[f"{part}flops"], row[f"{part}bytes"]
        return roofline(flops, moved, ms, self.ceilings, row["dtype"]) if flops and ms else None

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


@dataclass(frozen=True)
class Candidate:
    """A method that was measured: milliseconds, time relative to dense attention beside it, error relative to dense
    attention in float64 (of several layers the largest), peak bytes of a call where known, and whether its time or that
    beside it is too unsure for a statement."""

    method: str
    ms: float
    relative: float
    error: float
    peak_bytes: int | None = None
    noisy: bool = False


@dataclass
class Choice:
    """What `recommend` found, as data.

    Attributes:
        pick: the fastest candidate whose error is within the budget; None if there is none.
        reason: why, in a sentence.
        front: the candidates that no other beats in time and error at once, fastest first.
        candidates: all that were measured, fastest first.
        failed: (method, status, message) of those without figures.
        budget: the error that was allowed.
        title, caption: what was measured, and on what.
    """

    pick: Candidate | None
    reason: str
    front: list[Candidate]
    candidates: list[Candidate]
    failed: list[tuple[str, str, str]]
    budget: float
    title: str
    caption: str
    environment: Record = field(default_factory=dict)

    def to_json(self) -> str:
        """Everything, as a JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=1)


def _unsure(row: Mapping[str, Any]) -> float:
    """The half-width of a time's interval; of a record of an older version its spread."""
    return float(row.get("unsure") or row.get("spread") or 0.0)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list) else value
