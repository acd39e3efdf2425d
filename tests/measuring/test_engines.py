"""Peers with threads of their own: called in a process apart, and in turn with this one."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch

from efficient_attn.benchmarks import engines, peers
from efficient_attn.errors import EfficientAttnError
from efficient_attn.measuring import clock

SHAPE = peers.Shape(32, heads=2, head_dim=16)
NUMBERS = 3_000_000  # drawn on one thread, which takes some 20 ms


def lookup(name: str) -> peers.Peer:
    """Peers that look for work for a while after a call, that cannot be built, and that end."""

    def theirs(query: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        if name == "ends":
            os._exit(3)
        threading.Thread(target=torch.randn, args=(NUMBERS,)).start()
        return query * torch.get_num_threads() + os.getpid()

    def build(shape: peers.Shape) -> peers.Pair:
        if name == "unsupported":
            raise NotImplementedError("only on Sundays")
        return peers.Pair(shape.qkv(), theirs, theirs, None)

    return peers.Peer(name, "nothing", build, apart=True)


@pytest.fixture(scope="module")
def engine():
    found = engines.Engine("spins", SHAPE, lookup)
    yield found
    engines.close([found])
    assert not found._process.is_alive()


def processor_ticks(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_an_engine_is_called_in_its_process_with_our_threads(engine) -> None:
    expected = SHAPE.qkv()[0] * torch.get_num_threads() + engine._process.pid
    torch.testing.assert_close(engine(), expected)
    assert engine._process.pid != os.getpid() and engine.peak_bytes() >= 0


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs Linux")
def test_none_begins_before_the_other_sleeps(engine) -> None:
    sample = engine.timed(2, True)
    before = processor_ticks(engine._process.pid)
    time.sleep(0.02)
    assert processor_ticks(engine._process.pid) <= before + 1, "its threads are still at work"
    assert sample.wall > 0 and sample.cpu > 0

    others = threading.active_count()
    lookup("here").build(SHAPE).theirs(*SHAPE.qkv())
    clock.settle()
    assert threading.active_count() == others, "a thread of this process is still at work"


def test_what_happens_in_the_process_of_an_engine_is_said_here() -> None:
    with pytest.raises(NotImplementedError, match="only on Sundays"):
        engines.Engine("unsupported", SHAPE, lookup)
    dying = engines.Engine("ends", SHAPE, lookup)
    with pytest.raises(engines.EngineError, match="ends ended with code 3") as found:
        dying()
    assert isinstance(found.value, EfficientAttnError)
    dying.close()


def test_calls_of_an_alternation_with_another_process_are_awake() -> None:
    """Short ones run once unmeasured before each sample, theirs and ours; without another process none does."""
    runs: list[str] = []

    class Other(clock.Elsewhere):
        def __call__(self) -> object:
            raise AssertionError("it is timed there")

        def timed(self, count: int, wake: bool) -> clock.Sample:
            runs.append(f"other, wake={wake}")
            return clock.timed(lambda: time.sleep(0.002), count, wake)

    def ours() -> None:
        runs.append("ours")
        time.sleep(0.002)

    clock.interleaved({"ours": ours, "other": Other()}, budget_s=0.0, patience_s=10.0)
    warm_up = ["ours", "other, wake=False"]
    assert runs[:11] == warm_up + ["ours", "ours", "other, wake=True"] * 3
    times = clock.interleaved({"ours": ours}, budget_s=0.0, patience_s=10.0)
    assert runs.count("ours") == 1 + 2 * (runs.count("other, wake=True")) + 1 + times["ours"]["samples"]
