"""Biases by the relative position of two tokens in a sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from .base import RelativePosition, check


@dataclass(frozen=True, eq=False)
class ALiBi(RelativePosition):
    """-slope |d|: Press et al., "Train short, test long: attention with linear biases", ICLR 2022.

    Args:
        slopes: (Hq) or (B, Hq); they may be learned.
        alignment: None, "top_left" or "bottom_right".
    """

    slopes: Tensor
    alignment: str | None = None

    def __post_init__(self) -> None:
        check("slopes", self.slopes, (1, 2), self.alignment)

    def line(self, distance: Tensor) -> Tensor:
        # In float64, so that the product is rounded once, to what the call computes in: it is a line of numbers.
        return -self.slopes.double()[..., None] * distance.abs().double()

    @staticmethod
    def usual_slopes(heads: int) -> Tensor:
        """The paper's slopes for so many heads: 2^(-8 / n), 2^(-16 / n), ..; between powers of two, every second one of
        the next power follows."""
        power = 1 << (heads.bit_length() - 1)
        found = [2.0 ** (-8.0 * (k + 1) / power) for k in range(power)]
        found += [2.0 ** (-4.0 * (k + 1) / power) for k in range(0, 2 * (heads - power), 2)]
        return torch.tensor(found)


@dataclass(frozen=True, eq=False)
class RelativeBias(RelativePosition):
    """table[h, d + reach]: a learned number for each distance (Shaw et al., NAACL 2018; a Toeplitz matrix a head).

    Args:
        table: (2 reach + 1) or (Hq, 2 reach + 1), the key `reach` tokens before the query first; further away, the
            number at the end holds. (Hq, 2 N - 1) has one of its own for every pair of N tokens.
        alignment: None, "top_left" or "bottom_right".
    """

    table: Tensor
    alignment: str | None = None

    def __post_init__(self) -> None:
        check("table", self.table, (1, 2), self.alignment)
        if self.table.shape[-1] % 2 == 0:
            raise InputError(f"table must have an odd number of distances, -reach to reach; got {self.table.shape[-1]}")

    def line(self, distance: Tensor) -> Tensor:
        reach = self.table.shape[-1] // 2
        return self.table.index_select(-1, (distance.clamp(-reach, reach) + reach).to(self.table.device))


@dataclass(frozen=True, eq=False)
class T5Bias(RelativePosition):
    """table[bucket(d), h]: Raffel et al., "Exploring the limits of transfer learning", JMLR 2020.

    Half of the buckets are one distance each, the others grow with its logarithm up to `max_distance`.

    Args:
        table: (buckets, Hq), the weight of T5's relative_attention_bias.
        bidirectional: half of the buckets are for keys behind the query; else those count as distance 0.
        alignment: None, "top_left" or "bottom_right".
    """

    table: Tensor
    bidirectional: bool = True
    max_distance: int = 128
    alignment: str | None = None

    def __post_init__(self) -> None:
        check("table", self.table, (2,), self.alignment)
        exact = self.table.shape[0] // (4 if self.bidirectional else 2)
        if exact < 1 or self.max_distance <= exact:
            raise InputError(
                f"T5Bias needs a bucket for every sign and scale and max_distance above {exact}; got "
                f"{self.table.shape[0]} buckets and max_distance={self.max_distance}"
            )

    def line(self, distance: Tensor) -> Tensor:
        return self.table.index_select(0, self.bucket(distance).to(self.table.device)).T

    def bucket(self, distance: Tensor) -> Tensor:
        """The bucket of each distance d, int64."""
        buckets, first = self.table.shape[0], torch.zeros_like(distance)
        if self.bidirectional:
            buckets //= 2
            first = (distance > 0).long() * buckets
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = buckets // 2
        logs = torch.log(distance.float().clamp(min=1) / exact) / math.log(self.max_distance / exact)
        far = (exact + (logs * (buckets - exact)).long()).clamp(max=buckets - 1)
        return first + torch.where(distance < exact, distance, far)
