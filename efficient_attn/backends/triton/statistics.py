"""Statistics of attention weights by the Triton kernels: the same function as `reference.statistics`.

float32 sums, head dimensions up to 256; see kernels/attention_statistics.py. Nothing waits for the GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...masks import MaskArrays
from ..call import lse_without_keys, readable, refuse_orders
from ..statistics import Found, Wanted
from . import shared
from .launch import launch

NEEDS_TRANSPOSED = True  # attention received is summed up along the query blocks of each key block
WEIGHTINGS = 32  # of rows, in one launch
CELLS = range(128, 15, -1)  # sizes of a cell that a program owns whole


def attention_statistics(
    query: Tensor,  # (B, Hq, Nq, D)
    key: Tensor,  # (B, Hkv, Nk, D)
    bias: Tensor | None,
    mask: MaskArrays,
    scale: float,
    wanted: Wanted,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    diagonals: Tensor | None = None,
) -> Found:
    """Return what is `wanted` of the weights of this call, as `reference.statistics.attention_statistics`."""
    refuse_orders(mask, "statistics of the weights")
    query, key, mask = readable(query), readable(key), shared.contiguous(mask)
    (B, Hq, Nq, _), Nk = query.shape, key.shape[2]
    k = shared.kernels()
    slots, sets = _power(wanted.top), _power(wanted.set_count if wanted.key_sets is not None else 0)
    places = wanted.position_offset is not None

    def of_rows(*more: int, when: bool = True, dtype: torch.dtype = torch.float32) -> Any:
        return torch.empty((B, Hq, Nq, *more), dtype=dtype, device=query.device) if when else None

    softmax = k.RowSoftmax(of_rows(), of_rows())
    rows = k.RowResults(
        of_rows(), of_rows(), of_rows(when=places), of_rows(when=places), wanted.position_offset or 0, wanted.nearby,
        of_rows(wanted.set_count, when=sets > 0), None if wanted.key_sets is None else wanted.key_sets.contiguous(),
        Nk if wanted.key_sets is not None and wanted.key_sets.shape[0] > 1 else 0, wanted.set_count,
        of_rows(slots, when=slots > 0), of_rows(slots, when=slots > 0, dtype=torch.int32),
    )  # fmt: skip
    weightings = 0 if wanted.row_weights is None else wanted.row_weights.shape[0]
    received = query.new_empty(1 + weightings, B, Hq, Nk, dtype=torch.float32) if wanted.received else None
    cell = next((size for size in CELLS if wanted.map_block % size == 0), wanted.map_block)
    cells = None
    if wanted.map_block:
        cells = query.new_empty(B, Hq, *(-(-n // cell) for n in (Nq, Nk)), dtype=torch.float32)
    if query.numel() == 0 or shared.sees_nothing(mask, key):
        _fill_without_keys(softmax, rows, received, cells, sinks)
    else:
        problem = shared.problem_of(query, key, key, mask, scale, 0.0, None)
        inputs = shared.inputs_of(query, key, key, bias, problem, softcap, sinks, diagonals)
        extras = bias is not None or softcap > 0.0 or diagonals is not None
        config = shared.config_of("statistics", query, 0, mask, problem, extras)
        constants = shared.constants_of(config, mask, problem)
        options: dict[str, Any] = {"warps": config.warps, "stages": config.stages}
        busy = shared.processors(query.device)
        with shared.on_device(query.device):
            programs = shared.tile_count(Nq, config.block_q, mask, 0) * B * Hq
            walked = shared.mask_of(mask, B, False, problem, Hq, programs > busy)
            grid = k.Grid(programs, B * Hq, Hq, shared.section_of(B * Hq, Nk, key, key, Hq // key.shape[1]))
            launch(
                k.row_statistics_kernel, programs,
                *inputs._replace(mask=walked), softmax, rows, grid, constants, sets, slots, **options,
            )  # fmt: skip
            if received is not None:
                programs = shared.tile_count(Nk, config.block_k, mask, 1) * B * Hq
                walked = shared.mask_of(mask, B, True, problem, Hq, programs > busy)
                grid = k.Grid(programs, B * Hq, Hq, shared.section_of(B * Hq, Nq, query, query, 1))
                for part in _weightings(k, received, wanted.row_weights):
                    launch(k.received_kernel, programs,
                        *inputs._replace(mask=walked), softmax, part, grid, constants, _power(part.weightings),
                        **options,
                    )  # fmt: skip
            if cells is not None:
                own = [max(1, block // cell) for block in (config.block_q, config.block_k)]
                counts = [-(-n // size) for n, size in zip(cells.shape[2:], own, strict=True)]
                launch(k.mass_map_kernel, B * Hq * counts[0] * counts[1],
                    *inputs._replace(mask=shared.mask_of(mask, B, False, problem)), softmax,
                    k.Cells(cells, *cells.shape[2:], cell), constants, *own, *(max(16, _power(n)) for n in own),
                    **options,
                )  # fmt: skip
    top_weights, top_keys = _in_order(rows, softmax, wanted.top)
    return Found(
        rows.lse, rows.entropy, top_weights, top_keys, received, rows.distance, rows.nearby, rows.shares,
        None if cells is None else _joined(cells, wanted.map_block // cell),
    )  # fmt: skip


def _power(count: int) -> int:
    """The power of two that holds so many, 0 for none."""
    return 1 << (count - 1).bit_length() if count else 0


def _weightings(k: Any, received: Tensor, row_weights: Tensor | None) -> list[Any]:
    """What each launch adds up: every row once, and with each weighting."""
    step = received.stride(0)
    if row_weights is None:
        return [k.Received(received, None, 1, step, 0)]
    weights = torch.cat([torch.ones_like(row_weights[:1]), row_weights])
    firsts = range(0, weights.shape[0], WEIGHTINGS)
    parts = [(received[n : n + WEIGHTINGS], weights[n : n + WEIGHTINGS]) for n in firsts]
    return [k.Received(target, part, part.shape[0], step, weights.stride(0)) for target, part in parts]


def _fill_without_keys(softmax: Any, rows: Any, received: Tensor | None, cells: Tensor | None, sinks: Any) -> None:
    lse_without_keys(rows.lse, sinks)
    for result in (*softmax, rows.entropy, rows.distance, rows.nearby, rows.shares, received, cells):
        if result is not None:
            result.zero_()
    if rows.scores is not None:
        rows.scores.fill_(-torch.inf)
        rows.keys.fill_(2**31 - 1)


def _in_order(rows: Any, softmax: Any, top: int) -> tuple[Tensor | None, Tensor | None]:
    """The largest weights and their keys, descending, of equal ones the first key first."""
    if not top:
        return None, None
    by_key = rows.keys.argsort(-1)
    scores, keys = rows.scores.gather(-1, by_key), rows.keys.gather(-1, by_key)
    by_score = scores.sort(stable=True, dim=-1, descending=True).indices[..., :top]
    scores, keys = scores.gather(-1, by_score), keys.gather(-1, by_score)
    nothing = scores == -torch.inf
    weights = torch.exp2(scores - softmax.largest[..., None]) * softmax.inverse[..., None]
    broken = rows.lse.isnan()[..., None]  # a NaN score: no weight of the row is known
    weights = weights.masked_fill(nothing, 0.0).masked_fill(broken, torch.nan)
    return weights, keys.masked_fill(nothing | broken, -1)


def _joined(cells: Tensor, side: int) -> Tensor:
    """Cells of side x side smaller ones."""
    if side == 1:
        return cells
    padded = F.pad(cells, (0, -cells.shape[3] % side, 0, -cells.shape[2] % side))
    return padded.unflatten(2, (-1, side)).unflatten(4, (-1, side)).sum((3, 5))
