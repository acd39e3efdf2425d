"""Processes of torch.distributed that stay for many tests: to start one takes seconds, to ask one milliseconds."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class RankError(AssertionError):
    """What a rank raised; `kinds` has the name of each rank's error, or None."""

    def __init__(self, text: str, kinds: list[str | None]) -> None:
        super().__init__(text)
        self.kinds = kinds


def _serve(rank: int, world: int, folder: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=300)
    )
    groups = {world: dist.group.WORLD}
    while True:
        job = pipe.recv()
        if job is None:
            break
        function, ranks, arguments = job
        if ranks not in groups:  # every process takes part in making a group
            groups[ranks] = dist.new_group(list(range(ranks)), timeout=timedelta(seconds=300))
        try:
            pipe.send((None, None) if rank >= ranks else (function(groups[ranks], *arguments), None))
        except Exception as error:
            pipe.send((None, (type(error).__name__, traceback.format_exc())))
    dist.destroy_process_group()


class Ranks:
    """`world` processes; `run` calls a function of an importable module in the first of them."""

    def __init__(self, world: int, method: str = "spawn") -> None:
        self.world = world
        self.folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context(method)
        pipes = [context.Pipe() for _ in range(world)]
        self.pipes = [pipe for pipe, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, world, self.folder.name, pipe), daemon=True)
            for rank, (_, pipe) in enumerate(pipes)
        ]
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        for process in self.processes:
            process.start()
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before

    def run(self, function: Callable[..., Any], *arguments: Any, ranks: int | None = None, limit: float = 300) -> list:
        """function(group, *arguments) of each rank; what any of them raises is raised here."""
        ranks = self.world if ranks is None else ranks
        for pipe in self.pipes:
            pipe.send((function, ranks, arguments))
        answers = []
        for pipe in self.pipes:
            assert pipe.poll(limit), f"no answer within {limit} s"
            answers.append(pipe.recv())
        errors = [error for _, error in answers]
        if any(errors):
            text = "\n".join(f"rank {rank}: {error[1]}" for rank, error in enumerate(errors) if error)
            raise RankError(text, [error[0] if error else None for error in errors])
        return [answer for answer, _ in answers[:ranks]]

    def close(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self.folder.cleanup()


@contextlib.contextmanager
def started(world: int, method: str = "spawn") -> Iterator[Ranks]:
    ranks = Ranks(world, method)
    try:
        yield ranks
    finally:
        ranks.close()
