"""A rank that ends or hangs ends all: in every phase of a call, under torchrun, as they start, when asked here."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import rank_errors

from efficient_attn.errors import CommunicationError
from efficient_attn.measuring.ranks import started

TESTS = Path(__file__).resolve().parents[1]
TRAIN = shlex.split(
    "-m efficient_attn.cli train lm --length 512 --batch 1 --steps 100000 --dim 32 --layers 2 --heads 2 --threads 1 "
    "--attention dense --context-parallel 2"
)
# Two processes that start on a busy machine may come several seconds apart: that is no fault.
PATIENCE = 30


def test_a_rank_that_ends_or_hangs_ends_the_others_in_time():
    """By every transport, before the ranks agree, as keys travel and in a backward; the others can end too."""
    limit = 3.0
    made = subprocess.run(
        [sys.executable, "-m", "support.rank_faults", str(limit)],
        cwd=TESTS, stdout=subprocess.PIPE, text=True, check=True, timeout=1200,
    )  # fmt: skip
    rows = [json.loads(line) for line in made.stdout.splitlines()]
    assert len(rows) == 4 * 7
    for row in rows:
        place = f"{row['how']} before {row['when']} by {row['transport']}: {row}"
        assert row["error"] is None and "rank 0 of 2 could not finish the exchange of" in row["answer"], place
        assert f"within {limit:g} s" in row["answer"], place
        assert ("agreement" in row["answer"]) == (row["when"] == "agreement"), place
        assert row["code"] == 0, place
        assert row["seconds"] < limit + 10 and row["ended"] < 20, place  # with room for a busy machine


def test_a_question_to_ranks_ends_when_one_of_them_does():
    with started(2) as ranks, pytest.raises(CommunicationError, match=r"rank [01] of 2 was ended by SIGKILL"):
        ranks.run(rank_errors.fault, "is killed", "alone", "gather", 1.0)
    with started(1) as ranks, pytest.raises(CommunicationError, match="rank 0 of 1 gave no answer within 1 s"):
        ranks.run(rank_errors.hang, limit=1.0)


def test_a_process_that_never_comes_is_named(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    made = subprocess.run(
        [sys.executable, *TRAIN, "--timeout", "5", "--out", tmp_path / "run"],
        env=os.environ | place, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert made.returncode == 2 and "process 0 of 2 could not reach another one within 5 s" in made.stderr, made.stderr


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["is killed", "hangs", "Ctrl-C"])
def test_a_fault_under_torchrun_ends_all(tmp_path, fault):
    run = tmp_path / "run"
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
             *TRAIN, "--timeout", str(PATIENCE), "--out", run],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        ends = time.monotonic() + 200
        while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size):
            assert time.monotonic() < ends and launcher.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        children = [int(n) for n in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
        assert len(children) == 2
        if fault == "Ctrl-C":
            launcher.send_signal(signal.SIGINT)
        else:
            os.kill(children[1], {"is killed": signal.SIGKILL, "hangs": signal.SIGSTOP}[fault])
        assert launcher.wait(4 * PATIENCE + 60) != 0  # torchrun gives what it ends half a minute
        assert not any(Path(f"/proc/{child}").exists() for child in children)
        said = (tmp_path / "log").read_text()
        assert ("interrupted by Ctrl-C" if fault == "Ctrl-C" else "could not") in said
        assert (
            fault != "Ctrl-C"
            or f"torch.distributed.run --nproc-per-node 2 -m efficient_attn train lm --out {run}" in said
        )
        assert fault == "Ctrl-C" or f" within {PATIENCE} s" in said
    finally:
        launcher.kill()
