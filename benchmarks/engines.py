"""Peers with threads of their own, each in a process apart that takes turns with this one.

Such threads go on looking for work after a call, for up to some milliseconds, on the cores that the next call of an
alternation needs; so do PyTorch's and ours. Held from that they would be slower than their users have them. So each
such peer has a process, with its own default settings, and none of the two begins before the other's threads sleep.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from efficient_attn.errors import EfficientAttnError
from efficient_attn.measuring import clock, runner
from efficient_attn.measuring.calls import Call, binder

from . import peers

LIMIT_S = 600.0  # of one answer


class Engine(clock.Elsewhere):
    """The forward of a peer, built, called and timed in a process apart. What that raises is raised here.

    Args:
        name: of the peer.
        shape: what it is built for.
        lookup: gives the peer of a name, there; it must be picklable.
    """

    def __init__(self, name: str, shape: peers.Shape, lookup: Callable[[str], peers.Peer] = peers.get) -> None:
        context = runner.fork_server()
        self._pipe, theirs = context.Pipe()
        arguments = (name, shape, lookup, torch.get_num_threads(), theirs)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()  # so that its death is seen here
        self._name = name
        self._answer()

    def __call__(self) -> Tensor:
        """Its output."""
        out: Tensor = self._ask("output")
        return out

    def timed(self, count: int, wake: bool) -> clock.Sample:
        clock.settle()
        sample: clock.Sample = self._ask("timed", count, wake)
        return sample

    def peak_bytes(self) -> int:
        found: int = self._ask("peak_bytes")
        return found

    def close(self) -> None:
        """End its process."""
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, *question: Any) -> Any:
        try:
            self._pipe.send(question)
        except OSError:
            raise EngineError(f"the process of {self._name} has ended") from None
        return self._answer()

    def _answer(self) -> Any:
        try:
            if not self._pipe.poll(LIMIT_S):
                raise EngineError(f"{self._name} gave no answer within {LIMIT_S:.4g} s")
            answer, error = self._pipe.recv()
        except EOFError:
            self._process.join(5)
            raise EngineError(f"the process of {self._name} ended with code {self._process.exitcode}") from None
        if error is not None:
            kind, text = error
            raise (NotImplementedError if kind == "NotImplementedError" else EngineError)(text)
        return answer


class EngineError(EfficientAttnError, RuntimeError):
    """What a peer raised in its process, or how that ended."""


def peak_bytes(call: Call) -> int:
    """The peak of memory of one call, in the process that it runs in."""
    if isinstance(call, Engine):
        return call.peak_bytes()
    with clock.PeakMemory() as peak:
        call()
    return peak.bytes


def close(calls: Iterable[Call]) -> None:
    """End the processes of those calls that have one."""
    for call in calls:
        if isinstance(call, Engine):
            call.close()


def _serve(name: str, shape: peers.Shape, lookup: Callable[[str], peers.Peer], threads: int, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run ends this process
    threading.Thread(target=_follow, daemon=True).start()
    torch.set_num_threads(threads)
    call: Call | None = None
    with contextlib.suppress(EOFError, BrokenPipeError):  # closed
        question: tuple[Any, ...] = ("ready",)
        while True:
            try:
                if call is None:
                    pair = lookup(name).build(shape)
                    call = binder("fwd", pair.inputs)(pair.theirs)
                answer, error = _answered(call, *question), None
            except Exception as failure:
                answer, error = None, (type(failure).__name__, traceback.format_exc())
            clock.settle()
            pipe.send((answer, error))
            question = pipe.recv()


def _answered(call: Call, question: str, *arguments: Any) -> Any:
    if question == "output":
        return call()
    if question == "timed":
        return clock.timed(call, *arguments)
    return peak_bytes(call) if question == "peak_bytes" else None


def _follow() -> None:
    """Ends this process once the run is gone, whatever a library does at that moment."""
    run = multiprocessing.parent_process()
    assert run is not None, "an engine is started by a run"
    run.join()
    os._exit(1)
