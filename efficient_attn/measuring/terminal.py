"""What the commands share in a terminal: a console, tables, progress, errors by name and interruption."""

from __future__ import annotations

import contextlib
import io
import signal
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from ..errors import EfficientAttnError, UnsupportedError

try:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table
    from rich.text import Text
except ModuleNotFoundError as error:
    raise UnsupportedError(
        f"tables need {error.name}; pip install 'efficient-attn[bench]', or use to_json()"
    ) from error

MIB, GIB = 2**20, 2**30


def console(*, stderr: bool = False, width: int = 140, quiet: bool = False) -> Console:
    """A console that prints text as it is: a bracket in a path or message is no markup.

    In a file or pipe, which has no edge to wrap at, it is at least `width` wide.
    """
    made = Console(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False)
    if not made.is_terminal:
        made.width = max(made.width, width)
    return made


def note(out: Console, label: str, rest: str, colour: str = "yellow") -> None:
    """Print a line that begins with a coloured label."""
    out.print(Text.assemble((label, colour), rest), soft_wrap=True)


def make_table(title: str, labels: Sequence[str], text_columns: Collection[int], caption: str) -> Table:
    """An empty table: the columns of these numbers hold text, on the left, all others figures, on the right."""
    table = Table(
        title=title,
        caption=caption or None,
        box=SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        header_style="bold",
    )
    for number, label in enumerate(labels):
        text = number in text_columns
        table.add_column(label, justify="left" if text else "right", no_wrap=not text, overflow="fold")
    return table


def as_text(renderable: Any, width: int = 118) -> str:
    """A renderable as plain text."""
    file = io.StringIO()
    Console(file=file, width=width, no_color=True, highlight=False, markup=False, emoji=False).print(renderable)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def progress(out: Console, *, transient: bool = False) -> Progress:
    """A bar with what is done, the time so far and the time left, and the name of what runs now."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.description}", markup=False), console=out, transient=transient)


@contextlib.contextmanager
def named_errors(option: str = "") -> Iterator[None]:
    """This package's errors, and files that cannot be read or written, as errors of the command: exit code 2."""
    import typer

    try:
        yield
    except (EfficientAttnError, OSError) as error:
        raise typer.BadParameter(f"{option}: {error}" if option else str(error)) from error


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does, by a `KeyboardInterrupt` with an argument: see `interrupted`."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt("SIGTERM")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def interrupted(interrupt: KeyboardInterrupt, out: Console, folder: object) -> int:
    """Say how to go on after an interruption; returns 130 after Ctrl-C, 143 after SIGTERM."""
    code, by = (143, "SIGTERM") if interrupt.args else (130, "Ctrl-C")
    note(out, "interrupted", f" by {by}; to go on, repeat the command with --out {folder} --resume")
    return code
