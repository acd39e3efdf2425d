"""The suite `gpu` without a GPU: its grid, its figures, and what a run of `make gpu-check` keeps and prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from efficient_attn.benchmarks import __main__ as plain_runner
from efficient_attn.benchmarks import machine, report, suites
from efficient_attn.benchmarks.suites import gpu
from efficient_attn.measuring import inputs

CONFIGS = list(gpu.configs(suites.Options()))


def cell(config, status="ok", **metrics):
    return {"type": "cell", "suite": "gpu", "status": status, "config": config, **metrics}


def test_targets_are_of_cases_that_are_measured():
    names = {(config["case"], config["mode"]) for config in CONFIGS}
    assert len(names) == len(CONFIGS) == 23
    assert {(case, mode) for case, mode, *_ in gpu.TARGETS} <= names
    assert {kernels for _, _, kernels, *_ in gpu.TARGETS} == {name for name, _ in gpu.KERNELS.values()}


def test_figures_follow_from_times():
    q = torch.empty(1, 16, 1024, 64, dtype=torch.bfloat16, device="meta")
    config = {**gpu.DEFAULTS, "visible": "full", "mode": "bwd"}
    figures = gpu.figures(config, {"ours": 2.0, "flex": 3.0, "dense": 4.0}, 0.5, (q, q, q))
    assert figures["vs flex"] == 1.5 and figures["density efficiency"] == 1.0
    assert figures["tflops"] == round(4 * 16 * 1024**2 * 64 * 0.5 * 2.5 / 2.0 / 1e9, 1)
    figures = gpu.figures(config, {"ours": 2.0, "cuda": 1.0, "cudnn": 0.5, "cuda dense": 4.0}, 0.5, (q, q, q))
    assert figures["vs cuda"] == 0.5 and figures["cuda vs cudnn"] == 0.5 and figures["cuda vs ours"] == 2.0
    assert figures["cuda density efficiency"] == 2.0 and figures["cuda tflops"] == 2 * figures["tflops"]


def test_options_of_the_kernels_are_set_for_a_call_and_no_longer():
    assert gpu.in_any_order(lambda: os.environ["EFFICIENT_ATTN_CUDA_ANY_ORDER"])() == "1"
    assert "EFFICIENT_ATTN_CUDA_ANY_ORDER" not in os.environ
    configs = pytest.importorskip("efficient_attn.kernels.configs", reason="needs Triton", exc_type=ImportError)
    assert gpu.by_tma(lambda q, k, v: configs.DESCRIPTORS)(None, None, None) is True and configs.DESCRIPTORS is False


def test_block_masks_have_their_density():
    mask = inputs.random_blocks(1024, 2048, 0.25, block=128)
    assert mask.density == 0.25 and mask.block_size == (128, 128)


def test_a_machine_without_a_gpu_is_a_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        gpu.run_cell(CONFIGS[0])


def test_the_table_has_each_kind_of_kernels_and_the_targets():
    records = [cell(CONFIGS[0], ms=1.0, tflops=500.0, **{"vs flex": 1.1})]
    records.append(cell(CONFIGS[1], "oom", message="out of memory"))
    said = report.plain(records)
    assert "oom: gpu dense 16k D128 bwd: out of memory" in said
    assert "dense 16k D128 fwd, Triton: tflops 500, at least 480: reached." in said
    assert "dense 16k D128 fwd, Triton: vs flex 1.1, at least 1.3: MISSED." in said
    assert "1 of the 2 targets" in said and "CUDA, any order" not in said
    records[0] |= {"times_ms": {"ours": 1.0, "cuda": 0.5, "cudnn": 0.6}, "cuda tflops": 700.0, "cuda vs ours": 2.0}
    (line,) = (line for line in report.plain(records).splitlines() if " CUDA " in line and "2.00x" in line)
    assert line.split()[3:] == ["fwd", "CUDA", "0.5", "700", f"{machine.prediction(CONFIGS[0], 'CUDA'):.0f}", "2.00x"]
    said = report.plain(records)
    assert re.search(r"dense 16k D128 fwd, CUDA: tflops 700, at least 650 \(its machine code: .*\): reached\.", said)
    records[0] |= {"times_ms": {"ours": 1.0}, "absent": {"cuda": "RuntimeError: no such kernel"}}
    assert "unsupported: gpu dense 16k D128 fwd CUDA: RuntimeError: no such kernel" in report.plain(records)


def run(tmp_path, monkeypatch, measured, *arguments):
    monkeypatch.setattr(plain_runner, "gpu_facts", lambda: {"gpu": "none"})
    monkeypatch.setattr(plain_runner.runner, "run_cell", measured)
    plain_runner.main(["gpu", "--out", str(tmp_path), *arguments])
    return (tmp_path / "summary.txt").read_text()


def test_a_run_is_kept_drawn_and_summed_up_last(tmp_path, monkeypatch, capsys):
    """All of the suite but the measuring. A second run into the same directory is added, and alone in the summary."""

    def measured(each, out, limits, code, lookup):
        figures = {"ms": 1.234, "tflops": 5.0, "times_ms": {"ours": 1.234, "flex": 2.0}, "vs flex": 1.62}
        out.append(record := cell(dict(each.config), **figures))
        return record

    for _ in range(2):
        table = run(tmp_path, monkeypatch, measured, "--note", "conformance: passed")
    assert capsys.readouterr().out.endswith(table) and table.startswith("conformance: passed\n")
    assert sum("1.23 " in line for line in table.splitlines()) == len(CONFIGS)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2 * (1 + len(CONFIGS))
    pytest.importorskip("matplotlib")
    assert (tmp_path / "results.png").stat().st_size > 1000


def test_a_cell_that_ends_badly_is_measured_again_without_the_experimental_kernels(tmp_path, monkeypatch):
    tried = []

    def measured(each, out, limits, code, lookup):
        tried.append(each.config["cuda"])
        status = "crash" if tried[-1] else "ok"
        absent = {"ms": 1.0, "times_ms": {"ours": 1.0}, "absent": {"cuda": "left out"}}
        out.append(record := cell(dict(each.config), status, message="gone", **absent))
        return record

    monkeypatch.setattr(gpu, "CASES", {"dense 1k D128 B8": gpu.CASES["dense 1k D128 B8"]})
    summary = run(tmp_path, monkeypatch, measured)
    assert tried == [True, False] and "crash: gpu dense 1k D128 B8 fwd: gone" in summary


def test_no_cell_starts_when_the_time_is_over(tmp_path, monkeypatch, capsys):
    run(tmp_path, monkeypatch, None, "--seconds", "1")
    assert capsys.readouterr().out.count("not started, 1 s are over") == len(CONFIGS)


def test_it_needs_neither_typer_nor_rich_nor_matplotlib(tmp_path):
    code = f"""
import sys
for name in ("typer", "rich", "matplotlib", "sklearn", "numpy.testing", "psutil"):
    sys.modules[name] = None
from efficient_attn.benchmarks import __main__
__main__.main(["gpu", "--out", {str(tmp_path)!r}, "--seconds", "0"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("not started") == len(CONFIGS) and not (tmp_path / "results.png").exists()
