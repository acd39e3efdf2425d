"""Checkpoints: where they lie, their files, and what transformers' families call what this package calls otherwise.

A `Family` is one architecture of transformers: how its config.json reads, and a table of names. Each row of the table
is `theirs -> ours`, with {} for the number of a layer; several names on the right take equal shares of the tensor.
`register` makes a family known, under its "model_type".
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, UnsupportedError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
LAYER_NUMBER = r"(?<=\.)\d+(?=\.)"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack")


@dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    Fields:
        model: the name of our class.
        config: (their config.json, their tensors without prefixes) -> the fields of our config, as a dictionary; raises
            CheckpointError for what our model does not compute. "generation_config" in the first is that file.
        names: theirs -> ours, see the head of this file.
        prefixes: what stands before all names in models with a head, and is taken off ("bert.").
        transposed: names, as in `names`, of weights (in, out) instead of (out, in).
        ignored: regular expressions of names that carry nothing for us: buffers, tied copies, heads of other tasks.
        adjust: (ours, their config.json) -> ours, after all of that, for what a table cannot say.
    """

    model: str
    config: Callable[[Mapping[str, Any], Mapping[str, Tensor]], dict[str, Any]]
    names: Mapping[str, str | tuple[str, ...]]
    prefixes: tuple[str, ...] = ()
    transposed: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()
    adjust: Callable[[dict[str, Tensor], Mapping[str, Any]], dict[str, Tensor]] | None = None

    def fields(self, text: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
        """The fields of our config, of their config.json and their bare tensors.

        Raises:
            CheckpointError: settings that are missing, or that our model does not compute.
        """
        try:
            return self.config(text, tensors)
        except KeyError as error:
            raise CheckpointError(f"{folder / CONFIG} has no {error}, which a {self.model} needs") from None

    def bare(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their tensors without prefixes, and with the names of today's transformers."""
        return {self._without_prefix(_modern(name)): tensor for name, tensor in tensors.items()}

    def translate(self, tensors: Mapping[str, Tensor], text: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
        """Bare tensors under our names.

        Raises:
            CheckpointError: names that are neither in the table nor ignored.
        """
        found: dict[str, Tensor] = {}
        unknown = []
        for name, tensor in tensors.items():
            numbers = re.findall(LAYER_NUMBER, name)
            generic = re.sub(LAYER_NUMBER, "{}", name)
            if generic in self.names:
                ours = self.names[generic]
                targets = (ours,) if isinstance(ours, str) else ours
                tensor = tensor.T if generic in self.transposed else tensor
                shares = tensor.chunk(len(targets)) if len(targets) > 1 else (tensor,)
                found |= {ours.format(*numbers): share for ours, share in zip(targets, shares, strict=True)}
            elif not any(re.fullmatch(pattern, name) for pattern in self.ignored):
                unknown.append(name)
        if unknown:
            more = " ..." if len(unknown) > 8 else ""
            raise CheckpointError(f"unexpected weights in {folder}: {', '.join(unknown[:8])}{more}")
        return found if self.adjust is None else self.adjust(found, text)

    def _without_prefix(self, name: str) -> str:
        for prefix in self.prefixes:
            name = name.removeprefix(prefix)
        return name


FAMILIES: dict[str, Family] = {}  # by transformers' "model_type"


def register(model_type: str, family: Family) -> None:
    """Make an architecture known to `from_pretrained`."""
    FAMILIES[model_type] = family


def family_of(config: Mapping[str, Any], folder: Path) -> Family:
    """The family of a config.json of transformers.

    Raises:
        CheckpointError: an architecture that our models do not compute.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise CheckpointError(
            f"{folder} is of the architecture {kind!r}; known are {', '.join(sorted(FAMILIES))}. For other models use "
            "transformers with attn_implementation='efficient_attn'"
        )
    return FAMILIES[kind]


def _modern(name: str) -> str:
    """Names of norms in checkpoints converted from TensorFlow."""
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))


# --- what a config says ---

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


def activation(config: Mapping[str, Any], field: str, default: str = "gelu") -> str:
    """Our name of the activation that a config names.

    Raises:
        CheckpointError: one that we do not have.
    """
    name = config.get(field, default)
    if name not in ACTIVATIONS:
        raise CheckpointError(f"{field}={name!r} is not supported; choose from {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def expect(config: Mapping[str, Any], **values: Any) -> None:
    """Raise CheckpointError unless the config has these values, or leaves the fields out."""
    for name, value in values.items():
        if config.get(name, value) != value:
            raise CheckpointError(
                f"the checkpoint's config has {name}={config[name]!r}, and this model computes {name}={value!r} only; "
                "use transformers with attn_implementation='efficient_attn'"
            )


# --- files ---


def safetensors() -> Any:
    """The module safetensors.torch.

    Raises:
        UnsupportedError: it is not installed.
    """
    return _module("safetensors.torch")


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"{error.name} is not installed; pip install 'efficient-attn[models]'") from None


def locate(path: str | os.PathLike[str], *, revision: str | None, local_files_only: bool) -> Path:
    """The folder of a checkpoint, from the hub when `path` is not a folder.

    Raises:
        CheckpointError: neither a folder nor a repository that can be reached.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{path} is a file; a checkpoint is a folder with {CONFIG} and {WEIGHTS}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)) or str(path).startswith("."):
        raise CheckpointError(f"there is no folder {path}, and that is no id of the Hugging Face hub")
    hub = _module("huggingface_hub")
    try:
        found: str = hub.snapshot_download(
            str(path),
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=[CONFIG, GENERATION, INDEX, "model*.safetensors"],
        )
    except Exception as error:  # the hub's, its HTTP client's and the file system's own kinds
        raise CheckpointError(
            f"there is no folder {str(path)!r}, and the hub does not give it: {type(error).__name__}: {error}"
        ) from error
    return Path(found)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a dictionary, with generation_config.json, where there is one, as "generation_config".

    Raises:
        CheckpointError: there is no config.json, or one of the two is not JSON.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}; a checkpoint is a folder with {CONFIG} and {WEIGHTS}")
    text = _read_json(folder / CONFIG)
    if (folder / GENERATION).is_file():
        text["generation_config"] = _read_json(folder / GENERATION)
    return text


def _read_json(path: Path) -> dict[str, Any]:
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(text, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return text


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the files that its index names.

    Raises:
        CheckpointError: no such file (pickles are not read), or one that is damaged.
    """
    files = [folder / WEIGHTS]
    if not files[0].is_file():
        if not (folder / INDEX).is_file():
            pickles = [name for name in PICKLES if (folder / name).is_file()]
            found = f"it has {', '.join(pickles)}, which can run code when loaded; " if pickles else ""
            raise CheckpointError(
                f"{folder} has no {WEIGHTS}; {found}load it with transformers and save_pretrained() it again"
            )
        listed = _read_json(folder / INDEX).get("weight_map", {}).values()
        files = [folder / Path(name).name for name in sorted(set(listed))]
    return read_tensors(files)


def read_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors of safetensors files; raises CheckpointError, with its name, for one that is damaged."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= safetensors().load_file(str(file))
        except (OSError, ValueError, _module("safetensors").SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    return tensors
