"""The result file: append-only JSON lines, one environment line a run and one line a finished cell.

A line is written whole, flushed and fsynced, so that a power cut or `kill -9` loses at most the cell in progress. A
last line that was torn is dropped when the file is opened again; all lines before it stay.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError

SCHEMA = 1
# What a figure depends on; changes elsewhere in a checkout do not make its code version dirty.
SOURCES = ("efficient_attn", "benchmarks", "kernels", "csrc", "setup.py", "pyproject.toml")
STATUSES = ("ok", "oom", "timeout", "unsupported", "crash", "error")

Record = dict[str, Any]


def code_version() -> str:
    """The git commit of this checkout (`-dirty` when it has changes), or the installed version outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "--", *SOURCES], capture_output=True, text=True
        )
        if commit.returncode == 0:
            return commit.stdout.strip() + ("-dirty" if changes.stdout.strip() else "")
    return version("efficient-attn") or "unknown"


def cell_id(suite: str, config: Mapping[str, Any], code: str) -> str:
    """Names a cell by all that decides its result: suite, configuration and code version."""
    text = json.dumps([suite, config, code], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def environment(**extra: Any) -> Record:
    """The environment line: machine, versions, clocks and whatever else decides a figure."""
    versions = {name: version(name) for name in ("efficient-attn", "torch", "numpy", "triton", "scikit-learn")}
    versions["torch"] = torch.__version__  # with the build, +cpu or +cu130, that a wheel's metadata may leave out
    return {
        "type": "environment",
        "schema": SCHEMA,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "code": code_version(),
        "machine": machine(),
        "versions": versions,
        "python": platform.python_version(),
        "argv": sys.argv[1:],
        "load": round(os.getloadavg()[0], 2),
        **extra,
    }


def describe(environment: Mapping[str, Any]) -> str:
    """An environment line in a few words; of one that lacks something, what it has."""
    machine, versions = environment.get("machine") or {}, environment.get("versions") or {}
    parts = [
        str(machine.get("cpu", "unknown machine")),
        f"{machine['cores']} cores" if "cores" in machine else "",
        f"torch {versions['torch']}" if "torch" in versions else "",
        f"efficient-attn {versions.get('efficient-attn')} ({environment.get('code', 'unknown code')})",
        str(environment.get("started", "")),
    ]
    return ", ".join(part for part in parts if part)


def described(found: Sequence[Record]) -> str:
    """The last environment line of a file in a few words."""
    return describe(next((record for record in reversed(found) if record["type"] == "environment"), {}))


def machine() -> dict[str, Any]:
    """CPU model, cores this process may use, memory in bytes and current clocks, as far as the system tells."""
    values = _cpuinfo()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = next((line.split()[1] for line in _read("/proc/meminfo").splitlines() if line.startswith("MemTotal")), "0")
    return {
        "cpu": next(
            (value for key, value in values if key == "model name"), platform.processor() or platform.machine()
        ),
        "cores": cores,
        "clock_mhz": clock_mhz(),
        "memory_bytes": int(memory) * 1024,
        "system": platform.platform(),
    }


def clock_mhz() -> list[int]:
    """The clock of each core now; empty where the system does not tell."""
    return [round(float(value)) for key, value in _cpuinfo() if key == "cpu MHz"]


def _cpuinfo() -> list[tuple[str, str]]:
    fields = [line.partition(":") for line in _read("/proc/cpuinfo").splitlines()]
    return [(key.strip(), value.strip()) for key, _, value in fields]


def available_memory() -> int | None:
    """Bytes that new allocations can use now, or None where the system does not tell."""
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return None


class ResultFile:
    """An append-only JSONL file. Opening it drops a torn last line; `append` returns once the line is on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _drop_torn_line(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (closed by __exit__)

    def append(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def results_file(path: Path) -> Path:
    """The results of a run that is named by its file or its folder.

    Raises:
        InputError: a folder without results.
    """
    file = path / "results.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{path} has no results.jsonl; run efficient-attn bench --out {path} first")
    return file


def read(path: Path) -> Iterator[Record]:
    """The records of a file, oldest first, without a torn last line.

    Raises:
        InputError: a damaged line elsewhere, or one that is JSON but no record.
    """
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return
            raise InputError(
                f"{path}, line {number} is not JSON: {line[:60]!r}; remove the line and try again"
            ) from error
        if not _is_record(record):
            raise InputError(f"{path}, line {number} is no record of a run: {line[:60]!r}; is this a results.jsonl?")
        yield record


def _is_record(found: Any) -> bool:
    """Whether a line says what it is, and a cell which one."""
    if not isinstance(found, dict) or not isinstance(found.get("type"), str):
        return False
    if found["type"] != "cell":
        return True
    named = all(isinstance(found.get(key), str) for key in ("suite", "status"))
    return named and isinstance(found.get("config"), dict)


def _drop_torn_line(path: Path) -> None:
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with open(path, "r+b") as file:
            file.truncate(whole)
            os.fsync(file.fileno())


def version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
