"""``efficient-attn bench`` and ``efficient-attn report``."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from efficient_attn import EfficientAttnError, parse
from efficient_attn.backends import BACKENDS
from efficient_attn.errors import InputError
from efficient_attn.measuring import clock, records, runner
from efficient_attn.measuring.run_folder import make_run_folder

from . import cases, html_report, peers, plot, suites
from . import report as reporting

DTYPES = ("float32", "float64", "bfloat16", "float16")
DEFAULT_SUITES = ("ops", "vit")  # of a plain `bench`
BUSY = 0.5  # load average per core above which a run starts with a warning


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SUITE]...", help=f"all, cpu, or any of {', '.join(suites.names())}. Default: ops vit."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Short lengths and training: ops in under three minutes on 2 cores.")
    ] = False,
    methods: Annotated[
        list[str] | None, typer.Option(help="Specs, e.g. dense,bigbird:block=64,window=3. Repeatable.")
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option("--peers", help="Of the peers suite, e.g. sdpa_flash,linformer. Repeatable.")
    ] = None,
    seqlens: Annotated[str | None, typer.Option(help="Lengths: 512,2k,16k or 512:65536:x2.")] = None,
    mode: Annotated[str | None, typer.Option(help=f"Any of {','.join(cases.MODES)}.")] = None,
    dtype: Annotated[str, typer.Option(help=f"Any of {','.join(DTYPES)}.")] = "float32",
    backend: Annotated[str, typer.Option(help=f"Of the ops suite: auto, {', '.join(BACKENDS)}.")] = "auto",
    causal: Annotated[bool, typer.Option("--causal", help="Causal attention in the ops suite.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, random features and training.")] = 0,
    load: Annotated[
        list[Path] | None,
        typer.Option(help="A Python file that registers a method, a peer or a suite.", exists=True, dir_okay=False),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(min=0.0, help="Minutes after which no new cell starts; --resume goes on. Default: no end."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results.jsonl and results.png. Default: bench-results/<time>.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on in --out (default: the latest), skipping what is done.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one cell may take.")] = 120.0,
    memory_limit: Annotated[
        float | None, typer.Option(min=0.1, help="GiB that one cell may use. Default: 80 % of what is free.")
    ] = None,
) -> None:
    """Compares methods x lengths on this machine: time, peak memory, and error or accuracy against dense attention."""
    _load(load)
    wanted = names or list(DEFAULT_SUITES)
    chosen_peers = tuple(name for text in peer or () for name in text.split(","))
    more: dict[str, Any] = {"seed": seed, "backend": backend, "peer_names": chosen_peers}
    cells = plan(wanted, quick, methods, seqlens, mode, dtype, causal, threads, **more)
    folder = _folder(out, resume)
    raise typer.Exit(_run(cells, folder, runner.Limits.asked_for(timeout, memory_limit), budget))


def report(
    files: Annotated[
        list[Path], typer.Argument(help="results.jsonl files, of unfinished runs too.", exists=True, dir_okay=False)
    ],
    png: Annotated[Path | None, typer.Option(help="Where to draw. Default: beside the first file.")] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Also one self-contained page, with the charts as PNG and SVG and the rows as CSV beside it."
        ),
    ] = None,
    load: Annotated[
        list[Path] | None, typer.Option(help="Files that the run was given with --load.", exists=True, dir_okay=False)
    ] = None,
) -> None:
    """Prints the tables of result files and draws them."""
    _load(load)
    try:
        found = [record for file in files for record in records.read(file)]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if not _show(found, png or files[0].with_suffix(".png")):
        raise typer.BadParameter(
            f"{', '.join(map(str, files))} holds no cell yet; run efficient-attn bench --out FOLDER first"
        )
    if html is not None:
        for written in html_report.write(found, html, [str(file) for file in files]):
            print(written)


def plan(
    names: Sequence[str],
    quick: bool,
    method_lists: Sequence[str] | None,
    seqlens: str | None,
    mode: str | None,
    dtype: str,
    causal: bool,
    threads: int | None,
    *,
    seed: int = 0,
    backend: str = "auto",
    peer_names: tuple[str, ...] = (),
) -> list[runner.Cell]:
    """The cells of a run, an equal share of each suite at any time; raises ``typer.BadParameter`` for anything wrong
    before any of them starts."""
    known = suites.names()
    names = list(dict.fromkeys(suites.ALIASES.get(name, name) for name in names))
    if names == ["all"]:
        names = [name for name in known if suites.get(name).default]
    for name in names:
        _one_of("suite", name, ("all", *suites.ALIASES, *known))
    if "all" in names:
        raise typer.BadParameter("suite 'all' stands alone: it has every suite that the others name")
    for name in dtype.split(","):
        _one_of("--dtype", name, DTYPES)
    _one_of("--backend", backend, ("auto", *BACKENDS))
    for name in peer_names:
        _one_of("--peers", name, peers.names())
    modes = tuple(mode.split(",")) if mode else None
    for name in modes or ():
        _one_of("--mode", name, cases.MODES)
    chosen = tuple(spec for text in method_lists or () for spec in split_specs(text))
    for spec in chosen:
        try:
            parse(spec)
        except EfficientAttnError as error:
            raise typer.BadParameter(f"--methods: {error}") from error
    options = suites.Options(
        quick=quick,
        methods=chosen,
        peers=peer_names,
        seqlens=parse_lengths(seqlens) if seqlens else None,
        modes=modes,
        dtypes=tuple(dtype.split(",")),
        backend=backend,
        causal=causal,
        threads=threads or torch.get_num_threads(),
        budget_s=0.25 if quick else 1.5,
        seed=seed,
    )
    return _interleaved([[runner.Cell(name, config) for config in suites.get(name).configs(options)] for name in names])


def _interleaved(grids: Sequence[Sequence[runner.Cell]]) -> list[runner.Cell]:
    """The cells of several suites in an order in which each is at the same share of its own."""
    order = [((index + 1) / len(cells), cell) for cells in grids for index, cell in enumerate(cells)]
    return [cell for _, cell in sorted(order, key=lambda pair: pair[0])]


def split_specs(text: str) -> list[str]:
    """``"dense,bigbird:block=64,window=3"`` -> ``["dense", "bigbird:block=64,window=3"]``: a part whose ``=`` comes
    before any ``:`` belongs to the spec before it."""
    specs: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if specs and "=" in part.partition(":")[0]:
            specs[-1] += "," + part
        else:
            specs.append(part)
    return specs


def parse_lengths(text: str) -> tuple[int, ...]:
    """``"512,2k,16k"`` or ``"512:4096:x2"`` (from:to:factor) -> lengths, ascending."""
    geometric = re.fullmatch(r"(\w+):(\w+):x(\d+)", text)
    if geometric:
        first, last, factor = _length(geometric[1]), _length(geometric[2]), int(geometric[3])
        if factor < 2 or first > last:
            raise typer.BadParameter(f"--seqlens {text!r}: from:to:xfactor needs from <= to and a factor of at least 2")
        lengths = [first]
        while lengths[-1] * factor <= last:
            lengths.append(lengths[-1] * factor)
        return tuple(lengths)
    return tuple(sorted({_length(part.strip()) for part in text.split(",")}))


def _length(text: str) -> int:
    match = re.fullmatch(r"(\d+)([kKmM]?)", text)
    value = int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2].lower()] if match else 0
    if value < 1:
        raise typer.BadParameter(f"--seqlens: {text!r} is not a length; write 512, 2k, 512,2k,16k or 512:65536:x2")
    return value


def _load(files: Sequence[Path] | None) -> None:
    for file in files or ():
        try:
            suites.load(file)
        except Exception as error:  # whatever a user's file raises
            raise typer.BadParameter(f"--load {file}: {type(error).__name__}: {error}") from error


def _one_of(what: str, given: str, allowed: Sequence[str]) -> None:
    if given not in allowed:
        raise typer.BadParameter(f"{what} {given!r} does not exist; choose from {', '.join(allowed)}")


def _folder(out: Path | None, resume: bool) -> Path:
    """The folder of this run. An existing result file is only continued when asked for."""
    if out is None:
        runs = sorted(Path("bench-results").glob("*/results.jsonl"), key=lambda path: path.stat().st_mtime)
        if resume and not runs:
            raise typer.BadParameter(
                "--resume: there is no run under bench-results to go on with; leave it out or name --out"
            )
        out = runs[-1].parent if resume else Path("bench-results") / datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        make_run_folder(out, holds_run=not resume and (out / "results.jsonl").exists())
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    return out


def _run(cells: Sequence[runner.Cell], folder: Path, limits: runner.Limits, budget: float | None = None) -> int:
    """Measures what is not done yet, for ``budget`` minutes at most, shows the results, and returns the exit code: 130
    or 143 after Ctrl-C or SIGTERM."""
    path = folder / "results.jsonl"
    code, console = records.code_version(), Console()
    lookup = functools.partial(suites.measurement, files=suites.loaded())
    exit_code = 0
    with records.ResultFile(path) as out:
        done = {record.get("id") for record in records.read(path)}
        left = [cell for cell in cells if records.cell_id(cell.suite, cell.config, code) not in done]
        if len(left) < len(cells):
            console.print(f"{len(cells) - len(left)} of {len(cells)} cells are done already")
        noise = clock.noise()
        seed = cells[0].config.get("seed") if cells else None
        out.append(records.environment(threads=torch.get_num_threads(), limits=vars(limits), noise=noise, seed=seed))
        _warn_if_busy(console, noise)
        started = time.monotonic()
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        try:
            with _sigterm_raises(), Progress(*columns, TextColumn("{task.description}"), console=console) as progress:
                task = progress.add_task("", total=len(left))
                for number, cell in enumerate(left):
                    if budget is not None and time.monotonic() - started >= 60 * budget:
                        console.print(f"{budget:g} minutes are over, {len(left) - number} cells are left: --resume")
                        break
                    progress.update(task, description=reporting.cell_name(vars(cell)))
                    runner.run_cell(cell, out, limits, code, lookup)
                    progress.advance(task)
        except KeyboardInterrupt as interrupt:
            exit_code, by = (143, "SIGTERM") if interrupt.args else (130, "Ctrl-C")
            console.print(f"[yellow]interrupted[/] by {by}; to go on, repeat the command with --out {folder} --resume")
    _show(list(records.read(path)), folder / "results.png")
    console.print(f"{path}", highlight=False)
    return exit_code


def _warn_if_busy(console: Console, noise: float) -> None:
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > BUSY * cores or noise > clock.NOISY:
        about = f"load {load:.1f} on {cores} cores, the same work varies by {noise:.0%}"
        console.print(f"[yellow]the machine is busy[/] ({about}): times will be noisy")


def _show(found: Sequence[records.Record], png: Path) -> bool:
    """Prints the tables and draws the picture of some records; False when they hold no cell."""
    cells = reporting.latest(found)
    if not cells:
        return False
    environment = next(record for record in reversed(found) if record["type"] == "environment")
    about = records.describe(environment)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a file or pipe has no edge to wrap at
    console.print(about, highlight=False)
    reporting.print_report(cells, console)
    noisy = sum(cell.get("spread", 0) > clock.NOISY for cell in cells)
    if noisy:
        console.print(f"[yellow]{noisy} of {len(cells)} times are noisy[/]: an interquartile range above 25 %")
    if plot.save(cells, png, about):
        console.print(f"{png}", highlight=False)
    return True


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does: the worker is stopped, what is measured is shown."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt("SIGTERM")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
