"""The native kernels once for each instruction set that this machine runs, forced by EFFICIENT_ATTN_ISA."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_cpu = pytest.importorskip("efficient_attn._cpu", reason="the native module is not built")
TESTS = Path(__file__).resolve().parents[2]
KERNELS = TESTS.parent / "csrc" / "cpu"
AARCH64 = shutil.which("aarch64-linux-gnu-g++")
SUITE = ("contract/test_conformance.py", "contract/test_fuzz.py", "methods/test_linear_attention.py")
OTHERS = [name for name in _cpu.instruction_sets() if name != _cpu.instruction_set()]


def run(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "EFFICIENT_ATTN_ISA": isa}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)


def conforms(isa: str, wanted: str) -> None:
    suite = [str(TESTS / name) for name in SUITE]
    result = run(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", *suite, "-k", wanted)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert " passed" in result.stdout


@pytest.mark.parametrize("isa", OTHERS)
def test_conformance(isa: str) -> None:
    """Of the types that differ: float64 is what float32 is, in half as many lanes, and float16 is loaded otherwise."""
    types = "bfloat16" if isa.endswith("_bf16") else "(float32 or bfloat16 and not returned)"
    conforms(isa, f"{types} and cpu or operator")


@pytest.mark.slow
@pytest.mark.parametrize("isa", OTHERS)
def test_conformance_in_whole(isa: str) -> None:
    conforms(isa, "cpu or operator")


@pytest.mark.parametrize("isa", _cpu.instruction_sets())
def test_the_one_asked_for_is_taken(isa: str) -> None:
    result = run(isa, "-c", "import torch; from efficient_attn import _cpu; print(_cpu.instruction_set())")
    assert result.stdout.strip() == isa


@pytest.mark.skipif(AARCH64 is None, reason="no aarch64-linux-gnu-g++ is here")
@pytest.mark.parametrize("unit", ["attention", "linear_attention"])
def test_units_compile_where_no_header_of_x86_helps(unit: str) -> None:
    command = [str(AARCH64), "-std=c++17", "-fsyntax-only", "-Werror", "-Wall", "-Wextra", "-Wno-psabi"]
    command += [f"-I{KERNELS.parent}", "-DEFFICIENT_ATTN_ISA=baseline", str(KERNELS / f"{unit}.cpp")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def test_an_unknown_one_fails_the_import() -> None:
    result = run("avx1024", "-c", "import efficient_attn")
    assert result.returncode != 0 and "EFFICIENT_ATTN_ISA=avx1024" in result.stderr
