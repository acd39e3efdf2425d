"""Patterns that look at queries and keys: blocks of keys chosen for each block of queries.

Every block of keys is summarised, every block of queries too, and a product of the summaries stands for the scores
between them: ceil(Nq / block) * ceil(Nk / block) numbers for each head, never one for each pair. What is chosen then is
attended to exactly, and gradients are those of attention under the chosen mask; the choice itself has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..defaults import default_scale
from ..errors import InputError
from ..masks import BlockMask
from ..masks.algebra import Interval, entry_pairs, explicit, seen_keys
from ..masks.lists import FULL, Grid, entry_rows, pointers
from ..options import check_choice, register
from ..tracing import shapes_only
from .base import Pattern
from .bounds import grow

SUMMARIES = ("mean", "minmax")
QUERIES = ("mean", "first")


class ContentPattern(Pattern):
    """A pattern that depends on what queries and keys hold: `for_inputs` makes its mask, lengths alone do not."""

    @property
    def by_content(self) -> bool:
        return True

    def visible(self, i: Tensor, j: Tensor, q_len: int, kv_len: int, head: int = 0) -> Tensor:
        raise self._refusal()

    def for_inputs(
        self,
        query: Tensor,
        key: Tensor,
        *,
        scale: float | None = None,
        key_mask: Tensor | None = None,
        within: BlockMask | None = None,
    ) -> BlockMask:
        raise NotImplementedError


class _Blocks(ContentPattern):
    """What the two choices of blocks share: scores of blocks, what counts, and the lists of what is chosen."""

    block: int
    sink: int
    local: int
    summary: str
    queries: str
    alignment: str | None
    tau_max: float | None

    def _check_blocks(self) -> None:
        self._check_block()
        _check_share(self, "tau_max")
        self._at_least(sink=0, local=1)
        check_choice(self, "summary", SUMMARIES)
        check_choice(self, "queries", QUERIES)
        self._check_alignment()

    def _alike_in_part(self, first: int) -> bool:
        return first == 0 or (self.queries == "first" and first % self.block == 0)

    @property
    def _own_block(self) -> tuple[int, int]:
        return (self.block, self.block)

    @property
    def bounds_loss(self) -> bool:
        return self.tau_max is not None

    def for_inputs(
        self,
        query: Tensor,
        key: Tensor,
        *,
        scale: float | None = None,
        key_mask: Tensor | None = None,
        within: BlockMask | None = None,
    ) -> BlockMask:
        with torch.no_grad():  # no decorator: torch.compile cannot call a decorated method of what `aligned` made
            return self._chosen(query, key, scale, key_mask, within)

    def _chosen(
        self, query: Tensor, key: Tensor, scale: float | None, key_mask: Tensor | None, within: BlockMask | None
    ) -> BlockMask:
        B, Hq, Nq, D = query.shape
        Nk = key.shape[2]
        n_q, n_k = -(-Nq // self.block), -(-Nk // self.block)
        if n_q * n_k == 0:
            nothing = torch.zeros(B, Hq, n_q, 0, dtype=torch.int64, device=query.device)
            return self._mask_of(nothing, nothing.bool(), query, Nk)
        shown = None if within is None else shown_by(within, self.block, query.device, key_mask)
        if shown is not None:  # a key that no query sees counts as little as padding
            key_mask = shown.keys.expand(B, Nk)
        scores, counts, blank = self._scores(query, key, default_scale(scale, D), key_mask)
        seen = whole = (counts > 0).expand(B, 1, n_q, n_k)
        if shown is not None:
            seen, whole = seen & shown.blocks, seen & shown.whole
        seen, whole = (blocks.expand(B, Hq, n_q, n_k) for blocks in (seen, whole))
        forced = self._forced(Nq, Nk, within, query.device) & seen
        # What is always kept comes first, never what no query of the block may see. The score of a block that is cut
        # knows keys that some of its queries must not, so it decides nothing: those after the last whole block, which
        # hold the latest keys under any causality, come before the whole ones, those before it, after them.
        most = torch.finfo(scores.dtype).max / 8
        column = torch.arange(n_k, device=scores.device)
        late = (column / max(n_k, 1) + 1.5).to(scores.dtype) * most
        last = torch.where(whole, column, -1).amax(-1, keepdim=True)
        ranked = scores.clamp(-most, most)
        if blank is not None:  # no query decides: in turn, where equal scores would leave it to the device
            ranked = torch.where(blank, -column.to(scores.dtype), ranked)
        turn = torch.where(whole, ranked, torch.where(column > last, late, late - 4 * most))
        turn = turn.masked_fill(forced, torch.inf).masked_fill(~seen, -torch.inf)
        order, chosen = self._choose(
            scores, turn, forced, seen, torch.where(whole & self._ended(key_mask, Nk, key.device), counts, 0)
        )
        if self.tau_max is not None:
            columns = torch.zeros_like(seen).scatter(-1, order, chosen)
            scale = default_scale(scale, D)
            chosen = grow(columns, seen & whole, seen & ~whole, query, key, scale, key_mask, self.block, self.tau_max)
            order = column.expand_as(chosen)
        return self._mask_of(order, chosen, query, Nk)

    def _ended(self, key_mask: Tensor | None, n: int, device: torch.device) -> Tensor | bool:
        """Whether the last key of a block is there, (B, 1, 1, blocks); else more of it may come."""
        if key_mask is None:
            key_mask = torch.ones(1, n, dtype=torch.bool, device=device) if n % self.block else None
        if key_mask is None:
            return True
        key_mask = F.pad(key_mask, (0, -n % self.block))
        return key_mask[:, None, None, self.block - 1 :: self.block]

    def _choose(
        self, scores: Tensor, turn: Tensor, forced: Tensor, seen: Tensor, counts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Columns (B, Hq, n_q, k), distinct, and which of them are chosen.

        Everything is (B, Hq, n_q, n_k). turn: the largest is taken first; infinite where forced. counts: the keys of
        blocks that are wholly visible; 0 in a block that is cut, whose score knows keys that some queries must not.
        """
        raise NotImplementedError

    def _scores(
        self, query: Tensor, key: Tensor, scale: float, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Estimated scores (B, Hq, n_q, n_k), how many keys count in each block, (B | 1, 1, 1, n_k), and in which
        blocks no query counts, (B, 1, n_q, 1), None where all count."""
        Hq, Nq = query.shape[1:3]
        Hkv, Nk = key.shape[1:3]
        own = key_mask if Nq == Nk else None  # self-attention: the padding is that of the queries too
        summed, of_query = self._reduced(query, own, torch.sum, 0.0)
        mean = summed / of_query.clamp(min=1)
        if self.queries == "first":
            mean = self._first(query, own).to(summed.dtype)
        mean = mean.unflatten(1, (Hkv, Hq // Hkv)) if Hkv else mean[:, :, None]
        if self.summary == "mean":
            summed, counts = self._reduced(key, key_mask, torch.sum, 0.0)
            scores = mean @ (summed / counts.clamp(min=1))[:, :, None].mT
        else:  # the largest product with a point of the box around the keys
            low, counts = self._reduced(key, key_mask, torch.amin, torch.inf)
            high, _ = self._reduced(key, key_mask, torch.amax, -torch.inf)
            low, high = (torch.where(counts > 0, side, 0.0)[:, :, None].mT for side in (low, high))
            scores = mean.clamp(min=0) @ high + mean.clamp(max=0) @ low
        return scores.flatten(1, 2) * scale, counts[..., 0][:, :, None], None if own is None else of_query == 0

    def _first(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The first row of each block that counts, (B, H, n, D); zeros where none does."""
        if mask is None:
            return x[:, :, :: self.block]
        N = x.shape[2]
        there = torch.nn.functional.pad(mask, (0, -N % self.block)).unflatten(1, (-1, self.block))
        at = there.int().argmax(-1) + torch.arange(there.shape[1], device=x.device) * self.block  # [B, n]
        rows = x.gather(2, at[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
        return rows.masked_fill(~there.any(-1)[:, None, :, None], 0.0)

    def _reduced(
        self, x: Tensor, mask: Tensor | None, reduce: Callable[..., Tensor], neutral: float
    ) -> tuple[Tensor, Tensor]:
        """(B, H, N, D) reduced block by block, in float32 or better, and how many rows count, (B | 1, 1, n, 1)."""
        N = x.shape[2]
        n = -(-N // self.block)
        short = n * self.block - N
        there = torch.arange(n * self.block, device=x.device) < N
        there = there[None] if mask is None else torch.nn.functional.pad(mask, (0, short))
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = torch.nn.functional.pad(x, (0, 0, 0, short), value=neutral) if short else x  # a copy, also of none
        x = x if mask is None else x.masked_fill(~there[:, None, :, None], neutral)
        counts = there.unflatten(1, (n, self.block)).sum(-1)[:, None, :, None]
        return reduce(x.unflatten(2, (n, self.block)), dim=3), counts

    def _forced(self, q_len: int, kv_len: int, within: BlockMask | None, device: torch.device) -> Tensor:
        """The first blocks, and those around the diagonal where that is known (n_q, n_k)."""
        column = torch.arange(-(-kv_len // self.block), device=device)
        top = torch.arange(0, q_len, self.block, device=device)[:, None]
        if within is not None and within.window is not None:
            top = top + within.window_offset
        elif self.alignment is not None or q_len == kv_len:
            top = top + self._offset(q_len, kv_len)
        else:
            return (column < self.sink).expand(top.shape[0], -1)
        near = column > top // self.block - self.local
        near &= column < (top + self.block - 1) // self.block + self.local
        return near | (column < self.sink)

    def _mask_of(self, order: Tensor, chosen: Tensor, query: Tensor, kv_len: int) -> BlockMask:
        """The mask of the chosen columns."""
        B, Hq, n_q, k = order.shape
        device = order.device
        order, at = order.sort(-1)
        chosen = chosen.gather(-1, at)
        fields: dict[str, Any] = {
            "q_len": query.shape[2],
            "kv_len": kv_len,
            "block_size": self._own_block,
            "batch": B,
            "heads": Hq,
        }
        empty = torch.zeros(1, self.block, self.block // 8, dtype=torch.uint8, device=device)
        if _shapes_are_fixed(order):
            # No shape may depend on a value: what is not chosen is an empty tile.
            return BlockMask.unchecked(
                **fields,
                indptr=torch.arange(B * Hq * n_q + 1, device=device) * k,
                indices=order.flatten().int(),
                tile_ids=torch.where(chosen.flatten(), FULL, 0).int(),
                tiles=empty,
            )
        indices = order[chosen].int()
        return BlockMask.unchecked(
            **fields,
            indptr=pointers(chosen.sum(-1).flatten()),
            indices=indices,
            tile_ids=torch.full_like(indices, FULL),
            tiles=empty[:0],
        )


@register
@dataclass(frozen=True)
class TopKBlocks(_Blocks):
    """For each block of queries the blocks of keys with the largest estimated scores.

    block: tokens of a block, of queries and of keys.
    blocks: how many to keep for each block of queries, sink and local ones included; or
    fraction: this share of those that it may see, rounded up, if given.
    sink, local: the first `sink` blocks, and those nearer than `local` to the diagonal, are always kept; with Nq != Nk,
        the diagonal is that of causality, or `alignment` says where it is, else there is none.
    summary: of a block of keys: "mean" (mean-pooled; MoBA, Lu et al. 2025, arXiv:2502.13189) or "minmax" (the largest
        product with the box around the keys; Quest, Tang et al. 2024, arXiv:2406.10774).
    queries: what stands for a block of queries: its "mean", or its "first" row. Only "first" is strictly causal: a mean
        lets the later rows of a block influence which past blocks the earlier ones see.
    alignment: as in `SlidingWindow`.
    tau_max: blocks are added until no query drops more than this share of its softmax mass, for certain: a bound from
        means, boxes and variances of the blocks, see `bounds`. On keys without structure that keeps all of them, at
        more than dense attention's cost: `insight.growth` tells. Not with an additive bias.

    Where causality or lengths are known (is_causal=True, `& Causal()`, padding), the choice is among what they show. In
    self-attention (Nq = Nk) a key mask also says which queries count.
    """

    name = "topk_blocks"
    formula = "softmax(QK^T)V over the k blocks of largest mean(Q_I) mean(K_J)^T"
    paper = "Lu et al. 2025; Tang et al. 2024"
    complexity = "n k b d + (n / b)^2 d"

    block: int = 64
    blocks: int = 16
    fraction: float | None = None
    sink: int = 1
    local: int = 1
    summary: str = "mean"
    queries: str = "mean"
    alignment: str | None = None
    tau_max: float | None = None

    def check(self) -> None:
        self._check_blocks()
        self._at_least(blocks=1)
        _check_share(self, "fraction")

    def _choose(
        self, scores: Tensor, turn: Tensor, forced: Tensor, seen: Tensor, counts: Tensor
    ) -> tuple[Tensor, Tensor]:
        n_k = scores.shape[-1]
        wanted, most = torch.full_like(seen[..., 0], self.blocks, dtype=torch.int64), self.blocks
        if self.fraction is not None:
            wanted = (seen.sum(-1) * self.fraction - 1e-9).ceil().long()
            most = math.ceil(n_k * self.fraction)
        wanted = torch.maximum(wanted, forced.sum(-1))
        most = min(n_k, max(most, self.sink + 2 * self.local))
        order = turn.topk(most, dim=-1).indices
        rank = torch.arange(most, device=turn.device)
        return order, (rank < wanted[..., None]) & seen.gather(-1, order)


@register
@dataclass(frozen=True)
class TopPBlocks(_Blocks):
    """For each block of queries the fewest blocks of keys that are estimated to hold the share `mass` of its softmax.

    The estimate is softmax over blocks of score + log(number of keys), in the order of which blocks are taken until
    their mass reaches `mass`; sink and local blocks come first. Twilight, Lin et al. 2025, arXiv:2502.02770, at blocks.
    A block that causality or a mask cuts has no share in the mass: it holds what some of its queries must not know. Nor
    has one whose last key is padding or still to come: with causality it is the queries' own, and grows with tokens.

    Other fields: as in `TopKBlocks`.
    """

    name = "topp_blocks"
    formula = "softmax(QK^T)V over the fewest blocks of estimated mass p"
    paper = "Lin et al. 2025"
    complexity = "n k b d + (n / b)^2 d"

    block: int = 64
    mass: float = 0.9
    sink: int = 1
    local: int = 1
    summary: str = "mean"
    queries: str = "mean"
    alignment: str | None = None
    tau_max: float | None = None

    def check(self) -> None:
        self._check_blocks()
        _check_share(self, "mass")

    def _choose(
        self, scores: Tensor, turn: Tensor, forced: Tensor, seen: Tensor, counts: Tensor
    ) -> tuple[Tensor, Tensor]:
        mass = torch.where(seen & (counts > 0), scores + counts.clamp(min=1).log(), -torch.inf).softmax(-1)
        mass = mass.nan_to_num(0.0)  # where no block is whole
        order = turn.argsort(dim=-1, descending=True, stable=True)
        mass = mass.gather(-1, order)
        before = mass.cumsum(-1) - mass
        return order, (forced.gather(-1, order) | (before < self.mass)) & seen.gather(-1, order)


def _check_share(pattern: Pattern, name: str) -> None:
    value = getattr(pattern, name)
    if value is not None and not 0.0 < value <= 1.0:
        raise InputError(f"{pattern.name}: {name} must be a number in (0, 1], got {value!r}")


def _shapes_are_fixed(tensor: Tensor) -> bool:
    """Whether no shape may depend on a value: for tracers and transforms."""
    return torch.compiler.is_compiling() or shapes_only(tensor) or torch._C._are_functorch_transforms_active()


class Shown(NamedTuple):
    """What a mask shows, in square blocks.

    blocks, whole: bool (batch, heads, n_q, n_k), the blocks with a visible pair, and those whose queries all see the
    same keys.
    keys: bool (batch, Nk), those that any query sees.
    """

    blocks: Tensor
    whole: Tensor
    keys: Tensor


def shown_by(mask: BlockMask, block: int, device: torch.device, key_mask: Tensor | None = None) -> Shown:
    """What a mask and a padding (B, Nk) show in blocks of `block` queries and keys, on a device: a mask without lists
    is on none."""
    if mask.indptr is not None and (torch.compiler.is_compiling() or shapes_only(mask.indptr)):
        return _shown_by_pairs(mask.to_dense(max_pairs=2**62), key_mask, block)
    if mask.indptr is not None and key_mask is not None and not _shapes_are_fixed(key_mask):
        pairs = key_mask[:, None, None].expand(-1, 1, mask.q_len, -1)
        mask, key_mask = mask & BlockMask.from_dense(pairs, block_size=block), None
    grid, lists, window, lengths = mask.reblock((block, block)).parts
    lengths = lengths.to(device)
    keys = seen_keys(grid, lists, window, lengths)
    if key_mask is not None:
        keys = keys & key_mask
    if lists is None:
        return _shown_by_window(grid, window, keys)
    lists = explicit(grid, lists, window, lengths)
    rows, cols = entry_rows(lists), lists.indices.long()
    there = torch.nn.functional.pad(keys, (0, grid.n_k * block - grid.kv_len)).unflatten(1, (-1, block)).sum(-1)
    pairs = (grid.q_len - rows % max(grid.n_q, 1) * block).clamp(max=block)
    pairs = pairs * there[rows // max(lists.heads * grid.n_q, 1), cols]
    blocks = torch.zeros(2, lists.batch * lists.heads * grid.n_q, grid.n_k, dtype=torch.bool, device=rows.device)
    blocks[0, rows, cols] = True
    blocks[1, rows, cols] = entry_pairs(grid, lists) == pairs
    some, whole = blocks.view(2, lists.batch, lists.heads, grid.n_q, grid.n_k).unbind()
    return Shown(some, whole, keys)


def _shown_by_pairs(pairs: Tensor, key_mask: Tensor | None, block: int) -> Shown:
    """`shown_by` for bool (batch, heads, Nq, Nk): every shape is known, as torch.compile wants it."""
    if key_mask is not None:
        pairs = pairs & key_mask[:, None, None]
    keys = pairs.any(2).any(1)
    cut = torch.nn.functional.pad(pairs, (0, -pairs.shape[3] % block, 0, -pairs.shape[2] % block))
    seen = cut.unflatten(3, (-1, block)).unflatten(2, (-1, block)).sum((3, 5))
    there = torch.nn.functional.pad(keys, (0, -keys.shape[1] % block)).unflatten(1, (-1, block)).sum(-1)
    height = torch.arange(seen.shape[2], device=pairs.device)[:, None] * block
    height = (pairs.shape[2] - height).clamp(max=block)
    return Shown(seen > 0, seen == height * there[:, None, None], keys)


def _shown_by_window(grid: Grid, window: Interval, keys: Tensor) -> Shown:
    """`shown_by` for a window over the keys (B, Nk) that anybody sees: what rows see is a run of them."""
    before = torch.nn.functional.pad(keys.cumsum(-1), (1, 0))  # how many keys stand before each place
    top = torch.arange(grid.n_q, device=keys.device)[:, None] * grid.block_q
    bottom = (top + grid.block_q).clamp(max=grid.q_len) - 1
    start = torch.arange(grid.n_k, device=keys.device) * grid.block_k
    stop = (start + grid.block_k).clamp(max=grid.kv_len)
    low, high = window

    def count(of_low: Tensor, of_high: Tensor) -> Tensor:
        """The keys of each block from where the window of one row begins to where that of another ends."""
        first = start.expand(grid.n_q, -1) if low is None else torch.maximum(start, of_low + low)
        last = stop.expand(grid.n_q, -1) if high is None else torch.minimum(stop, of_high + high + 1)
        first = first.clamp(0, grid.kv_len)
        return before[:, torch.maximum(last.clamp(0, grid.kv_len), first)] - before[:, first]

    some = count(top, bottom) > 0
    whole = some & (count(bottom, top) == (before[:, stop] - before[:, start])[:, None])
    return Shown(some[:, None], whole[:, None], keys)
