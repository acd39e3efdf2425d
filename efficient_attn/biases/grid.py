"""Biases by the place of two tokens in an image: Swin's and BEiT's tables, the decomposed ones of ViTDet and SAM.

Tokens are the cells of a grid of h x w, row by row; cell i stands at (y_i, x_i). Queries and keys are the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .base import Appended, Pairwise, check


@dataclass(frozen=True, eq=False)
class DecomposedBias2D(Appended):
    """q_i . rel_h[y_i - y_j + h - 1] + q_i . rel_w[x_i - x_j + w - 1], of the query before it is scaled.

    Li et al., "Exploring plain vision transformer backbones for object detection", ECCV 2022, and SAM's image encoder.
    For query i this is one number for every row and one for every column of the grid, which are appended to it; a key
    has a one at its own row and column. So memory is O(N (h + w)), and D + h + w is at most what a head_dim may be.

    Args:
        rel_h: (2h - 1, D), or (Hq, 2h - 1, D); rel_w: (2w - 1, D), or (Hq, 2w - 1, D).
        grid: (h, w).
    """

    rel_h: Tensor
    rel_w: Tensor
    grid: tuple[int, int]

    def __post_init__(self) -> None:
        _check_grid(self.grid)
        for name, tensor, size in zip(("rel_h", "rel_w"), (self.rel_h, self.rel_w), self.grid, strict=True):
            check(name, tensor, (2, 3), None)
            if tensor.shape[-2] != 2 * size - 1:
                raise InputError(
                    f"{name} must have {2 * size - 1} distances for a grid of {self.grid}, got {tuple(tensor.shape)}; "
                    "interpolate it"
                )

    def columns(self, query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        h, w = self.grid
        _check_tokens("DecomposedBias2D", self.grid, 0, query, key)
        Hq, N, D, device = *query.shape[1:], query.device
        cells = query.unflatten(2, (h, w))
        numbers = []
        for name, tensor, size in (("rel_h", self.rel_h, h), ("rel_w", self.rel_w, w)):
            if tensor.shape[-1] != D or (tensor.dim() == 3 and tensor.shape[0] not in (1, Hq)):
                raise InputError(f"{name} {tuple(tensor.shape)} is for other heads than {Hq} of head_dim {D}")
            apart = tensor.to(device, query.dtype)[..., _apart(size, device), :]  # (.., of queries, of keys, D)
            apart = (apart if tensor.dim() == 3 else apart[None]).expand(Hq, -1, -1, -1)
            numbers.append(torch.einsum("bnyxc,nykc->bnyxk" if name == "rel_h" else "bnyxc,nxkc->bnyxk", cells, apart))
        beside = torch.cat(numbers, -1).flatten(2, 3) / scale
        place = torch.arange(N, device=device)
        ones = torch.zeros(N, h + w, dtype=key.dtype, device=device)
        ones[place, place // w] = 1.0
        ones[place, h + place % w] = 1.0
        return beside, ones.expand(*key.shape[:3], -1)


@dataclass(frozen=True, eq=False)
class RelativeBias2D(Pairwise):
    """table[(y_i - y_j + h - 1) (2w - 1) + x_i - x_j + w - 1, head]: Liu et al., "Swin Transformer", ICCV 2021.

    With a class token, the first token of the sequence (Bao et al., "BEiT", ICLR 2022), three more entries follow: from
    it to others, from others to it, to itself. The table is never written out as queries x keys: it is read for some
    queries at a time, 2^22 numbers, and in the backward again. A call with more pairs than that is made of several and
    takes no dropout, no lists of blocks and no other structured bias (`UnsupportedError`).

    Args:
        table: ((2h - 1) (2w - 1), Hq), and 3 rows more with a class token.
        grid: (h, w).
        class_token: whether one stands before the cells.
    """

    table: Tensor
    grid: tuple[int, int]
    class_token: bool = False

    def __post_init__(self) -> None:
        check("table", self.table, (2,), None)
        _check_grid(self.grid)
        h, w = self.grid
        wanted = (2 * h - 1) * (2 * w - 1) + 3 * self.class_token
        if self.table.shape[0] != wanted:
            raise InputError(
                f"table must have {wanted} rows for a grid of {self.grid} "
                f"{'with' if self.class_token else 'without'} a class token, got {tuple(self.table.shape)}"
            )

    def rows(self, first: int, last: int, query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
        _check_tokens("RelativeBias2D", self.grid, int(self.class_token), query, key)
        if self.table.shape[1] not in (1, query.shape[1]):
            raise InputError(
                f"table of RelativeBias2D is for {self.table.shape[1]} heads; this call has {query.shape[1]}"
            )
        index = self.index(first, last).to(self.table.device)
        found = self.table.T.index_select(1, index.flatten())  # one line a head, which the kernels read in place
        rows: Tensor = found.unflatten(1, index.shape)[None].to(query.device, dtype)
        return rows

    def index(self, first: int, last: int) -> Tensor:
        """The row of the table for each pair of the queries first .. last and all keys, int64 (last - first, N)."""
        h, w = self.grid
        token, cls = torch.arange(h * w + self.class_token), int(self.class_token)
        i, j = token[first:last, None] - cls, token - cls
        found = (i // w - j // w + h - 1) * (2 * w - 1) + i % w - j % w + w - 1
        if cls:
            end = self.table.shape[0]
            found = torch.where(i < 0, end - 3, torch.where(j < 0, end - 2, found))
            found = torch.where((i < 0) & (j < 0), end - 1, found)
        return found


def _apart(size: int, device: torch.device) -> Tensor:
    """The row of a table of distances for each place of a query and of a key, int64 (size, size)."""
    place = torch.arange(size, device=device)
    return place[:, None] - place + size - 1


def _check_grid(grid: Any) -> None:
    if len(grid) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in grid):
        raise InputError(f"grid must be (rows, columns) of whole numbers from 1 on, got {grid!r}")


def _check_tokens(name: str, grid: tuple[int, int], more: int, query: Tensor, key: Tensor) -> None:
    wanted = grid[0] * grid[1] + more
    if query.shape[2] != wanted or key.shape[2] != wanted:
        raise InputError(
            f"{name} of a grid of {grid[0]} x {grid[1]} is for {wanted} queries and keys; this call has "
            f"{query.shape[2]} and {key.shape[2]}"
        )
