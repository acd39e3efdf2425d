"""Text as bytes: no vocabulary to fit, any language; and texts with labels from files, a table or a hub data set."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...errors import InputError, UnsupportedError
from .base import (
    Sequences,
    Splits,
    divided,
    existing,
    few_per_class,
    files_per_class,
    majority,
    read_csv,
    read_text,
    split_labelled,
    visible_files,
)

# Byte b is token b + 3.
BEGIN, END, FIRST_BYTE = 1, 2, 3
BYTE_VOCABULARY = 256 + FIRST_BYTE

# The parts of Python's standard library that the task `bytes` tells apart when it is given no data: each is a folder of
# source files on every machine that runs this. (Those of encodings are copies of each other.)
LIBRARIES = ("asyncio", "email", "importlib", "multiprocessing", "tkinter", "unittest", "xml")

TABLES = (".csv", ".tsv", ".jsonl")
Encoder = Callable[["Sequence[str | bytes]"], "list[Tensor]"]

TEXT_COLUMNS, LABEL_COLUMNS = ("text", "sentence", "content", "review"), ("label", "class", "target", "category")


def encode(text: str | bytes, max_length: int, *, marks: bool = False) -> Tensor:
    """The first bytes of a text as tokens, int64 `[N <= max_length]`; with `marks` between BEGIN and END."""
    data = text.encode() if isinstance(text, str) else text
    data = data[: max_length - 2 if marks else max_length]
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8).long() + FIRST_BYTE if data else torch.tensor([END])
    if not marks:
        return tokens
    return torch.cat([torch.tensor([BEGIN]), tokens, torch.tensor([END])]) if data else torch.tensor([BEGIN, END])


def decode(tokens: Tensor) -> str:
    """The text of `tokens` (int64 `[N]`); padding and marks are left out."""
    return bytes(token - FIRST_BYTE for token in tokens.tolist() if token >= FIRST_BYTE).decode(errors="replace")


def load(
    seed: int,
    data: str | None = None,
    *,
    max_length: int = 1024,
    labels_per_class: int | None = None,
    encoder: Encoder | None = None,
    vocabulary: int = BYTE_VOCABULARY,
) -> Splits:
    """Labelled texts as tokens; batches have `tokens`, `lengths` and `label`. Each class has its share of each split.

    Args:
        data: a folder with a folder of text files for each class; a .csv, .tsv or .jsonl file with a column for the
            text and one for the label; a folder with such folders or files called train, valid and test; the id of a
            data set on the Hugging Face hub (with the package `datasets`); None: which part of Python's standard
            library is a piece of source from?
        max_length: bytes of a text that are read, or tokens.
        labels_per_class: use only so many training examples of each class.
        encoder: texts -> their tokens, None: bytes; vocabulary: how many there are.

    Raises:
        InputError: no such data, or nothing usable in it.
        UnsupportedError: a hub id without the package `datasets`.
    """
    if data is None:
        return _libraries(seed, max_length, labels_per_class)
    path = Path(data)
    parts = divided(path, TABLES) if path.is_dir() else {}
    if parts:
        read = {split: _labelled(part) for split, part in parts.items()}
    else:
        read = {"train": hub(data) if not path.exists() and _is_hub_id(data) else _labelled(path)}
    texts = [text for found, _ in read.values() for text in found]
    names = [name for _, found in read.values() for name in found]
    where = [split for split, (found, _) in read.items() for _ in found] if parts else None
    classes = sorted(set(names))
    numbers = {name: number for number, name in enumerate(classes)}
    labels = torch.tensor([numbers[name] for name in names])
    tokens = [encode(text, max_length) for text in texts] if encoder is None else encoder(texts)
    found = Sequences.of(tokens, label=labels)
    splits = split_labelled(labels, classes, seed, where)
    return _splits(found, labels, splits, classes, max_length, labels_per_class, seed, vocabulary)


def _labelled(path: Path) -> tuple[Sequence[str | bytes], list[str]]:
    """Texts and labels of a folder with a folder for each class, or of a file."""
    if path.is_dir():
        files, names = files_per_class(path, "text files")
        return [file.read_bytes() for file in files], names
    if path.suffix.lower() in TABLES:
        return table(existing(path, "a table with columns text and label"))
    existing(path, "a folder with a folder of text files per class, a .csv file or a hub id")
    raise InputError(f"--data {path} is neither a folder with a folder for each class nor a {', '.join(TABLES)} file")


def table(path: Path) -> tuple[list[str], list[str]]:
    """Texts and labels of a .csv or .tsv file with a header, or of a .jsonl file: an object a line."""
    if path.suffix.lower() == ".jsonl":
        header, rows = _json_lines(path)
    else:
        header, rows = read_csv(path, "\t" if path.suffix.lower() == ".tsv" else ",")
    text, label = _column(path, header, TEXT_COLUMNS), _column(path, header, LABEL_COLUMNS)
    pairs = [(row[header.index(text)], row[header.index(label)]) for row in rows]
    if len({name for _, name in pairs}) < 2:
        raise InputError(f"{path} needs at least two different values in its column {label!r}")
    return [text for text, _ in pairs], [name for _, name in pairs]


def _json_lines(path: Path) -> tuple[list[str], list[list[str]]]:
    """A .jsonl file as header and rows.

    Raises:
        InputError: a line that is no object, lacks a field of the first one, or holds a list in the place of a label.
    """
    header: list[str] = []
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is no JSON: {error}") from None
        header = header or (list(found) if isinstance(found, dict) else [])
        missing = [name for name in header if not isinstance(found, dict) or name not in found]
        if missing or not header:
            raise InputError(f"{path}, line {number} lacks {', '.join(missing) or 'fields'}; each line is an object")
        lists = [name for name in header if isinstance(found[name], list | dict)]
        if any(name.lower() in (*TEXT_COLUMNS, *LABEL_COLUMNS) for name in lists):
            raise InputError(
                f"{path}, line {number} holds several values in {', '.join(lists)}; each text has one label"
            )
        rows.append([str(found[name]) for name in header])
    return header, rows


def hub(name: str) -> tuple[list[str], list[str]]:
    """Texts and labels of the training split of a data set on the Hugging Face hub."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"--data {name} is no local path, and a hub data set needs the package datasets; pip install datasets"
        ) from error
    try:
        found = datasets.load_dataset(name, split="train")
    except Exception as error:  # the hub client raises errors of many kinds, all of which mean the same here
        raise InputError(f"--data {name}: the hub data set cannot be read ({error}); name local files") from error
    text, label = (_column(Path(name), found.column_names, names) for names in (TEXT_COLUMNS, LABEL_COLUMNS))
    return list(map(str, found[text])), list(map(str, found[label]))


def _libraries(seed: int, max_length: int, labels_per_class: int | None) -> Splits:
    """Pieces of source files, labelled with the part of the standard library. A file is in one split only."""
    root = Path(sysconfig.get_path("stdlib"))
    pieces: list[Tensor] = []
    labels: list[int] = []
    files: list[int] = []
    classes = [name for name in LIBRARIES if len(_sources(root / name)) >= 3]
    if len(classes) < 2:
        raise InputError(f"there is no source of Python's standard library in {root}; name texts with --data")
    for place, name in enumerate(classes):
        for file in _sources(root / name):
            source = file.read_bytes()
            for start in range(0, len(source), max_length):
                pieces.append(encode(source[start : start + max_length], max_length))
                labels.append(place)
                files.append(hash_of(str(file.relative_to(root))))
    which = torch.tensor([(number + seed) % 10 for number in files])
    parts = (which > 1).nonzero()[:, 0], (which == 0).nonzero()[:, 0], (which == 1).nonzero()[:, 0]
    label = torch.tensor(labels)
    return _splits(Sequences.of(pieces, label=label), label, parts, classes, max_length, labels_per_class, seed)


def hash_of(text: str) -> int:
    """A number that depends on nothing but the text (`hash` differs in every process)."""
    return int.from_bytes(text.encode(), "big") % 1_000_003


def _splits(
    data: Sequences,
    labels: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    classes: Sequence[str],
    max_length: int,
    labels_per_class: int | None,
    seed: int,
    vocabulary: int = BYTE_VOCABULARY,
) -> Splits:
    train, valid, test = parts
    if labels_per_class is not None:
        train = few_per_class(labels, train, labels_per_class, seed)
    about: dict[str, object] = {"vocabulary": vocabulary, "max_length": max_length}
    about |= {"classes": len(classes), "names": list(classes)}
    about["counts"] = torch.bincount(labels[train], minlength=len(classes)).tolist()
    about["baselines"] = {"majority": majority(labels[train], labels[test])}
    return Splits(data.subset(train), data.subset(valid), data.subset(test), about)


def _sources(folder: Path) -> list[Path]:
    return [path for path in visible_files(folder) if path.suffix == ".py"]


def _column(path: Path, header: Sequence[str], names: Sequence[str]) -> str:
    for column in header:
        if column.lower() in names:
            return column
    raise InputError(f"{path} needs a column named {' or '.join(names)}; its columns: {', '.join(header) or 'none'}")


def _is_hub_id(data: str) -> bool:
    return "\\" not in data and not data.startswith((".", "/", "~")) and data.count("/") <= 1 and not Path(data).suffix
