"""`profile_op` and `profile_model`: profiles as library calls."""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import methods
from ..errors import InputError
from ..measuring import records, runner
from ..measuring.options import MODES, check_choice, check_lengths, check_positive, check_shape
from ..patterns import Pattern
from . import activations as activation_sources
from . import roofline, sources
from .model import check_on_cpu, evaluating, find_attention, measured, run
from .profile import Profile, from_records
from .session import CEILINGS, MODEL, OPERATOR, Report, Session

LENGTHS = (1024, 2048, 4096, 8192, 16384)
MODEL_LENGTHS = (256, 512, 1024, 2048)

Spec = str | methods.Method | Pattern
Record = dict[str, Any]


def profile_op(
    method: Spec | Sequence[Spec],
    *,
    lengths: Iterable[int] = LENGTHS,
    mode: str | Sequence[str] = "fwd",
    batch: int = 1,
    heads: int = 8,
    kv_heads: int | None = None,
    head_dim: int = 64,
    dtype: str = "float32",
    causal: bool = False,
    activations: str = "random",
    seed: int = 0,
    threads: int | None = None,
    budget_s: float = 1.0,
    limits: runner.Limits | None = None,
    out: str | Path | None = None,
    trace: str | Path | None = None,
    report: Report | None = None,
) -> Profile:
    """Measure attention methods against length: time (beside dense attention), memory, operations, bytes and phases.

    Each length runs in a worker process with limits; a length that exceeds them is a row that says so, and longer ones
    are not tried. In a script, call it under `if __name__ == "__main__":`, as all that starts processes.

    Args:
        method: a spec, `Method` or `Pattern`, or several.
        lengths: of queries and keys.
        mode: "fwd", "fwd_bwd", or both.
        batch, heads, kv_heads, head_dim, dtype, causal: the shape.
        activations: "random" or "photographs", see `recommend`. Only methods that look at them take other time.
        seed: of activations.
        threads: default PyTorch's.
        budget_s: seconds of timing a cell, more where three rounds take longer.
        limits: seconds and bytes of a cell; default 120 s and no limit of memory.
        out: a folder for results.jsonl, which keeps every finished row whatever happens, and from which a later call
            with the same arguments goes on.
        trace: a file for a Chrome trace (ui.perfetto.dev) of the longest length that could be measured.
        report: called with (name, done, total) before each cell.

    Raises:
        InputError, InputTypeError: arguments that are no methods, shapes, lengths or modes, before anything runs.
    """
    given = [method] if isinstance(method, (str, methods.Method, Pattern)) else list(method)
    specs = list(dict.fromkeys(str(methods.parse(one)) for one in given))
    modes = [mode] if isinstance(mode, str) else list(mode)
    shape = [check_shape(batch, heads, kv_heads, head_dim, dtype, one) for one in modes]
    check_choice("activations", activations, activation_sources.KINDS)
    ascending = check_lengths(lengths)
    if not specs or not modes:
        raise InputError("give at least one method and one mode")
    threads = check_positive("threads", threads or torch.get_num_threads())
    common = {**shape[0], "causal": causal, "activations": activations, "seed": seed, "threads": threads}
    series = [{"method": s, "mode": m, **common, "budget_s": budget_s} for m in modes for s in specs]
    return _session(OPERATOR, series, ascending, threads, limits, out, trace, report, dense=True)


def profile_source(
    source: str,
    *,
    lengths: Iterable[int] = MODEL_LENGTHS,
    mode: str | Sequence[str] = "fwd",
    attention: Sequence[str] = (),
    batch: int = 1,
    dtype: str = "float32",
    seed: int = 0,
    threads: int | None = None,
    budget_s: float = 1.0,
    limits: runner.Limits | None = None,
    out: str | Path | None = None,
    trace: str | Path | None = None,
    report: Report | None = None,
) -> Profile:
    """Measure a model that a text names (see `sources`) against length, each length in a worker process.

    Args:
        source: a built-in model, a folder of a checkpoint, or file.py:function.
        attention: specs to put into the model, each a series of its own; none: the model as it is.
        lengths, mode, batch, dtype, seed, threads, budget_s, limits, out, trace, report: as in `profile_op`.

    Raises:
        InputError: no such model, or arguments that are none, before anything runs.
    """
    sources.find(source)
    modes = [mode] if isinstance(mode, str) else list(mode)
    shape = [check_shape(batch, 1, None, 1, dtype, one) for one in modes]
    ascending = check_lengths(lengths)
    specs: list[str | None] = [str(methods.parse(spec)) for spec in attention] or [None]
    threads = check_positive("threads", threads or torch.get_num_threads())
    common = {"model": source, "batch": shape[0]["batch"], "dtype": dtype, "seed": seed, "threads": threads}
    series = [{**common, "attention": s, "mode": m, "budget_s": budget_s} for m in modes for s in dict.fromkeys(specs)]
    return _session(MODEL, series, ascending, threads, limits, out, trace, report)


def _session(
    suite: str,
    series: Sequence[dict[str, Any]],
    lengths: Sequence[int],
    threads: int,
    limits: runner.Limits | None,
    out: str | Path | None,
    trace: str | Path | None,
    report: Report | None,
    *,
    dense: bool = False,
) -> Profile:
    with ExitStack() as stack:
        folder = out if out is not None else stack.enter_context(tempfile.TemporaryDirectory())
        session = stack.enter_context(Session(Path(folder) / "results.jsonl", limits or runner.Limits(), report))
        found = [session.environment, session.ceilings(threads)]
        rows = session.grow(suite, series, lengths, dense=dense)
        done = [row for row in rows if row["status"] == "ok"]
        if trace is not None and done:
            longest = max(done, key=lambda row: row["config"]["seqlen"])
            config = {**longest["config"], "trace": str(Path(trace).absolute())}
            rows.append(session.run(suite, config, again=not Path(trace).exists()))
        return from_records([*found, *rows])


def profile_model(
    model: nn.Module,
    sample: Any,
    *,
    lengths: Iterable[int] | None = None,
    mode: str | Sequence[str] = "fwd",
    attention: Iterable[str] | None = None,
    budget_s: float = 1.0,
    ceilings: bool = True,
    out: str | Path | None = None,
    trace: str | Path | None = None,
) -> Profile:
    """Measure a model of your own, here and now: time, memory, operations, and attention's share of them.

    Attention is found by `find_attention`: this package's, torch.nn's, and that of transformers, timm and others, which
    go by the name "Attention". The model runs in eval mode and is left as it was, without gradients.

    Args:
        model: any torch.nn.Module on the CPU.
        sample: a tensor, a tuple of positional or a mapping of keyword arguments; with `lengths` a function that makes
            one of them from a length.
        lengths: what `sample` is called with; None: one row, on the sample as it is.
        mode: "fwd", "fwd_bwd" (gradients of all parameters, for the mean square of the outputs), or both.
        attention: names of the modules that are attention, where they cannot be found.
        budget_s: seconds of timing a row.
        ceilings: whether to measure what the machine can do, for the roofline (about a second and half a GiB).
        out: a folder for results.jsonl, which keeps every finished row whatever happens.
        trace: a file for a Chrome trace (ui.perfetto.dev) of the longest row.

    Raises:
        InputError: no attention in the model, or arguments that do not belong together.
        InputTypeError: not a module. UnsupportedError: a model that is not on the CPU.
    """
    modes = [mode] if isinstance(mode, str) else list(mode)
    for one in modes:
        check_choice("mode", one, MODES)
    if lengths is not None and not callable(sample):
        raise InputError("with lengths=, sample is a function that makes the model's input from a length")
    make: Callable[[Any], Any] = sample if lengths is not None else lambda _: sample
    chosen: Sequence[int | None] = [None] if lengths is None else check_lengths(lengths)
    names = None if attention is None else list(attention)
    find_attention(model, names)
    check_on_cpu(model)
    found: list[Record] = [records.environment(threads=torch.get_num_threads())]
    with ExitStack() as stack:
        folder = out if out is not None else stack.enter_context(tempfile.TemporaryDirectory())
        file = stack.enter_context(records.ResultFile(Path(folder) / "results.jsonl"))
        file.append(found[0])
        if ceilings:
            config = {"threads": torch.get_num_threads(), "budget_s": 0.3}
            found.append(_cell(CEILINGS, config, "ok", roofline.run_cell(config)))
            file.append(found[-1])
        full: set[str] = set()
        for length, one in itertools.product(chosen, modes):
            if one in full:
                continue
            last = length == chosen[-1] and one == modes[-1]
            record = _row(model, make(length), length, one, names, budget_s, trace if last else None)
            file.append(record)
            found.append(record)
            if record["status"] == "oom":
                full.add(one)
    return from_records(found, "model")


def _row(
    model: nn.Module,
    sample: Any,
    length: int | None,
    mode: str,
    names: Sequence[str] | None,
    budget_s: float,
    trace: str | Path | None,
) -> Record:
    batch, tokens = _size(model, sample, names)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    config = {
        "model": type(model).__name__,
        "attention": None,
        "seqlen": tokens if length is None else length,
        "mode": mode,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "budget_s": budget_s,
    }
    try:
        where = None if trace is None else Path(trace)
        metrics = measured(model, sample, mode, budget_s, attention=names, trace=where)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("not enough memory|can't allocate", str(error)):
            raise
        return _cell(MODEL, config, "oom", {"message": f"{type(error).__name__}: {error}"[:500]})
    return _cell(MODEL, config, "ok", metrics)


def _cell(suite: str, config: Record, status: str, metrics: Record) -> Record:
    number = records.cell_id(suite, config, records.code_version())
    return {"type": "cell", "id": number, "suite": suite, "config": config, "status": status, **metrics}


def _size(model: nn.Module, sample: Any, names: Sequence[str] | None) -> tuple[int, int]:
    """Batch and length of what the model's first attention module gets."""
    seen: list[tuple[int, int]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensor = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() >= 2), None)
        if tensor is None:
            return
        first = tensor.dim() >= 3 and getattr(module, "batch_first", True)
        batch = 1 if tensor.dim() == 2 else tensor.shape[0 if first else 1]
        seen.append((batch, tensor.shape[1 if first else 0]))

    handles = [
        module.register_forward_pre_hook(hook, with_kwargs=True) for module in find_attention(model, names).values()
    ]
    try:
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            run(model, sample)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise InputError("none of the attention modules ran on the sample")
    return seen[0]
