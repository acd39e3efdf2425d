"""Lists that a program of torch.compile makes: those made outside of it, whatever sizes the program was made for.

A program is made anew for the second number of blocks, with sizes left open; there PyTorch 2.13 returns a view in
another dtype with a wrong width, which took different tiles for equal ones.
"""

from __future__ import annotations

import pytest
import torch

from efficient_attn.masks import BlockMask
from efficient_attn.masks.lists import count_bits, unique_rows, words_of


def random_tiles(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 16, 2), generator=generator).to(torch.uint8)


def test_tiles_are_told_apart_in_a_program_made_for_other_numbers_of_them():
    torch._dynamo.reset()

    def classes(tiles):
        return (count_bits(tiles), *unique_rows(words_of(tiles)))

    compiled = torch.compile(classes, backend="aot_eager")
    for count in (9, 6, 14):
        tiles = random_tiles(count, seed=count)
        tiles[-1] = tiles[0]
        for found, expected in zip(compiled(tiles), classes(tiles), strict=True):
            assert torch.equal(found, expected)


def documents(length: int) -> BlockMask:
    number = torch.arange(length) * 7 // length
    return BlockMask.from_predicate(
        lambda b, h, i, j: number[i] == number[j], q_len=length, kv_len=length, block_size=(16, 16)
    )


def random_pairs(length: int) -> BlockMask:
    pairs = torch.rand(length, length, generator=torch.Generator().manual_seed(length)) < 0.6
    return BlockMask.from_dense(pairs, block_size=(16, 16))


MADE = {
    "predicate": documents,
    "and": lambda n: random_pairs(n) & documents(n),
    "or": lambda n: random_pairs(n) | documents(n),
    "not": lambda n: ~random_pairs(n),
    "window": lambda n: random_pairs(n).with_window((9, 3)),
    "lengths": lambda n: random_pairs(n) & BlockMask.from_lengths(torch.tensor([n, n // 2]), q_len=n, kv_len=n),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
@pytest.mark.filterwarnings("ignore")
def test_masks_made_in_a_program_show_the_same_pairs(make):
    torch._dynamo.reset()
    compiled = torch.compile(lambda n: make(n).to_dense(), backend="aot_eager")
    for length in (64, 112, 77):
        assert torch.equal(compiled(length), make(length).to_dense())
