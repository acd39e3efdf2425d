"""Block sizes, warps and stages of every kernel, by head dimension, dtype and compute capability.

Defaults come from a small table, checked without a GPU by tests/kernels/triton/test_triton_compile.py (no spills,
shared memory within the limit). EFFICIENT_ATTN_AUTOTUNE=1 times the candidates of `candidates` once for each case on
the machine at hand and keeps the winner in a private directory (efficient_attn/backends/triton/autotune.py).
"""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

HEAD_DIMS = (64, 128, 256)  # the tables' steps: a head dimension takes the row of the least that holds it
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may use

# Whether the forward loads whole tiles of keys and values by TMA (compute capability 9.0 and newer) unless autotuning
# finds otherwise. Off until a GPU has shown that it helps: `make gpu-check` measures both.
DESCRIPTORS = False


class Config(NamedTuple):
    """Queries and keys of a tile, warps of a program, tiles in flight, and whether keys and values come by TMA."""

    block_q: int
    block_k: int
    warps: int
    stages: int
    descriptors: bool = False


INTERPRETER = Config(64, 64, 4, 1)  # few, large steps: the interpreter pays for every operation

# kernel -> capability -> half precision? -> largest of D and Dv, padded -> configuration
TABLE: dict[str, dict[int, dict[bool, dict[int, Config]]]] = {
    "forward": {
        80: {
            True: {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 2), 256: Config(64, 32, 8, 2)},
            False: {64: Config(64, 32, 8, 2), 128: Config(32, 32, 8, 2), 256: Config(16, 16, 8, 1)},
        },
        90: {
            True: {64: Config(128, 128, 8, 3), 128: Config(128, 128, 8, 2), 256: Config(128, 64, 8, 2)},
            False: {64: Config(64, 32, 8, 2), 128: Config(32, 32, 8, 2), 256: Config(16, 16, 8, 1)},
        },
    },
    "key_gradient": {
        80: {
            True: {64: Config(32, 128, 8, 2), 128: Config(32, 64, 8, 2), 256: Config(16, 32, 8, 1)},
            False: {64: Config(32, 32, 8, 1), 128: Config(16, 32, 8, 2), 256: Config(16, 16, 8, 2)},
        },
        90: {
            True: {64: Config(64, 128, 8, 2), 128: Config(32, 128, 8, 2), 256: Config(16, 32, 8, 1)},
            False: {64: Config(32, 32, 8, 1), 128: Config(32, 32, 8, 2), 256: Config(16, 16, 8, 2)},
        },
    },
    "query_gradient": {
        80: {
            True: {64: Config(64, 64, 8, 2), 128: Config(64, 32, 4, 2), 256: Config(64, 32, 8, 1)},
            False: {64: Config(32, 32, 8, 1), 128: Config(32, 32, 8, 2), 256: Config(16, 16, 8, 2)},
        },
        90: {
            True: {64: Config(128, 64, 8, 2), 128: Config(128, 64, 8, 2), 256: Config(32, 64, 4, 1)},
            False: {64: Config(32, 32, 8, 1), 128: Config(32, 32, 8, 2), 256: Config(16, 16, 8, 2)},
        },
    },
    "bias_gradient": {
        80: {
            True: {64: Config(64, 64, 8, 1), 128: Config(32, 64, 8, 1), 256: Config(16, 32, 8, 1)},
            False: {64: Config(32, 32, 8, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)},
        },
        90: {
            True: {64: Config(64, 64, 8, 1), 128: Config(64, 64, 8, 1), 256: Config(64, 32, 8, 1)},
            False: {64: Config(32, 32, 8, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)},
        },
    },
    "statistics": {
        80: {
            True: {64: Config(64, 64, 8, 1), 128: Config(32, 64, 8, 1), 256: Config(16, 32, 8, 1)},
            False: {64: Config(32, 32, 8, 1), 128: Config(16, 16, 8, 1), 256: Config(16, 16, 8, 1)},
        },
        90: {
            True: {64: Config(64, 64, 8, 1), 128: Config(64, 64, 8, 1), 256: Config(64, 32, 8, 1)},
            False: {64: Config(32, 32, 8, 1), 128: Config(16, 16, 8, 1), 256: Config(16, 16, 8, 1)},
        },
    },
}
# What takes registers of its own, halved or replaced: kernel, capability, half precision?, padded size -> with a
# list, with bias or dropout, None where the row above serves.
VARIANTS: dict[tuple[str, int, bool, int], tuple[Config | None, Config | None]] = {
    ("forward", 90, True, 64): (None, Config(128, 64, 8, 3)),
    ("forward", 90, True, 128): (Config(128, 64, 8, 3), Config(64, 64, 8, 2)),
    ("forward", 90, True, 256): (Config(64, 64, 8, 2), Config(64, 32, 8, 2)),
    ("forward", 80, True, 64): (None, Config(64, 64, 4, 2)),
    ("forward", 80, True, 128): (None, Config(64, 64, 8, 2)),
    ("forward", 80, True, 256): (Config(64, 32, 8, 1), Config(32, 32, 8, 2)),
    ("key_gradient", 90, True, 64): (None, Config(32, 64, 4, 2)),
    ("key_gradient", 90, True, 128): (None, Config(32, 64, 8, 2)),
    ("query_gradient", 90, True, 64): (None, Config(64, 64, 8, 2)),
    ("query_gradient", 90, True, 128): (None, Config(64, 64, 8, 2)),
    ("key_gradient", 80, True, 64): (None, Config(32, 64, 8, 1)),
    ("query_gradient", 90, True, 256): (Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
    ("query_gradient", 80, True, 64): (None, Config(64, 32, 4, 2)),
    ("key_gradient", 80, True, 128): (None, Config(16, 64, 8, 1)),
    ("forward", 90, False, 128): (Config(32, 32, 8, 1), None),
    ("key_gradient", 90, False, 128): (Config(16, 16, 8, 2), None),
    ("query_gradient", 90, False, 128): (Config(16, 16, 8, 2), None),
}
# Tokens in an order, whose rows have an address each: those that fit where neither of these does.
ORDERED: dict[tuple[str, int, bool, int], Config] = {
    ("forward", 80, True, 256): Config(32, 32, 8, 1),
    ("forward", 80, False, 128): Config(32, 32, 8, 1),
    ("forward", 90, False, 128): Config(32, 32, 8, 1),
    ("query_gradient", 80, True, 256): Config(32, 32, 8, 1),
    ("query_gradient", 90, True, 256): Config(32, 32, 4, 1),
    ("key_gradient", 90, True, 256): Config(16, 16, 8, 1),
}


# Where the compiler of a version of Triton needs more registers than the tables above allow for: version -> kernel,
# capability, half precision?, padded size, "plain", "listed", "extras" or "ordered" (see `default_config`) -> what
# serves in their place. A version that is not here takes the rows of the one before it.
BY_VERSION: dict[str, dict[tuple[str, int, bool, int, str], Config]] = {
    "3.6": {
        ("forward", 90, True, 128, "plain"): Config(128, 64, 8, 3),
        ("forward", 80, True, 128, "extras"): Config(64, 64, 8, 1),
        ("forward", 80, True, 128, "ordered"): Config(64, 64, 8, 1),
        ("forward", 80, False, 256, "listed"): Config(16, 32, 8, 1),
        ("forward", 90, False, 256, "listed"): Config(16, 32, 8, 1),
        ("forward", 90, False, 256, "ordered"): Config(16, 32, 8, 1),
        ("query_gradient", 80, True, 256, "extras"): Config(32, 32, 8, 1),
        ("query_gradient", 80, False, 128, "ordered"): Config(16, 32, 8, 2),
        ("bias_gradient", 80, False, 128, "extras"): Config(32, 16, 8, 1),
        ("bias_gradient", 90, False, 64, "extras"): Config(32, 16, 8, 1),
        ("statistics", 80, True, 128, "extras"): Config(32, 32, 8, 1),
    },
    "3.7": {
        ("forward", 90, True, 128, "plain"): Config(128, 64, 8, 3),
        ("forward", 80, False, 256, "listed"): Config(16, 32, 8, 1),
        ("query_gradient", 80, False, 128, "ordered"): Config(16, 32, 8, 2),
    },
    "3.9": {
        ("forward", 90, False, 64, "ordered"): Config(64, 32, 8, 1),
        ("forward", 90, False, 128, "extras"): Config(32, 32, 8, 1),
        ("key_gradient", 80, False, 128, "ordered"): Config(16, 16, 8, 1),
        ("key_gradient", 90, True, 128, "extras"): Config(32, 32, 8, 2),
        ("key_gradient", 90, True, 256, "extras"): Config(16, 16, 8, 1),
        ("query_gradient", 90, True, 128, "extras"): Config(64, 32, 8, 2),
        ("query_gradient", 90, True, 256, "plain"): Config(32, 32, 8, 1),
        ("query_gradient", 90, True, 256, "ordered"): Config(32, 16, 4, 1),
        ("statistics", 80, True, 128, "plain"): Config(16, 64, 8, 1),
        ("statistics", 80, True, 128, "extras"): Config(32, 32, 4, 1),
        ("statistics", 80, True, 256, "extras"): Config(16, 32, 4, 1),
    },
}


class LinearConfig(NamedTuple):
    """Rows of a chunk, columns of a program, its warps, and chunks in flight: with two, the rows of the next chunk are
    copied to shared memory (cp.async) while this one is multiplied."""

    chunk: int
    columns: int
    warps: int
    stages: int


# capability -> half precision? -> largest of features and Dv -> configuration; see linear_attention.py
LINEAR: dict[int, dict[bool, dict[int, LinearConfig]]] = {
    80: {
        True: {64: LinearConfig(32, 16, 4, 2), 128: LinearConfig(16, 32, 8, 2), 256: LinearConfig(16, 16, 8, 2)},
        False: {64: LinearConfig(16, 16, 8, 2), 128: LinearConfig(16, 16, 8, 2), 256: LinearConfig(16, 16, 8, 1)},
    },
    90: {
        True: {64: LinearConfig(32, 64, 4, 2), 128: LinearConfig(16, 32, 4, 2), 256: LinearConfig(16, 32, 8, 2)},
        False: {64: LinearConfig(16, 16, 8, 2), 128: LinearConfig(16, 16, 8, 2), 256: LinearConfig(16, 16, 8, 1)},
    },
}


def _minor(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def of_version(version: str) -> dict[tuple[str, int, bool, int, str], Config]:
    """The rows of `BY_VERSION` that serve a version of Triton, such as 3.9.0."""
    known = [name for name in BY_VERSION if _minor(name) <= _minor(version)]
    return BY_VERSION[max(known or list(BY_VERSION)[:1], key=_minor)]


@cache
def version_rows() -> dict[tuple[str, int, bool, int, str], Config]:
    """The rows of the version that is installed."""
    import triton

    return of_version(triton.__version__)


def step(size: int) -> int:
    """The row of the tables for a head dimension, or a number of features."""
    return next(step for step in HEAD_DIMS if size <= step)


def tabled(capability: int) -> int:
    """The compute capability whose row serves: 80 or 90, which stands for everything newer too."""
    return 90 if capability >= 90 else 80


def linear_config(features: int, half: bool, capability: int) -> LinearConfig:
    """The table's configuration of linear attention; `capability` as in `default_config`."""
    if capability == 0:
        return LinearConfig(64, 64, 4, 1)
    return LINEAR[tabled(capability)][half][step(features)]


def padded(size: int) -> int:
    """The power of two that holds a head dimension, at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def default_config(
    kernel: str,
    head_dim: int,
    half: bool,
    capability: int,
    listed: bool = False,
    extras: bool = False,
    ordered: bool = False,
) -> Config:
    """The table's configuration; `capability` is 80 or 90 (anything newer than 90 uses that of 90), 0 the interpreter.

    listed: under a list. extras: with a bias or dropout. ordered: of tokens in an order, which takes as much.
    """
    # Beyond 128 dimensions the registers would not suffice.
    described = kernel == "forward" and half and head_dim <= 128 and capability not in range(1, 90)
    if capability == 0:
        return INTERPRETER._replace(descriptors=DESCRIPTORS and described)
    capability, size = tabled(capability), step(head_dim)
    with_list, with_extras = VARIANTS.get((kernel, capability, half, size), (None, None))
    in_order = ORDERED.get((kernel, capability, half, size)) if ordered else None
    kind = "ordered" if ordered else "extras" if extras else "listed" if listed else "plain"
    chosen = (
        version_rows().get((kernel, capability, half, size, kind))
        or in_order
        or ((extras or ordered) and with_extras)
        or (listed and with_list)
        or TABLE[kernel][capability][half][size]
    )
    return chosen._replace(descriptors=DESCRIPTORS and described)


def fit(config: Config, block_q: int | None, block_k: int | None) -> Config:
    """The configuration with tiles that divide blocks of (block_q, block_k); None: there is no list."""
    if block_q is not None:
        config = config._replace(block_q=min(config.block_q, block_q & -block_q))
    if block_k is not None:
        config = config._replace(block_k=min(config.block_k, block_k & -block_k))
    return config


def for_single_pairs(config: Config, kernel: str, head_dim: int) -> Config:
    """The configuration of a call that draws random words for each pair alone, as dropout does of tokens in an order:
    where that leaves too few registers, tiles of half the queries, and if those are few, keys."""
    if head_dim > 64 or kernel in ("key_gradient", "bias_gradient"):
        block_k = config.block_k if config.block_q * config.block_k > 1024 else max(16, config.block_k // 2)
        config = config._replace(block_q=max(16, config.block_q // 2), block_k=block_k)
    return config


def short(config: Config, rows: int) -> Config:
    """The configuration with a query tile of at most `rows`, a power of two; a small tile has work for four warps, and
    those have registers for 64 keys."""
    config = config._replace(block_q=min(config.block_q, rows))
    return config if rows > 32 else config._replace(block_k=min(config.block_k, 64), warps=4)


def square(config: Config, head_dim: int) -> Config:
    """The configuration with square tiles, for sums along diagonals; wide heads leave registers for 16."""
    side = min(config.block_q, config.block_k, 64 if head_dim <= 128 else 16)
    return config._replace(block_q=side, block_k=side)


def safe(config: Config, walk_q: int | None = None, walk_k: int | None = None) -> Config:
    """The configuration for the second launch of a masked call: the same results a program, in smaller steps."""
    block_q = config.block_q if walk_q is None else min(walk_q, config.block_q)
    block_k = config.block_k if walk_k is None else min(walk_k, config.block_k)
    return Config(block_q, block_k, 8, 1)


def candidates(kernel: str, default: Config, head_dim: int, element_size: int, capability: int) -> list[Config]:
    """What autotuning tries: the default first, then what fits the shared memory by a rough count of tiles in flight;
    the forward with TMA too where there is one."""
    limit = SHARED_MEMORY[tabled(capability)]
    found = [default]
    for block_q in (32, 64, 128):
        for block_k in (32, 64, 128):
            for warps in (4, 8):
                for stages in (1, 2, 3, 4):
                    tiles = 2 * max(block_q, block_k) * stages + 2 * min(block_q, block_k)
                    if tiles * padded(head_dim) * element_size <= limit and block_q * block_k >= 32 * 64:
                        found.append(Config(block_q, block_k, warps, stages))
    if kernel == "forward" and element_size == 2 and head_dim <= 128 and capability >= 90:
        found += [config._replace(descriptors=True) for config in found]
    return list(dict.fromkeys(found))
