"""What a search has measured, in a file as it is measured: one that was interrupted goes on from it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...errors import InputError

if TYPE_CHECKING:
    from ...measuring import records

ABOUT, LAYER, TRIAL = "about", "layer", "trial"


class Kept:
    """Figures of layers, and errors of the whole model by what its layers attend with. A budget is no part of them:
    with another one the same measurements serve.

    Args:
        path: the file, JSON lines.
        about: what the figures depend on; a file of other figures is not gone on with.
        resume: go on with what the file holds; else it is begun anew.

    Raises:
        InputError: nothing to go on with, or figures of something else.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], *, resume: bool) -> None:
        from ...measuring import records  # reads what only some systems tell

        rows = list(records.read(path)) if resume and path.exists() else []
        if resume and not rows:
            raise InputError(f"--resume: {path} holds no measurements to go on with; leave it out")
        before: Mapping[str, Any] = next((row["values"] for row in rows if row["type"] == ABOUT), {})
        for name, value in about.items() if resume else ():
            if before.get(name) != value:
                raise InputError(
                    f"{path} was measured with another {name}: {before.get(name)}, now {value}; give the same, or "
                    "leave --resume out"
                )
        self.path = path
        self.layers = {row["name"]: row for row in rows if row["type"] == LAYER}
        self.errors = {tuple(row["methods"]): row["error"] for row in rows if row["type"] == TRIAL}
        self._about, self._resume = {"type": ABOUT, "values": dict(about)}, resume
        self._file: records.ResultFile | None = None

    def begin(self) -> records.ResultFile:
        """The file, made now at the latest: what was refused before leaves none, and an older one as it is."""
        from ...measuring import records  # reads what only some systems tell

        if self._file is None:
            if not self._resume:
                self.path.unlink(missing_ok=True)
            self._file = records.ResultFile(self.path)
            if not self._resume:
                self._file.append(self._about)
        return self._file

    def put_layer(self, name: str, dense: float, figures: Sequence[Mapping[str, Any]]) -> None:
        """Keep the cost of a layer as it is, and the figures of its candidates."""
        self.layers[name] = {"type": LAYER, "name": name, "dense": dense, "figures": list(figures)}
        self.begin().append(self.layers[name])

    def put_error(self, methods: tuple[str, ...], error: float) -> None:
        """Keep what the whole model loses with these methods."""
        self.errors[methods] = error
        self.begin().append({"type": TRIAL, "methods": list(methods), "error": error})

    def __str__(self) -> str:
        return f"{len(self.layers)} layers and {len(self.errors)} trials that were measured are kept in {self.path}"

    def remove(self) -> None:
        """The search is done."""
        if self._file is not None:
            self._file.__exit__()
        self.path.unlink(missing_ok=True)


def fingerprint(model: nn.Module, sample: Any) -> str:
    """Of the parameters and buffers of a model and the tensors that it is run on."""
    found = hashlib.sha256()
    for tensor in (*model.state_dict().values(), *pytree.tree_leaves(sample)):
        if isinstance(tensor, Tensor):
            found.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
