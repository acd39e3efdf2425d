"""Parameters to start from, and those to take away."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError, InputError
from ..models import Model, checkpoints
from . import checkpoint
from .task import Task


def adopt(task: Task, model: nn.Module, path: Path) -> list[str]:
    """Load what a checkpoint has of a fresh model; returns a note on what that was.

    Raises:
        InputError: no checkpoint there.
        CheckpointError: it has nothing of the model, or, but for the head, in another size.
    """
    saved, own = task.adopt(read(path)), model.state_dict()
    heads = tuple(getattr(model, "head_prefixes", tuple)())
    same = {name: value for name, value in saved.items() if name in own and own[name].shape == value.shape}
    other = [name for name in saved if name in own and name not in same and not (heads and name.startswith(heads))]
    if other or not same:
        what = f"{_short(other)} of other sizes" if other else "no tensor that the model has"
        raise CheckpointError(f"{path} holds {what}; give both the same sizes (--dim, --layers, --patch-size, ...)")
    model.load_state_dict(same, strict=False)
    fresh = [name for name in own if name not in same]
    return [f"{len(same)} tensors start from {path}, {len(fresh)} fresh" + (f": {_short(fresh)}" if fresh else "")]


def read(path: Path) -> dict[str, Tensor]:
    """The weights of a run's folder (its best), of a file of one, or of a folder of `save_pretrained`."""
    if not path.exists():
        raise InputError(f"--from {path} does not exist; name the folder of a run, a .pt file or a saved model")
    if path.is_file():
        return checkpoint.read(path)["model"]  # type: ignore[no-any-return]
    for name in (checkpoint.BEST, checkpoint.LAST):
        if (path / name).exists():
            return checkpoint.read(path / name)["model"]  # type: ignore[no-any-return]
    return checkpoints.read_weights(checkpoints.locate(path, revision=None, local_files_only=True))


def save_model(task: Task, about: Mapping[str, Any], weights: dict[str, Tensor], folder: Path) -> None:
    """Write `config.json` and `model.safetensors`, which `from_pretrained` reads."""
    model = task.model(about)
    if isinstance(model, Model):
        model.load_state_dict(weights)
        model.save_pretrained(folder)
        reader = task.reader(about)
        if reader is not None:
            reader.save_pretrained(folder)


def _short(names: list[str]) -> str:
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")
