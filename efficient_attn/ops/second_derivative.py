"""The derivative of attention's backward: autograd through the reference formula, one piece of the pairs at a time.

A piece is some rows of one query block with the keys that lists, window and lengths let any of them see, gathered side
by side. So time and memory follow the visited pairs: O(n) of both for a window, O(n) memory for dense attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.call import accumulation_dtype
from ..backends.reference import attention as reference
from ..masks import MaskArrays
from ..tracing import shapes_only

ROWS = 128  # of a piece where there are no lists, whose pieces are as high as a block
SCORES = 2**20  # of a piece, B * Hq * rows * keys; with very many keys it has FEWEST_ROWS
FEWEST_ROWS = 16


class Place(NamedTuple):
    """Where a piece lies: slices of batch, query heads, key heads and rows, and the keys."""

    batch: slice
    heads: slice
    kv_heads: slice
    rows: slice
    columns: Tensor  # int64 [keys]
    visible: Tensor  # bool (1 | batch, 1, rows, keys)


def backward_gradients(
    tensors: Sequence[Tensor | None],
    gradients: Sequence[Tensor],
    mask: MaskArrays,
    dropout_seed: Tensor | None,
    scale: float,
    dropout_p: float,
    bias_requires_grad: bool,
    softcap: float,
    diagonals_require_grad: bool,
) -> list[Tensor | None]:
    """The vector-Jacobian product of `attention_backward` for the tensors that it takes, None for None.

    Args:
        tensors: grad_out, grad_lse, grad_weights, query, key, value, bias, out, lse, sinks, diagonals.
        gradients: of dq, dk, dv, dbias, dsinks, ddiagonals; only the first three count where the others are not wanted.
    """
    query, key = tensors[3], tensors[4]
    assert query is not None and key is not None
    wanted_too = (bias_requires_grad, tensors[9] is not None, diagonals_require_grad)
    returned = [0, 1, 2, *(3 + k for k, also in enumerate(wanted_too) if also)]
    totals = [None if t is None else torch.zeros_like(t) for t in tensors]
    for place in _places(mask, query, key):
        leaves: list[Any] = [
            None if t is None else cut(t, place).detach().requires_grad_() for cut, t in zip(CUTS, tensors, strict=True)
        ]
        rest = (mask, scale, dropout_p, dropout_seed, bias_requires_grad, softcap, *leaves[9:], diagonals_require_grad)
        arguments: list[Any] = [*leaves[:9], *rest, _piece(place, query, key)]
        with torch.enable_grad():
            if leaves[2] is not None and leaves[2].shape[1] < query.shape[1]:  # of the average over all heads
                arguments[2] = leaves[2] * ((place.heads.stop - place.heads.start) / query.shape[1])
            results: Any = reference.attention_backward(*arguments)
        cotangents = [RESULT_CUTS[k](gradients[k], place) for k in returned]
        wanted = [k for k, leaf in enumerate(leaves) if leaf is not None]
        inputs = [leaf for leaf in leaves if leaf is not None]
        found = torch.autograd.grad([results[k] for k in returned], inputs, cotangents, allow_unused=True)
        for k, gradient in zip(wanted, found, strict=True):
            if gradient is not None:
                _add(CUTS[k], totals[k], place, gradient)
    return totals


def gradients(
    tensors: Sequence[Tensor | None],
    mask: MaskArrays,
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    bias_requires_grad: bool,
    softcap: float,
    sinks: Tensor | None,
    diagonals: Tensor | None,
    diagonals_require_grad: bool,
) -> list[Tensor | None]:
    """What `attention_backward` of the reference gives, but in O(n) memory: for rows whose weights their lse cannot
    say. `tensors`: the first nine of `backward_gradients`."""
    grad_weights, inputs, tensors = tensors[2], tensors[3:7], [*tensors, sinks, diagonals]
    query, key = tensors[3], tensors[4]
    assert query is not None and key is not None
    dtype = accumulation_dtype(query.dtype)
    with_grad = (inputs[3] if bias_requires_grad else None, sinks, diagonals if diagonals_require_grad else None)
    wanted = [*inputs[:3], *with_grad]
    totals = [None if t is None else torch.zeros_like(t, dtype=dtype) for t in wanted]
    for place in _places(mask, query, key):
        parts: list[Any] = [
            None if t is None else cut(t, place).to(dtype) for cut, t in zip(CUTS, tensors, strict=True)
        ]
        if grad_weights is not None and grad_weights.shape[1] < query.shape[1]:  # of the average over all heads
            parts[2] = parts[2] * ((place.heads.stop - place.heads.start) / query.shape[1])
        rest = (mask, scale, dropout_p, dropout_seed, bias_requires_grad, softcap, *parts[9:], diagonals_require_grad)
        arguments: list[Any] = [*parts[:9], *rest, _piece(place, query, key)]
        found = reference.attention_backward(*arguments)
        for cut, total, gradient in zip(RESULT_CUTS, totals, found, strict=True):
            if total is not None and gradient is not None:
                _add(cut, total, place, gradient)
    return [None if t is None or total is None else total.to(t.dtype) for total, t in zip(totals, wanted, strict=True)]


# --- the parts of a tensor that belong to a piece ---


def _of_rows(tensor: Tensor, place: Place) -> Tensor:
    """Of (B, Hq, Nq, ...)."""
    return tensor[place.batch, place.heads, place.rows]


def _of_keys(tensor: Tensor, place: Place) -> Tensor:
    """Of (B, Hkv, Nk, D)."""
    return tensor[place.batch, place.kv_heads].index_select(2, place.columns)


def _of_pairs(tensor: Tensor, place: Place) -> Tensor:
    """Of (B, Hq, Nq, Nk), each dimension 1 or full: what is broadcast belongs to every piece."""
    tensor = _lines(tensor, place)
    return tensor if tensor.shape[3] == 1 else tensor.index_select(3, place.columns)


def _lines(tensor: Tensor, place: Place) -> Tensor:
    """The piece's rows of (B, Hq, Nq, Nk), each dimension 1 or full; a view."""
    parts = (place.batch, place.heads, place.rows)
    return tensor[tuple(slice(None) if n == 1 else part for n, part in zip(tensor.shape, parts, strict=False))]


def _of_heads(tensor: Tensor, place: Place) -> Tensor:
    """Of (Hq)."""
    return tensor[place.heads]


def _of_diagonals(tensor: Tensor, place: Place) -> Tensor:
    """Of (1 | B, 1 | Hq, Nq + Nk - 1), of which every piece takes whole lines; a view."""
    parts = (place.batch, place.heads)
    return tensor[tuple(slice(None) if n == 1 else part for n, part in zip(tensor.shape, parts, strict=False))]


CUTS = (
    _of_rows, _of_rows, _of_pairs, _of_rows, _of_keys, _of_keys, _of_pairs, _of_rows, _of_rows, _of_heads, _of_diagonals
)  # fmt: skip
RESULT_CUTS = (_of_rows, _of_keys, _of_keys, _of_pairs, _of_heads, _of_diagonals)


def _add(cut: Any, total: Tensor | None, place: Place, gradient: Tensor) -> None:
    """Add to the part that `cut` takes."""
    assert total is not None
    if cut is _of_keys:
        total[place.batch, place.kv_heads].index_add_(2, place.columns, gradient)
    elif cut is _of_pairs and total.shape[3] > 1:
        _lines(total, place).index_add_(3, place.columns, gradient)
    elif cut is _of_pairs:
        _lines(total, place).add_(gradient)
    elif cut in (_of_heads, _of_diagonals):
        cut(total, place).add_(gradient)
    else:
        total[place.batch, place.heads, place.rows] += gradient


def _piece(place: Place, query: Tensor, key: Tensor) -> reference.Piece:
    device = query.device
    B, H, Nq, _ = query.shape
    b = torch.arange(B, device=device)[place.batch]
    h = torch.arange(H, device=device)[place.heads]
    i = torch.arange(Nq, device=device)[place.rows]
    return reference.Piece(place.visible, (b, h, i, place.columns), key.shape[2])


# --- the pieces ---


def _places(mask: MaskArrays, query: Tensor, key: Tensor) -> Iterator[Place]:
    """Pieces that hold every visible pair once."""
    (B, H, Nq, _), (_, kv_heads, Nk, _) = query.shape, key.shape
    if mask.indptr is None:
        everything = (slice(0, B), slice(0, H), slice(0, kv_heads))
        for start in range(0, Nq, ROWS):
            low, high = _reach(mask, start, min(start + ROWS, Nq), Nk)
            columns = torch.arange(low, high, device=query.device)
            yield from _pieces(mask, everything, slice(start, min(start + ROWS, Nq)), columns, None, B * H)
        return
    assert mask.indices is not None and mask.tile_ids is not None and mask.tiles is not None
    starts = mask.indptr.tolist()
    blocks = -(-Nq // mask.block_q)
    bits = torch.arange(8, device=query.device, dtype=torch.uint8)
    full = mask.tiles.new_full((1, mask.block_q, mask.block_k // 8), 255)  # what tile -1 stands for
    in_block = torch.arange(mask.block_k, device=query.device)
    for row in range(mask.batch * mask.heads * blocks):
        line, block = divmod(row, blocks)
        b, h = divmod(line, mask.heads)
        batch = slice(0, B) if mask.batch == 1 else slice(b, b + 1)
        heads = slice(0, H) if mask.heads == 1 else slice(h, h + 1)
        kv = slice(0, kv_heads) if mask.heads == 1 else slice(h * kv_heads // H, h * kv_heads // H + 1)
        rows = slice(block * mask.block_q, min((block + 1) * mask.block_q, Nq))
        low, high = _reach(mask, rows.start, rows.stop, Nk)
        indices = mask.indices[starts[row] : starts[row + 1]].long()
        ids = mask.tile_ids[starts[row] : starts[row + 1]].long()
        near = ((indices + 1) * mask.block_k > low) & (indices * mask.block_k < high)
        indices, ids = indices[near], ids[near]
        tiles = torch.where((ids < 0)[:, None, None], full, mask.tiles[ids] if mask.tiles.shape[0] else full)
        drawn = ((tiles[..., None] >> bits) & 1).bool().flatten(-2)  # (listed, block_q, block_k)
        columns = (indices[:, None] * mask.block_k + in_block).flatten()
        inside = columns < Nk
        listed = drawn.transpose(0, 1).flatten(1)[: rows.stop - rows.start, inside]
        calls = (batch.stop - batch.start) * (heads.stop - heads.start)
        yield from _pieces(mask, (batch, heads, kv), rows, columns[inside], listed, calls)


def _reach(mask: MaskArrays, first: int, last: int, kv_len: int) -> tuple[int, int]:
    """The keys that window and lengths let any of the rows first .. last see, as a range."""
    low = 0 if mask.window_left < 0 else max(0, first + mask.window_offset - mask.window_left)
    high = kv_len if mask.window_right < 0 else min(kv_len, last + mask.window_offset + mask.window_right)
    lengths = mask.kv_lengths
    if lengths is not None and lengths.numel() and not shapes_only(lengths):
        high = min(high, int(lengths.max()))
    return low, max(low, high)


def _pieces(
    mask: MaskArrays,
    slices: tuple[slice, slice, slice],
    rows: slice,
    columns: Tensor,
    listed: Tensor | None,
    lines: int,
) -> Iterator[Place]:
    """The rows in pieces of a bearable size; `listed` (rows, keys) is what the lists show of them. Rows that see
    nothing are among them: their lse may be a sink."""
    height = max(FEWEST_ROWS, SCORES // max(lines * columns.numel(), 1) // FEWEST_ROWS * FEWEST_ROWS)
    for start in range(rows.start, rows.stop, height):
        part = slice(start, min(start + height, rows.stop))
        i = torch.arange(part.start, part.stop, device=columns.device)[:, None] + mask.window_offset
        visible = torch.ones(i.shape[0], columns.shape[0], dtype=torch.bool, device=columns.device)
        if mask.window_left >= 0:
            visible = visible & (columns >= i - mask.window_left)
        if mask.window_right >= 0:
            visible = visible & (columns <= i + mask.window_right)
        if listed is not None:
            visible = visible & listed[part.start - rows.start : part.stop - rows.start]
        visible = visible[None, None]
        if mask.kv_lengths is not None:
            lengths = mask.kv_lengths if mask.kv_lengths.shape[0] == 1 else mask.kv_lengths[slices[0]]
            visible = visible & (columns < lengths[:, None, None, None])
        yield Place(*slices, part, columns, visible)
