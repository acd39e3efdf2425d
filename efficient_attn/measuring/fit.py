"""Growth: power laws fitted to measurements, what they predict, and where two of them meet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InputError

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class PowerLaw:
    """value = scale * length ** exponent, by least squares on the logarithms.

    Attributes:
        exponent, low, high: the slope and its 95 % confidence interval (Student's t); infinitely wide for two points.
        log_scale: logarithm of the factor.
        points: how many lengths were fitted.
        longest, value: the longest of them and its measured value, from which `at` and `length_for` extrapolate.
    """

    exponent: float
    low: float
    high: float
    log_scale: float
    points: int
    longest: float
    value: float

    def at(self, length: float) -> float:
        """The value predicted for a length."""
        return float(self.value * (length / self.longest) ** self.exponent)

    def length_for(self, value: float) -> float:
        """The length at which the value is predicted; infinite where it does not grow."""
        if value <= 0 or self.exponent <= 0:
            return 0.0 if value <= 0 else math.inf
        return self.longest * _exp(math.log(value / self.value) / self.exponent)

    def __str__(self) -> str:
        spread = (self.high - self.low) / 2
        return f"n^{self.exponent:.2f}" + (f" ± {spread:.2f}" if math.isfinite(spread) else "")


def fit(lengths: Sequence[float], values: Sequence[float]) -> PowerLaw:
    """Fit a power law to at least two positive measurements of different lengths.

    Raises:
        InputError: fewer than two lengths, or a value that is not positive.
    """
    if len(lengths) != len(values) or len(set(lengths)) < 2 or min(*lengths, *values) <= 0:
        raise InputError(
            f"a power law needs positive values at two lengths or more, got {list(values)} at {list(lengths)}"
        )
    x, y = [math.log(n) for n in lengths], [math.log(v) for v in values]
    count, mean_x, mean_y = len(x), sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    scale = mean_y - slope * mean_x
    half = math.inf
    if count > 2:
        residual = sum((b - scale - slope * a) ** 2 for a, b in zip(x, y, strict=True)) / (count - 2)
        t = STUDENT[count - 3] if count - 3 < len(STUDENT) else 1.96 + 2.5 / (count - 2)
        half = t * math.sqrt(residual / spread)
    longest = max(range(count), key=lambda k: lengths[k])
    return PowerLaw(slope, slope - half, slope + half, scale, count, lengths[longest], values[longest])


def fit_tail(lengths: Sequence[float], values: Sequence[float]) -> PowerLaw | None:
    """The fit to the longer half of the lengths, at least three: short calls are all overhead. None for fewer than two
    lengths."""
    points = sorted((n, v) for n, v in zip(lengths, values, strict=True) if v > 0)
    points = points[-max(3, -(-len(points) // 2)) :]
    if len({n for n, _ in points}) < 2:
        return None
    return fit([n for n, _ in points], [v for _, v in points])


@dataclass(frozen=True)
class Crossing:
    """Where one curve falls below another: at `length`, measured (between two measured lengths) or extrapolated."""

    length: float
    measured: bool


def crossing(lengths: Sequence[float], ours: Sequence[float], theirs: Sequence[float]) -> Crossing | None:
    """The length from which `ours` stays below `theirs`; the shortest measured one if it always is.

    Between two measured lengths logarithms are interpolated; beyond the last one both power laws are extrapolated.
    None when ours is not below at the end and does not grow more slowly, or when there are too few lengths to tell.
    """
    points = sorted(zip(lengths, ours, theirs, strict=True))
    if not points:
        return None
    gaps = [(n, math.log(a / b)) for n, a, b in points]
    if gaps[-1][1] < 0:
        above = [k for k, (_, gap) in enumerate(gaps) if gap >= 0]
        if not above:
            return Crossing(gaps[0][0], True)
        (n, gap), (m, next_gap) = gaps[above[-1]], gaps[above[-1] + 1]
        part = gap / (gap - next_gap)
        return Crossing(math.exp(math.log(n) + part * math.log(m / n)), True)
    laws = [fit_tail([p[0] for p in points], [p[k] for p in points]) for k in (1, 2)]
    if laws[0] is None or laws[1] is None or laws[0].exponent >= laws[1].exponent:
        return None
    length = points[-1][0] * _exp(gaps[-1][1] / (laws[1].exponent - laws[0].exponent))
    return Crossing(length, False) if math.isfinite(length) else None


def _exp(x: float) -> float:
    """e^x, infinite where it is too large for a float."""
    return math.exp(x) if x < 700 else math.inf
