"""Numbers in one notation, to be translated to another: digits, English and German words.

    342  <->  three hundred forty-two  <->  dreihundertzweiundvierzig

The rules are few and without exceptions that a table does not hold, yet not word by word: German says the ones before
the tens. Every number below a million is an example, so that the test can hold numbers that were never seen.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from ...errors import InputError
from .base import Batch, Splits
from .captions import pad
from .text import BYTE_VOCABULARY, encode

LIMIT = 1_000_000

# fmt: off
ENGLISH_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
ENGLISH_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
GERMAN_ONES = (
    "null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn", "elf", "zwölf",
    "dreizehn", "vierzehn", "fünfzehn", "sechzehn", "siebzehn", "achtzehn", "neunzehn",
)
GERMAN_TENS = ("", "", "zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig")
# fmt: on


def english(number: int) -> str:
    """`342 -> "three hundred forty-two"`, for 0 to 999,999."""
    if number < 20:
        return ENGLISH_ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return ENGLISH_TENS[tens] + (f"-{ENGLISH_ONES[ones]}" if ones else "")
    size, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    many, rest = divmod(number, size)
    return f"{english(many)} {name}" + (f" {english(rest)}" if rest else "")


def german(number: int) -> str:
    """`342 -> "dreihundertzweiundvierzig"`, for 0 to 999,999."""
    if number < 20:
        return GERMAN_ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return (f"{_german_many(ones)}und" if ones else "") + GERMAN_TENS[tens]
    size, name = (100, "hundert") if number < 1000 else (1000, "tausend")
    many, rest = divmod(number, size)
    return _german_many(many) + name + (german(rest) if rest else "")


def _german_many(number: int) -> str:
    """A number before another word: `eins` loses its s."""
    words = german(number)
    return words.removesuffix("s") if words.endswith("eins") else words


NOTATIONS: dict[str, Callable[[int], str]] = {"digits": str, "english": english, "german": german}


class Numbers:
    """Batches have `source` and `target` int64 `[B, N]` (bytes between marks) with `source_lengths` and
    `target_lengths`."""

    def __init__(self, numbers: torch.Tensor, source: str, target: str, max_length: int) -> None:
        self.numbers, self.source, self.target, self.max_length = numbers, source, target, max_length

    def __len__(self) -> int:
        return len(self.numbers)

    def batch(self, indices: torch.Tensor) -> Batch:
        numbers = self.numbers[indices].tolist()
        batch: Batch = {}
        for name, notation in (("source", self.source), ("target", self.target)):
            write = NOTATIONS[notation]
            texts = pad([encode(write(number), self.max_length, marks=True) for number in numbers])
            batch |= {name: texts["tokens"], f"{name}_lengths": texts["lengths"]}
        return batch


def load(
    seed: int, *, source: str = "english", target: str = "digits", below: int = 10_000, train: int = 8_000
) -> Splits:
    """Numbers below `below`, `train` of them to learn from and the others, up to 1,000 each, held out.

    Raises:
        InputError: an unknown notation, the same twice, or more training numbers than there are.
    """
    for notation in (source, target):
        if notation not in NOTATIONS:
            raise InputError(f"there is no notation {notation!r}; choose from {', '.join(NOTATIONS)}")
    if source == target:
        raise InputError(f"source and target are both {source!r}; choose two of {', '.join(NOTATIONS)}")
    if not 2 < below <= LIMIT or not 0 < train <= below - 2:
        raise InputError(f"below must be 3 to {LIMIT} and train less than it by 2, given {below=}, {train=}")
    numbers = torch.randperm(below, generator=torch.Generator().manual_seed(seed))
    held_out = min(1_000, (below - train) // 2)
    names = [NOTATIONS[name](number) for name in (source, target) for number in range(min(below, 1000))]
    longest = max(len(name.encode()) for name in names)
    if below > 1000:
        longest = 2 * longest + len(" thousand ")
    bounds = (0, train, train + held_out, train + 2 * held_out)
    about = {"vocabulary": BYTE_VOCABULARY, "max_length": longest + 2}
    first, valid, test = (Numbers(numbers[start:end], source, target, longest + 2) for start, end in pairwise(bounds))
    return Splits(first, valid, test, about)
