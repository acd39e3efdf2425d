"""The multiple-choice knapsack: one option of each group, the cheapest whose errors add up to no more than allowed.

Exact but for a grid of errors, onto which each error is rounded up, so that what is chosen never exceeds the allowance
(Sinha & Zoltners 1979 state the problem; this is its dynamic programme).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

STEPS = 2000  # of the grid of errors


@dataclass(frozen=True)
class Option:
    """One thing that a group can be: `error` is what it adds, `cost` what it costs."""

    name: str
    error: float
    cost: float


def front(options: Sequence[Option]) -> list[Option]:
    """Those that no other beats in both, the cheapest first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.cost, option.error)):
        if math.isfinite(option.error) and (not kept or option.error < kept[-1].error):
            kept.append(option)
    return kept


def choose(groups: Sequence[Sequence[Option]], allowance: float) -> list[Option]:
    """One option a group, of the smallest cost in all with errors of at most `allowance` in all.

    Each group must have an option of error 0, so that there always is a choice.
    """
    fronts = [front(options) for options in groups]
    if allowance <= 0:
        return [options[-1] for options in fronts]
    best = torch.zeros(STEPS + 1, dtype=torch.float64)  # [errors up to so many steps]
    taken: list[torch.Tensor] = []
    for options in fronts:
        costs = torch.full((len(options), STEPS + 1), torch.inf, dtype=torch.float64)
        for number, option in enumerate(options):
            steps = _steps(option.error, allowance)
            if steps <= STEPS:
                costs[number, steps:] = best[: STEPS + 1 - steps] + option.cost
        best, which = costs.min(0)
        taken.append(which)
    left, chosen = STEPS, []
    for options, which in zip(reversed(fronts), reversed(taken), strict=True):
        option = options[int(which[left])]
        left -= _steps(option.error, allowance)
        chosen.append(option)
    return chosen[::-1]


def _steps(error: float, allowance: float) -> int:
    """Steps of the grid, rounded up; a hair's breadth of rounding is none."""
    share = error / allowance
    return STEPS + 1 if share > 1.0 + 1e-9 else min(STEPS, math.ceil(share * STEPS - 1e-6))
