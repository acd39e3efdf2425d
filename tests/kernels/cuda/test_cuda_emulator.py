"""The CUDA kernels without a GPU: in the emulator (emulator/), in processes of their own, and as nvcc sees them.

`make test-cuda-emulator` runs every case; here is a sample of them, and of the faults that the emulator must find.
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
from efficient_attn.benchmarks.tools import cuda_table

HERE = Path(__file__).resolve().parent
TESTS = HERE.parents[1]
ROOT = TESTS.parent
EMULATOR = HERE / "emulator"
LINEAR = TESTS / "methods" / "test_linear_attention.py"
sys.path.insert(0, str(EMULATOR))
import build_emulator  # noqa: E402
from faults import FAULTS, HEADS  # noqa: E402

sys.path.remove(str(EMULATOR))

SAMPLES = {
    80: ["head_dim_3", "value_dim_200", "causal_bottom_right_empty_rows", "window", "bits", "blocks_window_lengths",
         "bias_heads_pairs", "bias_per_key", "grouped", "dropout", "unaligned", "negative_scale", "one_query_grouped",
         "few_queries_window", "few_queries_lengths_bias", "few_queries_blocks", "few_queries_of_many_heads"],
    90: ["dense_long", "long_head_dim_128", "long_head_dim_256", "head_dim_80", "causal_bottom_right_empty_rows",
         "bits", "lengths"],
}  # fmt: skip
LINEAR_SAMPLE = ["vectors-elu", "masked-identity", "causal-masked-performer_softmax", "causal-early-identity"]
compiled = pytest.mark.skipif(
    shutil.which(build_emulator.compiler().split()[0]) is None or os.uname().machine != "x86_64",
    reason="the emulator needs g++ on x86-64",
)


@pytest.fixture(scope="module")
def emulator() -> Path:
    return build_emulator.build(ROOT / "build" / "cuda_emulator")


def emulator_environment(module: Path, capability: int, schedule: int = 0) -> dict[str, str]:
    emulator = "EFFICIENT_ATTN_CUDA_EMULATOR"
    chosen = {emulator: str(module), f"{emulator}_CAPABILITY": str(capability), f"{emulator}_SCHEDULE": str(schedule)}
    return {**os.environ, **chosen}


def passes(module: Path, capability: int, *arguments: str, schedule: int = 0) -> None:
    environment = emulator_environment(module, capability, schedule) | {"PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert " passed" in result.stdout


@compiled
@pytest.mark.parametrize("capability", SAMPLES)
def test_conformance_of_a_sample(emulator: Path, capability: int) -> None:
    wanted = " or ".join(f"{name}-bfloat16" for name in SAMPLES[capability])
    passes(emulator, capability, str(TESTS / "contract" / "test_conformance.py"), "-k", f"({wanted}) and not bits_")


@compiled
def test_what_only_these_kernels_promise(emulator: Path) -> None:
    passes(emulator, 80, str(HERE / "emulated_kernels.py"), str(HERE / "emulated_schedule.py"), "-m", "not slow")


@compiled
@pytest.mark.slow
def test_the_longer_of_what_only_they_promise(emulator: Path) -> None:
    passes(emulator, 80, str(HERE / "emulated_kernels.py"), "-m", "slow")


@compiled
def test_conformance_of_a_sample_of_linear_attention(emulator: Path) -> None:
    wanted = " or ".join(f"cuda-{name}-bfloat16" for name in LINEAR_SAMPLE)
    passes(
        emulator,
        80,
        str(TESTS / "methods" / "test_linear_attention.py"),
        "-k",
        f"test_equals_the_definition and ({wanted})",
    )


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("capability", SAMPLES)
@pytest.mark.parametrize("dtype, schedule", [("float16", 1), ("bfloat16", 2)])
def test_conformance(emulator: Path, dtype: str, schedule: int, capability: int) -> None:
    passes(emulator, capability, str(TESTS / "contract" / "test_conformance.py"), f"-k-{dtype}]", schedule=schedule)
    if capability == 80:
        passes(
            emulator,
            80,
            str(TESTS / "methods" / "test_linear_attention.py"),
            "-k",
            f"test_equals_the_definition and {dtype}",
        )


@compiled
@pytest.mark.slow
def test_what_only_linear_attention_promises(emulator: Path) -> None:
    passes(emulator, 80, str(HERE / "emulated_linear.py"))


SOUND = {"none": 64, "none on Hopper": 64, "none on Hopper, heads of 256": 256, "none on Hopper in one pass": 128}
IN_CI = ("none", "a slot is released before its keys are read")


def run_fault(name: str, folder: Path) -> tuple[int, str]:
    """Exit status and output of emulated_probe.py on kernels with that fault (one of `SOUND`: as they are)."""
    sources = folder / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    hopper = "Hopper" in name
    if name not in SOUND:
        file, right, wrong = FAULTS[name]
        text = (sources / "cuda" / file).read_text()
        (sources / "cuda" / file).write_text(text.replace(right, wrong))
        hopper |= file.startswith("sm90")
    head = SOUND.get(name) or HEADS.get(name, 64)
    module = build_emulator.build(folder / "built", sources, small=head)
    environment = emulator_environment(module, 90 if hopper else 80)
    environment["EFFICIENT_ATTN_CUDA_ANY_ORDER"] = str(int(head == 128))
    command = [sys.executable, str(HERE / "emulated_probe.py")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    return result.returncode, result.stdout + result.stderr


def test_every_fault_has_one_place() -> None:
    for name, (file, right, _) in FAULTS.items():
        assert (ROOT / "csrc" / "cuda" / file).read_text().count(right) == 1, name


@compiled
@pytest.mark.parametrize(
    "fault", [pytest.param(n, marks=() if n in IN_CI else pytest.mark.slow) for n in (*SOUND, *FAULTS)]
)  # fmt: skip
def test_a_fault_is_found(fault: str, tmp_path: Path) -> None:
    status, said = run_fault(fault, tmp_path)
    if fault in SOUND:
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
def test_automatic_passes_it_by(emulator: Path) -> None:
    program = (
        "import torch, efficient_attn as ea; q = torch.randn(1, 1, 8, 8).bfloat16(); "
        "print(ea.explain(q, q, q).backend, ea.explain(q, q, q, backend='cuda').backend)"
    )
    environment = {**os.environ, "EFFICIENT_ATTN_CUDA_EMULATOR": str(emulator)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    auto, named = result.stdout.split()
    assert auto in ("cpu", "reference") and named == "cuda"


# --- what nvcc makes of them ---

TABLE = ROOT / "benchmarks" / "results" / "cuda" / "compile.jsonl"


def test_the_table_holds_every_kernel() -> None:
    rows = [json.loads(line) for line in TABLE.read_text().splitlines()]
    kinds = {(row["arch"], row["dtype"]) for row in rows}
    assert ("sm_80", "bfloat16") in kinds
    parts = {
        f"attention_{part}{safe}" for part in ("forward", "key_gradient", "query_gradient") for safe in ("", "_safe")
    }
    shapes = {(part, head_dim, extras) for part in parts for head_dim in (64, 128, 256) for extras in (False, True)}
    shapes |= {("attention_bias_gradient", head_dim, True) for head_dim in (64, 128, 256)}
    hopper = {
        (f"sm90::attention_{part}", head_dim, False)
        for part in ("forward", "key_gradient", "query_gradient") for head_dim in (64, 128, 256)
    } | {("sm90::attention_backward", 128, False), ("sm90::attention_round_queries", 0, False)}  # fmt: skip
    hopper |= {("sm90::attention_forward_wide", head_dim, False) for head_dim in (128, 256)}
    hopper |= {("sm90::attention_query_gradient_wide", head_dim, False) for head_dim in (64, 128)}
    shapes |= {(f"attention_decode_{rows}", head_dim, False) for rows in (16, 64) for head_dim in (64, 128, 256)}
    shapes |= {("attention_delta", 0, False), ("attention_decode_join", 0, False)}
    linear = {
        (f"linear_attention_{part}", features, split) for part in ("states", "sums") for features in (64, 128, 256)
        for split in (False, True)
    } | {("linear_attention_scan", 0, False), ("linear_attention_terms", 0, False)}  # fmt: skip
    for kind in kinds:
        of_kind = [row for row in rows if (row["arch"], row["dtype"]) == kind]
        found = {(row["kernel"], row["head_dim"], row["extras"]) for row in of_kind}
        wanted = shapes | (hopper if kind[0] == "sm_90a" else set()) | (linear if kind[1] == "bfloat16" else set())
        assert found == wanted
    assert not [said for row in rows if (said := cuda_table.complaint(row))]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not here")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_one_configuration_compiles_now(arch: str) -> None:
    rows = cuda_table.compile_rows(arch, "bfloat16", head_dims=(64,), parts=("forward",), extras=(0,))
    hopper = {"sm90::attention_forward"} if arch == "sm_90a" else set()
    everywhere = {
        "attention_forward",
        "attention_forward_safe",
        "attention_delta",
        "linear_attention_scan",
        "linear_attention_terms",
    }
    assert {row["kernel"] for row in rows} == everywhere | hopper
    assert not [said for row in rows if (said := cuda_table.complaint(row))]
