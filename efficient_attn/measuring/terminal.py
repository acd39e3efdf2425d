"""What the commands share in a terminal: a console, tables, progress, errors by name and interruption."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import EfficientAttnError, UnsupportedError

try:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.progress import Progress as RichProgress
    from rich.table import Table
    from rich.text import Text
except ModuleNotFoundError as error:
    raise UnsupportedError(
        f"tables need {error.name}; pip install 'efficient-attn[bench]', or use to_json()"
    ) from error

MIB, GIB = 2**20, 2**30
LINE_EVERY_S = 5.0  # of a run that no terminal watches


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


class Progress:
    """How far a command is: a bar on a terminal, elsewhere a line every few seconds, so that no wait is unexplained.

    Args:
        out: where to.
        unit: what is counted.
        transient: whether the bar goes away at the end.
    """

    def __init__(self, out: Console, unit: str = "cells", *, transient: bool = False) -> None:
        self._out, self._unit = out, unit
        self._name, self._done, self._total = "", 0.0, 0.0
        self._left: float | None = None  # the moment when all is done
        self._begun: float | None = None
        self._bar: RichProgress | None = None
        if out.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
            name = TextColumn("{task.description}", markup=False)
            self._bar = RichProgress(*columns, name, console=out, transient=transient)
            self._task = self._bar.add_task("", total=None, left="")
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._ticker.ident is not None:  # a command may end before it began
            self._ticker.join()
        if self._bar is not None:
            self._bar.stop()

    def update(self, name: str, done: float, total: float, left_s: float | None = None) -> None:
        """Say what runs now, and how much of all is done; `left_s` is better known than by what is done so far."""
        until = None if left_s is None else time.monotonic() + left_s
        if self._begun is None:  # a run that goes on
            self._begun = done
        self._name, self._done, self._total, self._left = name, done, total, until
        self._refresh()

    @property
    def done(self) -> float:
        """How much of all is done."""
        return self._done

    def left(self) -> str:
        """What is left, in words; empty as long as nothing tells."""
        now = time.monotonic()
        if self._left is not None and self._left < now and self._done < self._total:
            return "longer than expected"
        if self._left is not None:
            seconds = max(self._left - now, 0.0)
        elif self._begun is not None and self._done > self._begun:
            seconds = (now - self._started) * (self._total - self._done) / (self._done - self._begun)
        else:
            return ""
        return f"about {duration(seconds)} left"

    def _tick(self) -> None:
        while not self._ended.wait(1.0 if self._bar is not None else LINE_EVERY_S):
            if self._bar is not None:
                self._refresh()
                continue
            parts = [f"{self._done:.0f} of {self._total:.0f} {self._unit}" if self._total else ""]
            parts += [duration(time.monotonic() - self._started), self.left(), self._name]
            self._out.print("  " + ", ".join(filter(None, parts)), soft_wrap=True)
            self._out.file.flush()

    def _refresh(self) -> None:
        if self._bar is not None:
            total = self._total or None
            self._bar.update(self._task, description=self._name, completed=self._done, total=total, left=self.left())


def duration(seconds: float) -> str:
    """45 -> "45 s", 150 -> "2 min 30 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def say_error(error: object) -> None:
    """Say what went wrong in one line, however many its text has."""
    note(console(stderr=True), "error:", f" {' '.join(str(error).split())}", "red")


def usage_error() -> Any:
    """The class of the errors that the command line raises for its arguments: click's, or typer's own copy of it."""
    import typer

    return typer.BadParameter.__base__


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


def interrupted(interrupt: KeyboardInterrupt, out: Console, kept: str, going_on: str, to: str = "go on") -> int:
    """Say after an interruption what is kept, and the command to go on; returns 130 after Ctrl-C, 143 after SIGTERM."""
    code, by = (143, "SIGTERM") if interrupt.args else (130, "Ctrl-C")
    note(out, "interrupted", f" by {by}; {kept}; to {to}:")
    out.print(f"  {going_on}", soft_wrap=True)
    return code


@contextlib.contextmanager
def nothing_kept(out: Console) -> Iterator[None]:
    """Of a command that keeps nothing when it is interrupted: it says so, and the command to start again."""
    import typer

    try:
        with sigterm_raises():
            yield
    except KeyboardInterrupt as interrupt:
        again = command_line(sys.argv[1:])
        raise typer.Exit(interrupted(interrupt, out, "nothing is kept", again, "start again")) from None


def resuming(**options: object) -> str:
    """The command that runs, with these options in the place of its own, and --resume."""
    names = {f"--{name}" for name in options}
    kept, words = [], iter(sys.argv[1:])
    for word in words:
        if word in names:
            next(words, None)
        elif word != "--resume" and word.partition("=")[0] not in names:
            kept.append(word)
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return command_line([*kept, *given, "--resume"])


def command_line(arguments: Sequence[str]) -> str:
    """A command of this package as it can be typed where the one that runs was; under torchrun, for its processes."""
    program = sys.argv[0]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        count = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", count]
        return shlex.join([sys.executable, *launcher, "-m", __name__.partition(".")[0], *arguments])
    if Path(program).name != "efficient-attn":
        return shlex.join([sys.executable, "-m", __name__.partition(".")[0], *arguments])
    found = shutil.which("efficient-attn")
    return shlex.join(["efficient-attn" if found == program else program, *arguments])
