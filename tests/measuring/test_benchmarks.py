"""The benchmark machinery: result files, workers and their limits, clocks, inputs, tables and plots."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("rich")

from rich.console import Console

from efficient_attn import MultiheadAttention, methods, parse
from efficient_attn.benchmarks import cases, compare, figures, peers, report, suites, view
from efficient_attn.benchmarks.suites import ops, targets, vit
from efficient_attn.measuring import calls, clock, inputs, records, runner
from efficient_attn.measuring.fit import fit
from efficient_attn.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")
CELL = {"type": "cell", "suite": "ops", "status": "ok", "config": {}}
OPS = {"method": "dense", "seqlen": 128, "mode": "fwd", "causal": False, "dtype": "float32", "threads": 1}
OPS |= {**cases.OPERATOR_SHAPE, "budget_s": 0.02}


def run_one(tmp_path, suite, config, **limits):
    lookup = runner.of_module if "." in suite else suites.measurement
    with records.ResultFile(tmp_path / "results.jsonl") as out:
        return runner.run_cell(runner.Cell(suite, config), out, runner.Limits(**limits), "test", lookup)


# --- the result file ---


def test_a_torn_last_line_is_dropped_and_the_rest_stays(tmp_path):
    path = tmp_path / "results.jsonl"
    with records.ResultFile(path) as out:
        out.append({**CELL, "id": "a"})
    with open(path, "a") as file:
        file.write('{"type": "cell", "id": "b", "sta')
    assert [record["id"] for record in records.read(path)] == ["a"]
    with records.ResultFile(path) as out:
        out.append({**CELL, "id": "c"})
    assert [record["id"] for record in records.read(path)] == ["a", "c"]


def test_a_damaged_line_inside_a_file_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(f"{json.dumps(CELL)}\nnonsense\n{json.dumps(CELL)}\n")
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        list(records.read(path))


def test_every_line_is_on_the_disk_before_append_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(records.os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    with records.ResultFile(tmp_path / "results.jsonl") as out:
        out.append({"a": 1})
        out.append({"b": 2})
    assert synced == [len('{"a": 1}\n'), len('{"a": 1}\n{"b": 2}\n')]


def test_a_cell_is_named_by_suite_configuration_and_code():
    assert records.cell_id("ops", {"a": 1, "b": 2}, "x") == records.cell_id("ops", {"b": 2, "a": 1}, "x")
    names = {records.cell_id(*key) for key in (("ops", {"a": 1}, "x"), ("vit", {"a": 1}, "x"), ("ops", {"a": 1}, "y"))}
    assert len(names) == 3


def test_the_environment_tells_what_decides_a_figure():
    found = json.loads(json.dumps(records.environment(threads=1)))
    assert found["schema"] == records.SCHEMA and found["threads"] == 1
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["cores"] >= 1 and found["code"]


# --- workers ---


FAULTS = """
import os, time, torch
from efficient_attn import UnsupportedError

def run_cell(config):
    kind = config["fault"]
    if kind == "hang":
        child = os.fork()
        if child:
            print(child, flush=True)
            with open(config["pid_file"], "w") as file:
                file.write(str(child))
        time.sleep(600)
    elif kind == "allocate":
        torch.empty(100 * 2**30, dtype=torch.uint8).fill_(1)
    elif kind == "segfault":
        import ctypes
        ctypes.string_at(0)
    elif kind == "exit":
        os.write(2, b"native code gave up")
        os._exit(3)
    elif kind == "unsupported":
        raise UnsupportedError("not this")
    elif kind == "error":
        raise KeyError("a bug")
    elif kind == "child":
        import multiprocessing
        child = multiprocessing.get_context("fork").Process(target=os._exit, args=(7,))
        child.start()
        child.join()
        return {"exitcode": child.exitcode}
    elif kind == "kernel":
        from efficient_attn import attention
        threads = lambda: len(os.listdir("/proc/self/task"))
        before, query = threads(), torch.randn(1, 4, 256, 32)
        attention(query, query, query, backend="cpu")
        return {"threads_left": threads() - before}
    return {"torch_threads": torch.get_num_threads()}
"""


@pytest.fixture
def faults(tmp_path, monkeypatch):
    """The dotted name of a suite whose cells fail in the way that they say."""
    (tmp_path / "faulty").mkdir()
    (tmp_path / "faulty" / "suite.py").write_text(FAULTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "faulty.suite"


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        ("allocate", "oom", "memory"),
        ("segfault", "crash", "SIGSEGV"),
        ("exit", "crash", "exit code 3 .*native code gave up"),
        ("unsupported", "unsupported", "not this"),
        ("error", "error", "a bug"),
    ],
)
def test_a_failure_becomes_a_recorded_row(tmp_path, faults, fault, status, message):
    record = run_one(tmp_path, faults, {"fault": fault, "threads": 1}, memory_bytes=2 * 2**30)
    assert record["status"] == status
    assert re.search(message, record["message"])
    assert [r["status"] for r in records.read(tmp_path / "results.jsonl")] == [status]


def test_a_worker_uses_the_threads_that_its_cell_names(tmp_path, faults):
    assert run_one(tmp_path, faults, {"fault": "none", "threads": 1})["torch_threads"] == 1
    assert run_one(tmp_path, faults, {"fault": "none", "threads": 2})["torch_threads"] == 2


def test_a_hanging_worker_and_its_children_are_killed_at_the_limit(tmp_path, faults):
    pid_file = tmp_path / "child"
    record = run_one(tmp_path, faults, {"fault": "hang", "threads": 1, "pid_file": str(pid_file)}, seconds=3)
    assert record["status"] == "timeout" and record["seconds"] < 10
    child = int(pid_file.read_text())
    for _ in range(50):  # a killed orphan stays a zombie until init takes it
        if _state(child) in (None, "Z"):
            return
        time.sleep(0.1)
    pytest.fail(f"process {child} of a stopped worker still runs")


def test_a_cell_may_start_processes(tmp_path, faults):
    assert run_one(tmp_path, faults, {"fault": "child", "threads": 1})["exitcode"] == 7


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_workers_run_kernels_on_openmp_threads(tmp_path, faults):
    """As users' processes do; the plain threads of a forked child would be started anew in each timed call."""
    assert run_one(tmp_path, faults, {"fault": "kernel", "threads": 2})["threads_left"] == 1


RUN = """
import sys
from pathlib import Path
from efficient_attn.measuring import records, runner

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    config = {"fault": "hang", "threads": 1, "pid_file": sys.argv[1] + "/child"}
    with records.ResultFile(Path(sys.argv[1]) / "results.jsonl") as out:
        runner.run_cell(runner.Cell("faulty.suite", config), out, runner.Limits(), "test")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_workers_end_with_a_run_that_is_killed(tmp_path, faults):
    """kill -9 of the run: neither the worker nor the child that it forked goes on."""
    (tmp_path / "run.py").write_text(RUN)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.Popen([sys.executable, str(tmp_path / "run.py"), str(tmp_path)], env=environment)
    child_file = tmp_path / "child"
    try:
        deadline = time.monotonic() + 120
        while not (child_file.exists() and child_file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        child = int(child_file.read_text())
        worker = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])
        assert _state(worker) not in (None, "Z")
    finally:
        run.kill()
        run.wait()
    for _ in range(100):
        if all(_state(pid) in (None, "Z") for pid in (worker, child)):
            return
        time.sleep(0.1)
    pytest.fail(f"worker {worker} or its child {child} still runs after its run was killed")


def _state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


# --- clocks and counters ---


def test_calls_are_timed_in_alternation():
    order = []
    calls = {name: lambda name=name: (order.append(name), time.sleep(0.002)) for name in "ab"}
    times = clock.interleaved(calls, budget_s=0.05)
    measured = order[4:]  # two warm-ups of each
    assert measured[:6] == list("ababab")
    assert 2.0 <= times["a"]["ms"] < 20 and times["a"]["samples"] >= 3  # sleeping takes longer on a busy machine


def test_a_call_beyond_the_budget_runs_once():
    runs = []
    times = clock.interleaved({"slow": lambda: (runs.append(0), time.sleep(0.05)), "fast": lambda: None}, budget_s=0.03)
    assert len(runs) == 1 and times["slow"]["samples"] == 1 and times["fast"]["samples"] >= 3


def test_patience_gives_slow_calls_their_rounds_and_noisy_ones_more(monkeypatch):
    monkeypatch.setattr(clock.scheduling, "waits", dict)  # no system that tells what a thread waited
    runs = []
    times = clock.interleaved({"slow": lambda: (runs.append(0), time.sleep(0.05))}, budget_s=0.03, patience_s=1)
    assert len(runs) >= 4 and times["slow"]["samples"] == len(runs) - 1  # on a busy machine more
    naps = itertools.cycle((0.002, 0.02))
    noisy = clock.interleaved({"noisy": lambda: time.sleep(next(naps))}, budget_s=0.05, patience_s=0.5)
    assert noisy["noisy"]["samples"] > 12  # about 5 fit the budget


def test_ceilings_count_what_they_do():
    """The FMA loop's count is exact, and what it reaches is more than a matrix product does, which it bounds."""
    _cpu = pytest.importorskip("efficient_attn._cpu", reason="the native module is not built")
    lanes = {"baseline": 4, "avx2": 8, "avx512": 16, "avx512_bf16": 16, "amx_bf16": 16}[_cpu.instruction_set()]
    assert _cpu.fma_loop(3, 1000) == 3 * 1000 * 10 * lanes * 2
    fma, (a, b) = clock.fma_ceiling(), torch.randn(2, 512, 512)
    times = clock.interleaved({"fma": fma.call, "sgemm": lambda: a @ b}, budget_s=0.3)
    assert fma.giga_per_second(times["fma"]["ms"]) > 0.8 * 2 * 512**3 / times["sgemm"]["ms"] / 1e6


def test_short_calls_are_repeated_inside_a_sample():
    times = clock.interleaved({"nothing": lambda: None}, budget_s=0.02)
    assert times["nothing"]["ms"] < 0.001


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark can be set back on Linux only")
def test_peak_memory_sees_what_is_freed_again_and_nothing_from_before():
    torch.ones(64 * 2**20)  # a peak of 256 MiB before the block
    with clock.PeakMemory() as peak:
        torch.ones(16 * 2**20)
    assert 60 * 2**20 < peak.bytes < 80 * 2**20


def test_the_fitted_exponent_is_the_slope():
    lengths = [1024, 2048, 4096]
    assert fit(lengths, [n * 100 for n in lengths]).exponent == pytest.approx(1)
    assert fit(lengths, [n * n for n in lengths]).exponent == pytest.approx(2)


# --- inputs ---


def test_activations_come_from_a_photograph_and_have_structure():
    query, key, value = inputs.photograph_qkv(600, batch=2, heads=4, kv_heads=2, head_dim=16)
    assert query.shape == (2, 4, 600, 16) and key.shape == value.shape == (2, 2, 600, 16)
    assert 0.5 < query.std() < 2 and not torch.equal(query[0], query[1])
    tokens = inputs.photograph_tokens(600)
    near = torch.cosine_similarity(tokens[:-1], tokens[1:]).mean()
    far = torch.cosine_similarity(tokens[:-300], tokens[300:]).mean()
    assert near > far + 0.1
    assert torch.equal(query, inputs.photograph_qkv(600, batch=2, heads=4, kv_heads=2, head_dim=16)[0])


@pytest.mark.parametrize("seqlen", [1, 2, 7, 1000])
def test_photographs_give_any_length(seqlen):
    query, _, _ = inputs.photograph_qkv(seqlen)
    assert query.shape[2] == seqlen and query.isfinite().all()


def test_digits_are_split_without_overlap():
    images, labels, test_images, test_labels = inputs.digits()
    assert len(images) == len(labels) == 1437 and len(test_images) == len(test_labels) == 360
    assert set(labels.tolist()) == set(test_labels.tolist()) == set(range(10))


# --- suites ---


@pytest.mark.parametrize("mode", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize("method", cases.OPERATOR_METHODS)
def test_every_default_method_is_measured(tmp_path, method, mode):
    record = run_one(tmp_path, "ops", {**OPS, "method": method, "mode": mode})
    assert record["status"] == "ok", record
    assert record["ms"] > 0 and record["speedup_sdpa"] > 0 and record["peak_bytes"] >= 0
    assert record["error"] < (1e-5 if method == "dense" else 2.0)
    plan_free = ("dense", "lsh", "sorted_buckets", "linformer", "nystrom", "performer", "linear")
    assert ("plan_ms" in record) == (parse(method).name not in plan_free)


@pytest.mark.parametrize("method", cases.DECODES)
def test_one_query_at_the_end_of_a_cache_is_measured(method):
    row = run_operator(method, mode="decode")
    assert row["ms"] > 0 and row["error"] < (1e-5 if method == "dense" else 2.0)
    placed = parse(method).name in ("sliding_window", "strided", "longformer", "bigbird")
    assert ("plan_ms" in row) == placed


@pytest.mark.parametrize("method", ["sliding_window:left=16,right=16", "dilated:left=8,right=8,dilation=2"])
def test_a_lone_query_sees_the_keys_at_the_end(method):
    """As the last row of the whole sequence does, never the first keys."""
    config = {**OPS, "method": method, "seqlen": 300, "causal": True}
    whole, alone = {**config, "mode": "fwd"}, {**config, "mode": "decode"}
    outs = []
    for one in (whole, alone):
        call = ops.bound(one)
        outs.append(call()[:, :, -1:])
    (mask,) = call.plan_masks()
    assert not mask.to_dense()[..., : 300 - 17].any()
    torch.testing.assert_close(*outs)


def test_a_method_of_whole_sequences_does_not_decode(tmp_path):
    record = run_one(tmp_path, "ops", {**OPS, "method": "linformer:rank=16", "mode": "decode"})
    assert record["status"] == "unsupported" and "one query alone" in record["message"]


def test_the_error_is_that_of_the_method():
    """A window that covers everything has no error, a narrow one has."""
    wide = run_operator("sliding_window:left=128,right=128")
    narrow = run_operator("sliding_window:left=2,right=2")
    assert wide["error"] < 1e-5 < 0.05 < narrow["error"]


def test_causal_cells_compare_with_causal_attention(tmp_path):
    assert run_operator("dense", causal=True)["error"] < 1e-5
    assert run_operator("causal")["error"] < 1e-5
    record = run_one(tmp_path, "ops", {**OPS, "method": "linformer:rank=16", "causal": True})
    assert record["status"] == "unsupported"


def run_operator(method, **changes):
    return suites.get("ops").run_cell({**OPS, "method": method, **changes})


OF_EACH_KIND = ("dense", "neighborhood:kernel=5", "linformer:rank=16")


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m in OF_EACH_KIND else pytest.mark.slow) for m in cases.VIT_METHODS]
)
def test_the_vision_transformer_learns_with_every_default_method(method):
    """It begins to fit as many images as a batch holds in 60 steps."""
    images, labels, _, _ = inputs.digits()
    images, labels = images[: vit.BATCH], labels[: vit.BATCH]
    torch.manual_seed(0)
    attention = calls.sized(method, vit.TOKENS)
    model = vit.DigitsViT(lambda: MultiheadAttention(vit.DIM, vit.HEADS, batch_first=True, attention=attention))
    step = vit.trainer(model, images, labels, steps=60)
    losses = [step() for _ in range(60)]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def target_name(target):
    return view.cell_name({"suite": "targets", "config": asdict(target)})


def test_target_rows_name_what_exists():
    names = [target_name(target) for target in cases.TARGETS]
    assert len(set(names)) == len(names)
    for target in cases.TARGETS:
        assert target.mode in ("fwd", "bwd", "fwd_bwd") and target.dtype in ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("density", [0.5, 0.1])
def test_random_block_masks_have_their_density(density):
    assert inputs.random_blocks(1280, 1280, density).density == pytest.approx(density)


@pytest.mark.slow
def test_compilation_of_a_peer_is_timed_apart():
    target = next(target for target in cases.TARGETS if target.peer == "flex")
    config = asdict(target) | {"kv_len": 512, "q_len": 512, "budget_s": 0.1, "patience_s": 0.1, "threads": 1}
    record = targets.run_cell(config)
    assert record["samples"] >= 3 and record["peer_plan_ms"] > 10 * record["peer_ms"]


def test_the_plain_formulas_of_low_rank_methods_agree_with_ours():
    q, k, v = (torch.randn(2, 3, 24, 8, dtype=torch.float64) for _ in range(3))
    E, F = (torch.randn(5, 24, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(peers.linformer(q, k, v, E, F), methods.linformer_attention(q, k, v, E, F))
    torch.testing.assert_close(peers.nystrom(q, k, v, 6), methods.nystrom_attention(q, k, v, landmarks=6))
    W = methods.random_projection(64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k = q / 4, k / 4  # else the 1e-4 that the plain formula adds to each feature shows
    ours = methods.performer_attention(q, k, v, W)
    assert (peers.performer(q, k, v, W) - ours).norm() < 1e-3 * ours.norm()


@pytest.mark.parametrize("target", cases.TARGETS, ids=target_name)
def test_every_target_row_runs_at_a_small_size(target):
    """Each row's two calls agree in what they compute, and give a figure."""
    if target.peer == "flex":
        pytest.skip("compiles for most of a minute; run by make bench-cpu")
    length = min(target.kv_len, 256)
    config = asdict(target) | {"kv_len": length, "q_len": min(target.q_len, length), "bandwidth": None}
    record = targets.run_cell({**config, "budget_s": 0.01, "patience_s": 0.01, "threads": 1})
    assert record["figure"] > 0 and record["samples"] >= 1
    assert ("peak_share" in record) == (target.work in ("attention", "sparse_efficiency"))


# --- tables and plots ---


def a_cell(**changes):
    config = {**OPS, "method": "dense", **changes.pop("config", {})}
    metrics = {"ms": 1.0, "spread": 0.1, "samples": 5, "dense_ms": 1.0, "sdpa_ms": 2.0, "speedup_dense": 1.0}
    metrics |= {"speedup_sdpa": 2.0, "peak_bytes": 2**20, "error": 1e-7}
    return {"type": "cell", "suite": "ops", "status": "ok", "config": config, **metrics, **changes}


def printed(cells):
    """What a terminal shows; all of its figures and sentences are in the text without rich too."""
    out = io.StringIO()
    report.print_report(cells, Console(file=out, width=400))
    wanted = {word for line in report.plain(cells).splitlines() for word in line.split()}
    assert wanted <= set(out.getvalue().split())
    return out.getvalue()


def test_the_last_record_of_a_cell_counts():
    cells = view.latest([{"type": "environment"}, a_cell(ms=1.0), a_cell(ms=3.0)])
    assert [cell["ms"] for cell in cells] == [3.0]


def test_tables_show_figures_failures_and_noise():
    text = printed([a_cell(), a_cell(ms=7.25, spread=0.6, config={"seqlen": 256})])
    assert "2.00x" in text and "7.25~" in text
    failed = a_cell(status="oom", message="MemoryError: 9 GB", config={"seqlen": 512})
    text = printed([a_cell(), failed])
    assert "oom" in text and "MemoryError: 9 GB" in text


def test_what_all_rows_share_is_in_the_title_and_what_differs_a_column():
    here = {"code": "abc"}
    (table,) = report.tables(view.rows([a_cell(**here), a_cell(config={"seqlen": 256}, **here)])).values()
    assert table.title == "ops: float32, B1 H4 D64, 1 threads"
    assert [head for head, _ in table.sections] == ["N 128, fwd", "N 256, fwd"]
    labels = [column.label for column in table.columns]
    assert labels == ["method", "ms", "vs dense", "vs SDPA", "MiB", "error"]  # no plan, no density
    (table,) = report.tables(
        view.rows([a_cell(**here), a_cell(config={"threads": 2, "dtype": "float16"}, **here)])
    ).values()
    assert table.title == "ops: B1 H4 D64"
    assert [column.label for column in table.columns][:3] == ["method", "threads", "dtype"]
    assert [cells[:3] for cells, _ in table.sections[0][1]] == [["dense", "1", "float32"], ["dense", "2", "float16"]]


def test_short_names_are_explained_and_failures_with_one_reason_are_one_line():
    specs = ("bigbird:block=16", "bigbird:block=32", "linear", "performer:features=8")
    rows = view.rows([a_cell(config={"method": spec}) for spec in specs])
    assert [row["series"] for row in rows] == ["bigbird:block=16", "bigbird:block=32", "linear", "performer"]
    assert report.tables(rows)["ops"].note.endswith("Here performer:features=8.")
    failed = [a_cell(status="oom", message="[/INST] 9 GB", config={"seqlen": n}) for n in (1, 2, 3)]
    text = printed([a_cell(), *failed])
    assert "oom: ops dense 1 fwd and 2 more: [/INST] 9 GB" in text


RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("cpu/*/results.jsonl")), ids=lambda path: path.parent.name)
def test_results_of_older_versions_can_be_shown(path):
    cells = view.latest(records.read(path))
    text, rows = printed(cells), view.rows(cells)
    of_profile = {"ranks"}  # not of bench: `profile --context-parallel` shows them
    assert {suite.name for suite in view.shown(rows)} == {cell["suite"] for cell in cells} - of_profile
    assert all(f"{suite.name}: " in text for suite in view.shown(rows))
    compared = compare.compare(cells, cells)
    assert len(compared) == len(cells) and {one.verdict for one in compared} <= {"same", "unsure"}


def test_a_method_that_somebody_registers_is_measured(monkeypatch):
    monkeypatch.setitem(METHODS, "toy", type("Toy", (), {"name": "toy"}))
    for name in ("ops", "vit", "memory", "models", "lra"):
        found = {config["method"] for config in suites.get(name).configs(suites.Options())}
        assert "toy" in found and "causal" not in found


def test_every_method_of_the_package_has_a_size_for_the_operator_suite():
    sized = {spec.partition(":")[0] for spec in cases.OPERATOR_METHODS if "+" not in spec}
    assert sized == set(METHODS) - {"causal"}


def test_a_target_is_reached_only_with_its_share_of_the_peak():
    target = asdict(cases.TARGETS[0])
    row = {**target, "figure": 9.0, "peak_share": 0.5}
    assert targets.reached(row) is False
    assert targets.reached({**row, "peak_share": 0.99}) is True
    assert targets.reached({**row, "peak_share": 0.99, "figure": 1.0}) is False


def test_the_summary_counts_targets_and_names_what_was_missed():
    def row(target, figure, **more):
        metrics = {"ms": 1.0, "spread": 0.1, "peer_ms": 1.0, "peer_spread": 0.1, "peer_plan_ms": None, "peak_bytes": 0}
        return {
            "type": "cell",
            "suite": "targets",
            "status": "ok",
            "config": {**asdict(target), "threads": 2},
            "figure": figure,
        } | {
            **metrics,
            **more,
        }

    peaks = {"peak_gflops": 100.0, "peak_of": "fma"}
    flex = next(target for target in cases.TARGETS if target.peer == "flex")
    noted = next(target for target in cases.TARGETS if target.note)
    text = printed(
        [
            row(cases.TARGETS[0], 9.0, peak_share=0.5, **peaks),
            row(cases.TARGETS[1], 9.0, peak_share=0.5, **peaks),
            row(flex, 2.5, peer_plan_ms=18000.0, peak_share=0.5, **peaks),
            row(noted, 1.5),
            {**row(cases.TARGETS[3], 0.0), "status": "oom", "message": "none left"},
        ]
    )
    assert "2 of 4 targets that were measured are met" in text
    assert "Missed: attention float32 fwd full B1 H8 N4096 D64 against sdpa: 9.00 (>= 1.3) 50% (>= 85%)" in text
    assert "oom: targets attention float32 fwd_bwd causal B1 H8 N4096 D64 sdpa: none left" in text
    assert "peak (fma): 100 GFLOP/s" in text
    assert "flex compiled in 18000 ms" in text and noted.note in text


def test_the_plot_is_drawn_from_an_incomplete_run(tmp_path):
    cells = [
        a_cell(),
        a_cell(config={"method": "linear"}),
        a_cell(status="timeout", message="", config={"seqlen": 512}),
    ]
    assert figures.overview(view.rows(cells), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not figures.overview([], tmp_path / "b.png") and not (tmp_path / "b.png").exists()


# --- memory ---


@pytest.mark.slow
@pytest.mark.parametrize("method", cases.MEMORY_METHODS)
def test_memory_of_a_sparse_call_is_linear_in_the_length(tmp_path, method):
    """Contract rule 9: forward and backward at 16k, 32k and 64k tokens."""
    configs = suites.get("memory").configs(suites.Options(methods=(method,), threads=2))
    peaks = [run_one(tmp_path, "memory", config)["peak_bytes"] for config in configs]
    assert fit(cases.MEMORY_LENGTHS, peaks).exponent < 1.15
    assert peaks[-1] < 64 * 2**20 + 40 * 65536 * 2 * 16 * 4  # far from the 8 GiB of one n x n byte mask


@pytest.mark.parametrize("spec", ["neighborhood:kernel=7", "axial"])
def test_an_image_that_is_no_square_warms_up_on_a_shorter_one(spec):
    """2048 tokens are 32 x 64; the short piece before the measurement has a shape of its own."""
    layer = calls.Layer(*(torch.randn(1, 1, 512, 8) for _ in range(3)))
    bound = calls.Bound(spec, layer, "fwd")
    bound.warm_up()
    assert bound()[0].shape == layer.query.shape[1:]
