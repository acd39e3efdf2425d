"""What a pattern is: a small frozen object that says which pairs are visible and builds the `BlockMask`.

A pattern has a name, options with defaults, its definition (`visible`) and a builder (`_build`). Here is what all of
them share: the calls, the kept lists, what torch.compile sees of them, and the words of which builders are made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..defaults import ALIGNMENTS, alignment_offset
from ..errors import InputError, UnsupportedError
from ..masks import BlockMask, BlockSize
from ..masks.lists import Grid, predicate_lists
from ..masks.rules import check_block_size, check_sizes
from ..options import Named, check_choice, check_range
from ..tracing import shapes_only
from .orders import Proposal, arranged, worth_an_order

MANY_BLOCKS = 2**20  # to transpose more takes a while: done when a backward asks for it first

PATTERNS: dict[str, type[Pattern]] = {}


@dataclass(frozen=True)
class Pattern(Named):
    """Base of all patterns. A subclass has options with defaults, `visible` (its definition) and `_build`.

    `accepts_causal` says whether it may be asked for the past alone.
    """

    family = "pattern"
    registry = PATTERNS
    compounds: ClassVar[dict[str, Any]] = {}
    accepts_causal: ClassVar[bool] = True

    def visible(self, i: Tensor, j: Tensor, q_len: int, kv_len: int, head: int = 0) -> Tensor:
        """The definition: whether query i of a head sees key j, for index tensors that broadcast."""
        raise NotImplementedError

    def block_mask(
        self,
        q_len: int,
        kv_len: int,
        *,
        num_heads: int = 1,
        block_size: BlockSize | None = None,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """The mask for these lengths; the last 32 lists are kept, so that asking again costs nothing.

        Args:
            num_heads: number of query heads. Most patterns are the same for all, and broadcast.
            block_size: default: the pattern's own, or (128, 128).
            device: where lists go; default the CPU. A pattern that is a window has none.

        Raises:
            MaskError: lengths or a block size out of range. InputError: lengths for which the pattern is not defined.
            UnsupportedError: a pattern that looks at queries and keys; see `for_inputs`.
        """
        if self.by_content:
            raise self._refusal()
        size = self._own_block if block_size is None else check_block_size(block_size)
        heads = num_heads if self._heads_differ else 1
        check_sizes(q_len, kv_len, 1, heads)
        if self._analytic:
            known = type(q_len) is int and type(kv_len) is int  # not a symbol of torch.compile
            return _window(self, q_len, kv_len, size) if known else self._build(Grid(q_len, kv_len, *size), heads)
        place = str(torch.device("cpu" if device is None else device))
        if place != "meta" and not (torch.compiler.is_compiling() or shapes_only()):
            return _cached(self, q_len, kv_len, heads, size, place)
        text = self.to_json()
        indptr, indices, tile_ids, tiles, *transposed = pattern_lists(text, q_len, kv_len, heads, *size, place)
        return BlockMask.unchecked(
            (transposed[0], transposed[1], transposed[2]),
            q_len=q_len,
            kv_len=kv_len,
            block_size=size,
            heads=heads,
            indptr=indptr,
            indices=indices,
            tile_ids=tile_ids,
            tiles=tiles,
        )

    def for_inputs(
        self,
        query: Tensor,
        key: Tensor,
        *,
        scale: float | None = None,
        key_mask: Tensor | None = None,
        within: BlockMask | None = None,
    ) -> BlockMask:
        """The mask for these queries and keys, which most patterns only measure; `ContentPattern` looks at them.

        Args:
            query, key: (B, Hq, Nq, D), (B, Hkv, Nk, D).
            scale: of the scores, default 1 / sqrt(D).
            key_mask: bool (B, Nk), True = attend.
            within: the pairs that count anyway (causality, lengths): a choice is made among them. The result need not
                lie within; the caller joins the two.
        """
        return self.block_mask(query.shape[2], key.shape[2], num_heads=query.shape[1], device=query.device)

    def aligned(self, alignment: str | None) -> Pattern:
        """This pattern, with an alignment where it goes by positions and names none: what a call says for it."""
        if alignment is None or getattr(self, "alignment", "") is not None:
            return self
        return self._with(alignment=alignment)

    def _with(self, **options: Any) -> Pattern:
        # dataclasses.replace cannot be traced by torch.compile.
        return type(self)(**{option: getattr(self, option) for option in self.kinds} | options)

    @property
    def by_content(self) -> bool:
        """Whether the mask depends on what queries and keys hold."""
        return False

    @property
    def bounds_loss(self) -> bool:
        """Whether it promises how much of the softmax is lost at most, which it can for scores without a bias."""
        return False

    def check_scores(self, *modifiers: object) -> None:
        """Raise UnsupportedError for a bias or a soft cap, which are not None, that would break that promise."""
        if self.bounds_loss and any(modifier is not None for modifier in modifiers):
            raise UnsupportedError(
                f"{self.name}: tau_max bounds what the scores of queries and keys say, and a bias or softcap changes "
                "them; leave tau_max out, or pass what the bias hides as a mask"
            )

    def _refusal(self) -> UnsupportedError:
        return UnsupportedError(
            f"{self.name} chooses by what queries and keys hold; lengths do not say enough. Use attention(mask=...) or "
            "for_inputs(query, key)"
        )

    def _alike_in_part(self, first: int) -> bool:
        """Whether queries from position `first` on, alone and with every key, see what they see in the whole."""
        return True

    @property
    def _may_begin_later(self) -> bool:
        """Whether tokens before the sequence's first one can be padding: not those of an image."""
        return True

    @property
    def _analytic(self) -> bool:
        """Whether the mask needs no lists, for any length."""
        return False

    @property
    def _heads_differ(self) -> bool:
        """Whether the mask is not the same for all heads."""
        return False

    def _build(self, grid: Grid, num_heads: int) -> BlockMask:
        """The mask, on the CPU, in the given or another block size.

        This asks `visible` about every pair; a pattern that knows which blocks it touches builds them faster.
        """

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            seen = self.visible(i, j, grid.q_len, grid.kv_len, 0)
            for head in range(1, num_heads):
                seen = torch.where(h == head, self.visible(i, j, grid.q_len, grid.kv_len, head), seen)
            return seen

        return BlockMask.from_predicate(
            visible,
            q_len=grid.q_len,
            kv_len=grid.kv_len,
            heads=num_heads,
            block_size=(grid.block_q, grid.block_k),
        )

    def _proposals(self, q_len: int, kv_len: int) -> Sequence[Proposal] | None:
        """Disjoint parts that have the pattern's pairs together, each in its own order of tokens; None: there are none.

        Whether they pay is counted, see orders.py.
        """
        return None

    @property
    def _own_block(self) -> tuple[int, int]:
        return (128, 128)

    def __and__(self, other: Pattern) -> Pattern:
        return _combined("and", self, other) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other: Pattern) -> Pattern:
        return _combined("or", self, other) if isinstance(other, Pattern) else NotImplemented

    # --- checks of options ---

    def _at_least(self, **least: int) -> None:
        for option, low in least.items():
            check_range(self, option, low)

    def _check_alignment(self) -> None:
        if getattr(self, "alignment") is not None:  # noqa: B009 (a field of some subclasses)
            check_choice(self, "alignment", ALIGNMENTS)

    def _offset(self, q_len: int, kv_len: int) -> int:
        """The key at which query 0 stands, by the option `alignment` of some subclasses."""
        alignment: str | None = getattr(self, "alignment")  # noqa: B009
        if alignment is None and q_len != kv_len and 0 not in (q_len, kv_len):
            raise InputError(
                f"{self.name} goes by positions, and where {q_len} queries stand among {kv_len} keys is not known; say "
                "alignment='top_left' (query i at key i) or 'bottom_right' (the last query at the last key), in the "
                "pattern or as causal_alignment of the call"
            )
        return alignment_offset(alignment, q_len, kv_len)

    def _check_block(self) -> None:
        block: int = getattr(self, "block")  # noqa: B009 (a field of some subclasses)
        if block % 16 or not 16 <= block <= 256:
            raise InputError(f"{self.name}: block must be a multiple of 16 from 16 to 256, got {block}")

    def _check_square(self, q_len: int, kv_len: int) -> None:
        if q_len != kv_len:
            raise InputError(
                f"{self.name} is defined for self-attention; got {q_len} queries and {kv_len} keys. Make them one "
                "sequence (add_bias_kv and add_zero_attn append keys), or choose a pattern with an alignment"
            )


# --- words for builders ---


def empty_mask(grid: Grid, **window: Any) -> BlockMask:
    """A mask without lists for a grid, with a window or none."""
    return BlockMask(grid.q_len, grid.kv_len, (grid.block_q, grid.block_k), **window)


def along_diagonals(pattern: Pattern, within: BlockMask) -> BlockMask:
    """The mask of a pattern that depends on j - i alone."""
    q_len, kv_len = within.q_len, within.kv_len
    return BlockMask.from_predicate(
        lambda b, h, i, j: pattern.visible(i, j, q_len, kv_len),
        q_len=q_len,
        kv_len=kv_len,
        block_size=within.block_size,
        within=within,
        shift_invariant=True,
    )


def by_classes(
    visible: Callable[[Tensor, Tensor], Tensor], grid: Grid, rows: Tensor, cols: Tensor, *keys: Tensor
) -> BlockMask:
    """The mask of visible(i, j) in the given blocks, ascending; blocks with equal keys have equal tiles."""
    return BlockMask.from_lists(
        grid,
        predicate_lists(lambda b, h, i, j: visible(i, j), grid, 1, 1, rows, cols, keys=(*keys, grid.edge(rows, cols))),
    )


def cross(queries: Tensor, keys: Tensor, grid: Grid) -> BlockMask:
    """Everything that some queries see, and that sees some keys. queries: bool [q_len], keys: bool [kv_len]."""
    size = (grid.block_q, grid.block_k)
    columns = BlockMask.from_dense(keys, q_len=grid.q_len, block_size=size)
    rows = BlockMask.from_dense(queries, q_len=grid.kv_len, block_size=size[::-1])
    return columns | rows.swapped()


def _combined(operator: str, *parts: Pattern) -> Pattern:
    joined: Pattern = Pattern.compounds["combined"](operator, parts)
    return joined


# --- kept lists, and what torch.compile sees of them ---


@functools.lru_cache(maxsize=128)
def _window(pattern: Pattern, q_len: int, kv_len: int, size: tuple[int, int]) -> BlockMask:
    """A mask without lists, which is the same on every device and for every head."""
    return pattern._build(Grid(q_len, kv_len, *size), 1)


@functools.lru_cache(maxsize=32)
def _cached(
    pattern: Pattern,
    q_len: int,
    kv_len: int,
    heads: int,
    size: tuple[int, int],
    device: str,
    explicit: bool = False,
) -> BlockMask:
    # In a thread of its own, because what is kept must not depend on the modes of whoever asks first: inference mode,
    # fake tensors, transforms and default devices all belong to one thread.
    with ThreadPoolExecutor(max_workers=1) as clean:
        return clean.submit(_make, pattern, Grid(q_len, kv_len, *size), heads, device, explicit).result()


def _make(pattern: Pattern, grid: Grid, heads: int, device: str, explicit: bool) -> BlockMask:
    mask = pattern._build(grid, heads).reblock((grid.block_q, grid.block_k))
    if not explicit and worth_an_order(grid.q_len, grid.kv_len):
        mask = arranged(mask, pattern._proposals(grid.q_len, grid.kv_len))
    mask = (mask.explicit() if explicit else mask).to(device)
    if mask.union is not None:
        for part in mask.union:
            if part.mask.indices is not None:
                part.mask.keep_transposed()
        return mask
    if mask.indices is not None and (explicit or mask.indices.numel() < MANY_BLOCKS):
        mask.keep_transposed()
    return mask


# One operator that looks the lists up. Their number depends on the lengths, so these become constants of the graph.
@torch.library.custom_op("efficient_attn::pattern_lists", mutates_args=())
def pattern_lists(
    pattern: str, q_len: int, kv_len: int, heads: int, block_q: int, block_k: int, device: str
) -> list[Tensor]:
    """indptr, indices, tile_ids, tiles and the three transposed lists of a pattern given as JSON."""
    if device == "meta":
        return _shapes_of(_all_lists(pattern, q_len, kv_len, heads, block_q, block_k, "cpu"), device)
    return [tensor.clone() for tensor in _all_lists(pattern, q_len, kv_len, heads, block_q, block_k, device)]


@pattern_lists.register_fake
def _pattern_lists_fake(
    pattern: str, q_len: int, kv_len: int, heads: int, block_q: int, block_k: int, device: str
) -> list[Tensor]:
    sizes = int(q_len), int(kv_len), int(heads), int(block_q), int(block_k)
    return _shapes_of(_all_lists(pattern, *sizes, device="cpu"), device)


def _shapes_of(lists: list[Tensor], device: str) -> list[Tensor]:
    """Tensors like these on a device, of no value: under a tracer, or on meta."""
    return [torch.empty(tensor.shape, dtype=tensor.dtype, device=device) for tensor in lists]


def _all_lists(
    pattern: str, q_len: int, kv_len: int, heads: int, block_q: int, block_k: int, device: str
) -> list[Tensor]:
    size = (block_q, block_k)
    mask = _cached(Pattern.from_json(pattern), q_len, kv_len, heads, size, device, explicit=True)
    return [tensor for tensor in mask.arrays(True) if isinstance(tensor, Tensor)]
