"""Sparse patterns by name: small frozen objects that say which pairs are visible and build the `BlockMask`.

`python -m efficient_attn.patterns` draws them. Patterns combine with & and |, compare, hash, and round-trip as JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import InputError
from .mask_build import Grid, pointers, ragged_range
from .mask_check import ALIGNMENTS, check_block_size, check_sizes, is_int
from .masks import BlockMask, BlockSize

MAX_OPTION = 2**31 - 1
MAX_DEPTH = 16  # of combined patterns in JSON


@dataclass(frozen=True)
class Pattern:
    """Base of all patterns. A subclass has options with defaults, `visible` (its definition) and `_build`."""

    name: ClassVar[str]

    def visible(self, i: Tensor, j: Tensor, q_len: int, kv_len: int) -> Tensor:
        """The definition: whether query i sees key j, for index tensors that broadcast."""
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
            num_heads: number of query heads. The patterns of this file are the same for all, and broadcast.
            block_size: default: the pattern's own, or (128, 128).
            device: where lists go; default the CPU. A pattern that is a window has none.

        Raises:
            MaskError: lengths or a block size out of range.
        """
        size = self._own_block if block_size is None else check_block_size(block_size)
        check_sizes(q_len, kv_len)
        if self._analytic:
            return self._build(q_len, kv_len, size)
        place = str(torch.device("cpu" if device is None else device))
        if not torch.compiler.is_compiling():
            return _cached(self, q_len, kv_len, size, place)
        text = Pattern.to_json(self)
        indptr, indices, tile_ids, tiles, *transposed = pattern_lists(text, q_len, kv_len, *size, place)
        return BlockMask._trusted(
            {"lists": tuple(transposed)},
            q_len=q_len,
            kv_len=kv_len,
            block_size=size,
            indptr=indptr,
            indices=indices,
            tile_ids=tile_ids,
            tiles=tiles,
        )

    @property
    def _analytic(self) -> bool:
        """Whether the mask needs no lists, for any length."""
        return False

    def _build(self, q_len: int, kv_len: int, block_size: tuple[int, int]) -> BlockMask:
        """The mask, on the CPU, in the given or another block size."""
        raise NotImplementedError

    @property
    def _own_block(self) -> tuple[int, int]:
        return (128, 128)

    def __and__(self, other: Pattern) -> Pattern:
        return Combined("and", (self, other)) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other: Pattern) -> Pattern:
        return Combined("or", (self, other)) if isinstance(other, Pattern) else NotImplemented

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
                raise InputError(f"this is not JSON ({error}); a pattern is like {Dense().to_json()}") from None
        return _from_dict(text, depth=0)

    def _check(self, **least: int) -> None:
        for name, low in least.items():
            value = getattr(self, name)
            if not is_int(value) or not low <= value <= MAX_OPTION:
                note = " (-1: unlimited)" if low == -1 else ""
                raise InputError(f"{self.name}: {name} must be an int >= {low}{note}, got {value!r}")

    def _check_alignment(self, value: Any) -> None:
        if value not in ALIGNMENTS:
            raise InputError(f"{self.name}: alignment must be one of {', '.join(ALIGNMENTS)}, got {value!r}")


# --- windows: no lists, no memory ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dense(Pattern):
    """Every pair."""

    name: ClassVar[str] = "dense"

    @property
    def _analytic(self) -> bool:
        return True

    def visible(self, i: Tensor, j: Tensor, q_len: int, kv_len: int) -> Tensor:
        return (i >= 0) & (j >= 0)

    def _build(self, q_len: int, kv_len: int, block_size: tuple[int, int]) -> BlockMask:
        return BlockMask(q_len, kv_len, block_size)


@dataclass(frozen=True)
class SlidingWindow(Pattern):
    """Keys from i - left to i + right; -1 is unlimited. Beltagy et al. 2020, arXiv:2004.05150.

    alignment: where the window starts when q_len != kv_len: "top_left" puts query i at key i, "bottom_right" the last
    query at the last key.
    """

    name: ClassVar[str] = "sliding_window"
    left: int = 128
    right: int = 128
    alignment: str = "top_left"

    def __post_init__(self) -> None:
        self._check(left=-1, right=-1)
        self._check_alignment(self.alignment)

    @property
    def _analytic(self) -> bool:
        return True

    def visible(self, i: Tensor, j: Tensor, q_len: int, kv_len: int) -> Tensor:
        away = j - i - _offset(self.alignment, q_len, kv_len)
        return ((away >= -self.left) | (self.left < 0)) & ((away <= self.right) | (self.right < 0))

    def _build(self, q_len: int, kv_len: int, block_size: tuple[int, int]) -> BlockMask:
        offset = _offset(self.alignment, q_len, kv_len)
        return BlockMask(q_len, kv_len, block_size, window=(self.left, self.right), window_offset=offset)


@dataclass(frozen=True)
class Causal(Pattern):
    """Keys j <= i ("top_left"), or j <= i + kv_len - q_len ("bottom_right"): a query and what came before it."""

    name: ClassVar[str] = "causal"
    alignment: str = "top_left"

    def __post_init__(self) -> None:
        self._check_alignment(self.alignment)

    @property
    def _analytic(self) -> bool:
        return True

    def visible(self, i: Tensor, j: Tensor, q_len: int, kv_len: int) -> Tensor:
        return j <= i + _offset(self.alignment, q_len, kv_len)

    def _build(self, q_len: int, kv_len: int, block_size: tuple[int, int]) -> BlockMask:
        return SlidingWindow(-1, 0, self.alignment)._build(q_len, kv_len, block_size)


# --- patterns of tokens ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dilated(Pattern):
    """Every dilation-th key: `left` of them before query i, `right` after, and i. Beltagy et al. 2020, section 3.1."""

    name: ClassVar[str] = "dilated"
    left: int = 64
    right: int = 64
    dilation: int = 2

    def __post_init__(self) -> None:
        self._check(left=0, right=0, dilation=1)

    def visible(self, i: Tensor, j: Tensor, q_len: int, kv_len: int) -> Tensor:
        away = j - i
        reach = (away >= -self.left * self.dilation) & (away <= self.right * self.dilation)
        return reach & (away % self.dilation == 0)

    def _build(self, q_len: int, kv_len: int, block_size: tuple[int, int]) -> BlockMask:
        longest = max(q_len, kv_len)
        left, right = (min(side * self.dilation, longest) for side in (self.left, self.right))
        return _along_diagonals(self, SlidingWindow(left, right)._build(q_len, kv_len, block_size))


@dataclass(frozen=True)
class Strided(Pattern):
    """The last `stride` keys and every stride-th one before. Child et al. 2019, arXiv:1904.10509, section 4.3.

    causal: as in the paper; False looks ahead in the same way.
    """

    name: ClassVar[str] = "strided"
    stride: int = 128
    causal: bool = True

    def __post_init__(self) -> None:
        self._check(stride=1)
        if not isinstance(self.causal, bool):
            raise InputError(f"{self.name}: causal must be a bool, got {self.causal!r}")

    def visible(self, i: Tensor, j: Tensor, q_len: int, kv_len: int) -> Tensor:
        away = i - j
        seen = (away.abs() <= self.stride) | (away % self.stride == 0)
        return seen & (away >= 0) if self.causal else seen

    def _build(self, q_len: int, kv_len: int, block_size: tuple[int, int]) -> BlockMask:
        reach = Causal() if self.causal else Dense()
        return _along_diagonals(self, reach._build(q_len, kv_len, block_size))


@dataclass(frozen=True)
class Longformer(Pattern):
    """window / 2 keys to each side, and global tokens that see and are seen by all. Beltagy et al. 2020.

    window: even, both sides together as in the paper; global_tokens: the first so many positions.
    """

    name: ClassVar[str] = "longformer"
    window: int = 512
    global_tokens: int = 1

    def __post_init__(self) -> None:
        self._check(window=0, global_tokens=0)
        if self.window % 2:
            raise InputError(f"{self.name}: window counts both sides and must be even, got {self.window}")

    def visible(self, i: Tensor, j: Tensor, q_len: int, kv_len: int) -> Tensor:
        near = (i - j).abs() <= self.window // 2
        return near | (i < self.global_tokens) | (j < self.global_tokens)

    def _build(self, q_len: int, kv_len: int, block_size: tuple[int, int]) -> BlockMask:
        side, first = self.window // 2, self.global_tokens
        near = SlidingWindow(side, side)._build(q_len, kv_len, block_size)
        seen_by_all = BlockMask.from_lengths([min(first, kv_len)], q_len=q_len, kv_len=kv_len, block_size=block_size)
        every = BlockMask.from_lengths([min(first, q_len)], q_len=kv_len, kv_len=q_len, block_size=block_size[::-1])
        return near | seen_by_all | every.swapped()


# --- patterns of blocks ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BigBird(Pattern):
    """Blocks of `block` tokens: a window, global ones and random ones. Zaheer et al. 2020, arXiv:2007.14062.

    Block r of the queries sees
        window: the blocks r - window // 2 .. r + window // 2 (window is odd);
        global_blocks: half of them, rounded up, at the start and the rest at the end; they see every block too;
        random_blocks: others, drawn for each query block from `seed`, or all others when there are fewer.
    """

    name: ClassVar[str] = "bigbird"
    block: int = 64
    window: int = 3
    global_blocks: int = 2
    random_blocks: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        self._check(block=16, window=1, global_blocks=0, random_blocks=0, seed=0)
        if self.block % 16 or self.block > 256:
            raise InputError(f"{self.name}: block must be a multiple of 16 from 16 to 256, got {self.block}")
        if self.window % 2 == 0:
            raise InputError(f"{self.name}: window is centred on the query block and must be odd, got {self.window}")

    @property
    def _own_block(self) -> tuple[int, int]:
        return (self.block, self.block)

    def visible(self, i: Tensor, j: Tensor, q_len: int, kv_len: int) -> Tensor:
        grid = Grid(q_len, kv_len, self.block, self.block)
        seen = torch.zeros(grid.n_q, grid.n_k, dtype=torch.bool)
        indptr, indices = self._blocks(grid)
        seen[torch.arange(grid.n_q).repeat_interleave(indptr.diff()), indices] = True
        return seen.to(i.device)[i // self.block, j // self.block]

    def _build(self, q_len: int, kv_len: int, block_size: tuple[int, int]) -> BlockMask:
        indptr, indices = self._blocks(Grid(q_len, kv_len, self.block, self.block))
        return BlockMask.from_csr(indptr, indices, q_len=q_len, kv_len=kv_len, block_size=self.block)

    def _blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """indptr and indices of the visible blocks."""
        n_q, n_k, half = grid.n_q, grid.n_k, self.window // 2
        if n_q == 0 or n_k == 0:
            return torch.zeros(n_q + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        first, last = -(-self.global_blocks // 2), self.global_blocks // 2
        row = torch.arange(n_q)
        every_row = (row < first) | (row >= n_q - last)
        # Three ranges that may overlap: global at the start, window, global at the end.
        starts = torch.stack([torch.zeros_like(row), row - half, torch.full_like(row, n_k - last)], 1)
        stops = torch.stack([torch.full_like(row, first), row + half + 1, torch.full_like(row, n_k)], 1)
        starts[every_row, 0], stops[every_row, 0] = 0, n_k
        starts, stops = starts.clamp(0, n_k), stops.clamp(0, n_k)
        which, indices = ragged_range(starts.flatten(), (stops - starts).clamp(min=0).flatten())
        rows, cols = which // 3, indices
        listed = torch.cat([rows * n_k + cols, self._random(starts, stops, n_k)]).unique()
        counts = torch.bincount(listed // n_k, minlength=n_q)
        return pointers(counts), listed % n_k

    def _random(self, starts: Tensor, stops: Tensor, n_k: int) -> Tensor:
        """row * n_k + column of the random blocks, outside the ranges (rows, 3) that a row has anyway."""
        starts, order = starts.sort(1)
        taken_until = stops.gather(1, order).cummax(1).values
        starts = torch.maximum(starts, torch.cat([torch.zeros_like(starts[:, :1]), taken_until[:, :-1]], 1))
        widths = (taken_until - starts).clamp(min=0)  # of the ranges made disjoint, ascending
        free = n_k - widths.sum(1)
        row = torch.arange(starts.shape[0])
        ranks: list[Tensor] = []  # chosen so far in each row, as ranks among the free blocks, ascending
        chosen = []
        for draw in range(min(self.random_blocks, int(free.max()))):
            enough = free > draw
            rank = _hashed(self.seed, row, draw) % (free - draw).clamp(min=1)
            for earlier in ranks:
                rank = rank + (rank >= earlier)
            rank = torch.where(enough, rank, n_k)
            ranks = list(torch.stack([*ranks, rank]).sort(0).values)
            column = rank
            for start, width in zip(starts.unbind(1), widths.unbind(1), strict=True):
                column = torch.where((width > 0) & (column >= start), column + width, column)
            chosen.append((row * n_k + column)[enough])
        return torch.cat([row.new_empty(0), *chosen])


def _hashed(seed: int, row: Tensor, draw: int) -> Tensor:
    """62 random bits for each row, a pure function of its arguments on every platform (splitmix64)."""
    word = (row * 1_000_003 + draw) * -7046029254386353131 + seed * 0x2545F491
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        word = (word ^ ((word >> shift) & (2 ** (64 - shift) - 1))) * factor
    return (word ^ ((word >> 31) & (2**33 - 1))) & (2**62 - 1)


# --- combinations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Combined(Pattern):
    """Several patterns joined by & ("and") or | ("or")."""

    name: ClassVar[str] = "combined"
    operator: str = "and"
    parts: tuple[Pattern, ...] = ()

    def __post_init__(self) -> None:
        if self.operator not in ("and", "or"):
            raise InputError(f"{self.name}: operator must be 'and' or 'or', got {self.operator!r}")
        if not isinstance(self.parts, tuple) or not self.parts or not all(isinstance(p, Pattern) for p in self.parts):
            raise InputError(f"{self.name}: parts must be a tuple of at least one pattern, got {self.parts!r}")

    def visible(self, i: Tensor, j: Tensor, q_len: int, kv_len: int) -> Tensor:
        return functools.reduce(self._join, (part.visible(i, j, q_len, kv_len) for part in self.parts))

    @property
    def _analytic(self) -> bool:
        return self.operator == "and" and all(part._analytic for part in self.parts)

    @property
    def _own_block(self) -> tuple[int, int]:
        sizes = [part._own_block for part in self.parts if not part._analytic] or [(128, 128)]
        return (min(q for q, _ in sizes), min(k for _, k in sizes))

    def _build(self, q_len: int, kv_len: int, block_size: tuple[int, int]) -> BlockMask:
        return functools.reduce(self._join, (part._build(q_len, kv_len, block_size) for part in self.parts))

    def _join(self, a: Any, b: Any) -> Any:
        return (operator.and_ if self.operator == "and" else operator.or_)(a, b)


PATTERNS: dict[str, type[Pattern]] = {
    cls.name: cls for cls in (Dense, Causal, SlidingWindow, Dilated, Strided, Longformer, BigBird, Combined)
}

OPTIONS = {name: tuple(field.name for field in dataclasses.fields(cls)) for name, cls in PATTERNS.items()}


def _write(value: int | bool | str | tuple[Pattern, ...]) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join([Pattern.to_json(part) for part in value]) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _from_dict(given: Any, depth: int) -> Pattern:
    if not isinstance(given, Mapping) or not isinstance(given.get("pattern"), str):
        raise InputError(f"a pattern in JSON is an object with a 'pattern' name, like {Dense().to_json()}")
    cls = PATTERNS.get(given["pattern"])
    if cls is None:
        raise InputError(f"no pattern is called {given['pattern']!r}; there are {', '.join(PATTERNS)}")
    options = {str(name): value for name, value in given.items() if name != "pattern"}
    known = OPTIONS[cls.name]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise InputError(f"{cls.name} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    if cls is Combined and isinstance(options.get("parts"), list | tuple):
        if depth >= MAX_DEPTH:
            raise InputError(f"patterns are combined more than {MAX_DEPTH} deep")
        options["parts"] = tuple(_from_dict(part, depth + 1) for part in options["parts"])
    return cls(**options)


def _offset(alignment: str, q_len: int, kv_len: int) -> int:
    return kv_len - q_len if alignment == "bottom_right" else 0


def _along_diagonals(pattern: Pattern, within: BlockMask) -> BlockMask:
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


@functools.lru_cache(maxsize=32)
def _cached(
    pattern: Pattern, q_len: int, kv_len: int, size: tuple[int, int], device: str, explicit: bool = False
) -> BlockMask:
    # In a thread of its own, because what is kept must not depend on the modes of whoever asks first: inference mode,
    # fake tensors, transforms and default devices all belong to one thread.
    with ThreadPoolExecutor(max_workers=1) as clean:
        return clean.submit(_make, pattern, q_len, kv_len, size, device, explicit).result()


def _make(pattern: Pattern, q_len: int, kv_len: int, size: tuple[int, int], device: str, explicit: bool) -> BlockMask:
    mask = pattern._build(q_len, kv_len, size).reblock(size)
    mask = (mask.explicit() if explicit else mask).to(device)
    if mask.indptr is not None:
        mask._transposed["lists"] = mask.transposed()  # by itself it keeps nothing while anything is being traced
    return mask


# What torch.compile and torch.export see of a pattern with lists: one operator that looks the lists up. Their number
# depends on the lengths, so that these become constants of the graph.
@torch.library.custom_op("efficient_attn::pattern_lists", mutates_args=())
def pattern_lists(pattern: str, q_len: int, kv_len: int, block_q: int, block_k: int, device: str) -> list[Tensor]:
    """indptr, indices, tile_ids, tiles and the three transposed lists of a pattern given as JSON."""
    return [tensor.clone() for tensor in _all_lists(pattern, q_len, kv_len, block_q, block_k, device)]


@pattern_lists.register_fake
def _pattern_lists_fake(pattern: str, q_len: int, kv_len: int, block_q: int, block_k: int, device: str) -> list[Tensor]:
    lists = _all_lists(pattern, int(q_len), int(kv_len), block_q, block_k, device)
    return [torch.empty(tensor.shape, dtype=tensor.dtype, device=device) for tensor in lists]


def _all_lists(pattern: str, q_len: int, kv_len: int, block_q: int, block_k: int, device: str) -> list[Tensor]:
    mask = _cached(Pattern.from_json(pattern), q_len, kv_len, (block_q, block_k), device, explicit=True)
    return [tensor for tensor in mask.arrays(True) if isinstance(tensor, Tensor)]


def main() -> None:
    """Draw every pattern."""
    examples = (
        Dense(),
        Causal(),
        SlidingWindow(left=160, right=40),
        Dilated(left=20, right=20, dilation=8),
        Strided(stride=64),
        Longformer(window=128, global_tokens=16),
        BigBird(block=16, window=3, global_blocks=2, random_blocks=3),
        BigBird(block=16) & Causal(),
    )
    for pattern in examples:
        print(f"{pattern}\n{pattern.block_mask(512, 512)}\n")


if __name__ == "__main__":
    main()
