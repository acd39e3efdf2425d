"""`make gpu-sanitize`: the CUDA kernels under compute-sanitizer, all four tools side by side. Installs nothing.

Run like gpu_check.py, after it or alone; the package and the module that it linked and built in `--out` are used again.
Every conformance case runs in both half dtypes, forward and backward (tests/kernels/cuda/gpu_probe.py). Memory comes
from the driver for each tensor, so that memcheck sees where one ends. Only kernels of this package are instrumented.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_check  # a script's neighbour: the package is not linked yet

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SECONDS = 540  # one command on a lent machine may take ten minutes
FOUND = 9  # exit status of compute-sanitizer where it found something


def find_sanitizer() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = ["compute-sanitizer", *(str(Path(home) / "bin" / "compute-sanitizer") for home in homes)]
    return next(filter(None, map(shutil.which, [*places, "/usr/local/cuda/bin/compute-sanitizer"])), None)


def command(sanitizer: str, tool: str) -> list[str]:
    """One tool's whole command line."""
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--kernel-name", "kernel_substring=efficient_attn"]
    return [sanitizer, *options, sys.executable, str(gpu_check.ROOT / "tests" / "kernels" / "cuda" / "gpu_probe.py")]


def verdict(tool: str, code: int | None, log: str) -> str:
    """A line about one tool from its exit status (None: out of time) and what it printed."""
    lines = [line for line in log.splitlines() if "SUMMARY" in line or "configurations" in line]
    said = "; ".join(line.removeprefix("========= ") for line in lines) or "\n".join(log.strip().splitlines()[-3:])
    outcome = {0: "passed", FOUND: "FAILED", None: f"FAILED, not done in {SECONDS} s"}
    return f"{tool}: {outcome.get(code, f'FAILED with exit status {code}')}: {said}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=gpu_check.ROOT / "bench-results" / "gpu-check")
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
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    gpu_check.link(out / "site")
    print(f"gpu-sanitize: {gpu_check.build_cuda(out / 'site', out / 'build-cuda.log')}", flush=True)
    environment = {
        **os.environ, "PYTHONPATH": str(out / "site"), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    running = []
    for tool in tools:
        log = (out / f"sanitize-{tool}.log").open("w")
        process = subprocess.Popen(
            command(sanitizer, tool), cwd=out, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        running.append((tool, process, log))
    failed = False
    for tool, process, log in running:
        try:
            code: int | None = process.wait(max(1.0, SECONDS - (time.monotonic() - started)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
        log.close()
        failed |= code != 0
        print(f"gpu-sanitize: {verdict(tool, code, (out / f'sanitize-{tool}.log').read_text())}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
