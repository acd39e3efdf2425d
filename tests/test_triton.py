"""The Triton kernels in Triton's interpreter, in processes of their own: Triton reads the switch when it is
imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from efficient_attn import BlockMask, UnsupportedError, attention, explain

pytest.importorskip("triton")
TESTS = Path(__file__).parent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)


def pytest_passes(*arguments: str, at_least: int) -> None:
    """Run pytest in the interpreter. Fails unless that many tests passed: a selection that no longer fits the names
    would run fewer, or none."""
    result = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
    said = result.stdout[-4000:] + result.stderr[-1000:]
    found = re.search(r"(\d+) passed", said)
    passed = int(found[1]) if found else 0
    assert passed >= at_least, f"{passed} tests passed of at least {at_least}: {' '.join(arguments)}\n{said}"
    assert result.returncode == 0, said


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_conformance(dtype: str) -> None:
    pytest_passes(str(TESTS / "test_conformance.py"), f"-k-{dtype}]", at_least=75)


@pytest.mark.slow
def test_conformance_bfloat16() -> None:
    pytest_passes(str(TESTS / "test_conformance.py"), "-k-bfloat16]", at_least=75)


@pytest.mark.parametrize(("file", "tests"), [("kernels", 17), ("plan", 10), ("linear", 23)])
def test_what_only_the_kernels_promise(file: str, tests: int) -> None:
    pytest_passes(str(TESTS / f"interpreted_{file}.py"), at_least=tests)


@pytest.mark.parametrize("selection", ["no_such_name", "by_name_and_through_autograd"])
def test_a_selection_of_too_few_tests_fails(selection: str) -> None:
    with pytest.raises(AssertionError, match=r"[01] tests passed of at least 2"):
        pytest_passes(str(TESTS / "interpreted_linear.py"), "-k", selection, at_least=2)


def test_linear_attention_under_every_feature_map() -> None:
    cases = "equals_the_definition and (float32 and (odd or no-values or causal-masked) or bfloat16 and odd)"
    pytest_passes(str(TESTS / "test_linear_attention.py"), "-k", cases, at_least=17)


def test_cpu_tensors_are_refused_without_the_interpreter() -> None:
    q = torch.randn(1, 1, 8, 8)
    with pytest.raises(UnsupportedError, match="TRITON_INTERPRET=1"):
        attention(q, q, q, backend="triton")
    answer = explain(q, q, q)
    assert answer.backend != "triton" and "CUDA tensors" in answer.reasons["triton"][0]


def test_the_interpreter_is_taken_by_name_only() -> None:
    program = (
        "import torch, efficient_attn as ea; q = torch.randn(1, 1, 8, 8); "
        "print(ea.explain(q, q, q).backend, ea.explain(q, q, q, backend='triton').backend)"
    )
    auto, named = run("-c", program).stdout.split()
    assert auto in ("cpu", "reference") and named == "triton"


def test_grids_come_from_shapes_alone() -> None:
    """A mask on the meta device, without data, will do: nothing that sizes a launch waits for the GPU."""
    from efficient_attn.backends import triton as backend

    mask = BlockMask.from_dense(torch.rand(200, 300) < 0.5, block_size=(48, 32)).to("meta").arrays(False)
    assert backend._tiles(200, 16, mask, 0) == 15
    assert 0 <= backend._key_tiles(300, 32, mask) <= 10
    assert not backend._lists_nothing(mask) and backend._hides(mask, None)


def test_autotuning_measures_once_and_keeps_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from efficient_attn.backends import autotune

    monkeypatch.setenv("EFFICIENT_ATTN_CACHE", str(tmp_path / "cache"))
    measured = []
    candidates = [(64, 64, 4, 2), (128, 64, 8, 3), (32, 32, 4, 1)]

    def measure(candidate: tuple[int, ...]) -> float:
        measured.append(candidate)
        return {64: 2.0, 128: 1.0, 32: float("inf")}[candidate[0]]

    assert autotune.best("case", candidates, measure) == (128, 64, 8, 3) and len(measured) == 3
    assert autotune.best("case", candidates, measure) == (128, 64, 8, 3) and len(measured) == 3
    file = tmp_path / "cache" / "triton.json"
    assert (file.parent.stat().st_mode & 0o777) == 0o700 and list(file.parent.iterdir()) == [file]
    autotune._known.cache_clear()  # another process
    assert autotune.best("case", candidates, measure) == (128, 64, 8, 3) and len(measured) == 3
    assert autotune.best("case", candidates[2:], measure) == (
        32,
        32,
        4,
        1,
    )  # a kept choice that is no candidate any more
    file.write_text("{torn")
    autotune._known.cache_clear()
    assert autotune.best("case", candidates, measure) == (128, 64, 8, 3)
    file.parent.chmod(0o777)
    with pytest.raises(UnsupportedError, match="chmod 700"):
        autotune.best("case", candidates, measure)
