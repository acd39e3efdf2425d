"""What every data set is to the trainer: a length, and batches by index that depend on nothing but the index.

Because `batch(indices)` draws no random numbers, the place in an epoch is all there is to remember for a resume, and
a batch can be made ahead of time in another thread.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import InputError

Batch = dict[str, Tensor]

PAD = 0
SPLITS = ("train", "valid", "test")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "val", "validation", "dev"), "valid"),
    **dict.fromkeys(("test", "testing"), "test"),
}
NO_TEXT = (".xlsx", ".xls", ".ods", ".parquet", ".feather", ".zip", ".gz")
CHUNK = 256  # examples of a split that are read at once for its fingerprint


class Dataset(Protocol):
    """Examples by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> Batch:
        """The examples at `indices` (int64 `[B]`), stacked: tensors of shape `[B, ...]`."""
        ...


@dataclass(frozen=True)
class Splits:
    """Training, validation and test examples, and what a model must know about them (classes, vocabulary, ...);
    `about["baselines"]` holds test metrics that a model must beat."""

    train: Dataset
    valid: Dataset
    test: Dataset
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in SPLITS:
            if not len(getattr(self, name)):
                raise InputError(f"the {name} split is empty; give more data")

    def fingerprint(self) -> dict[str, str]:
        """A digest of every example of each split, and of `about`: of all that a run learns and is judged by.

        Made of the batches themselves, so that it holds for any data set, and what cannot be read is found here.

        Raises:
            InputError: a file that cannot be read.
        """
        found = {}
        for name in SPLITS:
            data, digest = getattr(self, name), hashlib.blake2b(digest_size=16)
            for begin in range(0, len(data), CHUNK):
                _add(digest, data.batch(torch.arange(begin, min(begin + CHUNK, len(data)))))
            found[name] = digest.hexdigest()
        about = hashlib.blake2b(digest_size=16)
        _add(about, self.about)
        return found | {"about": about.hexdigest()}


def _add(digest: hashlib.blake2b, value: Any) -> None:
    """Tensors with shape and dtype, containers, and plain values; of other objects only the type is known to last."""
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            _add(digest, (str(key), value[key]))
    elif isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)}:".encode())
        for item in value:
            _add(digest, item)
    else:
        plain = value is None or isinstance(value, str | int | float)
        digest.update((repr(value) if plain else type(value).__name__).encode() + b";")


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

    `batch` gives `tokens` int64 `[B, N]`, `lengths` int64 `[B]` and whatever else was given, one value an
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
    """A random division of `range(count)`, the same for the same seed; raises `InputError` below 3 examples."""
    if count < 3:
        raise InputError(f"{count} examples cannot be divided into train, valid and test; give at least 3")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held_valid, held_test = max(1, round(count * valid)), max(1, round(count * test))
    return order[held_valid + held_test :], order[:held_valid], order[held_valid : held_valid + held_test]


def split_labelled(
    labels: Tensor,
    classes: Sequence[str],
    seed: int,
    parts: Sequence[str] | None = None,
    *,
    valid: float = 0.1,
    test: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """A random division in which each class has the same share of each split.

    Args:
        labels: int64, of each example; classes: their names.
        parts: "train", "valid" or "test" of each example that came divided; a split that did not is taken from train.

    Raises:
        InputError: a class with too few examples, or with none in train.
    """
    given = ["train"] * len(labels) if parts is None else list(parts)
    places = {
        name: torch.tensor([i for i, part in enumerate(given) if part == name], dtype=torch.int64) for name in SPLITS
    }
    shares = {name: share for name, share in (("valid", valid), ("test", test)) if not len(places[name])}
    generator = torch.Generator().manual_seed(seed)
    taken: dict[str, list[Tensor]] = {name: [] for name in SPLITS}
    for number, name in enumerate(classes):
        own = places["train"][labels[places["train"]] == number]
        if len(own) <= len(shares):
            raise InputError(
                f"the class {name!r} has {len(own)} examples to be divided into {', '.join(['train', *shares])}; "
                "give more, or remove the class"
            )
        own = own[torch.randperm(len(own), generator=generator)]
        counts = {split: max(1, round(len(own) * share)) for split, share in shares.items()}
        for split, count in counts.items():
            taken[split].append(own[:count])
            own = own[count:]
        taken["train"].append(own)
    found = {name: torch.cat(taken[name]) if taken[name] else places[name] for name in SPLITS}
    shuffled = (found[name][torch.randperm(len(found[name]), generator=generator)] for name in SPLITS)
    return tuple(shuffled)  # type: ignore[return-value]


def divided(root: Path, suffixes: Collection[str] = ()) -> dict[str, Path]:
    """What a folder holds for each split: folders, or files with one of the suffixes, called train, valid (val,
    validation, dev) and test. Empty for a folder that has no train beside one of the others.

    Raises:
        InputError: two for one split.
    """
    found: dict[str, Path] = {}
    for path in sorted(root.iterdir()):
        name = SPLIT_NAMES.get((path.name if path.is_dir() else path.stem).lower())
        if name is None or not (path.is_dir() or path.suffix.lower() in suffixes):
            continue
        if name in found:
            raise InputError(f"{root} has {found[name].name} and {path.name}, which both are {name}; keep one")
        found[name] = path
    return found if "train" in found and len(found) > 1 else {}


def few_per_class(labels: Tensor, indices: Tensor, count: int, seed: int) -> Tensor:
    """Those of `indices` that are the first `count` of their class in a seeded order."""
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


def existing(path: Path, what: str, option: str = "--data") -> Path:
    """`path`, which an option gave, or `InputError` when nothing is there."""
    if not path.exists():
        raise InputError(f"{option} {path} does not exist; name {what}")
    return path


def visible_files(folder: Path) -> list[Path]:
    """All files in and below a folder in order of their names, but for hidden ones and those in hidden folders.

    Those are an editor's or a system's, as `.ipynb_checkpoints/cat.png` and macOS's `._cat.png`.
    """
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(_is_hidden(part) for part in path.relative_to(folder).parts)
    )


def files_per_class(root: Path, what: str, suffixes: Collection[str] | None = None) -> tuple[list[Path], list[str]]:
    """The files (images, texts: `what`) below each folder of `root`, and those folders' names.

    Raises:
        InputError: fewer than two folders, or one without such a file.
    """
    files, names = [], []
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not _is_hidden(path.name)):
        found = [file for file in visible_files(folder) if suffixes is None or file.suffix.lower() in suffixes]
        if not found:
            raise InputError(f"the folder {folder} holds no {what}, and would be a class without examples; remove it")
        files += found
        names += [folder.name] * len(found)
    if len(set(names)) < 2:
        raise InputError(f"{root} needs a folder of {what} for each class, at least two, as {root}/cat and {root}/dog")
    return files, names


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def read_text(path: Path) -> str:
    """A file in UTF-8, with or without a byte order mark, or in UTF-16 with one.

    Raises:
        InputError: another encoding.
    """
    raw = path.read_bytes()
    encoding = "UTF-16" if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "UTF-8"
    try:
        return raw.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not in {encoding} ({error}); save it as UTF-8") from None


def read_csv(path: Path, delimiter: str = ",") -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a table in UTF-8, with or without a byte order mark, or in UTF-16 with one.

    Raises:
        InputError: a folder, another kind of file, encoding or separator, two columns of one name, or a row that is
            shorter or longer than the header.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder, and a table is needed: name the .csv in it")
    if path.suffix.lower() in NO_TEXT:
        raise InputError(f"{path} is no text; save it as .csv in UTF-8, as pandas does by to_csv(index=False)")
    text = read_text(path)
    limit = csv.field_size_limit(len(text) + 1)  # a cell may be as long as the file
    try:
        header, *rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row] or [[]]
    except csv.Error as error:
        raise InputError(f"{path} is no table: {error}") from error
    finally:
        csv.field_size_limit(limit)
    other = next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), None)
    if other is not None:
        raise InputError(
            f"the columns of {path} are separated by {other!r}, not by {delimiter!r}; save it so, with decimal points: "
            f"pandas.read_csv(..., sep={other!r}, decimal=...).to_csv(..., index=False)"
        )
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise InputError(f"{path} has more than one column {', '.join(twice)}; rename or remove all but one")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise InputError(f"{path}, row {number} has {len(row)} columns instead of {len(header)}")
    return header, rows
