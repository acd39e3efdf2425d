"""The folder of a run of the command line: made before any work, and never written over."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError


def make_run_folder(out: Path, *, holds_run: bool) -> None:
    """Make the folder `out` for a new run, or for one that goes on (``holds_run`` False although it holds one).

    Raises:
        InputError: it holds a run already, or cannot be made.
    """
    if holds_run:
        raise InputError(f"--out {out} holds a run already; add --resume to go on with it, or name another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--out {out} cannot be made: {error.strerror}; name a folder that you may write to"
        ) from error
