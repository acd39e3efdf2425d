"""What every data set is to the trainer: a length, and batches by index that depend on nothing but the index.

Because ``batch(indices)`` draws no random numbers, the place in an epoch is all there is to remember for a resume, and
a batch can be made ahead of time in another thread.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import InputError

Batch = dict[str, Tensor]

PAD = 0


class Dataset(Protocol):
    """Examples by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> Batch:
        """The examples at ``indices`` (int64 ``[B]``), stacked: tensors of shape ``[B, ...]``."""
        ...


@dataclass(frozen=True)
class Splits:
    """Training, validation and test examples, and what a model must know about them (classes, vocabulary, ...);
    ``about["baselines"]`` holds test metrics that a model must beat."""

    train: Dataset
    valid: Dataset
    test: Dataset
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("train", "valid", "test"):
            if not len(getattr(self, name)):
                raise InputError(f"the {name} split is empty; give more data")


class Tensors:
    """Tensors whose first dimension counts examples."""

    def __init__(self, **tensors: Tensor) -> None:
        lengths = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(lengths.values())) != 1:
            raise InputError(f"every tensor needs one entry an example, given lengths {lengths}")
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def batch(self, indices: Tensor) -> Batch:
        return {name: tensor[indices] for name, tensor in self.tensors.items()}

    def subset(self, indices: Tensor) -> Tensors:
        return Tensors(**self.batch(indices))


class Sequences:
    """Token sequences of different lengths, one after the other in memory; a batch is padded to its longest.

    ``batch`` gives ``tokens`` int64 ``[B, N]``, ``lengths`` int64 ``[B]`` and whatever else was given, one value an
    example.
    """

    def __init__(self, tokens: Tensor, lengths: Tensor, **others: Tensor) -> None:
        if int(lengths.sum()) != len(tokens) or any(len(other) != len(lengths) for other in others.values()):
            raise InputError("Sequences needs as many tokens as the lengths add up to, and one other value an example")
        self.tokens, self.lengths, self.others = tokens, lengths, others
        self.starts = lengths.cumsum(0) - lengths

    @classmethod
    def of(cls, sequences: Sequence[Tensor], **others: Tensor) -> Sequences:
        return cls(torch.cat(list(sequences)), torch.tensor([len(sequence) for sequence in sequences]), **others)

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: Tensor) -> Batch:
        lengths = self.lengths[indices]
        columns = torch.arange(int(lengths.max()))
        inside = columns < lengths[:, None]  # [B, N]
        places = torch.where(inside, self.starts[indices][:, None] + columns, 0)
        tokens = torch.where(inside, self.tokens[places].long(), PAD)
        return {"tokens": tokens, "lengths": lengths, **{name: other[indices] for name, other in self.others.items()}}

    def subset(self, indices: Tensor) -> Sequences:
        return Sequences.of(
            [self.tokens[self.starts[i] : self.starts[i] + self.lengths[i]] for i in indices.tolist()],
            **{name: other[indices] for name, other in self.others.items()},
        )


class Subset:
    """Some examples of a data set that are read only when they are asked for."""

    def __init__(self, data: Dataset, indices: Tensor) -> None:
        self.data, self.indices = data, indices

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: Tensor) -> Batch:
        return self.data.batch(self.indices[indices])


def split_indices(count: int, seed: int, *, valid: float = 0.1, test: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """A random division of ``range(count)``, the same for the same seed; raises ``InputError`` below 3 examples."""
    if count < 3:
        raise InputError(f"{count} examples cannot be divided into train, valid and test; give at least 3")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held_valid, held_test = max(1, round(count * valid)), max(1, round(count * test))
    return order[held_valid + held_test :], order[:held_valid], order[held_valid : held_valid + held_test]


def few_per_class(labels: Tensor, indices: Tensor, count: int, seed: int) -> Tensor:
    """Those of ``indices`` that are the first ``count`` of their class in a seeded order."""
    indices = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))]
    kept = []
    for label in labels[indices].unique().tolist():
        of_class = indices[labels[indices] == label]
        if len(of_class) < count:
            raise InputError(f"class {label} has {len(of_class)} training examples, {count} a class were asked for")
        kept.append(of_class[:count])
    return torch.cat(kept)


def majority(train: Tensor, test: Tensor) -> float:
    """The accuracy on the test labels of always naming the class that is most frequent in training."""
    return (test == torch.bincount(train).argmax()).double().mean().item()


def existing(path: Path, what: str) -> Path:
    """``path``, or ``InputError`` when nothing is there."""
    if not path.exists():
        raise InputError(f"--data {path} does not exist; name {what}")
    return path


def read_csv(path: Path, delimiter: str = ",") -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a table in UTF-8, with or without a byte order mark, or in UTF-16 with one.

    Raises:
        InputError: another encoding, or a row that is shorter or longer than the header.
    """
    raw = path.read_bytes()
    encoding = "UTF-16" if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "UTF-8"
    try:
        text = raw.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not in {encoding} ({error}); save it as UTF-8") from None
    limit = csv.field_size_limit(len(text) + 1)  # a cell may be as long as the file
    try:
        header, *rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row] or [[]]
    except csv.Error as error:
        raise InputError(f"{path} is no table: {error}") from error
    finally:
        csv.field_size_limit(limit)
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise InputError(f"{path}, row {number} has {len(row)} columns instead of {len(header)}")
    return header, rows
