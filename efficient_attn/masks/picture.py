"""Masks draw themselves: as text for a terminal, as an image for a notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import MaskError
from . import algebra as mask_algebra
from .lists import entry_rows

if TYPE_CHECKING:
    from .block_mask import BlockMask

ROWS, COLUMNS = 16, 32  # of the text picture, at most
IMAGE = 512  # pixels a side, at most
EXACT_PAIRS = 1 << 22  # up to here a picture is drawn from the pairs, beyond from the blocks
SHADES = " ░▒▓█"


def describe(mask: BlockMask) -> str:
    """One line of facts and a picture of the first batch element and head."""
    facts = [f"shape={mask.shape}", f"block_size={mask.block_size}"]
    if mask.indices is not None and mask.tiles is not None:
        facts.append(f"blocks={mask.indices.shape[0]}, tiles={mask.tiles.shape[0]}")
    if mask.window is not None:
        facts.append(f"window={mask.window}" + (f" offset {mask.window_offset}" if mask.window_offset else ""))
    if mask.kv_lengths is not None:
        facts.append(f"kv_lengths=[{mask.kv_lengths.shape[0]}]")
    if mask.device is not None and (mask.device.type == "meta" or torch.compiler.is_compiling()):
        return f"BlockMask({', '.join(facts)})"
    text = f"BlockMask({', '.join(facts)}, density={mask.density:.4g}, {mask.nbytes} bytes)"
    picture = draw_text(mask) if 0 not in mask.shape else ""
    return f"{text}\n{picture}" if picture else text


def draw_text(mask: BlockMask) -> str:
    """Shades for the share of visible pairs in each cell; any visible pair shows."""
    shares = coverage(mask[:1, :1], ROWS, COLUMNS)
    level = torch.where(shares >= 1, 4, (shares * 3).ceil().clamp(max=3)).long()
    lines = ["".join(SHADES[cell] for cell in row) for row in level.tolist()]
    edge = "─" * len(lines[0])
    return "\n".join([f"┌{edge}┐", *(f"│{line}│" for line in lines), f"└{edge}┘"])


def plot(mask: BlockMask, ax: Any, batch: int, head: int) -> Any:
    """See `BlockMask.plot`."""
    from matplotlib import pyplot

    if 0 in mask.shape:
        raise MaskError(f"a mask of shape {mask.shape} has nothing to plot")
    ax = pyplot.subplots()[1] if ax is None else ax
    extent = (-0.5, mask.kv_len - 0.5, mask.q_len - 0.5, -0.5)
    shares = coverage(mask[batch, head], IMAGE, IMAGE).cpu().numpy()
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, extent=extent, interpolation="nearest", aspect="auto")
    ax.set(xlabel="key", ylabel="query", title=f"{mask.q_len} x {mask.kv_len}, density {mask.density:.3g}")
    return ax


def coverage(mask: BlockMask, rows: int, columns: int) -> Tensor:
    """Share of visible pairs, float64 (<= rows, <= columns), of a mask with one batch element and head."""
    grid, lists, window, lengths = mask._parts
    if grid.q_len * grid.kv_len <= EXACT_PAIRS:
        return _binned(mask.to_dense()[0, 0].double(), rows, columns)
    if lists is None:
        return _window_coverage(mask, rows, columns)
    lists = mask_algebra.explicit(grid, lists, window, lengths)
    seen, row, col = mask_algebra.entry_pairs(grid, lists).double(), entry_rows(lists), lists.indices.long()
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


def _window_coverage(mask: BlockMask, rows: int, columns: int) -> Tensor:
    """The same for a mask without lists: exact in the keys of a sample of queries."""
    grid, _, window, lengths = mask._parts
    step = max(1, grid.q_len // (16 * rows))
    i = torch.arange(0, grid.q_len, step, device=lengths.device)
    start, stop = mask_algebra.keys_seen(i, window, int(lengths))
    columns = min(columns, grid.kv_len)
    edges = torch.arange(columns + 1, device=lengths.device) * grid.kv_len // columns
    seen = torch.minimum(stop[:, None], edges[1:]) - torch.maximum(start[:, None], edges[:-1])
    return _binned(seen.clamp(min=0).double() / edges.diff(), rows, columns)
