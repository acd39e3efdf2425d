"""Images with captions: digits described in words, or any folder of images with texts."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...errors import InputError
from .base import PAD, Batch, Splits, Subset, Tensors, existing, read_csv, read_text, split_indices
from .images import SIZE, ImageFiles, digits, image_files
from .text import BYTE_VOCABULARY, encode

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("a handwritten {}", "the digit {}", "a photo of the number {}", "a scan of a {}", "{}, written by hand")


def load(seed: int, data: Path | None = None, *, image_size: int | None = None, max_length: int = 32) -> Splits:
    """Batches have `image` float32 `[B, C, H, W]`, `tokens` int64 `[B, N]` (bytes between marks) and
    `lengths`; those of the digits `label` too.

    Args:
        data: a folder of images, each with a text file of its name beside it (`cat.jpg`, `cat.txt`), or with a
            `captions.csv` that has columns file and caption. None for the digits, each with a random caption.
        image_size: height and width to which images are resized; None: SIZE for a folder's, the digits as they are.

    `about` has `prompts` for the digits: `tokens` and `lengths` of every template for every class, from which a
    zero-shot classifier is made.

    Raises:
        InputError: no such folder, or nothing usable in it.
        UnsupportedError: scikit-learn or Pillow is not installed.
    """
    about: dict[str, object] = {"vocabulary": BYTE_VOCABULARY, "max_length": max_length}
    if data is not None:
        return _folder(seed, existing(data, "a folder of images with captions"), image_size or SIZE, max_length, about)
    images, labels = digits(image_size)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(TEMPLATES), (len(labels),), generator=generator)
    captions = [TEMPLATES[template].format(NAMES[label]) for template, label in zip(chosen, labels, strict=True)]
    found = Tensors(image=images, label=labels, **pad([encode(text, max_length, marks=True) for text in captions]))
    prompts = [encode(template.format(name), max_length, marks=True) for name in NAMES for template in TEMPLATES]
    train, valid, test = split_indices(len(labels), seed, test=0.2)
    about |= {"channels": 1, "image_size": images.shape[2], "classes": len(NAMES), "prompts": pad(prompts)}
    return Splits(found.subset(train), found.subset(valid), found.subset(test), about)


def pad(texts: list[Tensor]) -> dict[str, Tensor]:
    """Tokens of several texts as one: `tokens` int64 `[B, N]` and `lengths` int64 `[B]`."""
    tokens = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=PAD)
    return {"tokens": tokens, "lengths": torch.tensor([len(text) for text in texts])}


def _folder(seed: int, root: Path, image_size: int, max_length: int, about: dict[str, object]) -> Splits:
    table = root / "captions.csv"
    pairs = _from_table(table) if table.exists() else _from_text_files(root)
    texts = pad([encode(caption, max_length, marks=True) for _, caption in pairs])
    found = ImageFiles([file for file, _ in pairs], image_size, 3, **texts)
    train, valid, test = split_indices(len(pairs), seed)
    about |= {"channels": 3, "image_size": image_size}
    return Splits(Subset(found, train), Subset(found, valid), Subset(found, test), about)


def _from_text_files(root: Path) -> list[tuple[Path, str]]:
    images = [(file, file.with_suffix(".txt")) for file in image_files(root)]
    pairs = [(image, read_text(text).strip()) for image, text in images if text.exists()]
    if not pairs:
        raise InputError(
            f"{root} holds {len(images)} images, none with a caption; put cat.txt beside cat.jpg, or a captions.csv "
            "with columns file and caption into the folder"
        )
    return pairs


def _from_table(table: Path) -> list[tuple[Path, str]]:
    header, rows = read_csv(table)
    if not {"file", "caption"} <= set(header):
        raise InputError(f"{table} needs columns file and caption; it has {', '.join(header) or 'none'}")
    file, caption = header.index("file"), header.index("caption")
    pairs = [(table.parent / row[file], row[caption]) for row in rows]
    missing = next((image for image, _ in pairs if not image.exists()), None)
    if missing is not None:
        raise InputError(f"{table} names {missing}, which does not exist")
    return pairs


__all__ = ["NAMES", "TEMPLATES", "Batch", "load", "pad"]
