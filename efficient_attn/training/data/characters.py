"""Characters of a text, to be predicted one by one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...errors import InputError
from .base import Batch, Splits, existing


@dataclass(frozen=True)
class Pieces:
    """Every `length + 1` characters from one place on, a place each `stride` characters.

    Batches have `tokens` int64 `[B, length]` and `targets`, the same one character later.
    """

    text: Tensor  # uint8 or int32 [characters]
    length: int
    stride: int

    def __len__(self) -> int:
        return max(0, (len(self.text) - self.length - 1) // self.stride + 1)

    def batch(self, indices: Tensor) -> Batch:
        pieces = self.text[indices[:, None] * self.stride + torch.arange(self.length + 1)].long()
        return {"tokens": pieces[:, :-1].contiguous(), "targets": pieces[:, 1:].contiguous()}


def load(data: Path | None = None, *, length: int = 256) -> Splits:
    """The characters of a text file; None for the descriptions of the Python language that come with Python.

    The last tenth of the text is the test and the tenth before it the validation. `about` has `vocabulary` and
    `characters`, whose place is the token.

    Raises:
        InputError: no such file, not UTF-8, or shorter than a piece in each split.
    """
    if data is None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
    else:
        try:
            text = existing(data, "a text file").read_text(encoding="utf-8")
        except (UnicodeDecodeError, IsADirectoryError) as error:
            raise InputError(f"--data {data} is not a text file in UTF-8 ({error})") from error
    characters = sorted(set(text))
    if len(text) < 12 * (length + 1):
        raise InputError(f"{len(text)} characters are too few for pieces of {length}; give more text or less length")
    token = {character: place for place, character in enumerate(characters)}
    tokens = torch.tensor([token[character] for character in text], dtype=torch.int32)
    valid, test = len(text) * 8 // 10, len(text) * 9 // 10
    return Splits(
        Pieces(tokens[:valid], length, stride=max(1, length // 4)),
        Pieces(tokens[valid:test], length, stride=length),
        Pieces(tokens[test:], length, stride=length),
        about={"vocabulary": len(characters), "characters": characters, "max_length": length},
    )
