"""Where tokens stand: learned, sinusoidal and rotary positions. Letters: B batch, N tokens, C features, D head_dim."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import InputError

KINDS = ("none", "learned", "sinusoidal", "sinusoidal_halves")
EXTENSIONS = ("tile", "interpolate")


class LearnedPositions(nn.Module):
    """A trained vector for each of `max_len` positions.

    Args:
        offset: rows of the table before that of position 0, which RoBERTa and BART leave for padding.
    """

    def __init__(self, max_len: int, dim: int, *, offset: int = 0) -> None:
        super().__init__()
        self.max_len, self.offset = max_len, offset
        self.weight = nn.Parameter(torch.empty(max_len + offset, dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, positions: Tensor) -> Tensor:
        """positions: int64 (...), from 0, or -1 for padding where offset > 0 -> (..., C)."""
        return nn.functional.embedding(positions + self.offset, self.weight)


class SinusoidalPositions(nn.Module):
    """sin and cos of positions at C/2 wavelengths from 2 pi to 20000 pi (Vaswani et al. 2017, section 3.5).

    Args:
        interleaved: sin and cos in turn, as in the paper; else all sin before all cos, as Marian has it.
    """

    weight: Tensor

    def __init__(self, max_len: int, dim: int, *, interleaved: bool = True) -> None:
        super().__init__()
        self.max_len = max_len
        exponent = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        angles = torch.arange(max_len, dtype=torch.float64)[:, None] * 10000.0**-exponent  # [max_len, C / 2]
        pairs = torch.stack([angles.sin(), angles.cos()], -1)
        table = pairs.flatten(1)[:, :dim] if interleaved else pairs.transpose(1, 2).flatten(1)[:, :dim]
        self.register_buffer("weight", table.to(torch.get_default_dtype()), persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        """positions: int64 (...), from 0 -> (..., C)."""
        return nn.functional.embedding(positions, self.weight)


def extended(table: Tensor, rows: int, how: str) -> Tensor:
    """A trained table of positions (n, C) with more rows, to go on training from.

    Args:
        how: "tile" repeats the table, so that neighbours differ as they did (Longformer, Beltagy et al. 2020, section
            5); "interpolate" stretches it, so that the whole spans what it did. Fewer rows are the first ones.

    Raises:
        InputError: another word.
    """
    if how not in EXTENSIONS:
        raise InputError(f"positions are extended by {' or '.join(EXTENSIONS)}; got {how!r}")
    n = table.shape[0]
    if rows <= n:
        return table[:rows]
    if how == "tile":
        return table[torch.arange(rows, device=table.device) % n]
    stretched = nn.functional.interpolate(table.T[None].float(), size=rows, mode="linear", align_corners=True)
    return stretched[0].T.to(table.dtype)


def make_positions(
    kind: str, max_len: int, dim: int, *, offset: int = 0
) -> LearnedPositions | SinusoidalPositions | None:
    """The module of a kind in `KINDS`; None for "none". "sinusoidal_halves" is Marian's order; offset: of learned ones.

    Raises:
        InputError: an unknown kind.
    """
    if kind not in KINDS:
        raise InputError(f"positions must be one of {', '.join(KINDS)}; got {kind!r}")
    if kind == "none":
        return None
    if kind == "learned":
        return LearnedPositions(max_len, dim, offset=offset)
    return SinusoidalPositions(max_len, dim, interleaved=kind == "sinusoidal")


def check_length(length: int, max_len: int) -> None:
    """Raise InputError for more tokens than there are positions."""
    if length > max_len:
        raise InputError(f"the model has positions for {max_len} tokens, and got {length}; shorten the input")


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021): pairs of features of queries and keys turned by an angle a position.

    Feature i is paired with i + D/2, as in GPT-NeoX and Llama. Scores depend on distances alone.

    Args:
        head_dim: D, even.
        base: the angles are position * base^(-2 i / D).
    """

    def __init__(self, head_dim: int, *, base: float = 10000.0) -> None:
        super().__init__()
        if head_dim % 2:
            raise InputError(f"rotary positions pair features, so head_dim must be even; got {head_dim}")
        self.head_dim, self.base = head_dim, base

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions (N) or (B, N) -> cos, sin (1 or B, 1, N, D) for `rotate`."""
        exponent = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float32) / self.head_dim
        angles = positions[..., None].float() * self.base**-exponent
        angles = torch.cat([angles, angles], -1)
        angles = angles[None, None] if positions.dim() == 1 else angles[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn queries or keys (B, H, N, D) by what `Rotary` gave."""
    cos, sin = turn
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
