"""`make gpu-check` on a GPU that is not there: what it says and keeps when processes hang, die, lie or say nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks" / "tools"))
import gpu_check  # noqa: E402
import gpu_smoke  # noqa: E402
import gpu_stages as stages  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks" / "tools"))

# Stands for gpu_smoke.py: what a family does is its name.
FAKE = """
import os, sys, time
name, out = sys.argv[1], open(sys.argv[3], "a", buffering=1)
good = '{"call": "bfloat16 dense", "result": "out", "error": 0.01, "budget": 0.02, "bad": 0}'
bad = '{"call": "float16 list", "result": "dk", "error": 0.5, "budget": 0.02, "bad": 7, "of": 9, "first": [0, 2], '
bad += '"is": "nan", "not": "1.0"}'
if name == "import": raise ImportError("no module named triton_core")
if name == "unbuilt": print('{"error": "efficient_attn._cuda is not built"}', file=out); sys.exit(4)
print('{"ready": {}}', file=out)
print('{"at": "bfloat16 causal"}', file=out)
if name == "hang": time.sleep(60)
if name == "crash": os.abort()
print(bad if name == "bad" else good, file=out)
if name == "half": out.write('{"call": "bflo'); out.flush(); os._exit(0)
if name != "silent": print('{"done": true}', file=out)
"""
VERDICTS = {
    "good": "",
    "hang": "stopped at its limit, in bfloat16 causal",
    "crash": "ended by SIGABRT after",
    "bad": "1 results, first float16 list dk; worst float16 list dk: 7 of 9 elements, error 0.5 over 0.02, at [0, 2]",
    "import": "no module named triton_core",
    "unbuilt": "efficient_attn._cuda is not built",
    "half": "ok after",
    "silent": "ok after",
}


@pytest.fixture
def check(tmp_path: Path) -> gpu_check.Check:
    return gpu_check.Check(tmp_path / "out", tmp_path / "work", 60.0)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    monkeypatch.setattr(gpu_check, "SMOKE", script)
    monkeypatch.setattr(gpu_check, "FAMILY_S", 1.5)


def kept(check: gpu_check.Check) -> list[dict]:
    return stages.json_lines(check.out / "results.jsonl")


def test_a_family_that_fails_is_named_and_nothing_else_is(check: gpu_check.Check, fake: None) -> None:
    wrong = gpu_check.smoke(check, list(VERDICTS))
    check.publish()
    assert wrong == [name for name, why in VERDICTS.items() if why]
    said = {row["family"]: row["verdict"] for row in kept(check) if "verdict" in row}
    for name, why in VERDICTS.items():
        assert said[name] == "passed" if not why else why in said[name], said[name]
    assert stages.failed_before(check.out / "results.jsonl") == wrong
    assert (check.out / "summary.txt").read_text().startswith("FAILED: smoke hang, smoke crash")
    with tarfile.open(check.out / "logs.tgz") as archive:
        assert {f"smoke-{name}.log" for name in VERDICTS} <= set(archive.getnames())
    files = list(check.out.iterdir())
    assert len(files) <= 8 and all(path.stat().st_size < 16 * 2**20 for path in files)


def test_a_process_that_never_begins_is_stopped(check: gpu_check.Check, tmp_path: Path) -> None:
    command, rows = [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "rows"
    ended = stages.run_limited(command, tmp_path / "log", os.environ, 0.2, cwd=tmp_path, ready=rows, start=0.5)
    assert ended.status == "hang" and ended.seconds < 5
    assert stages.smoke_verdict(ended, []) == "FAILED: it did not begin in time"
    assert stages.run_limited(["/no/such"], tmp_path / "log", {}, 1.0, cwd=tmp_path).status == "missing"


def test_what_it_started_ends_with_it(tmp_path: Path) -> None:
    child = "import time; time.sleep(60)"
    program = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid); p.wait()"
    ended = stages.run_limited([sys.executable, "-u", "-c", program], tmp_path / "log", os.environ, 1.5, cwd=tmp_path)
    assert ended.status == "hang"
    state, until = Path(f"/proc/{ended.output.strip()}/stat"), time.monotonic() + 20
    while state.exists() and state.read_text().rsplit(")")[-1].split()[0] != "Z":
        assert time.monotonic() < until
        time.sleep(0.05)


def test_speed_leaves_out_what_failed(check: gpu_check.Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell without a time of the kernels under test is a failure, whatever its status."""
    cells = [
        {"case": "dense", "mode": mode, "head_dim": d, "visible": "full", "q_len": None}
        for mode in ("fwd", "bwd") for d in (64, 128)
    ]  # fmt: skip
    ran: list[list[str]] = []

    def python(*arguments: str, log: str, **more: object) -> stages.Ended:
        if log == "cells":
            return stages.Ended("ok", 0, 0.0, json.dumps([{**c, "case": f"D{c['head_dim']}"} for c in cells]))
        ran.append(list(arguments))
        (check.work / "speed").mkdir()
        rows = [
            {"type": "cell", "status": "ok", "config": {"case": "D128", "mode": "fwd"}, "times_ms": {"cuda": 1.0}},
            {"type": "cell", "status": "ok", "config": {"case": "D64", "mode": "fwd"}, "times_ms": {"cudnn": 1.0}},
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows) + '{"type": "cell", "sta'
        (check.work / "speed" / "results.jsonl").write_text(text)
        return stages.Ended("hang", None, 9.0, "")

    monkeypatch.setattr(check, "python", python)
    gpu_check.speed(check, ["cuda", "cuda any order", "cudnn"], ["backward-64", "one-pass-128"])
    (command,) = ran
    assert [command[k + 1] for k, word in enumerate(command) if word == "--cell"] == ["D64/fwd", "D128/fwd", "D128/bwd"]
    assert "cuda any order" not in command
    assert check.failed == ["speed"] and "D64 bwd is left out" in "\n".join(check.summary)
    check.publish()
    assert sum(row["type"] == "cell" for row in kept(check)) == 2


def test_two_passes_take_the_place_of_one(check: gpu_check.Check) -> None:
    wrong = ["backward-128", "backward-64", "two-passes-128"]
    gpu_check.take_two_passes(check, wrong)
    assert len(wrong) == 3 and "EFFICIENT_ATTN_CUDA_TWO_PASSES" not in check.environment
    wrong.remove("two-passes-128")
    gpu_check.take_two_passes(check, wrong)
    assert wrong == ["backward-64"] and check.environment["EFFICIENT_ATTN_CUDA_TWO_PASSES"] == "1"


TESTS = """
import os, time, pytest
pytestmark = pytest.mark.gpu
@pytest.mark.parametrize("k", range(8))
def test_cuda_good(k): pass
def test_cuda_bad(): assert 1 == 2
def test_cuda_hangs(): time.sleep(60)
def test_cuda_dies(): os.abort()
def test_cuda_sticky(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_cuda_skips(): pytest.skip("needs a GPU")
@pytest.mark.parametrize("k", range(4))
def test_cuda_later(k): pass
"""
SHARE = """
import os
def pytest_configure(config): config.addinivalue_line("markers", "gpu: needs a GPU")
def pytest_collection_modifyitems(items):
    first, step = map(int, os.environ["EFFICIENT_ATTN_SHARD"].split("/"))
    items[:] = items[first::step]
"""


def test_conformance_goes_on_behind_what_hangs_or_dies(
    check: gpu_check.Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "checkout"
    for name in stages.TESTS:
        (root / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
    (root / "tests" / "conftest.py").write_text(SHARE)
    (root / "tests" / stages.TESTS[0]).write_text(TESTS)
    (root / "tests" / stages.TESTS[1]).write_text("import no_such_module\n")
    (root / "tests" / stages.TESTS[2]).write_text("")
    monkeypatch.setattr(gpu_check, "ROOT", root)
    monkeypatch.setattr(gpu_check, "TEST_S", 2)
    monkeypatch.setattr(gpu_check, "SHARDS", 2)
    gpu_check.conformance(check, "cuda", "cuda")
    check.publish()
    bad = {row["test"].rpartition("::")[2]: row["outcome"] for row in kept(check) if "test" in row}
    assert {name: outcome.split(":")[0] for name, outcome in bad.items()} == {
        "test_cuda_bad": "failed", "test_cuda_hangs": "lost", "test_cuda_dies": "lost", "test_cuda_sticky": "failed",
        "test_cuda_skips": "skipped", "tests/" + stages.TESTS[1]: "not collected",
    }  # fmt: skip
    (total,) = (row for row in kept(check) if "complete" in row)
    assert total["passed"] == 12 and total["complete"] is True
    assert check.failed == ["tests cuda"]


def test_no_test_is_a_failure(check: gpu_check.Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)  # without any
    monkeypatch.setattr(gpu_check, "SHARDS", 1)
    gpu_check.conformance(check, "cuda", "cuda")
    assert check.failed == ["tests cuda"] and "no test ran" in check.summary[-1]


# --- imports and the module ---


def test_imports_that_fail_end_the_call(check: gpu_check.Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "IMPORTS", "import no_such_module")
    gpu_check.run_call(check, 1, check.work, [])
    assert check.failed == ["imports"] and "No module named 'no_such_module'" in check.summary[0]
    assert (check.out / "summary.txt").read_text().startswith("FAILED: imports")
    monkeypatch.setattr(gpu_check, "IMPORTS", 'import json; print(json.dumps({"gpu": "", "pytest": True}))')
    assert gpu_check.imports(check) is None and "sees no CUDA GPU" in check.summary[-1]


@pytest.fixture
def carried(tmp_path: Path) -> Path:
    folder = tmp_path / "carry"
    folder.mkdir()
    (folder / "_cuda.abi3.so").write_bytes(b"not a module")
    (folder / "sources.txt").write_text(gpu_check.sources_digest() + "\n")
    return folder


@pytest.mark.parametrize("why", ["loads", "does not load", "other sources", "none"])
def test_a_carried_module_is_taken_only_if_it_loads(
    why: str, check: gpu_check.Check, carried: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a compiler there is no other, which is a failure."""
    check.environment |= {"CUDA_HOME": str(tmp_path / "none"), "EFFICIENT_ATTN_CUDA_EMULATOR": ""}
    if why == "loads":
        monkeypatch.setattr(gpu_check, "LOADED", "print('a module')")
    elif why == "other sources":
        (carried / "sources.txt").write_text("1234\n")
    elif why == "none":
        (carried / "_cuda.abi3.so").unlink()
    assert gpu_check.module(check, carried, (9, 0)) == (why == "loads")
    check.publish()
    (row,) = (row for row in kept(check) if row["stage"] == "module")
    if why == "loads":
        assert row["ok"] and not check.failed
        return
    assert check.failed == ["module"] and "no nvcc in CUDA_HOME" in row["why"]
    reason = {"does not load": "file too short", "other sources": "from other sources", "none": "is not there"}[why]
    assert reason in check.summary[0]


# --- the smoke test itself ---


def test_every_family_is_of_a_cell_or_a_kernel_of_its_own() -> None:
    from efficient_attn.benchmarks import suites
    from efficient_attn.benchmarks.suites import gpu

    used = {name for config in gpu.configs(suites.Options()) for name in stages.families_of(config)}
    assert used <= set(stages.FAMILIES)
    assert {"forward-64", "backward-256", "one-pass-128", "decode-128", "linear-256", "sm80-64", "extras-64"} <= set(
        stages.FAMILIES
    )


def test_its_verdict_on_a_result() -> None:
    gold = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    plain = gold.bfloat16()
    assert gpu_smoke.judge(plain, gold, plain)["bad"] == 0
    for wrong in (0.5, float("nan"), float("inf")):
        found = plain.clone()
        found[1, 2] = wrong
        row = gpu_smoke.judge(found, gold, plain)
        assert row["bad"] == 1 and row["first"] == [1, 2] and row["of"] == 12 and row["not"].startswith("0.09")
    infinite = gold.clone()
    infinite[0, 0] = -torch.inf
    assert gpu_smoke.judge(infinite.bfloat16(), infinite, infinite.bfloat16())["bad"] == 0
    assert gpu_smoke.judge(plain, infinite, plain)["first"] == [0, 0]


def test_it_finds_a_wrong_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reference in the place of the kernels, and one element of its dk changed."""
    rows: list[dict] = []

    def family(spoiled: bool) -> int:
        rows.clear()
        calls = [
            (name, lambda backend, exact, call=call: spoil(call("reference", exact), spoiled and backend == "cuda"))
            for name, call in gpu_smoke.calls(gpu_smoke.Family("backward", 16, ("causal", "list")), "cpu", 70, 2)
        ]
        monkeypatch.setattr(gpu_smoke, "calls", lambda *arguments: calls)
        try:
            return gpu_smoke.check(gpu_smoke.families()["backward-64"], lambda **row: rows.append(row), "cpu", 70, 2)
        finally:
            torch.use_deterministic_algorithms(False)
            monkeypatch.undo()

    def spoil(found: dict, wanted: bool) -> dict:
        if wanted:
            found["dk"] = found["dk"].clone()
            found["dk"][0, 1, 69, 3] += 0.5
        return found

    assert family(False) == 0
    assert sum("result" in row for row in rows) == 4 * 5  # two dtypes and masks; lse, out and three gradients
    assert family(True) == 4
    assert {row["result"] for row in rows if row.get("bad")} == {"dk"}
    assert next(row["first"] for row in rows if row.get("bad")) == [0, 1, 69, 3]


# --- calls, on the command line ---


def test_the_plan_of_both_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for call, texts in ((1, ("smoke: ", "cuDNN and flash", "shards")), (2, ("sanitizer", "FlexAttention", "Triton"))):
        assert gpu_check.main(["--dry-run", "--call", str(call), "--out", str(tmp_path)]) == 0
        said = capsys.readouterr().out
        assert "dry run; it would" in said and all(text in said for text in texts), said


def test_a_call_ends_with_a_verdict(
    check: gpu_check.Check, fake: None, carried: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole first call on the fake GPU: what passes is measured and tested, what fails is said."""
    facts = {"gpu": "Fake", "capability": [9, 0], "pytest": True}
    monkeypatch.setattr(gpu_check, "IMPORTS", f"print({json.dumps(json.dumps(facts))})")
    monkeypatch.setattr(gpu_check, "LOADED", "print('a module')")
    monkeypatch.setattr(stages, "FAMILIES", ["good", "crash"])
    monkeypatch.setattr(gpu_check, "without_gpu", lambda: "")
    ran: list[object] = []
    monkeypatch.setattr(gpu_check, "speed", lambda check, kernels, wrong: ran.append((kernels[0], list(wrong))))
    monkeypatch.setattr(gpu_check, "conformance", lambda check, choice, name: ran.append(name))
    arguments = ["--out", str(tmp_path / "out"), "--carried", str(carried), "--seconds", "40"]
    assert gpu_check.main(arguments) == 1
    assert ran == [("cuda", ["crash"]), "cuda"]
    previous = str(tmp_path / "out" / "results.jsonl")
    looked_at: list[object] = []
    monkeypatch.setattr(gpu_check, "sanitize", lambda check, names: looked_at.append(names))
    assert gpu_check.main([*arguments, "--call", "2", "--previous", previous]) == 0
    assert ran[2:] == [("ours", []), "triton"] and looked_at == [["crash"]]


def test_the_sanitizer_looks_at_what_failed(
    check: gpu_check.Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "tools"))
    sanitize = importlib.import_module("gpu_sanitize")
    fake = tmp_path / "compute-sanitizer"
    fake.write_text('#!/bin/sh\necho "========= ERROR SUMMARY: 3 errors"\nexit 9\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: str(fake))
    gpu_check.sanitize(check, ["forward-128"])
    assert check.summary[0] == "sanitizer forward-128: memcheck: FAILED: ERROR SUMMARY: 3 errors"
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    gpu_check.sanitize(check, [])
    assert not check.failed
    gpu_check.sanitize(check, ["forward-128"])
    assert check.failed == ["sanitizer"]


# --- what would waste its time ---


def test_a_family_has_the_start_and_no_more_to_begin(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    ended = stages.run_limited(
        command, tmp_path / "log", os.environ, 30.0, cwd=tmp_path, ready=tmp_path / "rows", start=0.3
    )
    assert ended.status == "hang" and ended.seconds < 5


def test_a_gpu_that_answers_nobody_is_asked_no_further(
    check: gpu_check.Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "stuck.py"
    script.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(gpu_check, "SMOKE", script)
    monkeypatch.setattr(gpu_check, "START_S", 0.4)
    monkeypatch.setattr(gpu_check, "SIDE_BY_SIDE", 2)
    names = [f"family-{k}" for k in range(12)]
    assert gpu_check.smoke(check, names) == names
    assert sum("not run: none of 2" in line for line in check.summary) >= 9
    assert len(list(check.logs.iterdir())) <= 3


@pytest.mark.parametrize("place", ["results", "logs"])
def test_a_full_disk_is_said_once_and_ends_nothing(
    place: str, check: gpu_check.Check, fake: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """/dev/full takes no byte."""
    if place == "results":
        write_text = Path.write_text
        monkeypatch.setattr(Path, "write_bytes", lambda path, data: write_text(Path("/dev/full"), "no room for this"))
    else:
        (check.logs / "smoke-good.log").symlink_to("/no/such/folder/log")
    wrong = gpu_check.smoke(check, ["good", "bad"])
    check.publish()
    check.publish()
    said = capsys.readouterr().out
    assert "smoke bad: FAILED: 1 results" in said
    if place == "results":
        assert wrong == ["bad"] and said.count("NOT WRITTEN") == 1 and "No space left on device" in said
        assert check.failed[0] == "results" and list(check.out.iterdir()) == []
    else:
        assert (
            wrong == ["good", "bad"]
            and "smoke good: FAILED: not started" in said
            and check.out.joinpath("results.jsonl").exists()
        )


def test_a_stage_that_raises_does_not_keep_the_next_from_its_turn(
    check: gpu_check.Check, fake: None, carried: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"gpu": "Fake", "capability": [9, 0], "pytest": True}
    monkeypatch.setattr(
        gpu_check, "IMPORTS", f"print({json.dumps(json.dumps(facts))}); print('[W612] a warning at the end')"
    )
    monkeypatch.setattr(gpu_check, "LOADED", "print('a module')")
    monkeypatch.setattr(gpu_check, "CELLS", "print('no list')")
    ran: list[object] = []
    monkeypatch.setattr(gpu_check, "smoke", lambda check, names: names[100])
    monkeypatch.setattr(gpu_check, "conformance", lambda check, choice, name: ran.append(name))
    gpu_check.run_call(check, 1, carried, [])
    assert check.failed == ["smoke", "speed"] and ran == ["cuda"]
    assert "IndexError" in (check.out / "summary.txt").read_text()


def test_a_call_that_is_stopped_keeps_what_it_found(tmp_path: Path) -> None:
    """SIGTERM while families of kernels run: their processes end, and the results are there."""
    program = f"""
import sys, time
sys.path.insert(0, {str(ROOT / "benchmarks" / "tools")!r})
import gpu_check
gpu_check.without_gpu = lambda: ""
gpu_check.imports = lambda check: {{"gpu": "Fake", "capability": [9, 0], "pytest": True}}
gpu_check.module = lambda check, carried, capability: True
gpu_check.SMOKE = {str(tmp_path / "child.py")!r}
sys.exit(gpu_check.main(["--out", {str(tmp_path / "out")!r}]))
"""
    (tmp_path / "child.py").write_text(
        "import os, sys, time\n"
        'print(\'{"ready": {}}\\n{"at": "bfloat16 dense"}\', file=open(sys.argv[3], "a"), flush=True)\n'
        f"open({str(tmp_path)!r} + '/' + str(os.getpid()) + '.pid', 'w').close()\n"
        "time.sleep(60)\n"
    )
    with (tmp_path / "said").open("wb") as said:
        call = subprocess.Popen([sys.executable, "-c", program], stdout=said, stderr=said)
    try:
        until = time.monotonic() + 30
        while not (pids := list(tmp_path.glob("*.pid"))):
            assert time.monotonic() < until, (tmp_path / "said").read_text()
            time.sleep(0.05)
        call.terminate()
        assert call.wait(20) == 1
    finally:
        call.kill()
    assert "stopped by SIGTERM" in (tmp_path / "out" / "summary.txt").read_text()
    for path in pids:
        state = Path(f"/proc/{path.stem}/stat")
        assert not state.exists() or state.read_text().rsplit(")")[-1].split()[0] == "Z"


def test_results_of_a_call_that_are_not_there_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--call", "2", "--previous", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    assert "there is no" in capsys.readouterr().err and not (tmp_path / "out").exists()
