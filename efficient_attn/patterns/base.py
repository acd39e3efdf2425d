"""What a pattern is: a small frozen object that says which pairs are visible and builds the `BlockMask`.

A pattern has a name, options with defaults, its definition (`visible`) and a builder (`_build`). Here is what all of
them share: the calls, the kept lists, what torch.compile sees of them, JSON, and the words of which builders are made.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..defaults import ALIGNMENTS
from ..errors import InputError, UnsupportedError
from ..masks import BlockMask, BlockSize
from ..masks.lists import Grid, predicate_lists
from ..masks.rules import check_block_size, check_sizes, is_int

MAX_OPTION = 2**31 - 1
MAX_DEPTH = 16  # of combined patterns in JSON
MANY_BLOCKS = 2**20  # to transpose more takes a while: done when a backward asks for it first
EXAMPLE = '{"pattern": "bigbird", "block": 64}'

PATTERNS: dict[str, type[Pattern]] = {}
OPTIONS: dict[str, tuple[str, ...]] = {}
P = TypeVar("P", bound="type[Pattern]")


def register(cls: P) -> P:
    """Class decorator: make a pattern known to JSON, by its name."""
    PATTERNS[cls.name] = cls
    OPTIONS[cls.name] = tuple(field.name for field in dataclasses.fields(cls))
    return cls


@dataclass(frozen=True)
class Pattern:
    """Base of all patterns. A subclass has options with defaults, `visible` (its definition) and `_build`."""

    name: ClassVar[str]

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
            return self._build(Grid(q_len, kv_len, *size), heads)
        place = str(torch.device("cpu" if device is None else device))
        if not torch.compiler.is_compiling():
            return _cached(self, q_len, kv_len, heads, size, place)
        text = Pattern.to_json(self)
        indptr, indices, tile_ids, tiles, *transposed = pattern_lists(text, q_len, kv_len, heads, *size, place)
        return BlockMask._trusted(
            {"lists": tuple(transposed)},
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

    @property
    def by_content(self) -> bool:
        """Whether the mask depends on what queries and keys hold."""
        return False

    def _refusal(self) -> UnsupportedError:
        return UnsupportedError(
            f"{self.name} chooses by what queries and keys hold; lengths do not say enough. Use attention(mask=...) or "
            "for_inputs(query, key)"
        )

    @property
    def _analytic(self) -> bool:
        """Whether the mask needs no lists, for any length."""
        return False

    @property
    def _heads_differ(self) -> bool:
        """Whether the mask is not the same for all heads."""
        return False

    def _build(self, grid: Grid, num_heads: int) -> BlockMask:
        """The mask, on the CPU, in the given or another block size."""
        raise NotImplementedError

    @property
    def _own_block(self) -> tuple[int, int]:
        return (128, 128)

    def __and__(self, other: Pattern) -> Pattern:
        return _combined("and", self, other) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other: Pattern) -> Pattern:
        return _combined("or", self, other) if isinstance(other, Pattern) else NotImplemented

    def to_json(self) -> str:
        """The pattern with all its options as a JSON object, which `from_json` reads."""
        # Written by hand because torch.compile traces it; no option is a string that would need escapes.
        options = "".join([f', "{name}": {_write(getattr(self, name))}' for name in OPTIONS[self.name]])
        return f'{{"pattern": "{self.name}"{options}}}'

    @staticmethod
    def from_json(text: str | Mapping[str, Any]) -> Pattern:
        """The pattern that a JSON object (its text, or the decoded mapping) describes; left-out options have defaults.

        Raises:
            InputError: not such an object, unknown names or options, values of a wrong type or out of range.
        """
        if isinstance(text, str):
            try:
                text = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                raise InputError(f"this is not JSON ({error}); a pattern is like {EXAMPLE}") from None
        return _from_dict(text, depth=0)

    # --- checks of options -------------------------------------------------------------------------------------------

    def _check(self, **least: int) -> None:
        for name, low in least.items():
            value = getattr(self, name)
            if not is_int(value) or not low <= value <= MAX_OPTION:
                note = " (-1: unlimited)" if low == -1 else ""
                raise InputError(f"{self.name}: {name} must be an int >= {low}{note}, got {value!r}")

    def _check_tuples(self, **least: int) -> None:
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(is_int(v) and low <= v <= MAX_OPTION for v in value):
                raise InputError(f"{self.name}: {name} must be a tuple of ints >= {low}, got {value!r}")

    def _check_bools(self, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{self.name}: {name} must be a bool, got {getattr(self, name)!r}")

    def _check_choice(self, name: str, allowed: Sequence[str]) -> None:
        if getattr(self, name) not in allowed:
            raise InputError(f"{self.name}: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    def _check_alignment(self) -> None:
        self._check_choice("alignment", ALIGNMENTS)

    def _check_block(self) -> None:
        self._check(block=16)
        block: int = getattr(self, "block")  # noqa: B009 (a field of some subclasses)
        if block % 16 or block > 256:
            raise InputError(f"{self.name}: block must be a multiple of 16 from 16 to 256, got {block}")

    def _check_square(self, q_len: int, kv_len: int) -> None:
        if q_len != kv_len:
            raise InputError(
                f"{self.name} is defined for self-attention; got {q_len} queries and {kv_len} keys. Make them one "
                "sequence (add_bias_kv and add_zero_attn append keys), or choose a pattern with an alignment"
            )


# --- words for builders ----------------------------------------------------------------------------------------------


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
    return BlockMask._of_lists(
        grid,
        predicate_lists(lambda b, h, i, j: visible(i, j), grid, 1, 1, rows, cols, keys=(*keys, grid.edge(rows, cols))),
    )


def cross(tokens: Tensor, grid: Grid) -> BlockMask:
    """Everything that some tokens see and are seen by. tokens: bool [max(q_len, kv_len)]."""
    size = (grid.block_q, grid.block_k)
    columns = BlockMask.from_dense(tokens[: grid.kv_len], q_len=grid.q_len, block_size=size)
    rows = BlockMask.from_dense(tokens[: grid.q_len], q_len=grid.kv_len, block_size=size[::-1])
    return columns | rows.swapped()


# --- JSON ------------------------------------------------------------------------------------------------------------


def _combined(operator: str, *parts: Pattern) -> Pattern:
    cls: Any = PATTERNS["combined"]
    joined: Pattern = cls(operator, parts)
    return joined


def _write(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join([_write(part) for part in value]) + "]"
    if isinstance(value, Pattern):
        return Pattern.to_json(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _from_dict(given: Any, depth: int) -> Pattern:
    if not isinstance(given, Mapping) or not isinstance(given.get("pattern"), str):
        raise InputError(f"a pattern in JSON is an object with a 'pattern' name, like {EXAMPLE}")
    cls = PATTERNS.get(given["pattern"])
    if cls is None:
        raise InputError(f"no pattern is called {given['pattern']!r}; there are {', '.join(PATTERNS)}")
    options = {str(name): value for name, value in given.items() if name != "pattern"}
    known = OPTIONS[cls.name]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise InputError(f"{cls.name} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    for name, value in options.items():
        if isinstance(value, list | tuple):
            options[name] = tuple(_part(item, depth) if name == "parts" else item for item in value)
    return cls(**options)


def _part(given: Any, depth: int) -> Pattern:
    if depth >= MAX_DEPTH:
        raise InputError(f"patterns are combined more than {MAX_DEPTH} deep")
    return _from_dict(given, depth + 1)


# --- kept lists, and what torch.compile sees of them -----------------------------------------------------------------


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
    mask = (mask.explicit() if explicit else mask).to(device)
    if mask.indices is not None and (explicit or mask.indices.numel() < MANY_BLOCKS):
        mask._transposed["lists"] = mask.transposed()  # by itself it keeps nothing while anything is being traced
    return mask


# One operator that looks the lists up. Their number depends on the lengths, so these become constants of the graph.
@torch.library.custom_op("efficient_attn::pattern_lists", mutates_args=())
def pattern_lists(
    pattern: str, q_len: int, kv_len: int, heads: int, block_q: int, block_k: int, device: str
) -> list[Tensor]:
    """indptr, indices, tile_ids, tiles and the three transposed lists of a pattern given as JSON."""
    return [tensor.clone() for tensor in _all_lists(pattern, q_len, kv_len, heads, block_q, block_k, device)]


@pattern_lists.register_fake
def _pattern_lists_fake(
    pattern: str, q_len: int, kv_len: int, heads: int, block_q: int, block_k: int, device: str
) -> list[Tensor]:
    lists = _all_lists(pattern, int(q_len), int(kv_len), int(heads), block_q, block_k, device)
    return [torch.empty(tensor.shape, dtype=tensor.dtype, device=device) for tensor in lists]


def _all_lists(
    pattern: str, q_len: int, kv_len: int, heads: int, block_q: int, block_k: int, device: str
) -> list[Tensor]:
    size = (block_q, block_k)
    mask = _cached(Pattern.from_json(pattern), q_len, kv_len, heads, size, device, explicit=True)
    return [tensor for tensor in mask.arrays(True) if isinstance(tensor, Tensor)]
