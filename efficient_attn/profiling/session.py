"""Runs the cells of a profile, shortest lengths first, and decides what longer ones are worth.

Every finished cell is a line of a JSONL file before the next one starts. Once a series (a method or model in a mode)
ran out of time or memory, its longer lengths get a row that says so without a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..measuring import records, runner
from ..measuring.fit import fit_tail

OPERATOR = f"{__package__}.operator"
MODEL = f"{__package__}.model"
CEILINGS = f"{__package__}.roofline"

CALLS = 4  # how often a cell runs a slow call
DENSE_SHARE = 0.1  # of a cell's time limit, that one call of dense attention beside a method may take

Record = dict[str, Any]
Report = Callable[[str, int, int], None]


class Session:
    """An open result file and the limits of its cells; a cell that the file holds already is not run again."""

    def __init__(self, path: Path, limits: runner.Limits, report: Report | None = None) -> None:
        self.limits, self.code = limits, records.code_version()
        self.file = records.ResultFile(path)
        self.known = {found["id"]: found for found in records.read(path) if found.get("type") == "cell"}
        self.environment = records.environment(threads=torch.get_num_threads(), limits=vars(limits))
        self.file.append(self.environment)
        self.report = report or (lambda name, done, total: None)
        self.done = self.total = 0

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.file.__exit__(kind, error, at)

    def run(self, suite: str, config: Mapping[str, Any], *, again: bool = False) -> Record:
        """The record of a cell, measured now unless it is known, or in any case (`again`)."""
        known = None if again else self.known.get(records.cell_id(suite, config, self.code))
        found: Record = known or runner.run_cell(runner.Cell(suite, config), self.file, self.limits, self.code)
        return found

    def skip(self, suite: str, config: Mapping[str, Any], status: str, why: str) -> Record:
        """Record a cell that is not run; one that was run under other limits keeps its figures."""
        number = records.cell_id(suite, config, self.code)
        known: Record | None = self.known.get(number)
        if known is not None:
            return known
        found: Record = {
            "type": "cell",
            "id": number,
            "suite": suite,
            "config": dict(config),
            "seconds": 0.0,
            "status": status,
            "message": f"not run: {why}",
        }
        self.file.append(found)
        return found

    def ceilings(self, threads: int) -> Record:
        """The machine's ceilings, as a row."""
        self.report("ceilings of this machine", self.done, self.total)
        return self.run(CEILINGS, {"threads": threads, "budget_s": 1.0})

    def grow(
        self, suite: str, series: Sequence[Mapping[str, Any]], lengths: Iterable[int], *, dense: bool = False
    ) -> list[Record]:
        """Measure each series at each length, all series at one length before the next.

        Args:
            series: configurations without seqlen.
            dense: whether cells take a `dense` flag: it is set while dense attention is affordable.
        """
        ascending = sorted(set(lengths))
        self.total += len(series) * len(ascending)
        rows: list[list[Record]] = [[] for _ in series]
        for length in ascending:
            for number, config in enumerate(series):
                self.report(_name(config, length), self.done, self.total)
                rows[number].append(self._next(suite, {**config, "seqlen": length}, rows[number], dense))
                self.done += 1
        return [row for found in rows for row in found]

    def _next(self, suite: str, config: dict[str, Any], before: Sequence[Record], dense: bool) -> Record:
        length = config["seqlen"]
        if dense:
            expected = _expected(before, length, "dense_ms")
            given_up = bool(before) and not before[-1]["config"]["dense"]
            affordable = expected is None or expected <= 1e3 * DENSE_SHARE * self.limits.seconds
            config["dense"] = affordable and not given_up
        last = before[-1] if before else None
        if last is not None and last["status"] in ("oom", "timeout"):
            what = {"oom": "memory", "timeout": "time"}[last["status"]]
            why = f"N = {last['config']['seqlen']} ran out of {what}, or was expected to"
            return self.skip(suite, config, last["status"], why)
        expected = _expected(before, length, "ms")
        if expected is not None and CALLS * expected > 2e3 * self.limits.seconds:
            why = (
                f"a call was expected to take {expected / 1e3:.0f} s, the limit of a cell is {self.limits.seconds:g} s"
            )
            return self.skip(suite, config, "timeout", why)
        return self.run(suite, config)


def _expected(before: Sequence[Record], length: int, metric: str) -> float | None:
    """What the power law of the lengths so far says of the next one; with one length, as if quadratic."""
    points = [(row["config"]["seqlen"], row[metric]) for row in before if row["status"] == "ok" and metric in row]
    if not points:
        return None
    law = fit_tail([n for n, _ in points], [v for _, v in points])
    if law is None:
        return float(points[-1][1] * (length / points[-1][0]) ** 2)
    return law.at(length)


def _name(config: Mapping[str, Any], length: int) -> str:
    label = config.get("method") or " ".join(filter(None, (config.get("model"), config.get("attention"))))
    return f"{label} N={length} {config['mode']}"
