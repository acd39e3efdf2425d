"""Biases that are known by a few numbers: added to scores tile by tile, never written out as queries x keys.

`bias=` of `attention` takes a tensor, one of these, or a list of both, which add up. All but `LowRankBias` go by the
relative position alone. They become one line of Nq + Nk - 1 numbers a head, differentiable, which kernels read along
the diagonals of a tile. Letters as in `functional`; d = j - i - offset is how far key j stands behind query i, with
offset 0 or, under the alignment "bottom_right", Nk - Nq.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from .defaults import ALIGNMENTS, alignment_offset
from .errors import InputError, InputTypeError


class Bias:
    """A bias by a few numbers."""


@dataclass(frozen=True, eq=False)
class RelativePosition(Bias):
    """A bias that goes by d alone; `alignment` says where queries stand where Nq != Nk, None leaves it to the call."""

    def line(self, distance: Tensor) -> Tensor:
        """The bias (n), (Hq | 1, n) or (B, Hq | 1, n) at the distances d (n), int64."""
        raise NotImplementedError

    def diagonals(self, query: Tensor, key: Tensor, alignment: str | None, dtype: torch.dtype) -> Tensor:
        """(1 | B, 1 | Hq, Nq + Nk - 1): what is added to pair (i, j) stands at i - j + Nk - 1.

        Raises:
            InputError: Nq != Nk without an alignment, or numbers for another batch or number of heads.
        """
        (B, Hq, Nq, _), Nk = query.shape, key.shape[2]
        own = getattr(self, "alignment", None)
        chosen = alignment if own is None else own
        if chosen is None and Nq != Nk:
            raise InputError(
                f"{type(self).__name__} with {Nq} queries and {Nk} keys is ambiguous; say alignment='top_left' or "
                "'bottom_right' (the last query stands at the last key), in it or as causal_alignment of the call"
            )
        count = max(Nq + Nk - 1, 0)
        apart = Nk - 1 - torch.arange(count, device=query.device)  # j - i
        line = self.line(apart - alignment_offset(chosen, Nq, Nk)).to(query.device, dtype)
        line = line[(None,) * (3 - line.dim())]
        if line.shape[0] not in (1, B) or line.shape[1] not in (1, Hq):
            raise InputError(
                f"{type(self).__name__} is for batch {line.shape[0]} and {line.shape[1]} heads; this call has {B} and "
                f"{Hq}"
            )
        return line


def _check(name: str, tensor: Any, dims: Sequence[int], alignment: str | None) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise InputTypeError(f"{name} must be a floating-point tensor, got {kind}")
    if tensor.dim() not in dims:
        raise InputError(f"{name} must have {' or '.join(map(str, dims))} dimensions, got {tuple(tensor.shape)}")
    if alignment is not None and alignment not in ALIGNMENTS:
        raise InputError(f"alignment must be one of {ALIGNMENTS} or None, got {alignment!r}")


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
        _check("slopes", self.slopes, (1, 2), self.alignment)

    def line(self, distance: Tensor) -> Tensor:
        dtype = torch.promote_types(self.slopes.dtype, torch.float32)
        return -self.slopes.to(dtype)[..., None] * distance.abs().to(dtype)

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
        _check("table", self.table, (1, 2), self.alignment)
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
        _check("table", self.table, (2,), self.alignment)
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


@dataclass(frozen=True, eq=False)
class LowRankBias(Bias):
    """u_i . w_j, appended to the dot products of queries and keys: no kernel sees it.

    Args:
        u: (Nq, R), or (1 | B, 1 | Hq, Nq, R), which gets a gradient as all biases do.
        w: (Nk, R), or (1 | B, 1 | Hkv, Nk, R): one for the query heads that share a key head. In half precision both
            are rounded as queries and keys are. D + R is at most what a head_dim may be.
    """

    u: Tensor
    w: Tensor

    def __post_init__(self) -> None:
        for name, tensor in (("u", self.u), ("w", self.w)):
            _check(name, tensor, (2, 4), None)
        if self.u.shape[-1] != self.w.shape[-1]:
            shapes = f"{tuple(self.u.shape)} and {tuple(self.w.shape)}"
            raise InputError(f"u and w must share their last dimension; got {shapes}")

    def appended(self, query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Query and key (B, H, N, D + R) whose product times the scale holds the bias."""
        if scale == 0.0:
            raise InputError("LowRankBias is a part of scores times the scale; with scale=0 it would vanish")
        return _beside(query, self.u / scale, "u"), _beside(key, self.w, "w")


def _beside(rows: Tensor, more: Tensor, name: str) -> Tensor:
    more = more[(None,) * (4 - more.dim())]
    full = (*rows.shape[:3], more.shape[3])
    if more.shape[2] != full[2] or any(more.shape[d] not in (1, full[d]) for d in (0, 1)):
        raise InputError(
            f"{name} of LowRankBias, {tuple(more.shape)}, does not fit {tuple(rows.shape)}: it must be (1 | B, 1 | H, "
            "N, R); w has the heads of keys"
        )
    return torch.cat([rows, more.to(rows.device, rows.dtype).expand(full)], -1)


class PositionBias(nn.Module):
    """A structured bias whose tensors belong to a module: learned or fixed, saved, moved, shared by all that hold it.

        PositionBias(T5Bias(torch.zeros(32, 8)))               # a table of 32 buckets for 8 heads, learned
        PositionBias(ALiBi(ALiBi.usual_slopes(8)))             # fixed, unless learned=True

    Args:
        bias: what the module gives when it is called, by the tensors that it has then. A parameter stays the same one.
        learned: whether its tensors are parameters, which default is for all but ALiBi, or buffers.

    Raises:
        InputTypeError: anything but a structured bias.
    """

    def __init__(self, bias: Bias, *, learned: bool | None = None) -> None:
        super().__init__()
        if not isinstance(bias, Bias):
            raise InputTypeError(
                f"PositionBias takes an ALiBi, RelativeBias, T5Bias or LowRankBias; got {type(bias).__name__}"
            )
        self._kind = type(bias)
        self._options: dict[str, Any] = {}
        self._names: list[str] = []
        for field in fields(bias):  # type: ignore[arg-type]
            value = getattr(bias, field.name)
            if not isinstance(value, Tensor):
                self._options[field.name] = value
                continue
            self._names.append(field.name)
            if not isinstance(value, nn.Parameter):
                value = value.detach().clone()
            if not isinstance(bias, ALiBi) if learned is None else learned:
                self.register_parameter(field.name, value if isinstance(value, nn.Parameter) else nn.Parameter(value))
            else:
                self.register_buffer(field.name, value.detach())

    def forward(self) -> Bias:
        """The bias, of the tensors that the module has now."""
        made: Bias = self._kind(**{name: getattr(self, name) for name in self._names}, **self._options)
        return made

    def extra_repr(self) -> str:
        options = (f"{name}={value}" for name, value in self._options.items())
        return ", ".join([self._kind.__name__, *options])


BiasLike = Tensor | Bias | Sequence[Tensor | Bias] | None


def split(bias: BiasLike) -> tuple[Tensor | None, list[Bias]]:
    """The tensors of what a user passes as `bias`, added up, and the rest. Raises InputTypeError for anything else."""
    if bias is None or type(bias) is Tensor:
        return bias, []
    parts = list(bias) if isinstance(bias, (list, tuple)) else [bias]
    for part in parts:
        if not isinstance(part, (Tensor, Bias)):
            raise InputTypeError(
                "bias must be a floating-point tensor, an ALiBi, RelativeBias, T5Bias or LowRankBias, or a list of "
                f"them; got {type(part).__name__}"
            )
    dense: Tensor | None = None
    for part in parts:
        if isinstance(part, Tensor):
            dense = part if dense is None else dense + part
    return dense, [part for part in parts if isinstance(part, Bias)]


def join(dense: Tensor | None, others: list[Bias]) -> BiasLike:
    """What `split` took apart."""
    return dense if not others else [*others] if dense is None else [dense, *others]


def aligned(others: list[Bias], alignment: str | None) -> list[Bias]:
    """The biases, those that name no alignment with this one."""
    return [
        replace(part, alignment=alignment)  # type: ignore[call-arg]
        if isinstance(part, RelativePosition) and getattr(part, "alignment", None) is None
        else part
        for part in others
    ]
