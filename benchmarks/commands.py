"""`efficient-attn bench` and `efficient-attn report`."""

from __future__ import annotations

import functools
import os
import time
import webbrowser
from collections.abc import Sequence
from dataclasses import replace
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
from efficient_attn.measuring.terminal import (
    Progress,
    console,
    duration,
    interrupted,
    named_errors,
    note,
    resuming,
    sigterm_raises,
)

from . import cases, figures, html_report, peers, planning, suites, view
from . import report as reporting
from .summary import Summary

FULL_SUITES = ("ops", "vit", "fidelity", "million")
PAGE = "report.html"  # in the folder of a run
BUSY = 0.5  # load average per core above which a run starts with a warning


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SUITE]...",
            help=f"all, cpu, or any of {', '.join(suites.names())}. Default: an overview within three minutes.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Short lengths and training; the overview within a minute.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help=f"The long grid of {', '.join(FULL_SUITES)}: every method, an hour.")
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
        typer.Option(
            min=0.0,
            help="Minutes of measuring; what does not fit is left for --resume. Default: the overview's, else no end.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for results.jsonl, results.png and report.html. Default: bench-results/<time>."),
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser at the end.")] = False,
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
    chosen_peers = tuple(name for text in peer or () for name in text.split(","))
    more: dict[str, Any] = {"seed": seed, "backend": backend, "peer_names": chosen_peers}
    options = read_options(quick, methods, seqlens, mode, dtype, causal, threads, **more)
    limits = runner.Limits.asked_for(timeout, memory_limit)
    if full and names:
        raise typer.BadParameter("--full stands alone: it is the suites " + ", ".join(FULL_SUITES))
    # Sizes, directions and backends are chosen of a grid; the overview has its own.
    asked = names or full or seqlens or mode or chosen_peers or backend != "auto" or "," in dtype
    if asked:
        steps = [planning.Step((cell,)) for cell in grid(names or FULL_SUITES, options)]
        seconds = None
    else:
        steps = planning.overview(options)
        seconds = cases.QUICK_OVERVIEW_S if quick else cases.OVERVIEW_S
        limits = replace(limits, seconds=max(limits.seconds, seconds))
    with named_errors():
        folder = choose_run_folder(out, "bench-results", resume=resume)
    code = _run(planning.Plan(steps, seconds if budget is None else 60 * budget), folder, limits, overview=not asked)
    if show:
        webbrowser.open((folder / PAGE).resolve().as_uri())
    raise typer.Exit(code)


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


def read_options(
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
) -> suites.Options:
    """What the command line asks of suites; raises `typer.BadParameter` for anything wrong before any starts."""
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
    return suites.Options(
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


def grid(names: Sequence[str], options: suites.Options) -> list[runner.Cell]:
    """The cells of some suites, an equal share of each at any time; raises `typer.BadParameter` for unknown ones."""
    known = suites.names()
    names = list(dict.fromkeys(suites.ALIASES.get(name, name) for name in names))
    if names == ["all"]:
        names = [name for name in known if suites.get(name).default]
    for name in names:
        _one_of("suite", name, ("all", *suites.ALIASES, *known))
    if "all" in names:
        raise typer.BadParameter("suite 'all' stands alone: it has every suite that the others name")
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


def _run(plan: planning.Plan, folder: Path, limits: runner.Limits, *, overview: bool) -> int:
    """Measures what is not done yet within the plan's budget, shows the results, and returns the exit code: 130 or 143
    after Ctrl-C or SIGTERM."""
    path, code, out = folder / "results.jsonl", records.code_version(), console()
    exit_code = 0
    with records.ResultFile(path) as file:
        done = {record.get("id") for record in records.read(path)}
        steps = [step for step in plan.steps if any(_id(cell, code) not in done for cell in step.cells)]
        total, left = (sum(len(step.cells) for step in some) for some in (plan.steps, steps))
        if left < total:
            out.print(f"{total - left} of {total} cells are done already")
        noise = clock.noise()
        seed = next((cell.config.get("seed") for step in steps for cell in step.cells), None)
        file.append(records.environment(threads=torch.get_num_threads(), limits=vars(limits), noise=noise, seed=seed))
        _warn_if_busy(out, noise)
        if plan.budget_s is not None:
            out.print(f"{left} cells, at most {duration(plan.budget_s)} of measuring, into {path}", soft_wrap=True)
        try:
            with sigterm_raises(), Progress(out) as bar:
                left_out = _measure(plan, steps, file, limits, code, bar)
            _say_what_is_left_out(out, plan, left_out, folder)
        except KeyboardInterrupt as interrupt:
            kept = sum(record["type"] == "cell" for record in records.read(path))
            kept_in = f"{kept} measured cells are kept in {path}"
            exit_code = interrupted(interrupt, out, kept_in, resuming(out=folder))
    _show(list(records.read(path)), folder / "results.png", overview=overview, page=folder / PAGE)
    out.print(f"{path}", soft_wrap=True)
    return exit_code


def _measure(
    plan: planning.Plan,
    steps: Sequence[planning.Step],
    file: records.ResultFile,
    limits: runner.Limits,
    code: str,
    bar: Progress,
) -> list[planning.Step]:
    """Run the steps that fit the plan's budget, and return the others."""
    files = suites.loaded()
    alone = functools.partial(suites.measurement, files=files)
    together = functools.partial(suites.measurement_together, files=files)
    total, done, left_out = sum(len(step.cells) for step in steps), 0, []
    for number, step in enumerate(steps):
        if not plan.fits(step):
            left_out.append(step)
            total -= len(step.cells)
            continue
        bar.update(_step_name(step), done, total, plan.remaining(steps[number:]))
        started, left = time.monotonic(), plan.left()
        seconds = limits.seconds if left is None else min(limits.seconds, max(left, planning.SHORTEST_S))
        within = replace(limits, seconds=seconds)
        if len(step.cells) > 1:
            runner.run_together(step.cells, file, within, code, together)
        else:
            suites.measured(step.cells[0], lambda each, w=within: runner.run_cell(each, file, w, code, alone))
        plan.finished(step, time.monotonic() - started)
        done += len(step.cells)
    bar.update("", done, total, 0.0)
    return left_out


def _step_name(step: planning.Step) -> str:
    first = step.cells[0]
    if len(step.cells) == 1:
        return view.cell_name(vars(first))
    return view.cell_name({"suite": first.suite, "config": {**first.config, "method": f"{len(step.cells)} methods"}})


def _id(cell: runner.Cell, code: str) -> str:
    return records.cell_id(cell.suite, cell.config, code)


def _say_what_is_left_out(out: Console, plan: planning.Plan, steps: Sequence[planning.Step], folder: Path) -> None:
    if not steps:
        return
    names = "; ".join(list(dict.fromkeys(map(_step_name, steps)))[:4]) + ("; ..." if len(steps) > 4 else "")
    needed = sum(plan.expected(step) or 0.0 for step in steps)
    cells = sum(len(step.cells) for step in steps)
    about = f", about {duration(needed)} more" if needed else ""
    text = f": {cells} cells ({names}){about}; --resume --out {folder} --budget MINUTES goes on"
    note(out, "left out for want of time", text)


def _warn_if_busy(out: Console, noise: float) -> None:
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > BUSY * cores or noise > clock.NOISY:
        about = f"load {load:.1f} on {cores} cores, the same work varies by {noise:.0%}"
        note(out, "the machine is busy", f" ({about}): measured longer, and what stays unsure is marked ~")


def _show(found: Sequence[records.Record], png: Path, *, overview: bool = False, page: Path | None = None) -> bool:
    """Prints the tables and draws the picture and the page of some records; False when they hold no cell."""
    cells = view.latest(found)
    if not cells:
        return False
    about, out = records.described(found), console()
    out.print(about)
    rows = view.rows(cells)
    summary = Summary(rows)
    table = summary.table() if overview else None
    if table is None:
        reporting.print_report(cells, out)
    else:
        reporting.print_table(table, out)
        for claim in summary.sentences():
            out.print(f"  {claim.text}")
        for status, text in reporting.failures(rows):
            note(out, status, f": {text}")
    noisy = sum(row["noisy"] for row in rows)
    if noisy:
        note(out, f"{noisy} of {len(rows)} times are noisy", f": unsure by more than {clock.UNSURE:.0%}")
    environment = next((record for record in reversed(found) if record["type"] == "environment"), {})
    if figures.story(rows, png, environment) if table is not None else figures.overview(rows, png, about):
        out.print(f"picture  {png}", soft_wrap=True)
    if page is not None:
        html_report.write(found, page, [str(page.with_name("results.jsonl"))], pictures=False)
        out.print(f"page     {page}", soft_wrap=True)
    return True
