"""A model that the command line names, and inputs for it: texts, images, series, or tensors in a file.

folder              a checkpoint of this package or of transformers, or the folder of a run of `train`
id                  one on the Hugging Face hub
file.py:function    your own; function(length) returns (model, sample)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, InputError, UnsupportedError
from ..models import CLIP, Model, PatchForecaster, ViT, checkpoints
from ..profiling import sources
from ..training.data import text as texts
from ..training.data.base import existing, read_text, visible_files
from ..training.data.images import read_image
from ..training.data.series_reader import SeriesReader


@dataclass(frozen=True)
class Loaded:
    """A model, its folder, and for those of a function its own sample."""

    model: nn.Module
    folder: Path | None = None
    sample: Any = None

    @property
    def is_ours(self) -> bool:
        """Whether the model is of this package."""
        return isinstance(self.model, Model)


@dataclass(frozen=True)
class Read:
    """An input of a model: `sample`, a batch, and for a page what its tokens are called and a picture or series."""

    sample: Any
    labels: list[str] | None = None
    pixels: Tensor | None = None  # (H, W, 3) of 0 to 255
    values: Tensor | None = None  # (N,), nan where missing
    kind: str = "tensors"
    part: str = ""  # the module whose attention is shown, where the input is of one part of the model


def load(name: str, length: int | None) -> Loaded:
    """The model of a name.

    Raises:
        InputError, CheckpointError: no such model, or one without weights. UnsupportedError: transformers is missing.
    """
    place, colon, function = name.rpartition(":")
    if colon and function.isidentifier() and (place.endswith(".py") or not Path(name).exists()):
        with sources.named_failure(name):
            model, sample = sources.find(name)({"seqlen": length or 512, "batch": 2, "model": name})
        return Loaded(model.eval(), None, sample)
    folder = Path(name)
    folder = folder / "model" if (folder / "model" / checkpoints.CONFIG).is_file() else folder
    if not folder.is_dir():
        folder = checkpoints.locate(name, revision=None, local_files_only=False)
    text = checkpoints.read_config(folder)
    if "efficient_attn" in text:
        return Loaded(Model.from_pretrained(folder), folder)
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder} has no weights in safetensors, without which its attention says nothing")
    transformers = sources._transformers()
    try:
        return Loaded(transformers.AutoModel.from_pretrained(folder).eval(), folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} cannot be loaded by transformers: {error}") from error


def read(loaded: Loaded, path: Path, kind: str | None, length: int | None, batch: int) -> Read:
    """A batch from a file or folder.

    Args:
        kind: "text", "image", "series" or "tensors"; None: by the file's name.
        length: of a text, in tokens; default: what the model takes, at most 512 for a batch.
        batch: how many texts, images or windows; 1 for a page.

    Raises:
        InputError: no such file, one of another kind than the model reads, or one with too little.
    """
    option = "--data" if kind in (None, "tensors") else f"--{kind}"
    path = existing(path, "a text, an image or a folder of images, a .csv, .npz or .safetensors", option)
    kind = kind or _kind(path)
    made: Callable[..., Read] = {"text": _text, "image": _image, "series": _series, "tensors": _tensors}[kind]
    return made(loaded, path, length, batch)


def _kind(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in (".npz", ".npy", ".safetensors"):
        return "tensors"
    if suffix == ".csv":
        return "series"
    if path.is_dir() or suffix in (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"):
        return "image"
    return "text"


# --- texts ---


def _text(loaded: Loaded, path: Path, length: int | None, batch: int) -> Read:
    ids, name_of, (before, after) = _tokens(loaded, read_text(path))
    marks = len(before) + len(after)
    limit = _longest(loaded.model)
    length = length or min(len(ids) // batch + marks, limit, 512 if batch > 1 else 2**31)
    own = length - marks
    if length > limit:
        raise InputError(f"the model has positions for {limit} tokens, and --length asks for {length}")
    if own < 1 or length < 2 or len(ids) < batch * own:
        raise InputError(
            f"{path} has {len(ids)} tokens, too few for {batch} pieces of {max(own, 2)}; give a longer text or a "
            f"smaller --length{' or --batch' if batch > 1 else ''}"
        )
    pieces = [[*before, *ids[start : start + own], *after] for start in range(0, batch * own, own)]
    tokens = torch.tensor(pieces)
    labels = [name_of(token) for token in tokens[0].tolist()]
    return Read(tokens if loaded.is_ours else {"input_ids": tokens}, labels, kind="text")


def _tokens(loaded: Loaded, text: str) -> tuple[list[int], Callable[[int], str], tuple[list[int], list[int]]]:
    """The tokens of a text, what one is called, and what stands before and after a piece, such as [CLS] and [SEP]."""
    folder = loaded.folder
    if folder is not None and any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json")):
        tokenizer = sources._transformers().AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]
        marks_insides = any(token.startswith("##") for token in tokenizer.get_vocab())  # WordPiece; others mark begins

        def word(token: int) -> str:
            written: str = tokenizer.convert_ids_to_tokens(token)
            if marks_insides:
                return written[2:] if written.startswith("##") else f" {written}"
            return re.sub(r"^[Ġ▁]", " ", written).replace("Ċ", "\n")

        marks: list[int] = tokenizer("")["input_ids"]
        begins = int(bool(marks) and marks[0] in (tokenizer.cls_token_id, tokenizer.bos_token_id))
        return ids, word, (marks[:begins], marks[begins:])
    vocabulary = getattr(getattr(loaded.model, "config", None), "vocab_size", 0)
    if vocabulary == texts.BYTE_VOCABULARY:
        data = text.encode("utf-8")
        name_of = lambda token: chr(max(token - texts.FIRST_BYTE, 0))  # noqa: E731
        return texts.encode(data, len(data)).tolist(), name_of, ([], [])
    raise InputError(
        f"{folder or 'the model'} has no tokenizer, and {vocabulary or 'no'} tokens are no bytes; give the tokens "
        "themselves with --data FILE.npz"
    )


def _longest(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    if getattr(config, "positions", "") in ("none", "rotary"):
        return 2**31
    for name in ("max_len", "max_position_embeddings", "n_positions"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    return 2**31


# --- images, series, tensors ---


def _image(loaded: Loaded, path: Path, length: int | None, batch: int) -> Read:
    config = getattr(loaded.model, "config", None)
    config = getattr(config, "vision_config", config)
    backbone = getattr(config, "backbone", None) or getattr(config, "image", None) or config
    size: Any = getattr(backbone, "image_size", None)
    channels: int = getattr(backbone, "channels", getattr(backbone, "num_channels", 3))
    if not isinstance(size, int):
        raise InputError(f"{type(loaded.model).__name__} reads no images: its config has no image_size")
    files = visible_files(path) if path.is_dir() else [path]
    if len(files) < batch:
        raise InputError(f"{path} has {len(files)} images, and --batch asks for {batch}")
    pixels = torch.stack([read_image(file, size, channels).float() for file in files[:batch]])
    shown = pixels[0].expand(-1, -1, 3) if channels == 1 else pixels[0]
    part = ""
    images: Any = pixels.permute(0, 3, 1, 2) / 255.0
    if not loaded.is_ours:
        return Read({"pixel_values": (images - 0.5) / 0.5}, pixels=shown, kind="image")
    if isinstance(loaded.model, CLIP):
        end = loaded.model.config.text.eos_token_id
        images = (
            images,
            torch.full((batch, 2), 1 if end is None else end),
        )  # any text: it is not shown
        part = "image"
    elif not isinstance(loaded.model, ViT):
        raise InputError(f"{type(loaded.model).__name__} reads no images")
    return Read(images, pixels=shown, kind="image", part=part)


def _series(loaded: Loaded, path: Path, length: int | None, batch: int) -> Read:
    model = loaded.model
    if not isinstance(model, PatchForecaster) or loaded.folder is None:
        raise InputError(f"--series is for a run of `train forecast`; the model is a {type(model).__name__}")
    reader = SeriesReader.from_pretrained(loaded.folder)
    context, config = model.config.context, model.config
    if config.past_covariates or config.future_covariates or config.static_features:
        raise UnsupportedError("forecasters with covariates are inspected with --data FILE.npz of their inputs by name")
    series = reader.scaled(reader.read(path)[0])
    rows = len(series.values)
    if rows < context + batch - 1:
        raise InputError(f"{path} has {rows} rows, too few for {batch} windows of {context}")
    step = max((rows - context) // max(batch - 1, 1), 1) if batch > 1 else 0
    starts = [rows - context - n * step for n in range(batch)]
    windows = torch.stack([series.values[start : start + context] for start in starts]).float()
    return Read(windows, values=windows[0, :, 0], kind="series")


def _tensors(loaded: Loaded, path: Path, length: int | None, batch: int) -> Read:
    found: Mapping[str, Tensor]
    if path.suffix == ".safetensors":
        found = checkpoints.read_tensors([path])
    else:
        import numpy as np

        try:
            made = np.load(path, allow_pickle=False)
            arrays = {"": made} if path.suffix == ".npy" else {name: made[name] for name in made.files}
            found = {name: torch.from_numpy(array) for name, array in arrays.items()}
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} holds no arrays of numbers: {error}") from error
    if not found:
        raise InputError(f"{path} holds no array")
    return Read(next(iter(found.values())) if list(found) == [""] else dict(found))
