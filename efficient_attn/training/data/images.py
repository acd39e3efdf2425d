"""Images with labels: scikit-learn's handwritten digits, or any folder with a folder of images for each class."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError, UnsupportedError
from .base import Batch, Dataset, Splits, Subset, Tensors, existing, few_per_class, majority, split_indices

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
DECODERS = 4


def load(seed: int, data: Path | None = None, *, image_size: int = 32, labels_per_class: int | None = None) -> Splits:
    """Batches have ``image`` float32 ``[B, C, H, W]`` in [0, 1] and ``label`` int64 ``[B]``.

    Args:
        data: a folder with a folder of images for each class; None for the digits (8 x 8, one channel; 20 % are
            held out for the test, 10 % for validation).
        image_size: to which images of a folder are resized.
        labels_per_class: use only so many training examples of each class.

    Raises:
        InputError: no such folder, or nothing usable in it.
        UnsupportedError: scikit-learn (for the digits) or Pillow (for a folder) is not installed.
    """
    if data is None:
        images, labels = digits()
        found: Dataset = Tensors(image=images, label=labels)
        train, valid, test = split_indices(len(labels), seed, test=0.2)
        about: dict[str, Any] = {"channels": 1, "image_size": 8, "classes": 10}
    else:
        files, names = folder_per_class(existing(data, "a folder with a folder of images for each class"))
        classes = sorted(set(names))
        labels = torch.tensor([classes.index(name) for name in names])
        found = ImageFiles(files, image_size, label=labels)
        train, valid, test = split_indices(len(labels), seed)
        about = {"channels": 3, "image_size": image_size, "classes": len(classes), "names": classes}
    if labels_per_class is not None:
        train = few_per_class(labels, train, labels_per_class, seed)
    about["baselines"] = {"majority": majority(labels[train], labels[test])}
    return Splits(Subset(found, train), Subset(found, valid), Subset(found, test), about)


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits: images float32 ``[1797, 1, 8, 8]`` in [0, 1] and labels int64 ``[1797]``."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise UnsupportedError("the digits come with scikit-learn; pip install 'efficient-attn[train]'") from error
    found = load_digits()
    images = torch.from_numpy(found.images).float() / 16
    return images.unsqueeze(1), torch.from_numpy(found.target).long()


class ImageFiles:
    """Image files that are decoded, cropped to a square and resized when a batch asks for them.

    ``others`` are tensors with one entry a file. The latest few thousand decoded images stay in memory as bytes.
    """

    def __init__(self, files: Sequence[Path], image_size: int, **others: Tensor) -> None:
        pillow()
        self.files, self.image_size, self.others = files, image_size, others
        kept = max(1, 2**28 // (3 * image_size * image_size))
        self._decode = lru_cache(maxsize=kept)(lambda place: read_image(files[place], image_size))

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: Tensor) -> Batch:
        with ThreadPoolExecutor(DECODERS) as decoders:
            images = torch.stack(list(decoders.map(self._decode, indices.tolist())))
        pixels = images.permute(0, 3, 1, 2).float() / 255
        return {"image": pixels.contiguous(), **{name: other[indices] for name, other in self.others.items()}}


def read_image(path: Path, size: int) -> Tensor:
    """An image file as uint8 ``[size, size, 3]``: its largest central square, resized."""
    import numpy as np

    image_class = pillow()
    try:
        with image_class.open(path) as opened:
            image = opened.convert("RGB")
    except OSError as error:
        raise InputError(f"{path} cannot be read as an image ({error}); remove or repair it") from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((size, size), image_class.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(image))


def folder_per_class(root: Path) -> tuple[list[Path], list[str]]:
    """The image files below each folder of ``root``, and those folders' names."""
    files = [
        (file, folder.name) for folder in sorted(root.iterdir()) if folder.is_dir() for file in image_files(folder)
    ]
    if len({name for _, name in files}) < 2:
        raise InputError(f"{root} needs a folder of images for each class, at least two, as in {root}/cat/1.jpg")
    return [file for file, _ in files], [name for _, name in files]


def image_files(folder: Path) -> list[Path]:
    """All image files in and below a folder, in order of their names."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)


def pillow() -> Any:
    """The module ``PIL.Image``."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise UnsupportedError("image files need Pillow; pip install 'efficient-attn[train]'") from error
    return Image
