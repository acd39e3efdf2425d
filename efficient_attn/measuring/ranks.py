"""Processes of torch.distributed on this machine that stay and do what they are told: to start one takes seconds, to
ask one milliseconds. `profile --context-parallel` measures with them, and the tests of distributed/ run in them.

No wait is without an end: a process that ends, or that has not answered in time, ends the question with an error that
names it, and `close` ends all.
"""

from __future__ import annotations

import contextlib
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

from ..errors import CommunicationError
from .runner import fork_server


class RankError(CommunicationError):
    """What ranks raised; `kinds` has the name of each rank's error, or None."""

    def __init__(self, text: str, kinds: list[str | None]) -> None:
        super().__init__(text)
        self.kinds = kinds


class Ranks:
    """`world` processes with one gloo group.

    In a script, make it under `if __name__ == "__main__":`, as all that starts processes.

    Args:
        world: how many.
        threads: of each.
        limit: seconds that a question may take, and gloo's own limit.
        context: how processes start; default: with PyTorch imported already.
    """

    def __init__(self, world: int, threads: int = 1, limit: float = 300.0, context: Any = None) -> None:
        self.world, self.limit = world, limit
        self.folder = tempfile.TemporaryDirectory()
        context = context or fork_server()
        pipes = [context.Pipe() for _ in range(world)]
        self.pipes: list[Any] = [pipe for pipe, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, world, self.folder.name, threads, limit, pipe), daemon=True)
            for rank, (_, pipe) in enumerate(pipes)
        ]
        for process, (_, pipe) in zip(self.processes, pipes, strict=True):
            process.start()
            pipe.close()  # the child's end, so that its death is seen here

    def run(
        self, function: Callable[..., Any], *arguments: Any, ranks: int | None = None, limit: float | None = None
    ) -> list[Any]:
        """function(group, *arguments) of each of the first `ranks` processes, a function of an importable module.

        Raises:
            RankError: what ranks raised.
            CommunicationError: a process that ended, or gave no answer in time; nothing can be asked after that.
        """
        count = self.world if ranks is None else ranks
        self.tell(function, *arguments, ranks=count)
        ends = time.monotonic() + (self.limit if limit is None else limit)
        answers = [self.answer(rank, ends - time.monotonic()) for rank in range(self.world)]
        errors = [error for _, error in answers]
        if any(errors):
            text = "\n".join(f"rank {rank}: {error[1]}" for rank, error in enumerate(errors) if error)
            raise RankError(text, [error[0] if error else None for error in errors])
        return [answer for answer, _ in answers[:count]]

    def tell(self, function: Callable[..., Any], *arguments: Any, ranks: int) -> None:
        """Begin with a question."""
        for rank, pipe in enumerate(self.pipes):
            try:
                pipe.send((function, ranks, arguments))
            except OSError:
                raise self._ended(rank) from None

    def answer(self, rank: int, limit: float) -> tuple[Any, tuple[str, str] | None]:
        """What a rank returned, or the name and the text of its error."""
        ends = time.monotonic() + limit
        others = {process.sentinel: n for n, process in enumerate(self.processes)}
        while not self.pipes[rank].poll(0):
            left = ends - time.monotonic()
            if left <= 0:
                raise CommunicationError(f"rank {rank} of {self.world} gave no answer within {limit:.4g} s")
            found = wait([self.pipes[rank], *others], left)
            gone = [others.pop(sentinel) for sentinel in found if sentinel in others]
            if rank in gone and not self.pipes[rank].poll(0):
                raise self._ended(rank)
        try:
            return self.pipes[rank].recv()  # type: ignore[no-any-return]
        except EOFError:
            raise self._ended(rank) from None

    def _ended(self, rank: int) -> CommunicationError:
        process = self.processes[rank]
        process.join(5)
        code = process.exitcode
        how = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with code {code}"
        return CommunicationError(f"the process of rank {rank} of {self.world} {how}; see what it printed")

    def close(self) -> None:
        """End all processes, those too that hang."""
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        ends = time.monotonic() + 5
        for process in self.processes:
            process.join(max(ends - time.monotonic(), 0))
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()
        self.folder.cleanup()


@contextlib.contextmanager
def started(world: int, threads: int = 1, limit: float = 300.0) -> Iterator[Ranks]:
    """`Ranks` for a block."""
    ranks = Ranks(world, threads, limit)
    try:
        yield ranks
    finally:
        ranks.close()


def _serve(rank: int, world: int, folder: str, threads: int, limit: float, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    torch.set_num_threads(threads)
    seconds = timedelta(seconds=limit)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=seconds)
    groups = {world: dist.group.WORLD}
    with contextlib.suppress(EOFError):  # the parent has died
        while (job := pipe.recv()) is not None:
            function, ranks, arguments = job
            if ranks not in groups:  # every process takes part in making a group
                groups[ranks] = dist.new_group(list(range(ranks)), timeout=seconds)
            try:
                pipe.send((None, None) if rank >= ranks else (function(groups[ranks], *arguments), None))
            except Exception as error:
                pipe.send((None, (type(error).__name__, traceback.format_exc())))
    dist.destroy_process_group()
