"""The folder of a run of the command line: made before any work, and never written over."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from ..errors import InputError


def make_run_folder(out: Path, *, holds_run: bool) -> None:
    """Make the folder `out` of a run.

    Raises:
        InputError: it cannot be made, or `holds_run`: it holds a run that would be written over.
    """
    if holds_run:
        raise InputError(f"--out {out} holds a run already; add --resume to go on with it, or name another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--out {out} cannot be made: {error.strerror}; name a folder that you may write to"
        ) from error


def check_file(option: str, path: Path) -> Path:
    """`path`, before the work whose result it will hold; what is there stays as it is.

    Raises:
        InputError: a folder, or a file that cannot be written.
    """
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: there is no folder {path.parent}")
    there = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise InputError(
            f"{option} {path} cannot be written: {error.strerror}; name a file in a folder that you may write to"
        ) from error
    if not there:
        path.unlink()
    return path


def choose_run_folder(out: Path | None, under: str, *, resume: bool, latest: bool = True) -> Path:
    """The folder of a run with a results.jsonl, made: `out`, or one below `under`, named after the time.

    With `resume` and no `out` it is the latest run below `under`, if `latest` allows that.

    Raises:
        InputError: a folder that holds a run, without `resume`; nothing to resume; a folder that cannot be made.
    """
    if out is None and resume:
        if not latest:
            raise InputError("--resume goes on in a folder: name it with --out")
        runs = sorted(Path(under).glob("*/results.jsonl"), key=lambda path: path.stat().st_mtime)
        if not runs:
            raise InputError(f"--resume: there is no run under {under} to go on with; leave it out or name --out")
        out = runs[-1].parent
    out = out or Path(under) / datetime.now().strftime("%Y%m%d-%H%M%S")
    make_run_folder(out, holds_run=not resume and (out / "results.jsonl").exists())
    return out
