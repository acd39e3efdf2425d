"""What a suite makes once and every one of its cells needs, kept on the disk: each cell is a process of its own."""

from __future__ import annotations

import hashlib
import inspect
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def cached(name: str, make: Callable[[], Any], *, key: Any, code: Sequence[Any] = ()) -> Any:
    """`make()`, or what it gave before for the same key, PyTorch and source code of `code` (modules, functions).

    Values are tensors, numbers, text, and lists, tuples and dictionaries of them. They lie in the user's cache folder
    (XDG_CACHE_HOME or ~/.cache), below efficient-attn.
    """
    text = f"{key} {torch.__version__} {''.join(map(inspect.getsource, code))}"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "efficient-attn"
    path = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    made = make()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        torch.save(made, file)
    os.replace(file.name, path)  # whole or not at all, also when a run is killed here
    return made
