"""Masks draw themselves: as text for a terminal, as an image for a notebook. All take `BlockMask.parts`."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from . import algebra
from .algebra import Interval
from .lists import BlockLists, Grid, entry_rows

ROWS, COLUMNS = 16, 32  # of the text picture, at most
IMAGE = 512  # pixels a side, at most
EXACT_PAIRS = 1 << 22  # up to here a picture is drawn from the pairs, beyond from the blocks
SHADES, EDGES = " ░▒▓█", "┌─┐│└┘"
PLAIN_SHADES, PLAIN_EDGES = " .+x#", "+-+|++"  # where the terminal's encoding has no others


def draw(grid: Grid, lists: BlockLists | None, window: Interval, lengths: Tensor) -> str:
    """Shades for the share of visible pairs in each cell; any visible pair shows."""
    shares = coverage(grid, lists, window, lengths, ROWS, COLUMNS)
    level = torch.where(shares >= 1, 4, (shares * 3).ceil().clamp(max=3)).long()
    shades, edges = (SHADES, EDGES) if _shows(SHADES + EDGES) else (PLAIN_SHADES, PLAIN_EDGES)
    lines = ["".join(shades[cell] for cell in row) for row in level.tolist()]
    top_left, across, top_right, side, bottom_left, bottom_right = tuple(edges)
    edge = across * len(lines[0])
    rows = (f"{side}{line}{side}" for line in lines)
    return "\n".join([f"{top_left}{edge}{top_right}", *rows, f"{bottom_left}{edge}{bottom_right}"])


def _shows(signs: str) -> bool:
    """Whether standard output can show some signs: not a terminal in ASCII or cp1252."""
    try:
        signs.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def plot(ax: Any, title: str, grid: Grid, lists: BlockLists | None, window: Interval, lengths: Tensor) -> Any:
    """An image on matplotlib axes, new ones for None; returns the axes."""
    from matplotlib import pyplot

    ax = pyplot.subplots()[1] if ax is None else ax
    extent = (-0.5, grid.kv_len - 0.5, grid.q_len - 0.5, -0.5)
    shares = coverage(grid, lists, window, lengths, IMAGE, IMAGE).cpu().numpy()
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, extent=extent, interpolation="nearest", aspect="auto")
    ax.set(xlabel="key", ylabel="query", title=title)
    return ax


def coverage(
    grid: Grid, lists: BlockLists | None, window: Interval, lengths: Tensor, rows: int, columns: int
) -> Tensor:
    """Share of visible pairs, float64 (<= rows, <= columns), of a mask with one batch element and head."""
    if grid.q_len * grid.kv_len <= EXACT_PAIRS:
        return _binned(algebra.draw(grid, lists, window, lengths)[0, 0].double(), rows, columns)
    if lists is None:
        return _window_coverage(grid, window, lengths, rows, columns)
    lists = algebra.explicit(grid, lists, window, lengths)
    seen, row, col = algebra.entry_pairs(grid, lists).double(), entry_rows(lists), lists.indices.long()
    rows, columns = min(rows, grid.n_q), min(columns, grid.n_k)
    cell = row * rows // grid.n_q * columns + col * columns // grid.n_k
    visible = torch.zeros(rows * columns, dtype=torch.float64, device=row.device).index_add_(0, cell, seen)
    high = torch.bincount(torch.arange(grid.q_len) // grid.block_q * rows // grid.n_q, minlength=rows)
    wide = torch.bincount(torch.arange(grid.kv_len) // grid.block_k * columns // grid.n_k, minlength=columns)
    return visible.view(rows, columns).cpu() / (high[:, None] * wide)


def _binned(values: Tensor, rows: int, columns: int) -> Tensor:
    """Means over equal cells."""
    for dim, cells in ((0, rows), (1, columns)):
        size = values.shape[dim]
        cells = min(cells, size)
        index = torch.arange(size, device=values.device) * cells // size
        shape = list(values.shape)
        shape[dim] = cells
        sums = values.new_zeros(shape).index_add_(dim, index, values)
        counts = torch.bincount(index, minlength=cells)
        values = sums / (counts[:, None] if dim == 0 else counts)
    return values


def _window_coverage(grid: Grid, window: Interval, lengths: Tensor, rows: int, columns: int) -> Tensor:
    """The same for a mask without lists: exact in the keys of a sample of queries."""
    step = max(1, grid.q_len // (16 * rows))
    i = torch.arange(0, grid.q_len, step, device=lengths.device)
    start, stop = algebra.keys_seen(i, window, int(lengths))
    columns = min(columns, grid.kv_len)
    edges = torch.arange(columns + 1, device=lengths.device) * grid.kv_len // columns
    seen = torch.minimum(stop[:, None], edges[1:]) - torch.maximum(start[:, None], edges[:-1])
    return _binned(seen.clamp(min=0).double() / edges.diff(), rows, columns)
