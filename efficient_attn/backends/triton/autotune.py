"""Measured choices, kept on disk: which of some configurations is fastest for a key, on the machine at hand.

EFFICIENT_ATTN_AUTOTUNE=1 turns it on. Results lie in one JSON file in a directory of the user's own, by default
~/.cache/efficient-attn (EFFICIENT_ATTN_CACHE names another); it is replaced as a whole, so that a reader or a killed
process never meets half of it. Two processes that tune at once may lose each other's entries, which are then measured
again.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from ...errors import UnsupportedError

Choice = tuple[int, ...]


def enabled() -> bool:
    return os.environ.get("EFFICIENT_ATTN_AUTOTUNE") == "1"


def directory() -> Path:
    """The directory of the results, made private. Raises UnsupportedError if others could have written to it."""
    path = Path(os.environ.get("EFFICIENT_ATTN_CACHE") or Path.home() / ".cache" / "efficient-attn")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnsupportedError(
            f"EFFICIENT_ATTN_AUTOTUNE=1 keeps its results in {path}, which others may write to; chmod 700 it, or name "
            "a directory of your own in EFFICIENT_ATTN_CACHE"
        )
    return path


def load(path: Path) -> dict[str, list[int]]:
    """What the file holds; nothing, if there is none or it is damaged: its entries are measured again."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def store(path: Path, key: str, choice: Choice) -> None:
    """Add one entry; the file is replaced in one step."""
    entries = load(path) | {key: list(choice)}
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(entries, file, indent=1, sort_keys=True)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def best(key: str, candidates: Sequence[Choice], measure: Callable[[Choice], float]) -> Choice:
    """The candidate with the least `measure` (infinity: does not run here), from the file where it was measured
    before."""
    known = _known(str(directory() / "triton.json"))
    found = known.get(key)
    if found is None or tuple(found) not in candidates:
        times = [measure(candidate) for candidate in candidates]
        found = list(candidates[times.index(min(times))])
        known[key] = found
        store(directory() / "triton.json", key, tuple(found))
    return tuple(found)


@cache
def _known(path: str) -> dict[str, list[int]]:
    """The file as this process first read it, and what it measured since."""
    return load(Path(path))
