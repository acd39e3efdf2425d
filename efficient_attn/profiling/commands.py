"""`efficient-attn profile` and `efficient-attn recommend`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..errors import InputError
from ..measuring import records, runner
from ..measuring.options import read_lengths
from ..measuring.run_folder import check_file, choose_run_folder
from ..measuring.terminal import Progress, console, interrupted, named_errors, nothing_kept, resuming, sigterm_raises
from .api import LENGTHS, MODEL_LENGTHS, profile_op, profile_source
from .profile import from_records
from .recommendation import CANDIDATES, from_rows, recommend
from .session import MODEL, OPERATOR, Report

Text = str | None
PROFILED = "profiled"  # a row that says that all rows of a method and length are there


def profile(
    op: Annotated[
        list[str] | None, typer.Option("--op", help="A method's spec, e.g. bigbird:block=64. Repeatable.")
    ] = None,
    model: Annotated[
        Text,
        typer.Option(help="encoder, decoder, bert, a folder with transformers' config.json, or file.py:function."),
    ] = None,
    lengths: Annotated[Text, typer.Option(help="512,2k,16k or 1k..256k (doubling) or 512:64k:x2.")] = None,
    mode: Annotated[str, typer.Option(help="fwd, fwd_bwd or fwd,fwd_bwd.")] = "fwd",
    attention: Annotated[
        list[str] | None, typer.Option(help="With --model: a spec to put into it, each a series. Repeatable.")
    ] = None,
    batch: Annotated[int, typer.Option()] = 1,
    heads: Annotated[int, typer.Option()] = 8,
    kv_heads: Annotated[int | None, typer.Option(help="Grouped queries. Default: --heads.")] = None,
    head_dim: Annotated[int, typer.Option()] = 64,
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")] = "float32",
    causal: Annotated[bool, typer.Option("--causal", help="With --op: causal attention.")] = False,
    activations: Annotated[str, typer.Option(help="With --op: random or photographs.")] = "random",
    seed: Annotated[int, typer.Option(help="Of activations and weights.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's.")] = None,
    budget: Annotated[float, typer.Option(min=0.05, help="Seconds of timing a cell.")] = 1.0,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one cell may take.")] = 120.0,
    memory_limit: Annotated[
        float | None, typer.Option(min=0.1, help="GiB that one cell may use. Default: 80 % of what is free.")
    ] = None,
    context_parallel: Annotated[
        Text,
        typer.Option(help="Ranks that share the sequence, as 1,2,4,64: measured here, predicted beyond."),
    ] = None,
    layout: Annotated[
        str, typer.Option(help="With --context-parallel: zigzag, or contiguous, least to send for windows.")
    ] = "zigzag",
    link: Annotated[Text, typer.Option(help="With --context-parallel: predict for h200, measure nothing.")] = None,
    bandwidth: Annotated[float | None, typer.Option(min=1e-3, help="GB/s of a link, for the prediction.")] = None,
    latency: Annotated[float | None, typer.Option(min=0.0, help="Microseconds of a message, likewise.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="A Chrome trace (ui.perfetto.dev) of the longest length, into this file.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results.jsonl and profile.png. Default: profile-results/<time>.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in --out, skipping what is done.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Time, memory, phases and roofline of a method or model against length, with what they predict."""
    shape: dict[str, Any]
    with named_errors():
        if context_parallel is not None:
            given = {"bandwidth": (bandwidth, 1e9), "latency": (latency, 1e-6)}
            shape = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": dtype}
            _over_ranks(
                op or ["dense"],
                read_lengths(lengths or "8k"),
                _numbers(context_parallel),
                shape | {"causal": causal, "link": link, "layout": layout, "mode": mode},
                {name: value * unit for name, (value, unit) in given.items() if value is not None},
                timeout,
                as_json,
                None if out is None else choose_run_folder(out, "profile-results", resume=resume),
            )
            return
        if (op is None) == (model is None):
            raise InputError("give --op SPEC or --model NAME, one of the two")
        chosen = read_lengths(lengths) if lengths else (LENGTHS if model is None else MODEL_LENGTHS)
        folder = choose_run_folder(out, "profile-results", resume=resume, latest=False)
        if trace is not None:
            trace.parent.mkdir(parents=True, exist_ok=True)
            check_file("--trace", trace)
        common: dict[str, Any] = {"lengths": chosen, "mode": mode.split(","), "batch": batch, "dtype": dtype}
        common |= {
            "seed": seed,
            "threads": threads,
            "budget_s": budget,
            "limits": runner.Limits.asked_for(timeout, memory_limit),
        }
        common |= {"out": folder, "trace": trace}
        err = console(stderr=as_json)
        code = 0
        try:
            with _progress(err) as report:
                if op is not None:
                    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
                    shape |= {"causal": causal, "activations": activations}
                    found = profile_op(op, **shape, **common, report=report)
                else:
                    found = profile_source(model or "", attention=attention or (), **common, report=report)
        except KeyboardInterrupt as interrupt:
            code = interrupted(interrupt, err, _kept(folder), resuming(out=folder))
            rows = list(records.read(folder / "results.jsonl"))
            if not any(row.get("suite") in (OPERATOR, MODEL) for row in rows):
                raise typer.Exit(code) from None
            found = from_records(rows)
        _show(found, folder / "profile.png", as_json)
        if not code and not found.series():
            err.print("no cell could be measured; the rows say why")
            code = 1
    raise typer.Exit(code)


def recommend_command(
    more: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="Further files of --from, as of runs/*.jsonl.")
    ] = None,
    length: Annotated[str | None, typer.Option(help="Sequence length: 4096 or 4k.")] = None,
    error: Annotated[float, typer.Option("--budget", help="The error allowed, |out - dense| / |dense|.")] = 0.1,
    model: Annotated[Text, typer.Option(help="Measure on the activations of this model; see profile.")] = None,
    rows: Annotated[
        list[Path] | None, typer.Option("--from", help="Recommend from result files instead. Repeatable.")
    ] = None,
    candidate: Annotated[
        list[str] | None, typer.Option(help=f"A spec. Repeatable. Default: {len(CANDIDATES)} of them.")
    ] = None,
    mode: Annotated[Text, typer.Option(help="fwd or fwd_bwd. Default: fwd.")] = None,
    batch: Annotated[int | None, typer.Option(help="Default: 1.")] = None,
    heads: Annotated[int | None, typer.Option(help="Default: 8.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Grouped queries. Default: --heads.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Default: 64.")] = None,
    dtype: Annotated[Text, typer.Option(help="float32, float64, bfloat16 or float16. Default: float32.")] = None,
    causal: Annotated[bool | None, typer.Option("--causal/--no-causal", help="Causal attention.")] = None,
    activations: Annotated[str, typer.Option(help="random or photographs.")] = "random",
    seed: Annotated[int, typer.Option(help="Of activations and weights.")] = 0,
    device: Annotated[str, typer.Option(help="cpu; other devices by --from.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's.")] = None,
    seconds: Annotated[float, typer.Option(min=0.05, help="Seconds of timing a candidate.")] = 1.0,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one candidate may take.")] = 120.0,
    memory_limit: Annotated[
        float | None, typer.Option(min=0.1, help="GiB that one candidate may use. Default: 80 % of what is free.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results.jsonl and recommend.png. Default: profile-results/<time>.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in --out, skipping what is done.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Which attention to use: the measured front of time against error, and the fastest within a budget."""
    with named_errors():
        shape: dict[str, Any] = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        shape |= {"dtype": dtype, "causal": causal, "mode": mode}
        given = {name: value for name, value in shape.items() if value is not None}
        sizes = read_lengths(length) if length else ()
        if len(sizes) > 1:
            raise InputError(f"--length {length!r} names {len(sizes)} lengths; recommend is for one")
        if more and rows is None:
            raise InputError(f"{more[0]}: result files come after --from")
        if rows is not None:
            found = from_rows([*rows, *(more or ())], budget=error, **given, seqlen=sizes[0] if sizes else None)
            _print(found, as_json)
            return
        if not sizes:
            raise InputError("give --length N (with --model: of its sample), or --from FILE")
        folder = choose_run_folder(out, "profile-results", resume=resume, latest=False)
        options: dict[str, Any] = {"budget": error, "candidates": candidate or CANDIDATES, "device": device}
        options |= {
            "seed": seed,
            "threads": threads,
            "budget_s": seconds,
            "limits": runner.Limits.asked_for(timeout, memory_limit),
        }
        err = console(stderr=as_json)
        try:
            with _progress(err) as report:
                if model is None:
                    options |= {"activations": activations, "length": sizes[0], **given}
                    found = recommend(**options, out=folder, report=report)
                else:
                    found = _recommend_for(model, sizes[0], given, {**options, "out": folder, "report": report})
        except KeyboardInterrupt as interrupt:
            raise typer.Exit(interrupted(interrupt, err, _kept(folder), resuming(out=folder))) from None
        _print(found, as_json)
        console(stderr=True).print(f"{found.plot(folder / 'recommend.png')}")


def _numbers(text: str) -> list[int]:
    if not all(part.isdigit() for part in text.split(",")):
        raise InputError(f"--context-parallel takes numbers of ranks such as 1,2,4,64; got {text!r}")
    return [int(part) for part in text.split(",")]


def _over_ranks(
    specs: list[str], lengths: tuple[int, ...], ranks: list[int], options: dict[str, Any], beyond: dict[str, float],
    timeout: float, as_json: bool, folder: Path | None,
) -> None:  # fmt: skip
    """The tables of --context-parallel; with a folder also its rows there, and what they have already is left out."""
    profiles = importlib.import_module(f"{__package__}.ranks")
    err, found, every = console(stderr=True), [], options | {"beyond": beyond, "timeout": timeout}
    with contextlib.ExitStack() as stack:
        file = None if folder is None else stack.enter_context(records.ResultFile(folder / "results.jsonl"))
        kept = () if folder is None else list(records.read(folder / "results.jsonl"))
        done = {(row["spec"], row["length"]) for row in kept if row["type"] == PROFILED}
        work = [(spec, n) for spec in specs for n in lengths if (spec, n) not in done]
        if file is not None:
            file.append(records.environment())
        if folder is None:
            stack.enter_context(nothing_kept(err))
        try:
            with _progress(err) as report:
                for number, (spec, n) in enumerate(work):
                    part = functools.partial(_part, report, number, len(work))
                    found.append(profiles.profile_ranks(spec, n, ranks, report=part, **every))
                    if file is not None:
                        for record in [*found[-1].records(options), {"type": PROFILED, "spec": spec, "length": n}]:
                            file.append(record)
                    if not as_json:
                        print(found[-1], flush=True)
        except KeyboardInterrupt as interrupt:
            if folder is None:
                raise
            raise typer.Exit(interrupted(interrupt, err, _kept(folder), resuming(out=folder))) from None
    if as_json:
        print(json.dumps([profile.to_json() for profile in found]))
    elif len(work) < len(specs) * len(lengths):
        print(f"{len(specs) * len(lengths) - len(work)} profiles are in {folder} already")


def _part(report: Report, number: int, of: int, name: str, done: int, total: int) -> None:
    """Report how much is done of one of several, all of which take as many steps."""
    report(name, number * total + done, of * total)


def _recommend_for(model: str, length: int, given: dict[str, Any], options: dict[str, Any]) -> Any:
    sources = importlib.import_module(f"{__package__}.sources")
    wrong = [name for name in given if name not in ("batch", "dtype", "mode")]
    if wrong:
        raise InputError(f"--{wrong[0].replace('_', '-')} is the model's own; leave it out with --model")
    config = {"model": model, "seqlen": length, "batch": given.get("batch", 1), "seed": options["seed"]}
    with sources.named_failure(model):
        network, sample = sources.load({**config, "dtype": given.get("dtype", "float32")})
    return recommend(network, sample, mode=given.get("mode", "fwd"), **options)


@contextlib.contextmanager
def _progress(out: Console) -> Iterator[Report]:
    with sigterm_raises(), Progress(out, transient=True) as bar:
        yield bar.update


def _kept(folder: Path) -> str:
    path = folder / "results.jsonl"
    cells = sum(record["type"] == "cell" for record in records.read(path)) if path.exists() else 0
    return f"{cells} measured cells are kept in {path}"


def _show(found: Any, png: Path, as_json: bool) -> None:
    _print(found, as_json)
    if found.series():
        console(stderr=True).print(f"{found.plot(png)}")


def _print(found: Any, as_json: bool) -> None:
    if as_json:
        print(found.to_json())
        return
    out = console()
    if found.environment:
        out.print(records.describe(found.environment))
    out.print(found.table())
