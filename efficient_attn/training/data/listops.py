"""ListOps: nested operators on digits, whose value is the class (Nangia and Bowman 2018).

    [MAX 2 9 [MIN 4 7 ] 0 ]  ->  9

Rules, with the sizes of the Long Range Arena (Tay et al. 2021): a node above the greatest depth is an operator with
probability 1/4 and else a digit; an operator is MIN, MAX, MED (median, rounded down) or SM (sum modulo 10), each as
likely, with 2 to `max_args` arguments; a tree is kept when its number of tokens lies between `min_length` and
`max_length`. Operators open and close with a token each.

Trees are grown level by level, thousands at once: the nodes of a level are arrays in which the children of a node
stand together. Sizes come first, so that the many trees of a wrong size cost no more than that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import InputError
from .base import Sequences, Splits, majority

Ints = NDArray[np.int64]

OPERATORS = ("MIN", "MAX", "MED", "SM")
# 0 pads; then the digits, the operators' opening tokens, and the closing one.
VOCABULARY = ("<pad>", *map(str, range(10)), *(f"[{name}" for name in OPERATORS), "]")
DIGIT, OPEN, CLOSE = 1, 11, 15

OPERATOR_SHARE = 0.25
TREES_AT_ONCE = 4096
# Trees grown without any of the right size before the sizes are called impossible.
FRUITLESS_TREES = 400_000


@dataclass
class Level:
    """The nodes of one depth of many trees, in order of their parents."""

    tree: Ints  # which tree a node belongs to
    arguments: Ints  # number of children, 0 for a digit
    kind: Ints  # the digit, or the operator's index

    @property
    def first(self) -> Ints:
        """Index in the next level of each node's first child."""
        return np.cumsum(self.arguments) - self.arguments

    def keep(self, nodes: NDArray[np.bool_], rename: Ints) -> Level:
        return Level(rename[self.tree[nodes]], self.arguments[nodes], self.kind[nodes])


def generate(
    count: int, seed: int, *, min_length: int = 500, max_length: int = 2000, max_depth: int = 10, max_args: int = 10
) -> Sequences:
    """`count` examples: batches have `tokens`, `lengths` and `label` (int64 `[B]`, 0 to 9).

    Raises `InputError` for sizes that no tree, or hardly any, can have.
    """
    if not 1 <= min_length <= max_length or max_depth < 1 or max_args < 2 or count < 1:
        raise InputError(
            f"ListOps needs count >= 1, 1 <= min_length <= max_length, max_depth >= 1 and max_args >= 2, "
            f"given {count=}, {min_length=}, {max_length=}, {max_depth=}, {max_args=}"
        )
    rng = np.random.default_rng(seed)
    tokens: list[Ints] = []
    lengths: list[Ints] = []
    labels: list[Ints] = []
    found = grown = 0
    while found < count:
        # A single digit has one token: where that is too few, only trees that begin with an operator are grown.
        trees = _grow(rng, max_depth, max_args, root_is_operator=min_length > 1 and max_depth > 1)
        levels, sizes = _of_length(trees, min_length, max_length)
        grown += TREES_AT_ONCE
        if grown >= FRUITLESS_TREES and found + len(sizes) == 0:
            raise InputError(
                f"of {grown} trees of depth <= {max_depth} with <= {max_args} arguments none had {min_length} to "
                f"{max_length} tokens; allow other lengths, more depth or more arguments"
            )
        if len(sizes):
            tokens.append(_tokens(levels, sizes))
            lengths.append(sizes)
            labels.append(_values(levels)[0])
            found += len(sizes)
    kept = np.concatenate(lengths)[:count]
    return Sequences(
        torch.from_numpy(np.concatenate(tokens)[: kept.sum()].astype(np.uint8)),
        torch.from_numpy(kept),
        label=torch.from_numpy(np.concatenate(labels)[:count]),
    )


def load(
    seed: int,
    *,
    train: int = 96_000,
    held_out: int = 2_000,
    min_length: int = 500,
    max_length: int = 2000,
    max_depth: int = 10,
    max_args: int = 10,
) -> Splits:
    """Training examples, and `held_out` for validation and for test, from independent streams of random numbers."""
    sizes = {"min_length": min_length, "max_length": max_length, "max_depth": max_depth, "max_args": max_args}
    counts = (train, held_out, held_out)
    first, valid, test = (generate(count, 3 * seed + part, **sizes) for part, count in enumerate(counts))
    baselines = {"majority": majority(first.others["label"], test.others["label"])}
    about = {"vocabulary": len(VOCABULARY), "classes": 10, "max_length": max_length, "baselines": baselines}
    return Splits(first, valid, test, about)


def text(tokens: torch.Tensor) -> str:
    """Tokens (int64 `[N]`) as they are written."""
    return " ".join(VOCABULARY[token] for token in tokens.tolist() if token)


def _grow(rng: np.random.Generator, max_depth: int, max_args: int, *, root_is_operator: bool) -> list[Level]:
    """Random trees, of whatever size, top level first."""
    tree = np.arange(TREES_AT_ONCE)
    levels: list[Level] = []
    for depth in range(1, max_depth + 1):
        nodes = len(tree)
        operator = (rng.random(nodes) < OPERATOR_SHARE) & (depth < max_depth)
        if depth == 1 and root_is_operator:
            operator[:] = True
        arguments = np.where(operator, rng.integers(2, max_args + 1, nodes), 0)
        kind = np.where(operator, rng.integers(len(OPERATORS), size=nodes), rng.integers(10, size=nodes))
        levels.append(Level(tree, arguments, kind))
        tree = np.repeat(tree, arguments)
        if not len(tree):
            break
    return levels


def _of_length(levels: list[Level], min_length: int, max_length: int) -> tuple[list[Level], Ints]:
    """The trees with the right number of tokens, numbered anew, and those numbers of tokens."""
    sizes = np.zeros(TREES_AT_ONCE, np.int64)
    for level in levels:
        np.add.at(sizes, level.tree, np.where(level.arguments > 0, 2, 1))
    right = (sizes >= min_length) & (sizes <= max_length)
    rename = np.cumsum(right) - 1
    return [level.keep(right[level.tree], rename) for level in levels], sizes[right]


def _sums(level: Level, below: Ints) -> Ints:
    """For each node, the sum of `below` over its children (0 without)."""
    ends = np.concatenate([[0], np.cumsum(below)])
    sums: Ints = ends[level.first + level.arguments] - ends[level.first]
    return sums


def _values(levels: list[Level]) -> list[Ints]:
    """What each node evaluates to, level by level."""
    values: list[Ints] = [np.zeros(0, np.int64)]
    for level in reversed(levels):
        result = level.kind.copy()
        operators = np.flatnonzero(level.arguments)
        if len(operators):
            arguments, first = level.arguments[operators], level.first[operators]
            parent = np.repeat(np.arange(len(operators)), arguments)
            ordered = values[0][np.lexsort((values[0], parent))]
            low, high = ordered[first + (arguments - 1) // 2], ordered[first + arguments // 2]
            by_kind = [ordered[first], ordered[first + arguments - 1], (low + high) // 2]
            by_kind.append(np.add.reduceat(ordered, first) % 10)
            result[operators] = np.choose(level.kind[operators], by_kind)
        values.insert(0, result)
    return values[:-1]


def _tokens(levels: list[Level], sizes: Ints) -> Ints:
    """All trees' tokens, one tree after the other."""
    spans: list[Ints] = [np.zeros(0, np.int64)]  # number of tokens of each node with what is below it
    for level in reversed(levels):
        spans.insert(0, np.where(level.arguments > 0, 2 + _sums(level, spans[0]), 1))
    tokens = np.empty(sizes.sum(), np.int64)
    place = np.cumsum(sizes) - sizes
    for level, span, below in zip(levels, spans, spans[1:], strict=False):
        operator = level.arguments > 0
        tokens[place] = np.where(operator, OPEN, DIGIT) + level.kind
        tokens[place[operator] + span[operator] - 1] = CLOSE
        parent = np.repeat(np.arange(len(place)), level.arguments)
        before = np.cumsum(below) - below  # tokens of all earlier nodes of the next level
        place = place[parent] + 1 + before - before[level.first[parent]] if len(below) else place[:0]
    return tokens
