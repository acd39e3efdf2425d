"""Importing and calling leave the process as it was: denormals, rounding, exceptions, OpenMP and PyTorch's threads.

A library built with -ffast-math flushes denormals in whatever program loads it; a kernel that sets flags or thread
counts for its own sake changes the results and the speed of everybody else's code.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from support.process_state import FLUSHING, ROUNDING, UPWARD, fenv, state

from efficient_attn import attention, linear_attention

pytestmark = pytest.mark.skipif(
    not (sys.platform == "linux" and platform.machine() == "x86_64"),
    reason="the layout of fenv_t is that of glibc on x86-64",
)


def calls(dtype: torch.dtype = torch.float32) -> None:
    """Every kernel, forward and backward, large enough for several threads."""
    query, key, value = (torch.randn(2, 4, 300, 32, dtype=dtype, requires_grad=True) for _ in range(3))
    attention(query, key, value, is_causal=True, backend="cpu").sum().backward()
    linear_attention(query.exp(), key.exp(), value, is_causal=True).sum().backward()


IMPORT = """
import json, sys, torch
torch.set_num_threads(2)
torch.ones(10**6).add_(1)  # starts PyTorch's threads
from support.process_state import state
before = state()
import efficient_attn.functional
print(json.dumps([before, state(), "efficient_attn._cpu" in sys.modules]))
"""


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_import_changes_nothing() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    result = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    before, after, native = json.loads(result.stdout)
    assert native and before == after
    assert not before["mxcsr"] & FLUSHING


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_calls_change_nothing(two_threads, dtype) -> None:
    torch.ones(10**6).add_(1)
    before = state()
    calls(dtype)
    assert state() == before


def test_calls_change_nothing_in_another_thread(two_threads) -> None:
    seen = []

    def work() -> None:
        torch.get_num_threads()  # at its first question PyTorch gives a new thread the number chosen in another
        before = state()
        calls()
        seen.append((before, state()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    before, after = seen[0]
    assert before == after


def test_what_the_caller_chose_stays(two_threads) -> None:
    """Flushing and upward rounding, in a thread of their own so that no other test meets them."""
    seen = []

    def work() -> None:
        torch.set_flush_denormal(True)
        ctypes.CDLL("libm.so.6").fesetround(UPWARD)
        before = fenv()
        calls()
        seen.append((before, fenv()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    before, after = seen[0]
    assert before["mxcsr"] & FLUSHING == FLUSHING and before["mxcsr"] & ROUNDING == UPWARD << 3
    assert before == after


def test_threads_that_served_a_call_do_not_flush(two_threads) -> None:
    """The kernels run on the OpenMP threads that PyTorch's own operators use next."""
    calls()
    tiny = torch.full((10**6,), 1e-40)
    assert ((tiny * 0.5) > 0).all() and ((tiny + 0) == tiny).all()


DENORMAL = {torch.float32: 3e-40, torch.float64: 3e-310, torch.bfloat16: 3e-39, torch.float16: 3e-7}
SPACING = {torch.float32: 2.0**-149, torch.float64: 5e-324, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DENORMAL, ids=str)
def test_denormals_are_computed_with(dtype, threads) -> None:
    """Denormal values, and denormal gradients of the output, come out as from the definition in double."""
    _cpu = pytest.importorskip("efficient_attn._cpu", reason="the native module is not built")
    if dtype is torch.bfloat16 and _cpu.instruction_set() in ("avx512_bf16", "amx_bf16"):
        pytest.skip("the instruction that multiplies bfloat16 takes denormals for 0, here and in PyTorch")
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(1, 4, 70, 16, generator=generator)  # noqa: E731
    query, key = draw().to(dtype).requires_grad_(), draw().to(dtype).requires_grad_()
    value = (draw() * DENORMAL[dtype]).double().to(dtype) if dtype != torch.float64 else draw().double() * 3e-310
    value.requires_grad_()
    grad_out = (draw().double() * DENORMAL[dtype]).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = attention(query, key, value, backend="cpu")
        (dv,) = torch.autograd.grad(out, value, grad_out)
    finally:
        torch.set_num_threads(before)
    weights = (query.double() @ key.double().transpose(-1, -2) / 4).softmax(dim=-1)
    for ours, exact in ((out, weights @ value.double()), (dv, weights.transpose(-1, -2) @ grad_out.double())):
        assert exact.abs().max() < 20 * DENORMAL[dtype]
        # Off by the rounding of each of 70 products at most; flushed, all would be 0.
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=70 * SPACING[dtype])
        assert ours.abs().max() > 100 * SPACING[dtype] or dtype in (torch.bfloat16, torch.float16)
        assert (ours != 0).any()


def test_denormal_queries_meet_huge_keys() -> None:
    """A product of a denormal and a large number is an ordinary score."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, 1, 40, 8, generator=generator) * 1e-39
    key = torch.randn(1, 1, 50, 8, generator=generator) * 1e38
    value = torch.randn(1, 1, 50, 8, generator=generator)
    ours = attention(query, key, value, scale=10.0, backend="cpu")
    exact = (query.double() @ key.double().transpose(-1, -2) * 10).softmax(dim=-1) @ value.double()
    torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3)
    assert (ours - value.mean(dim=2, keepdim=True)).abs().max() > 0.1  # flushed queries would give the mean
