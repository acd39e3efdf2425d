"""Applies the faults of faults.py, one by one, in a copy of the code, runs the tests that should find each, and prints
a table: `make mutants`, or `make mutants ARGS="--only masks --first 3"`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from kernels.cuda.emulator.faults import FAULTS as CUDA_FAULTS  # noqa: E402
from mutants.faults import FAULTS, Fault  # noqa: E402

LIMIT_S = 900.0  # a fault may make a loop endless


def copied(folder: Path) -> Path:
    """A copy of the code and its tests, which a process with it on its path imports instead of the installed one."""
    copy = folder / "copy"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    kept = ("efficient_attn/", "kernels/", "benchmarks/", "tests/", "csrc/", "docs/", "examples/", "pyproject.toml",
            "setup.py", "README.md", "CHANGELOG.md", "constraints.txt", "LICENSE")  # fmt: skip
    for name in files:
        if name.startswith(kept) and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    for module in (ROOT / "efficient_attn").glob("_c*.so"):
        shutil.copy2(module, copy / "efficient_attn" / module.name)
    for name in ("kernels", "benchmarks"):  # as installed: below the package
        (copy / "efficient_attn" / name).symlink_to(copy / name)
    return copy


def run_tests(copy: Path, tests: str, log: Path) -> str:
    """What became of the tests in the copy: "passed", "failed", or "endless"."""
    child = os.fork()
    if child == 0:
        os.setpgrp()
        os.chdir(copy)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(PYTHONPATH=str(copy), OMP_NUM_THREADS="1")
        sys.path[:0] = [str(copy)]
        sys.path = [place for place in sys.path if not place.startswith(str(ROOT / "tests"))]
        for name in [name for name in sys.modules if name.split(".")[0] in ("kernels", "mutants", "support")]:
            del sys.modules[name]
        import pytest

        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow and not gpu"]
        before_k, k, selection = tests.partition(" -k ")
        os._exit(int(pytest.main([*options, *before_k.split(), *(["-k", selection] if k else [])])))
    started = time.monotonic()
    while time.monotonic() - started < LIMIT_S:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return "passed" if os.waitstatus_to_exitcode(status) == 0 else "failed"
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "endless"


def write(file: Path, text: str) -> None:
    """Write a source, of which no compiled form may be left: two changes in one second look alike."""
    for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*"):
        compiled.unlink()
    file.write_text(text)


def find(fault: Fault, copy: Path, logs: Path, number: int) -> str:
    """Whether the tests find a fault: "killed", "SURVIVED", or what is wrong with it."""
    file = copy / fault.file
    text = file.read_text()
    if text.count(fault.right) != 1:
        return f"occurs {text.count(fault.right)} times"
    try:
        write(file, text.replace(fault.right, fault.wrong))
        for command in [fault.build] if fault.build else []:
            subprocess.run(command, shell=True, cwd=copy, check=True, capture_output=True)
        return "SURVIVED" if run_tests(copy, fault.tests, logs / f"{number}.txt") == "passed" else "killed"
    finally:
        write(file, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose name, file or tests contain this")
    parser.add_argument("--first", type=int, default=0, help="go on from this number")
    parser.add_argument("--sound", action="store_true", help="first see that the tests pass without any fault")
    parser.add_argument("--keep", type=Path, help="where to leave the output of pytest, a file a fault")
    options = parser.parse_args()
    import pytest  # noqa: F401  (loaded once, for all that are forked)
    import torch._dynamo
    import torch.utils.checkpoint  # noqa: F401

    survived = 0
    about = [f"{fault.name} {fault.file} {fault.tests}" for fault in FAULTS]
    chosen = [(n, fault) for n, fault in enumerate(FAULTS) if options.only in about[n] and n >= options.first]
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(Path(folder))
        logs = options.keep or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        for tests in sorted({fault.tests for _, fault in chosen}) if options.sound else ():
            verdict = run_tests(copy, tests, logs / "sound.txt")
            print(f"without a fault: {verdict} {tests}", flush=True)
            if verdict != "passed":
                return 2
        for n, fault in chosen:
            started = time.monotonic()
            try:
                verdict = find(fault, copy, logs, n)
            except KeyboardInterrupt:
                again = f'make mutants ARGS="--first {n}{f" --only {options.only}" if options.only else ""}"'
                print(f"interrupted by Ctrl-C, {survived} not found so far; to go on:\n  {again}", flush=True)
                return 130
            survived += verdict != "killed"
            file = fault.file.removeprefix("efficient_attn/")
            print(f"{n:3} {verdict:9} {time.monotonic() - started:5.0f} s  {file:32} {fault.name}", flush=True)
    print(f"{len(chosen)} faults, {survived} not found; CUDA's {len(CUDA_FAULTS)} are test_cuda_emulator.py's")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
