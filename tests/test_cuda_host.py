"""The CUDA kernels without a GPU: in the host twin (tests/cuda_host), in processes of their own, and as nvcc sees them.

`make test-cuda-host` runs every case; here is a sample of them, and of the faults that the twin must find.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from efficient_attn import UnsupportedError, attention, explain

TESTS = Path(__file__).parent
ROOT = TESTS.parent
TWIN = TESTS / "cuda_host"
sys.path.insert(0, str(TWIN))
import build_twin  # noqa: E402
from faults import FAULTS  # noqa: E402

sys.path.remove(str(TWIN))

SAMPLE = [
    "head_dim_3", "value_dim_200", "causal_bottom_right_empty_rows", "window", "bits", "blocks_window_lengths",
    "bias_heads_pairs", "bias_per_key", "grouped", "dropout", "unaligned", "negative_scale", "one_query_grouped",
    "few_queries_window", "few_queries_lengths_bias", "few_queries_blocks", "few_queries_of_many_heads",
]  # fmt: skip
LINEAR_SAMPLE = ["vectors-elu", "masked-identity", "causal-masked-performer_softmax", "causal-early-identity"]
compiled = pytest.mark.skipif(
    shutil.which(build_twin.compiler().split()[0]) is None or os.uname().machine != "x86_64",
    reason="the host twin needs g++ on x86-64",
)


@pytest.fixture(scope="module")
def twin() -> Path:
    return build_twin.build(ROOT / "build" / "cuda_host")


def passes(module: Path, *arguments: str) -> None:
    environment = {**os.environ, "EFFICIENT_ATTN_CUDA_TWIN": str(module), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert " passed" in result.stdout


@compiled
def test_conformance_of_a_sample(twin: Path) -> None:
    wanted = " or ".join(f"{name}-bfloat16" for name in SAMPLE)
    passes(twin, str(TESTS / "test_conformance.py"), "-k", f"({wanted}) and not bits_")


@compiled
def test_what_only_these_kernels_promise(twin: Path) -> None:
    passes(twin, str(TESTS / "twin_kernels.py"))


@compiled
def test_conformance_of_a_sample_of_linear_attention(twin: Path) -> None:
    wanted = " or ".join(f"cuda-{name}-bfloat16" for name in LINEAR_SAMPLE)
    passes(twin, str(TESTS / "test_linear_attention.py"), "-k", f"test_equals_the_definition and ({wanted})")


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_conformance(twin: Path, dtype: str) -> None:
    passes(twin, str(TESTS / "test_conformance.py"), "-k", f"-{dtype}]")
    passes(twin, str(TESTS / "test_linear_attention.py"), "-k", f"test_equals_the_definition and {dtype}")


@compiled
@pytest.mark.slow
def test_what_only_linear_attention_promises(twin: Path) -> None:
    passes(twin, str(TESTS / "twin_linear.py"))


def run_fault(name: str, folder: Path) -> tuple[int, str]:
    """Exit status and output of twin_probe.py on kernels with that fault ("none": as they are)."""
    sources = folder / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    if name != "none":
        file, right, wrong = FAULTS[name]
        text = (sources / "cuda" / file).read_text()
        assert text.count(right) == 1, f"{file} holds {text.count(right)} times: {right}"
        (sources / "cuda" / file).write_text(text.replace(right, wrong))
    module = build_twin.build(folder / "built", sources, small=True)
    environment = {**os.environ, "EFFICIENT_ATTN_CUDA_TWIN": str(module)}
    command = [sys.executable, str(TESTS / "twin_probe.py")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    return result.returncode, result.stdout + result.stderr


@compiled
@pytest.mark.parametrize(
    "fault", [pytest.param(n, marks=() if n in ("none", "no barrier in the forward") else pytest.mark.slow)
              for n in ("none", *FAULTS)]
)  # fmt: skip
def test_a_fault_is_found(fault: str, tmp_path: Path) -> None:
    status, said = run_fault(fault, tmp_path)
    if fault == "none":
        assert status == 0, said
    else:
        assert status == 3, f"not found: {said}"


def test_it_is_taken_by_name_only_and_says_why_not() -> None:
    q = torch.randn(1, 1, 8, 8)
    with pytest.raises(UnsupportedError, match="CUDA tensors"):
        attention(q, q, q, backend="cuda")
    answer = explain(q, q, q)
    assert answer.backend != "cuda" and any("tensor cores" in reason for reason in answer.reasons["cuda"])


@compiled
def test_automatic_passes_it_by(twin: Path) -> None:
    program = (
        "import torch, efficient_attn as ea; q = torch.randn(1, 1, 8, 8).bfloat16(); "
        "print(ea.explain(q, q, q).backend, ea.explain(q, q, q, backend='cuda').backend)"
    )
    environment = {**os.environ, "EFFICIENT_ATTN_CUDA_TWIN": str(twin)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    auto, named = result.stdout.split()
    assert auto in ("cpu", "reference") and named == "cuda"


# --- what nvcc makes of them ---

TABLE = ROOT / "benchmarks" / "results" / "cuda" / "compile.jsonl"


def check(row: dict) -> None:
    """Shared memory that an A100 has, and nothing spilled. Two exceptions: the `safe` kernels, which run only on tiles
    where a NaN was met, and sums of linear attention over more than 128 columns, whose state fills the registers."""
    assert row["shared"] <= 163 * 1024, row
    wide = row["kernel"] == "linear_sums" and row["head_dim"] == 256 and row["spill_stores"] <= 64
    assert row["safe"] or wide or row["spill_stores"] == row["spill_loads"] == 0, row


def test_the_table_holds_every_kernel() -> None:
    rows = [json.loads(line) for line in TABLE.read_text().splitlines()]
    kinds = {(row["arch"], row["dtype"]) for row in rows}
    assert ("sm_80", "bfloat16") in kinds
    parts = {
        f"attention_{part}{safe}" for part in ("forward", "key_gradient", "query_gradient") for safe in ("", "_safe")
    }
    shapes = {(part, head_dim, extras) for part in parts for head_dim in (64, 128, 256) for extras in (False, True)}
    shapes |= {("attention_bias_gradient", head_dim, True) for head_dim in (64, 128, 256)}
    shapes |= {(f"attention_decode_{rows}", head_dim, False) for rows in (16, 64) for head_dim in (64, 128, 256)}
    shapes |= {("attention_delta", 0, False), ("attention_decode_join", 0, False)}
    linear = {
        (f"linear_{part}", features, split) for part in ("states", "sums") for features in (64, 128, 256)
        for split in (False, True)
    } | {("linear_scan", 0, False), ("linear_terms", 0, False)}  # fmt: skip
    for kind in kinds:
        of_kind = [row for row in rows if (row["arch"], row["dtype"]) == kind]
        found = {(row["kernel"], row["head_dim"], row["extras"]) for row in of_kind}
        assert found == (shapes | linear if kind[1] == "bfloat16" else shapes)
    for row in rows:
        check(row)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not here")
def test_one_configuration_compiles_now() -> None:
    from efficient_attn.benchmarks import cuda_table

    rows = cuda_table.compile_rows("sm_80", "bfloat16", head_dims=(64,), parts=("forward",), extras=(0,))
    always = {"attention_delta", "linear_scan", "linear_terms"}  # of one shape only
    assert {row["kernel"] for row in rows} == always | {"attention_forward", "attention_forward_safe"}
    for row in rows:
        check(row)
