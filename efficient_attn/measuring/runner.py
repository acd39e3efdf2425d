"""Runs cells one after another, each in a process of its own with a time and a memory limit.

Workers are forked from a fork server that has imported PyTorch and run nothing, so that a cell starts in a fraction of
a second with fresh memory counters. Whatever happens to a worker (out of memory, hang, crash) becomes a record; the run
goes on.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver, reduction
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from . import records
from .records import Record

Measure = Callable[[Mapping[str, Any]], dict[str, Any]]
# Of several configurations at once: the metrics of each in their order, or the error that it ended with.
MeasureTogether = Callable[[Sequence[Mapping[str, Any]]], list[dict[str, Any] | BaseException]]

END_S = 2.0  # what a worker has to end by itself once it has answered


@dataclass(frozen=True)
class Cell:
    """One measurement: the name of a suite and a configuration (JSON values only, among them `threads`)."""

    suite: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Limits:
    """What one cell may use: seconds of wall clock, and bytes on top of an idle worker (None: unlimited)."""

    seconds: float = 120.0
    memory_bytes: int | None = None

    @classmethod
    def asked_for(cls, seconds: float, memory_gib: float | None) -> Limits:
        """Those of a command line; without a limit of memory 80 % of what is free."""
        free = records.available_memory()
        default = None if free is None else int(0.8 * free)
        return cls(seconds, int(memory_gib * 2**30) if memory_gib else default)


def of_module(suite: str) -> Measure:
    """The `run_cell` of the module that a suite is named after."""
    measure: Measure = importlib.import_module(suite).run_cell
    return measure


def run_cell(
    cell: Cell, out: records.ResultFile, limits: Limits, code: str, lookup: Callable[[str], Measure] = of_module
) -> Record:
    """Measure one cell in a worker and append its record to `out`.

    `lookup` runs in the worker, where it returns the function that measures the suite (JSON values in and out); it must
    be picklable. Ctrl-C stops the worker and leaves no record, so that a resumed run measures the cell again.
    """
    return _recorded([cell], out, limits, code, lookup, together=False)[0]


def run_together(
    cells: Sequence[Cell],
    out: records.ResultFile,
    limits: Limits,
    code: str,
    lookup: Callable[[str], MeasureTogether],
) -> list[Record]:
    """Measure cells of one suite in one worker, in one alternation, and append a record of each to `out`.

    `lookup` gives the function that takes all configurations. What one of them raises is its own record; what ends the
    worker is the record of all. `seconds` of a record are its share of the worker's.
    """
    return _recorded(cells, out, limits, code, lookup, together=True)


def _recorded(
    cells: Sequence[Cell],
    out: records.ResultFile,
    limits: Limits,
    code: str,
    lookup: Callable[[str], Any],
    *,
    together: bool,
) -> list[Record]:
    started = time.perf_counter()
    load = round(os.getloadavg()[0], 2)
    results = _run_worker(cells, limits, lookup, together)
    about = {
        "code": code,
        "seconds": round((time.perf_counter() - started) / len(cells), 3),
        "load": load,
        "clock_mhz": records.clock_mhz(),
    }
    found = []
    for cell, result in zip(cells, results, strict=True):
        name = {"type": "cell", "id": records.cell_id(cell.suite, cell.config, code), "suite": cell.suite}
        found.append({**name, "config": dict(cell.config), **about, **result})
        out.append(found[-1])
    return found


@contextlib.contextmanager
def children_ignore_interrupts() -> Iterator[None]:
    """Processes that are started within never hear Ctrl-C, not even while they begin: the run decides when they end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@cache
def fork_server() -> multiprocessing.context.ForkServerContext:
    """Where processes start with PyTorch imported already."""
    context = multiprocessing.get_context("forkserver")
    # Not this package: its native module starts plain threads in a process that was forked with it (parallel.cpp).
    context.set_forkserver_preload(["torch", "sklearn.datasets"])
    # It is started by `python -c`, which imports from the working directory first: a torch/ or random.py of the user's.
    before = os.open(".", os.O_RDONLY)
    try:
        os.chdir(sys.prefix)
        with children_ignore_interrupts():
            forkserver.ensure_running()
    finally:
        os.fchdir(before)
        os.close(before)
    return context


def _run_worker(
    cells: Sequence[Cell], limits: Limits, lookup: Callable[[str], Any], together: bool
) -> Sequence[Record]:
    context = fork_server()
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryFile() as log:  # without a name: a run that is killed leaves none behind
        # Not a daemon, which may have no children: a cell that compiles may start some. _follow ends an abandoned one.
        work = (sender, cells, limits.memory_bytes, _Inherited(log.fileno()), lookup, together)
        process = context.Process(target=_work, args=work, daemon=False)
        process.start()
        sender.close()
        try:
            if not receiver.poll(limits.seconds):
                return [{"status": "timeout", "message": f"stopped after {limits.seconds:.4g} s"}] * len(cells)
            results: list[Record] = receiver.recv()
            process.join(END_S)  # it gives back its semaphores; ended within that, Python says at last that they leak
            return results
        except EOFError:
            process.join()
            log.seek(0)
            return [_crash(process.exitcode, log.read().decode(errors="replace"))] * len(cells)
        finally:
            _stop(process)
            receiver.close()


class _Inherited:
    """An open file of the run, which a worker has from its start."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __getstate__(self) -> Any:
        return reduction.DupFd(self.fd)

    def __setstate__(self, sent: Any) -> None:
        self.fd = sent.detach()


def _work(
    sender: Connection,
    cells: Sequence[Cell],
    memory_bytes: int | None,
    log: _Inherited,
    lookup: Callable[[str], Any],
    together: bool,
) -> None:
    """The worker: limits first, then the measurement, then one message: a result for each cell."""
    os.setsid()
    threading.Thread(target=_follow, daemon=True).start()
    os.dup2(log.fd, 1)
    os.dup2(log.fd, 2)
    os.close(log.fd)
    try:
        import torch

        if memory_bytes is not None and os.path.exists("/proc/self/statm"):
            limit = _address_space() + memory_bytes
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        torch.set_num_threads(cells[0].config["threads"])
        torch.manual_seed(cells[0].config.get("seed", 0))
        measure, configs = lookup(cells[0].suite), [cell.config for cell in cells]
        found = measure(configs) if together else [measure(configs[0])]
        results = [_failure(one) if isinstance(one, BaseException) else {"status": "ok", **one} for one in found]
    except BaseException as error:
        results = [_failure(error)] * len(cells)
    sender.send(results)


def _follow() -> None:
    """Ends this worker and what it started once the run is gone, however that ended."""
    run = multiprocessing.parent_process()
    assert run is not None, "a worker is started by a run"
    run.join()
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _failure(error: BaseException) -> Record:
    out_of_memory = re.search(r"not enough memory|can't allocate memory|out of memory", str(error), re.IGNORECASE)
    if isinstance(error, MemoryError) or out_of_memory:
        status = "oom"
    elif isinstance(error, NotImplementedError):
        status = "unsupported"
    else:
        status = "error"
    where = "".join(traceback.format_tb(error.__traceback__)[-3:])
    return {"status": status, "message": f"{type(error).__name__}: {error}"[:2000], "traceback": where}


def _crash(exitcode: int | None, log: str) -> Record:
    """A worker that died without a message: by a signal, or by an exit from native code."""
    tail = log.strip()[-500:]
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = " (probably the system's out-of-memory killer)" if -exitcode == signal.SIGKILL else ""
        return {"status": "crash", "message": f"the worker was ended by {name}{hint}. {tail}"}
    return {"status": "crash", "message": f"the worker ended with exit code {exitcode} and no result. {tail}"}


def _stop(process: BaseProcess) -> None:
    """Ends the worker and whatever it started: it leads a process group of its own."""
    if process.is_alive() and process.pid is not None:
        try:
            group = os.getpgid(process.pid)
            if group == process.pid:
                os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.kill()
    process.join()


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
