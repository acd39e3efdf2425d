"""`efficient-attn bench` and `efficient-attn report`."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from efficient_attn import InputError, parse
from efficient_attn.backends import BACKENDS
from efficient_attn.measuring import clock, records, runner
from efficient_attn.measuring.options import DTYPES, read_lengths, split_specs
from efficient_attn.measuring.run_folder import choose_run_folder
from efficient_attn.measuring.terminal import console, interrupted, named_errors, note, progress, sigterm_raises

from . import cases, figures, html_report, peers, suites, view
from . import report as reporting

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
    seqlens: Annotated[
        str | None, typer.Option(help="Lengths: 512,2k,16k or 1k..256k (doubling) or 512:64k:x2.")
    ] = None,
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
    with named_errors():
        folder = choose_run_folder(out, "bench-results", resume=resume)
    raise typer.Exit(_run(cells, folder, runner.Limits.asked_for(timeout, memory_limit), budget))


def report(
    files: Annotated[
        list[Path], typer.Argument(help="Folders of runs or their results.jsonl, unfinished ones too.", exists=True)
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
    with named_errors():
        files = [records.results_file(path) for path in files]
        found = [record for file in files for record in records.read(file)]
        if not _show(found, png or files[0].with_suffix(".png")):
            raise InputError(
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
    """The cells of a run, an equal share of each suite at any time; raises `typer.BadParameter` for anything wrong
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
    with named_errors("--methods"):
        for spec in chosen:
            parse(spec)
    with named_errors("--seqlens"):
        lengths = read_lengths(seqlens) if seqlens else None
    options = suites.Options(
        quick=quick,
        methods=chosen,
        peers=peer_names,
        seqlens=lengths,
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


def _load(files: Sequence[Path] | None) -> None:
    for file in files or ():
        try:
            suites.load(file)
        except Exception as error:  # whatever a user's file raises
            raise typer.BadParameter(f"--load {file}: {type(error).__name__}: {error}") from error


def _one_of(what: str, given: str, allowed: Sequence[str]) -> None:
    if given not in allowed:
        raise typer.BadParameter(f"{what} {given!r} does not exist; choose from {', '.join(allowed)}")


def _run(cells: Sequence[runner.Cell], folder: Path, limits: runner.Limits, budget: float | None = None) -> int:
    """Measures what is not done yet, for `budget` minutes at most, shows the results, and returns the exit code: 130
    or 143 after Ctrl-C or SIGTERM."""
    path, code, out = folder / "results.jsonl", records.code_version(), console()
    lookup = functools.partial(suites.measurement, files=suites.loaded())
    exit_code = 0
    with records.ResultFile(path) as file:
        done = {record.get("id") for record in records.read(path)}
        left = [cell for cell in cells if records.cell_id(cell.suite, cell.config, code) not in done]
        if len(left) < len(cells):
            out.print(f"{len(cells) - len(left)} of {len(cells)} cells are done already")
        noise = clock.noise()
        seed = cells[0].config.get("seed") if cells else None
        file.append(records.environment(threads=torch.get_num_threads(), limits=vars(limits), noise=noise, seed=seed))
        _warn_if_busy(out, noise)
        started = time.monotonic()
        try:
            with sigterm_raises(), progress(out) as bar:
                task = bar.add_task("", total=len(left))
                for number, cell in enumerate(left):
                    if budget is not None and time.monotonic() - started >= 60 * budget:
                        out.print(f"{budget:g} minutes are over, {len(left) - number} cells are left: --resume")
                        break
                    bar.update(task, description=view.cell_name(vars(cell)))
                    suites.measured(cell, lambda each: runner.run_cell(each, file, limits, code, lookup))
                    bar.advance(task)
        except KeyboardInterrupt as interrupt:
            exit_code = interrupted(interrupt, out, folder)
    _show(list(records.read(path)), folder / "results.png")
    out.print(f"{path}")
    return exit_code


def _warn_if_busy(out: Console, noise: float) -> None:
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > BUSY * cores or noise > clock.NOISY:
        about = f"load {load:.1f} on {cores} cores, the same work varies by {noise:.0%}"
        note(out, "the machine is busy", f" ({about}): times will be noisy")


def _show(found: Sequence[records.Record], png: Path) -> bool:
    """Prints the tables and draws the picture of some records; False when they hold no cell."""
    cells = view.latest(found)
    if not cells:
        return False
    about, out = records.described(found), console()
    out.print(about)
    reporting.print_report(cells, out)
    noisy = sum(cell.get("spread", 0) > clock.NOISY for cell in cells)
    if noisy:
        note(out, f"{noisy} of {len(cells)} times are noisy", ": an interquartile range above 25 %")
    if figures.overview(view.rows(cells), png, about):
        out.print(f"{png}")
    return True
