"""How a list is walked: each row's blocks sorted into those that need no mask and those that do.

A block of the list is *clean* if every pair of it is visible: it is full, and no window or end of a sequence cuts it.
It is left out if the window hides it whole. `plan_kernel` writes the rest of a row in its own order, clean blocks
first, so that the walk over them loads no bits and checks no bounds. Made once for a mask, window and direction
(efficient_attn/backends/triton/plan.py); lengths, which differ between batch elements, are looked at by each walk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .walk import list_entry, visible_keys, visible_queries


@triton.jit
def plan_kernel(
    mask, indices, tile_ids, clean, live, Nq, Nk,
    LIST_Q: tl.constexpr, LIST_K: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fill indices and tile_ids [entries], and clean and live [rows]: how many blocks of a row are clean, and how many
    there are. Grid: rows of the list. TRANSPOSED: rows are of key blocks."""
    i_row = tl.program_id(0).to(tl.int64)
    begin = tl.maximum(tl.load(mask.indptr + i_row), 0)
    end = tl.maximum(tl.minimum(tl.load(mask.indptr + i_row + 1), mask.entries), begin)
    i_block = (i_row % mask.blocks).to(tl.int32)
    if TRANSPOSED:
        j_first = i_block * LIST_K
        j_last = tl.minimum(j_first + LIST_K, Nk) - 1
        any_first, any_end, all_first, all_end = visible_queries(mask, j_first, j_last, Nk, Nq)
        all_end = tl.where(j_first + LIST_K <= Nk, all_end, all_first)  # missing keys are masked
    else:
        i_last = tl.minimum(i_block * LIST_Q + LIST_Q, Nq) - 1
        any_first, any_end, all_first, all_end = visible_keys(mask, i_block * LIST_Q, i_last, Nk)
    SIZE: tl.constexpr = LIST_Q if TRANSPOSED else LIST_K

    o_entry = tl.arange(0, BLOCK)
    clean_count = tl.zeros([], tl.int32)
    live_count = tl.zeros([], tl.int32)
    # First the clean blocks are written and counted, then the others behind them.
    for others in tl.static_range(2):
        for start in range(begin, end, BLOCK):
            m_entry = start + o_entry < end
            b_block, b_tile = list_entry(mask, start + o_entry, end - 1)
            b_first = b_block * SIZE
            m_live = m_entry & (b_first < any_end) & (b_first + SIZE > any_first)
            m_clean = m_live & (b_tile < 0) & (b_first >= all_first) & (b_first + SIZE <= all_end)
            m_now = m_live & (m_clean == 0) if others else m_clean
            b_place = begin + live_count + tl.cumsum(m_now.to(tl.int32), 0) - 1
            tl.store(indices + b_place, b_block, mask=m_now)
            tl.store(tile_ids + b_place, b_tile, mask=m_now)
            live_count += tl.sum(m_now.to(tl.int32))
        if others == 0:
            clean_count = live_count
    tl.store(clean + i_row, clean_count)
    tl.store(live + i_row, live_count)
