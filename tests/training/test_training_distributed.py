"""Two processes (gloo, CPU) train as one process with twice the batch: DDP and FSDP, and checkpoints go both ways."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")

from efficient_attn.training import checkpoint, metrics

pytestmark = pytest.mark.slow

# No dropout and no augmentation: their random numbers differ from process to process.
COMMON = [
    "digits",
    "--dim",
    "16",
    "--layers",
    "2",
    "--heads",
    "2",
    "--no-augment",
    "--no-tensorboard",
    "--threads",
    "1",
]
COMMON += ["--attention", "bigbird:block=16,window=1,global_blocks=0,random_blocks=0", "--lr", "1e-3"]


def start(processes, *arguments):
    """The command in as many processes."""
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    )
    command = [sys.executable, *launcher, "-m", "efficient_attn.cli", "train", *COMMON, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def finish(process, code=0):
    output, _ = process.communicate()
    assert process.returncode == code, output
    return output


def losses(folder):
    return [line["loss"] for line in metrics.read(folder)]


def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    finish(start(1, "--batch", "16", "--steps", "8", "--eval-every", "4", "--out", str(tmp_path / "one")))
    for parallel in ("ddp", "fsdp"):
        arguments = ["--batch", "4", "--accumulate", "2", "--eval-every", "4", "--parallel", parallel]
        out = tmp_path / parallel
        finish(start(2, *arguments, "--steps", "8", "--out", str(out)))
        assert losses(out) == pytest.approx(losses(tmp_path / "one"), rel=1e-4), parallel
        assert json.loads((out / "result.json").read_text())["processes"] == 2
        one, two = (checkpoint.read(folder / "last.pt") for folder in (tmp_path / "one", out))
        for name, value in one["model"].items():
            assert (two["model"][name] - value).abs().max() < 1e-4, f"{parallel}: {name}"
        assert two["optimizer"].keys() == one["optimizer"].keys()
        assert {len(state["random"]) for state in (one, two)} == {1, 2}
    # One process goes on from two, sharded, and the other way round.
    longer = finish(start(1, "--steps", "10", "--out", str(tmp_path / "fsdp"), "--resume"))
    assert "1 processes go on from 2" in longer and len(losses(tmp_path / "fsdp")) == 13
    back = finish(start(2, "--steps", "12", "--out", str(tmp_path / "fsdp"), "--resume"))
    assert "2 processes go on from 1" in back and "goes on after step 10 of 12" in back


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_share_each_sequence(tmp_path, parallel):
    common = ["--batch", "16", "--steps", "6", "--eval-every", "3"]
    finish(start(1, *common, "--out", str(tmp_path / "one")))
    shared = ["--context-parallel", "2", "--parallel", parallel]
    finish(start(2, *common, *shared, "--out", str(tmp_path / "two")))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    longer = finish(start(2, "--steps", "8", "--out", str(tmp_path / "two"), "--resume"))
    assert "goes on after step 6 of 8" in longer


def test_a_number_of_processes_that_cannot_share_is_refused(tmp_path):
    refused = finish(start(1, "--steps", "1", "--context-parallel", "2", "--out", str(tmp_path / "run")), code=2)
    assert "--context-parallel 2 needs a multiple of 2 processes" in refused


@pytest.mark.parametrize("shared", [[], ["--context-parallel", "2"]], ids=["data", "context"])
def test_all_processes_stop_after_the_same_step(tmp_path, shared):
    steps = ["--steps", "4000", "--save-every", "4000"]
    process = start(2, "--batch", "4", *steps, *shared, "--out", str(tmp_path / "a"))
    path = tmp_path / "a" / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") > 5):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)  # the launcher passes it on
    output, _ = process.communicate()
    assert "--resume" in output and process.returncode != 0, output
    state = checkpoint.read(tmp_path / "a" / "last.pt")
    assert 5 < state["step"] < 4000 and len(state["random"]) == 2
    assert metrics.read(tmp_path / "a")[-1]["step"] == state["step"]
    on = finish(start(2, "--steps", str(state["step"] + 2), "--out", str(tmp_path / "a"), "--resume"))
    assert f"goes on after step {state['step']}" in on


def test_torchrun_needs_a_folder(tmp_path):
    output = finish(start(2, "--steps", "1"), code=1)
    assert "under torchrun give --out" in output
