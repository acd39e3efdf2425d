"""Images with labels: scikit-learn's handwritten digits, or any folder with a folder of images for each class."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError, UnsupportedError
from .base import (
    Batch,
    Dataset,
    Splits,
    Subset,
    Tensors,
    divided,
    existing,
    few_per_class,
    files_per_class,
    majority,
    split_indices,
    split_labelled,
    visible_files,
)

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
SIZE = 32
DECODERS = 4
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF


def load(
    seed: int,
    data: Path | None = None,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    labels_per_class: int | None = None,
) -> Splits:
    """Batches have `image` float32 `[B, C, H, W]` in [0, 1] and `label` int64 `[B]`.

    Args:
        data: a folder with a folder of images for each class, or with such folders in train, valid and test; None for
            the digits (8 x 8, one channel; 20 % are held out for the test, 10 % for validation).
        image_size: height and width to which images are resized; None: SIZE for a folder's, the digits as they are.
        channels: 1 (grey) or 3; None: 1 if every image is grey, else 3.
        labels_per_class: use only so many training examples of each class.

    Raises:
        InputError: no such folder, or nothing usable in it.
        UnsupportedError: scikit-learn (for the digits) or Pillow (for a folder) is not installed.
    """
    if data is None:
        images, labels = digits(image_size)
        images = images.expand(-1, channels or 1, -1, -1)
        found: Dataset = Tensors(image=images, label=labels)
        train, valid, test = split_indices(len(labels), seed, test=0.2)
        about: dict[str, Any] = {"channels": images.shape[1], "image_size": images.shape[2], "classes": 10}
    else:
        root = existing(data, "a folder with a folder of images for each class")
        parts = divided(root)
        read = {split: files_per_class(part, "images", SUFFIXES) for split, part in (parts or {"train": root}).items()}
        files = [file for found_files, _ in read.values() for file in found_files]
        names = [name for _, found_names in read.values() for name in found_names]
        where = [split for split, (found_files, _) in read.items() for _ in found_files] if parts else None
        classes = sorted(set(names))
        numbers = {name: number for number, name in enumerate(classes)}
        labels = torch.tensor([numbers[name] for name in names])
        image_size, channels = image_size or SIZE, channels or (1 if all(map(is_grey, files)) else 3)
        found = ImageFiles(files, image_size, channels, label=labels)
        train, valid, test = split_labelled(labels, classes, seed, where)
        about = {"channels": channels, "image_size": image_size, "classes": len(classes), "names": classes}
    about["counts"] = torch.bincount(labels[train], minlength=about["classes"]).tolist()
    if labels_per_class is not None:
        train = few_per_class(labels, train, labels_per_class, seed)
    about["baselines"] = {"majority": majority(labels[train], labels[test])}
    return Splits(Subset(found, train), Subset(found, valid), Subset(found, test), about)


def digits(size: int | None = None) -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits: images float32 `[1797, 1, 8, 8]` in [0, 1], or resized, and labels int64
    `[1797]`."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise UnsupportedError("the digits come with scikit-learn; pip install 'efficient-attn[train]'") from error
    found = load_digits()
    images = torch.from_numpy(found.images).float().unsqueeze(1) / 16
    if size is not None:
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return images, torch.from_numpy(found.target).long()


class ImageFiles:
    """Image files that are decoded, cropped to a square and resized when a batch asks for them.

    `others` are tensors with one entry a file. The latest few thousand decoded images stay in memory as bytes.
    """

    def __init__(self, files: Sequence[Path], image_size: int, channels: int = 3, **others: Tensor) -> None:
        pillow()
        self.files, self.image_size, self.others = files, image_size, others
        kept = max(1, 2**28 // (channels * image_size * image_size))
        self._decode = lru_cache(maxsize=kept)(lambda place: read_image(files[place], image_size, channels))

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: Tensor) -> Batch:
        with ThreadPoolExecutor(DECODERS) as decoders:
            images = torch.stack([image.float() for image in decoders.map(self._decode, indices.tolist())])
        pixels = images.permute(0, 3, 1, 2) / 255
        return {"image": pixels.contiguous(), **{name: other[indices] for name, other in self.others.items()}}


def is_grey(path: Path) -> bool:
    """Whether a file says that it has no colours; False for what cannot be opened."""
    try:
        with pillow().open(path) as opened:
            return str(opened.mode) in ("1", "L", "LA", "F") or str(opened.mode).startswith("I")
    except (OSError, ValueError, SyntaxError, pillow().DecompressionBombError):
        return False


def read_image(path: Path, size: int, channels: int = 3) -> Tensor:
    """An image file as `[size, size, channels]`, from 0 to 255: its largest central square, resized.

    One channel is grey. uint8 for files of eight bits a channel; float32 for deeper greys, whose levels would not
    survive in a byte. Turned as its EXIF orientation says, and white where it is transparent, as a viewer shows it.

    Raises:
        InputError: what is no image, has several pages, or values whose range the file does not say.
    """
    import numpy as np

    image_class = pillow()
    from PIL import ImageOps

    try:
        with image_class.open(path) as opened:
            if opened.format == "TIFF" and opened.n_frames > 1:
                raise InputError(f"{path} holds {opened.n_frames} pages; save those to train on as a file each")
            ImageOps.exif_transpose(opened, in_place=True)  # cameras store how they were held, not a turned picture
            image = _deep_grey(path, opened) if opened.mode.startswith(("I", "F")) else _colour(opened)
    except InputError:
        raise
    except image_class.DecompressionBombError as error:
        raise InputError(f"{path} is too large to be decoded ({error}); make it smaller") from error
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's, for damaged files and for colours it cannot convert
        raise InputError(f"{path} cannot be read as an image ({error}); remove or repair it") from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((size, size), image_class.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    if channels == 1 and image.mode == "RGB":
        image = image.convert("L")
    pixels = torch.from_numpy(np.array(image))
    return pixels if pixels.dim() == 3 else pixels[:, :, None].expand(-1, -1, channels)


def _colour(image: Any) -> Any:
    """A Pillow image of eight bits a channel as RGB."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = pillow().new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")


def _deep_grey(path: Path, image: Any) -> Any:
    """A Pillow image of more than eight bits as float32 from 0 to 255, by the depth that the file states.

    Pillow's own conversion to RGB cuts every value above 255 off. Unsigned numbers of up to 16 bits reach from 0 to
    2^bits - 1 and fractions from 0 to 1; for signed, 32-bit and other fractional ones (CT numbers, counts) any range
    would be a guess.
    """
    import numpy as np

    tags = getattr(image, "tag_v2", {})  # a TIFF's
    values = np.asarray(image).astype(np.float64)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        top = 2.0 ** tags.get(_BITS, (16,))[0] - 1
    elif image.mode == "F" and 0 <= values.min() <= values.max() <= 1:
        top = 1.0
    else:
        raise InputError(
            f"{path} holds numbers from {values.min():g} to {values.max():g} of a kind whose black and white the file "
            "does not say; save all files with one range as 16-bit unsigned PNG, or as fractions from 0 to 1"
        )
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = top - values
    return pillow().fromarray((values * (255 / top)).astype(np.float32))


def image_files(folder: Path) -> list[Path]:
    """All image files in and below a folder, in order of their names, but for hidden ones."""
    return [file for file in visible_files(folder) if file.suffix.lower() in SUFFIXES]


def pillow() -> Any:
    """The module `PIL.Image`."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise UnsupportedError("image files need Pillow; pip install 'efficient-attn[train]'") from error
    return Image
