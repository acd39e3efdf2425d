"""`make gpu-sanitize`: the CUDA kernels under compute-sanitizer, all four tools side by side. Installs nothing.

Run like gpu_check.py, whose second call runs the tools over what failed in the first; this runs them over everything:
every conformance case in both half dtypes, forward and backward (tests/kernels/cuda/gpu_probe.py). The module is the
carried one or built here. Memory comes from the driver for each tensor, so that memcheck sees where one ends. Only
kernels of this package are instrumented.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_check  # a script's neighbour: the package is not linked yet

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SECONDS = 540  # one command on a lent machine may take ten minutes
PROBE = str(gpu_check.ROOT / "tests" / "kernels" / "cuda" / "gpu_probe.py")
FOUND = 9  # exit status of compute-sanitizer where it found something


def find_sanitizer() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = ["compute-sanitizer", *(str(Path(home) / "bin" / "compute-sanitizer") for home in homes)]
    return next(filter(None, map(shutil.which, [*places, "/usr/local/cuda/bin/compute-sanitizer"])), None)


def command(sanitizer: str, tool: str, program: Sequence[str] = (PROBE,)) -> list[str]:
    """One tool's whole command line over a Python program."""
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--kernel-name", "kernel_substring=efficient_attn"]
    return [sanitizer, *options, sys.executable, *program]


def verdict(tool: str, code: int | None, log: str, seconds: float = SECONDS) -> str:
    """A line about one tool from its exit status (None: out of time) and what it printed."""
    lines = [line for line in log.splitlines() if "SUMMARY" in line or "configurations" in line]
    said = "; ".join(line.removeprefix("========= ") for line in lines) or "\n".join(log.strip().splitlines()[-3:])
    outcome = {0: "passed", FOUND: "FAILED", None: f"FAILED, not done in {seconds:.0f} s"}
    return f"{tool}: {outcome.get(code, f'FAILED with exit status {code}')}: {said}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=gpu_check.ROOT / "bench-results" / "gpu-check")
    parser.add_argument("--carried", type=Path, default=gpu_check.ROOT / "build" / "carry", help="of make cuda-carry")
    parser.add_argument("--dry-run", action="store_true", help="show the commands")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="default: all")
    options = parser.parse_args(arguments)
    out, tools, sanitizer = options.out.resolve(), options.tool or TOOLS, find_sanitizer()
    reason = gpu_check.without_gpu()
    if options.dry_run or reason:
        print(f"gpu-sanitize: {f'skipped: {reason}' if reason else 'dry run'}. A run would build _cuda and start:")
        for tool in tools:
            print(f"  {' '.join(command(sanitizer or 'compute-sanitizer', tool))}")
        return 0
    if sanitizer is None:
        print("gpu-sanitize: NOT RUN: no compute-sanitizer on PATH, in CUDA_HOME or in /usr/local/cuda/bin")
        return 1
    check = gpu_check.Check(out, Path(tempfile.mkdtemp(prefix="gpu-sanitize-")), SECONDS)
    found = gpu_check.imports(check)
    if found is None or not gpu_check.module(check, options.carried.resolve(), found["capability"]):
        return 1
    check.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

    def run(tool: str) -> bool:
        log, seconds = check.logs / f"sanitize-{tool}.log", check.left(SECONDS)
        ended = gpu_check.run_limited(command(sanitizer, tool), log, check.environment, seconds, cwd=check.work)
        code = None if ended.status == "hang" else ended.code
        shutil.copy(log, out)
        print(f"gpu-sanitize: {verdict(tool, code, ended.output)}", flush=True)
        return code == 0

    with ThreadPoolExecutor(len(tools)) as pool:
        return 0 if all(list(pool.map(run, tools))) else 1


if __name__ == "__main__":
    sys.exit(main())
