"""python -m efficient_attn.patterns [--length N] [SPEC ...]: draw patterns; without a spec, one of each kind."""

from __future__ import annotations

import argparse

import torch

from ..methods import parse
from . import (
    LSH,
    Axial,
    BigBird,
    Causal,
    DeepSpeedBigBird,
    DeepSpeedBSLongformer,
    DeepSpeedFixed,
    DeepSpeedLocalSlidingWindow,
    DeepSpeedVariable,
    Dense,
    Dilated,
    Documents,
    Fixed,
    Longformer,
    Neighborhood,
    Pattern,
    PrefixLM,
    SlidingWindow,
    SortedBuckets,
    Strided,
    TopKBlocks,
    TopPBlocks,
    per_head,
)

LENGTH = 484  # a square image
EXAMPLES = (
    Dense(),
    Causal(),
    SlidingWindow(left=160, right=40),
    Dilated(left=20, right=20, dilation=8),
    Strided(stride=64),
    Fixed(stride=64, summary=8),
    Longformer(window=128, global_tokens=16, global_indices=(200, 201, 202)),
    PrefixLM(prefix=150),
    Documents(lengths=(100, 234, 150)),
    Neighborhood(kernel=(9, 7)),
    Axial(),
    BigBird(block=16, window=3, global_blocks=2, random_blocks=3),
    DeepSpeedFixed(),
    DeepSpeedVariable(local_window_blocks=(2, 4, 8), global_block_indices=(5,)),
    DeepSpeedBigBird(),
    DeepSpeedBSLongformer(global_block_indices=(0, 20)),
    DeepSpeedLocalSlidingWindow(),
    TopKBlocks(block=16, blocks=5),
    TopPBlocks(block=16, mass=0.8),
    LSH(n_buckets=8, rounds=1),
    SortedBuckets(size=64),
    BigBird(block=16) & Causal(),
    per_head([Strided(stride=64, part="summary"), Strided(stride=64, part="local")]),
)


def main() -> None:
    """Draw what the command line names, or every example."""
    arguments = argparse.ArgumentParser(prog="python -m efficient_attn.patterns", description=__doc__)
    arguments.add_argument("spec", nargs="*", help="such as bigbird:block=16")
    arguments.add_argument("--length", type=int, default=LENGTH, help="tokens of the sequence")
    given = arguments.parse_args()
    for spec in given.spec or EXAMPLES:
        pattern = parse(spec) if isinstance(spec, str) else spec
        if not isinstance(pattern, Pattern):
            arguments.error(f"{spec} is no pattern")
        print(f"{pattern!r}\n{draw(pattern, given.length)}\n")


def draw(pattern: Pattern, length: int) -> str:
    """The mask of a pattern, for twelve heads; one that looks at queries and keys gets a random walk to look at."""
    walk = torch.randn(1, 12, length, 16, generator=torch.Generator().manual_seed(0)).cumsum(2)
    return repr(pattern.for_inputs(walk, walk))


if __name__ == "__main__":
    main()
