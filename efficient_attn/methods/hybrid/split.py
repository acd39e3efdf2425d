"""Which keys a query sees exactly, and which blocks of keys go to the tail.

The pattern says which pairs must be exact; `allowed` (causality, the user's mask) which pairs exist. Both are looked at
in blocks of `block` queries by `block` keys, and each block is wholly one of three:

    exact    a pair of the pattern is allowed in it, or only some of its pairs are allowed: its allowed pairs are exact
    tail     all of its pairs are allowed, none of them is in the pattern
    absent   none of its pairs is allowed

So the exact part is the pattern widened to whole blocks, every allowed pair is counted exactly once, and a tail never
sees part of a block: with causality it only ever compresses what lies wholly in the past of a whole block of queries.
Padding is no part of this: it empties keys inside the blocks.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...defaults import alignment_offset
from ...errors import UnsupportedError
from ...inputs import MaskLike, as_block_mask, check_alignment
from ...masks import BlockMask
from ...masks.lists import FULL, entry_rows, pointers
from ...patterns import Pattern
from ...tracing import PLAN, named, shapes_only


@dataclass(frozen=True, eq=False)
class Split:
    """The two parts of a hybrid's pairs.

    exact: the pairs of the exact branch.
    tail: bool (1 | B, 1 | Hq, query blocks, key blocks), the blocks of the tail.
    block: their size.
    """

    exact: BlockMask
    tail: Tensor
    block: int

    @cached_property
    def over_blocks(self) -> BlockMask:
        """`tail` as the mask of Nq queries over one key a block."""
        batch, heads, _, n_k = self.tail.shape
        width = min(128, -(-max(n_k, 1) // 16) * 16)
        return BlockMask.from_predicate(
            lambda b, h, i, j: self.tail[b, h, i // self.block, j],
            q_len=self.exact.q_len,
            kv_len=n_k,
            batch=batch,
            heads=heads,
            block_size=(self.block, width),
            device=self.tail.device,
        )


def split(pattern: BlockMask, allowed: BlockMask, block: int) -> Split:
    """Split the allowed pairs into exact ones around those of `pattern` and whole blocks for the tail."""
    in_pattern, _ = _blocks(pattern & allowed, block)
    in_allowed, whole = _blocks(allowed, block)
    exact = in_pattern | (in_allowed & ~whole)
    tail = whole & ~exact
    batch, heads = exact.shape[:2]
    rows = exact.flatten(0, 2)
    lists = BlockMask.from_csr(
        pointers(rows.sum(1)),
        rows.nonzero()[:, 1],
        q_len=pattern.q_len,
        kv_len=pattern.kv_len,
        block_size=block,
        batch=batch,
        heads=heads,
    )
    return Split(lists & allowed, tail, block)


@named(PLAN)
def plan(
    pattern: Pattern,
    query: Tensor,
    key: Tensor,
    block: int,
    *,
    mask: MaskLike = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Split:
    """The split of a call; of patterns of positions, and without a mask of the user's, the last 32 are kept.

    Args:
        key_mask, scale: what a pattern that is chosen by content goes by; others do not look at them.

    Raises:
        UnsupportedError: a mask or a pattern by content under torch.compile, for the lists depend on values.
        InputError, MaskError: a mask or an alignment that does not fit.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    check_alignment(is_causal, causal_alignment, q_len, kv_len)
    alignment = (causal_alignment or "top_left") if is_causal else None
    pattern = pattern.aligned(causal_alignment)
    if mask is None and not pattern.by_content:
        facts = (q_len, kv_len, query.shape[1], block, alignment, str(query.device))
        if not (torch.compiler.is_compiling() or shapes_only(query)):
            return _cached(pattern, *facts)
        return _traced(pattern, *facts)
    if torch.compiler.is_compiling() or shapes_only(query):
        raise UnsupportedError(
            "torch.compile, fake and meta tensors cannot split a mask, or a pattern that is chosen by content, into an "
            "exact part and a tail, for both depend on values; leave the mask out (is_causal and padding are fine) and "
            "take a pattern of positions, or do not compile this call"
        )
    allowed = (
        BlockMask(q_len, kv_len, (block, block))
        if mask is None
        else as_block_mask(mask, query, key, alignment=causal_alignment)
    )
    if alignment is not None:
        allowed = allowed.with_causal(alignment)
    found = pattern.for_inputs(query, key, scale=scale, key_mask=key_mask, within=allowed)
    return split(found, allowed, block)


def _blocks(mask: BlockMask, block: int) -> tuple[Tensor, Tensor]:
    """Which blocks hold a visible pair, and which hold nothing else: bool (batch, heads, query blocks, key blocks)."""
    lists = mask.reblock(block).explicit_lists()
    n_q, n_k = -(-mask.q_len // block), -(-mask.kv_len // block)
    some = torch.zeros(lists.batch * lists.heads * n_q, n_k, dtype=torch.bool, device=lists.indptr.device)
    every = torch.zeros_like(some)
    rows, cols = entry_rows(lists), lists.indices.long()
    some[rows, cols] = True
    every[rows, cols] = lists.tile_ids == FULL
    shape = (lists.batch, lists.heads, n_q, n_k)
    return some.view(shape), every.view(shape)


@functools.lru_cache(maxsize=32)
def _cached(
    pattern: Pattern, q_len: int, kv_len: int, heads: int, block: int, alignment: str | None, device: str
) -> Split:
    # In a thread of its own, as for patterns: what is kept must not depend on the modes of whoever asks first.
    with ThreadPoolExecutor(max_workers=1) as clean:
        return clean.submit(_make, pattern, q_len, kv_len, heads, block, alignment, device).result()


def _make(
    pattern: Pattern, q_len: int, kv_len: int, heads: int, block: int, alignment: str | None, device: str
) -> Split:
    allowed = BlockMask(q_len, kv_len, (block, block))
    if alignment is not None:
        allowed = allowed.with_causal(alignment)
    made = split(pattern.block_mask(q_len, kv_len, num_heads=heads), allowed, block)
    made = Split(made.exact.to(device), made.tail.to(device), block)
    for mask in (made.exact, made.over_blocks):
        mask.keep_transposed()
    return made


# --- torch.compile ---


def _traced(
    pattern: Pattern, q_len: int, kv_len: int, heads: int, block: int, alignment: str | None, device: str
) -> Split:
    """`_cached` as a graph sees it: tensors from one operator, and numbers."""
    tail, *lists = split_lists(pattern.to_json(), q_len, kv_len, heads, block, alignment or "", device)
    batch, split_heads, _, n_k = tail.shape
    offset = alignment_offset(alignment, q_len, kv_len)

    def mask(lists: list[Tensor], kv_len: int, width: int, window: tuple[int, int] | None) -> BlockMask:
        return BlockMask.unchecked(
            (lists[4], lists[5], lists[6]),
            q_len=q_len, kv_len=kv_len, block_size=(block, width), batch=batch, heads=split_heads,
            indptr=lists[0], indices=lists[1], tile_ids=lists[2], tiles=lists[3],
            window=window, window_offset=offset if window else 0,
        )  # fmt: skip

    made = Split(mask(lists[:7], kv_len, block, (-1, 0) if alignment else None), tail, block)
    made.__dict__["over_blocks"] = mask(lists[7:], n_k, min(128, -(-max(n_k, 1) // 16) * 16), None)
    return made


@torch.library.custom_op("efficient_attn::split_lists", mutates_args=())
def split_lists(
    pattern: str, q_len: int, kv_len: int, heads: int, block: int, alignment: str, device: str
) -> list[Tensor]:
    """The tail of a split, the seven lists of its exact part, and those of `over_blocks`; the pattern is JSON."""
    if device == "meta":
        return _shapes_of(_all_tensors(pattern, q_len, kv_len, heads, block, alignment, "cpu"), device)
    return [tensor.clone() for tensor in _all_tensors(pattern, q_len, kv_len, heads, block, alignment, device)]


@split_lists.register_fake
def _split_lists_fake(
    pattern: str, q_len: int, kv_len: int, heads: int, block: int, alignment: str, device: str
) -> list[Tensor]:
    sizes = int(q_len), int(kv_len), int(heads), int(block)  # they decide how long the lists are
    return _shapes_of(_all_tensors(pattern, *sizes, alignment, "cpu"), device)


def _shapes_of(tensors: list[Tensor], device: str) -> list[Tensor]:
    """Tensors like these on a device, of no value: under a tracer, or on meta."""
    return [torch.empty(tensor.shape, dtype=tensor.dtype, device=device) for tensor in tensors]


def _all_tensors(
    pattern: str, q_len: int, kv_len: int, heads: int, block: int, alignment: str, device: str
) -> list[Tensor]:
    made = _cached(Pattern.from_json(pattern), q_len, kv_len, heads, block, alignment or None, device)
    lists = [made.exact.arrays(True)[4:11], made.over_blocks.arrays(True)[4:11]]
    return [made.tail, *(tensor for part in lists for tensor in part if tensor is not None)]
