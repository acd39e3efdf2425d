"""What the stages of `make gpu-check` are made of: commands under a limit, files that may end in half a line, verdicts.

A process that waits for a GPU ignores signals, so a command gets its limit from here and is killed with all that it
started.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_smoke  # imports PyTorch only when it runs

FAMILIES = list(gpu_smoke.families())
POLL_S, KILLED_S = 0.1, 3.0
TESTS = ("contract/test_conformance.py", "methods/test_linear_attention.py", "kernels/test_gpu_kernels.py")


class Ended(NamedTuple):
    """How a command ended: "ok", "failed" (an exit status), "crash" (a signal), "hang" (its limit) or "missing"."""

    status: str
    code: int | None
    seconds: float
    output: str

    def said(self) -> str:
        """That in a few words, with the last thing that it printed where it did not end well."""
        last = (self.output.strip().splitlines() or ["no output"])[-1][:300]
        name = {"failed": f"exit status {self.code}", "hang": "stopped at its limit", "missing": "not started"}
        if self.status == "crash" and self.code is not None:
            name["crash"] = f"ended by {signal.Signals(-self.code).name}"
        said = f"{name.get(self.status, self.status)} after {self.seconds:.0f} s"
        return said if self.status == "ok" else f"{said}: {last}"


def run_limited(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    seconds: float,
    *,
    cwd: Path,
    cwd_of: Path | None = None,
    ready: Path | None = None,
    start: float = 0.0,
    tick: Callable[[], None] = lambda: None,
) -> Ended:
    """Run a command into a log. `ready`: a file whose first line starts the limit, which comes within `start` s."""
    began = time.monotonic()
    limit_from = None if ready else began
    try:
        with log.open("wb") as file:
            process = subprocess.Popen(
                list(command), cwd=cwd_of or cwd, env=dict(environment), stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
    except OSError as error:
        return Ended("missing", None, 0.0, f"{error.filename or command[0]}: {error.strerror}")
    code = None
    try:
        while (code := process.poll()) is None:
            now = time.monotonic()
            if limit_from is None and ready is not None and json_lines(ready):
                limit_from = now
            if now - began > start if limit_from is None else now - limit_from > seconds:
                break
            time.sleep(POLL_S)
            tick()
    finally:
        _end(process)
    spent = time.monotonic() - began
    output = log.read_text(errors="replace")
    if code is None:
        return Ended("hang", None, spent, output)
    return Ended("ok" if code == 0 else "crash" if code < 0 else "failed", code, spent, output)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill it and what it started; a process that the driver holds is left behind after a while."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILLED_S)


def whole_lines(path: Path) -> list[str]:
    """The lines that are whole JSON objects: a process may be killed while it writes one."""
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            if isinstance(json.loads(line), dict):
                found.append(line)
        except ValueError:
            continue
    return found


def told(output: str) -> Any:
    """What a program printed as JSON in the last line that is any: others print at their end, too. None: nothing."""
    for line in reversed(output.splitlines()):
        if line.startswith(("{", "[")):
            with contextlib.suppress(ValueError):
                return json.loads(line)
    return None


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in whole_lines(path)]


def smoke_verdict(ended: Ended, rows: Sequence[Mapping[str, Any]]) -> str:
    """Why a family fails, or an empty string: only a process that says that it is done, with no bad result, passes."""
    at = next((row["at"] for row in reversed(rows) if "at" in row), "the start")
    if ended.status == "hang":
        return f"FAILED: stopped at its limit, in {at}" if rows else "FAILED: it did not begin in time"
    if ended.status in ("crash", "missing"):
        return f"FAILED: {ended.said()}, in {at}"
    bad = [row for row in rows if row.get("bad")]
    if bad:
        worst = max(bad, key=lambda row: row["bad"])
        return (
            f"FAILED: {len(bad)} results, first {bad[0]['call']} {bad[0]['result']}; worst {worst['call']} "
            f"{worst['result']}: {worst['bad']} of {worst['of']} elements, error {worst['error']} over "
            f"{worst['budget']}, at {worst['first']} {worst['is']} in place of {worst['not']}"
        )
    if ended.status != "ok" or not any(row.get("done") for row in rows):
        why = next((row["error"] for row in rows if isinstance(row.get("error"), str)), ended.said())
        return f"FAILED: {why}, in {at}"
    return "" if any("result" in row for row in rows) else "FAILED: it compared nothing"


def families_of(cell: Mapping[str, Any]) -> list[str]:
    """The families whose kernels a cell of the suite `gpu` runs."""
    width = next(d for d in gpu_smoke.HEAD_DIMS if cell["head_dim"] <= d)
    if cell["visible"].startswith("linear"):
        return [f"linear-{width}"]
    if cell["q_len"] == 1:
        return [f"decode-{width}"]
    return [f"forward-{width}", *([f"backward-{width}"] if cell["mode"] == "bwd" else [])]


def failed_before(previous: Path | None) -> list[str]:
    """The families that failed by the results of the first call."""
    rows = json_lines(previous) if previous else []
    return [row["family"] for row in rows if str(row.get("verdict", "")).startswith("FAILED")]


# --- tests ---


def pytest_command(root: Path, choice: str) -> list[str]:
    """pytest on the files that need a GPU, `choice` of their tests; see gpu_outcomes.py for its limits."""
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "gpu_outcomes", "--continue-on-collection-errors"]
    # Returned weights are not theirs, and one test needs two GPUs: what would be skipped is not chosen.
    chosen = ["-m", "gpu", "-k", f"({choice}) and not the_device_of_the_tensors and not returned_weights"]
    return ["-m", "pytest", "-q", f"--rootdir={root}", *plugins, *chosen, *(str(root / "tests" / t) for t in TESTS)]


def finished(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every test of a share ran: pytest's exit status is 0, 1, or 5 where there was nothing left to run."""
    return bool(rows) and rows[-1].get("finished") in (0, 1, 5)


def outcomes(rows: Sequence[Mapping[str, Any]]) -> tuple[Counter[str], list[tuple[str, str]]]:
    """How many tests ended how, and those that did not pass. One that was started and never ended is lost."""
    last: dict[str, str] = {}
    for row in rows:
        if "test" in row:
            last[row["test"]] = row.get("outcome") or "lost: it ended its process, or ran over its limit"
    bad = [(test, outcome) for test, outcome in last.items() if outcome != "passed"]
    return Counter(outcome.partition(":")[0] for outcome in last.values()), bad
