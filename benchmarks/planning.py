"""What a run measures, step by step, and whether the next step fits the time that is left.

A step is one cell, or several that are measured in one alternation. What it takes is what its line of the plan says,
times how much slower this machine has been so far; without such a line, what the steps of its suite took.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from efficient_attn.measuring.runner import Cell

from . import cases, suites
from .suites import fidelity

MARGIN = 1.15  # on what a step is expected to take
SHORTEST_S = 3.0  # what a step may take in any case that was started


@dataclass(frozen=True)
class Step:
    """Cells that are measured together, and the seconds that they take on the machine of reference, where known."""

    cells: tuple[Cell, ...]
    seconds: float | None = None


class Plan:
    """The steps of a run, and how long those that are left will take; None as `budget_s`: as long as it needs."""

    def __init__(
        self, steps: Sequence[Step], budget_s: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.steps, self.budget_s, self._clock = list(steps), budget_s, clock
        self._started = clock()
        self._ratios: list[float] = []
        self._seconds: dict[str, list[float]] = {}

    def left(self) -> float | None:
        """Seconds of the budget that are left."""
        return None if self.budget_s is None else self.budget_s - (self._clock() - self._started)

    def expected(self, step: Step) -> float | None:
        """Seconds that a step will take on this machine; None as long as nothing tells."""
        if step.seconds is not None:
            return step.seconds * (statistics.median(self._ratios) if self._ratios else 1.0)
        known = self._seconds.get(step.cells[0].suite)
        return statistics.mean(known) * len(step.cells) if known else None

    def fits(self, step: Step) -> bool:
        """Whether a step will end within the budget; one that nothing is known of may start while there is any."""
        left = self.left()
        return left is None or (left > 0 and MARGIN * (self.expected(step) or 0.0) <= left)

    def finished(self, step: Step, seconds: float) -> None:
        """Learn from what a step took."""
        if step.seconds is not None:
            self._ratios.append(seconds / step.seconds)
        self._seconds.setdefault(step.cells[0].suite, []).append(seconds / len(step.cells))

    def remaining(self, steps: Sequence[Step]) -> float | None:
        """Seconds until the end of these steps, as far as they fit the budget; None when nothing tells."""
        expected = [self.expected(step) for step in steps]
        known = [each for each in expected if each is not None]
        if steps and not known:
            return None
        total = sum(each if each is not None else statistics.mean(known) for each in expected)
        left = self.left()
        return total if left is None else min(total, max(left, 0.0))


def overview(options: suites.Options) -> list[Step]:
    """The steps of a plain `bench`, those that matter most first."""
    steps: list[Step] = []
    for suite, at, seconds in cases.QUICK_OVERVIEW_STEPS if options.quick else cases.OVERVIEW_STEPS:
        configs = _overview_configs(suite, at, options)
        cells = tuple(Cell(suite, config) for config in configs)
        together = suites.get(suite).run_together is not None and cells
        steps += [Step(cells, seconds)] if together else [Step((cell,), seconds) for cell in cells]
    return steps


def _overview_configs(suite: str, at: tuple[object, ...], options: suites.Options) -> list[dict[str, object]]:
    common = {**options.common(), "budget_s": cases.OVERVIEW_BUDGET_S}
    if options.methods and suite in ("fidelity", "million"):  # they have families and methods of their own
        return []
    if suite == "ops":
        mode, seqlen = at
        shape = {"dtype": options.dtypes[0], **cases.OPERATOR_SHAPE, "causal": options.causal, "backend": "auto"}
        methods = options.specs(cases.OVERVIEW_METHODS)
        return suites.grid(seqlen=seqlen, mode=mode, method=methods, **shape, **common)
    if suite == "vit":
        return suites.grid(
            method=options.methods or cases.OVERVIEW_VIT_METHODS, steps=cases.OVERVIEW_VIT_STEPS, **common
        )
    if suite == "fidelity":
        return [
            {"source": fidelity.best_source(), "family": family, "size": size, "steps": fidelity.QUICK_STEPS, **common}
            for family, size in cases.OVERVIEW_FAMILIES
        ]
    return [dict(config, **common) for config in suites.get(suite).configs(options)]
