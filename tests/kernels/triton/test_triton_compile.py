"""What Triton compiles the kernels to for sm_80 and sm_90, read without a GPU; and `make gpu-check` without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from efficient_attn.benchmarks.tools import triton_table as table
from efficient_attn.kernels.configs import SHARED_MEMORY

ROOT = Path(__file__).resolve().parents[3]
ROWS = [json.loads(line) for line in table.RESULTS.read_text().splitlines()]
MATRIX = ("attention_forward_kernel", "key_gradient_kernel", "query_gradient_kernel", "bias_gradient_kernel")


def check(row: dict) -> None:
    """Shared memory within the limit, nothing spilled where a default configuration runs, tensor cores for halves."""
    assert row["shared"] <= SHARED_MEMORY[row["sm"]], row
    # The second launch of a masked call (safe) computes nothing unless a NaN was met. Beyond 128 dimensions two things
    # are not promised: exact float32, whose multiply-adds hold whole rows in registers even in the smallest tile that
    # there is, and linear attention.
    attention = row["kernel"] in MATRIX and (row["dtype"] != "float32" or row["head_dim"] <= 128)
    linear = row["feature"] == "linear" and row["dtype"] != "float32" and row["head_dim"] <= 128
    if (attention or linear) and not row["safe"]:
        assert row["spilled"] == 0, row
    if row["dtype"] != "float32" and row["kernel"] in MATRIX:
        assert row["mma"] + row["wgmma"] > 0, row
        if row["sm"] == 90 and row["block_q"] >= 64 and row["block_k"] >= 64:
            assert row["wgmma"] > 0, row
    by_tma = row["feature"] == "tma" and row["kernel"] == "attention_forward_kernel" and not row["safe"]
    assert (row["tma"] > 0) == by_tma, row
    if row["dtype"] == "float32" and row["kernel"] in MATRIX and not row["safe"]:
        assert row["mma"] + row["wgmma"] == 0, row  # exact float32 by default


def test_the_table_holds_every_configuration() -> None:
    kinds = {(row["sm"], row["dtype"], row["head_dim"], row["feature"]) for row in ROWS}
    assert kinds == {(sm, str(t).removeprefix("torch."), d, f) for sm, t, d, f in table.cases()}
    for row in ROWS:
        check(row)


@pytest.mark.parametrize(("sm", "head_dim", "feature"), [(90, 128, "lists"), (80, 64, "window")])
def test_compiled_now(sm: int, head_dim: int, feature: str) -> None:
    rows = table.compile_case(sm, torch.bfloat16, head_dim, feature)
    assert {"attention_forward_kernel", "key_gradient_kernel", "query_gradient_kernel"} <= {r["kernel"] for r in rows}
    assert any(row["safe"] for row in rows)
    for row in rows:
        check(row)
    kept = [
        r for r in ROWS if (r["sm"], r["dtype"], r["head_dim"], r["feature"]) == (sm, "bfloat16", head_dim, feature)
    ]
    tiles = [
        [{k: r.get(k) for k in ("kernel", "block_q", "block_k", "warps", "stages")} for r in s] for s in (rows, kept)
    ]
    assert tiles[0] == tiles[1], "benchmarks/results/triton/compile.jsonl is of other kernels; run make triton-table"


@pytest.mark.slow
@pytest.mark.parametrize("case", table.cases(), ids=lambda c: "-".join(map(str, c)))
def test_every_configuration_compiles(case: tuple) -> None:
    for row in table.compile_case(*case):
        check(row)


def gpu_check(*arguments: str) -> str:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / "tools" / "gpu_check.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_gpu_check_says_why_it_is_skipped(tmp_path: Path) -> None:
    said = gpu_check("--out", str(tmp_path / "out"))
    assert "skipped: PyTorch sees no CUDA GPU" in said and "6. " in said
    assert not (tmp_path / "out").exists()


def test_gpu_check_links_a_package_that_works(tmp_path: Path) -> None:
    """All that runs before the GPU is needed: the links, the module's build, the import of what will be measured."""
    said = gpu_check("--out", str(tmp_path), "--dry-run")
    assert "benchmark cells with" in said and "dry run" in said
    program = (
        "import efficient_attn as ea, torch, efficient_attn.kernels.attention as k; q = torch.randn(1, 1, 8, 8); "
        "print(ea.__file__, k.__file__, ea.attention(q, q, q).shape)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(str(tmp_path / "site")) == 2


def test_the_gpu_suite_without_a_gpu() -> None:
    """Its table of cells, its figures and its summary are plain Python: checked on rows as a run would write them."""
    from efficient_attn.benchmarks import gpu

    cells = gpu.cells()
    names = {(cell.config["case"], cell.config["mode"]) for cell in cells}
    assert {(case, mode) for case, mode, *_ in (*gpu.TARGETS, *gpu.CUDA_TARGETS)} <= names
    q = torch.empty(1, 16, 1024, 64, dtype=torch.bfloat16, device="meta")
    config = {**gpu.DEFAULTS, "visible": "full", "mode": "bwd"}
    figures = gpu._figures(config, {"ours": 2.0, "flex": 3.0, "dense": 4.0}, 0.5, (q, q, q))
    assert figures["vs flex"] == 1.5 and figures["density efficiency"] == 1.0
    assert figures["tflops"] == round(4 * 16 * 1024**2 * 64 * 0.5 * 2.5 / 2.0 / 1e9, 1)
    figures = gpu._figures(config, {"ours": 2.0, "cuda": 1.0, "cudnn": 0.5, "cuda dense": 4.0}, 0.5, (q, q, q))
    assert figures["vs cuda"] == 0.5 and figures["cuda vs cudnn"] == 0.5 and figures["cuda vs ours"] == 2.0
    assert gpu.in_any_order(lambda: os.environ["EFFICIENT_ATTN_CUDA_ANY_ORDER"])() == "1"
    assert "EFFICIENT_ATTN_CUDA_ANY_ORDER" not in os.environ
    assert figures["cuda density efficiency"] == 2.0 and figures["cuda tflops"] == 2 * figures["tflops"]
    mask = gpu.random_blocks(1024, 2048, 0.25)
    assert mask.density == 0.25 and mask.block_size == (128, 128)
    records = [
        {"type": "cell", "status": "ok", "config": dict(cells[0].config), "ms": 1.0, "tflops": 500.0, "vs flex": 1.1}
    ]
    records.append({"type": "cell", "status": "oom", "config": dict(cells[1].config), "message": "out of memory"})
    said = gpu.summary(records)
    assert "oom: out of memory" in said
    assert "fwd: tflops >= 480: 500.0 reached" in said and "fwd: vs flex >= 1.3: 1.1 MISSED" in said
    assert "not measured" in said and "experimental" not in said
    records[0] |= {"times_ms": {"ours": 1.0, "cuda": 0.5}, "cuda tflops": 700.0, "cuda vs ours": 2.0}
    said = gpu.summary(records).split("The CUDA kernels (experimental)")[1]
    assert "0.500" in said and "2.00x" in said and "fwd: cuda tflops >= 650: 700.0 reached" in said


def test_a_run_is_kept_drawn_and_summed_up_last(tmp_path: Path, monkeypatch, capsys) -> None:
    """All of the suite but the measuring. A second run into the same directory is added, and alone in the summary."""
    from efficient_attn.benchmarks import gpu

    def measured(cell, out, limits, code):
        figures = {"ms": 1.0, "tflops": 5.0, "times_ms": {"ours": 1.0, "flex": 2.0}, "vs flex": 2.0}
        out.append(record := {"type": "cell", "status": "ok", "config": dict(cell.config)} | figures)
        return record

    monkeypatch.setattr(gpu, "device_facts", lambda: {"gpu": "none"})
    monkeypatch.setattr(gpu.runner, "run_cell", measured)
    for _ in range(2):
        gpu.main(["--out", str(tmp_path), "--note", "conformance: passed"])
    table = (tmp_path / "summary.txt").read_text()
    assert capsys.readouterr().out.endswith(table) and table.startswith("conformance: passed\n")
    assert sum("1.000" in line for line in table.splitlines()) == len(gpu.cells())
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2 * (1 + len(gpu.cells()))
    assert (tmp_path / "results.png").stat().st_size > 1000


def test_a_cell_that_ends_badly_is_measured_again_without_the_experimental_kernels(tmp_path: Path, monkeypatch) -> None:
    from efficient_attn.benchmarks import gpu

    tried = []

    def measured(cell, out, limits, code):
        tried.append(cell.config["cuda"])
        out.append(record := {"type": "cell", "status": "crash" if tried[-1] else "ok", "config": dict(cell.config),
                              "ms": 1.0, "times_ms": {"ours": 1.0}, "absent": {"cuda": "left out"}})  # fmt: skip
        return record

    monkeypatch.setattr(gpu, "device_facts", dict)
    monkeypatch.setattr(gpu, "cells", lambda: [gpu.runner.Cell("gpu", {**gpu.DEFAULTS, "case": "x", "mode": "fwd"})])
    monkeypatch.setattr(gpu.runner, "run_cell", measured)
    gpu.main(["--out", str(tmp_path)])
    assert tried == [True, False]
    assert "crash: " in (tmp_path / "summary.txt").read_text()
