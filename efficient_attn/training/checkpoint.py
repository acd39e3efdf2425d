"""Checkpoints of a run: all that the next step depends on, in one file that is there whole or not at all.

`last.pt` holds the model, the optimizer, the number of the step (from which schedule and place in the data follow),
the data's fingerprint and the random numbers' states of each process. Tensors are whole, so that another number of
processes can go on. The file is read by `torch.load(weights_only=True)`: nothing in it is executed.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .processes import like, whole

FORMAT = 1
LAST, BEST = "last.pt", "best.pt"


def write_whole(path: Path, content: bytes | Mapping[str, Any]) -> None:
    """Put bytes, or an object for `torch.load`, into a file: beside it first, then renamed once it is on the disk."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            torch.save(dict(content), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself
    finally:
        os.close(folder)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's content.

    Raises:
        CheckpointError: no file, not one of ours, or of another format.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}") from error
    except Exception as error:  # the unpickler raises errors of many kinds for what is no checkpoint
        why = (str(error).splitlines() or ["it ends too early"])[0]
        raise CheckpointError(f"{path} is no checkpoint that can be read ({why})") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of efficient-attn train, or of another version of it")
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers with all of their shards."""
    return {name: whole(value) for name, value in model.state_dict().items()}


def load_weights(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Put :func:`weights` back.

    Raises:
        CheckpointError: of another model.
    """
    now = model.state_dict()
    if set(now) != set(saved) or any(now[name].shape != saved[name].shape for name in now):
        differing = sorted(set(now) ^ set(saved)) or [n for n in now if now[n].shape != saved[n].shape]
        raise CheckpointError(f"the checkpoint is of another model: {', '.join(differing[:5])} differ")
    model.load_state_dict({name: like(saved[name], value) for name, value in now.items()})


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state by the names of parameters, with all of its shards."""
    return {
        name: {key: whole(value) for key, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Put :func:`optimizer_state` back; a count of steps keeps its place on the CPU."""
    for name, parameter in model.named_parameters():
        if name in saved:
            optimizer.state[parameter] = {
                key: like(value, parameter) if value.shape == parameter.shape and value.dim() else value.clone()
                for key, value in saved[name].items()
            }


def random_state() -> dict[str, Any]:
    """The states of all generators that a model or its data may draw from."""
    state: dict[str, Any]
    name, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put :func:`random_state` back."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
