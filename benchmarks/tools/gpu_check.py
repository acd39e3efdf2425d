"""`make gpu-check`: build, conformance and benchmarks on a machine with a GPU and no network. Installs nothing.

Run from a checkout with the Python that has PyTorch and Triton. Python files are used where they lie, through a folder
of links, for kernels/ and benchmarks/ belong below the package; the C++ module, and with nvcc the CUDA module for this
GPU, are compiled beside them where that is possible. Only the standard library is needed to start. On a machine without
a GPU it says so, shows its plan and ends. `make gpu-sanitize` (gpu_sanitize.py) runs compute-sanitizer, on its own.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOTAL_S = 470  # the whole of it stays below eight minutes
BUILD_S, CONFORMANCE_S = 60, 200
CUDA_BUILD_S = 120  # of sixteen processors, a part
NEEDED = {"torch": "the tensors", "triton": "the kernels"}
HELPFUL = {
    "pytest": "without it conformance is not run",
    "pybind11": "without it the CPU backend is not built",
    "ninja": "without it the CPU backend is not built",
    "matplotlib": "without it there is no picture",
}


def without_gpu() -> str:
    """Why there is nothing to check here, or ''."""
    for name, what in NEEDED.items():
        if importlib.util.find_spec(name) is None:
            return f"{sys.executable} has no {name} ({what}); name a Python that has it: make gpu-check PYTHON=..."
    probe = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 3)"
    if subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode != 0:
        return "PyTorch sees no CUDA GPU on this machine"
    return ""


def plan(out: Path) -> list[str]:
    """What a run does, in order."""
    return [
        f"link the package together in {out / 'site'}",
        f"compile the C++ module there, at most {BUILD_S} s (skipped without a compiler, pybind11 or ninja)",
        f"compile the CUDA module there for this GPU, at most {CUDA_BUILD_S} s (skipped without nvcc)",
        f"pytest -m gpu in {shards()} processes, those of the CUDA kernels apart, at most {CONFORMANCE_S} s",
        "benchmarks against SDPA (flash, cuDNN, efficient) and compiled FlexAttention in the time that is left",
        f"{out / 'results.jsonl'}, results.png, summary.txt there, and the summary on the screen",
    ]


def shards() -> int:
    return max(1, min(12, (os.cpu_count() or 1) - 2))


def link(site: Path) -> None:
    """efficient_attn below `site`, made of links to the checkout."""
    package = site / "efficient_attn"
    if package.exists():
        shutil.rmtree(package)
    package.mkdir(parents=True)
    for source in (ROOT / "efficient_attn").iterdir():
        if source.name != "__pycache__":
            (package / source.name).symlink_to(source)
    for name in ("kernels", "benchmarks"):
        (package / name).symlink_to(ROOT / name)


def build(site: Path, log: Path, name: str, seconds: int) -> str:
    """Compile efficient_attn._cpu or _cuda into `site`; returns what to say about it."""
    said, others = f"module _{name}", {"cpu": "CUDA", "cuda": "CPU"}
    if any(
        (site / "efficient_attn" / f"_{name}{suffix}").exists() for suffix in importlib.machinery.EXTENSION_SUFFIXES
    ):
        return f"{said}: the one that lies in the checkout"
    missing = [tool for tool in ("pybind11", "ninja", "setuptools") if importlib.util.find_spec(tool) is None]
    if missing:
        return f"{said}: not built, {', '.join(missing)} missing; backend {name!r} is not part of this check"
    work = site.parent / "build"
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(work / "lib"), "--build-temp", str(work)]
    environment = {**os.environ, f"EFFICIENT_ATTN_{name.upper()}": "1", f"EFFICIENT_ATTN_{others[name]}": "0"}
    started = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:  # with ninja and all the compilers that it started
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"{said}: not built in {seconds} s; see {log}"
    if code != 0:
        last = (log.read_text().strip().splitlines() or ["no output"])[-1].removeprefix("error: ")
        return f"{said}: not built: {last}; see {log}"
    for module in work.glob(f"lib/efficient_attn/_{name}*.so"):
        shutil.copy(module, site / "efficient_attn")
    return f"{said}: built in {time.monotonic() - started:.0f} s"


def build_cuda(site: Path, log: Path) -> str:
    """The CUDA module for the GPU that is here."""
    if os.environ.get("EFFICIENT_ATTN_CUDA") == "0":
        return "module _cuda: not built, EFFICIENT_ATTN_CUDA=0; backend 'cuda' is not part of this check"
    probe = "import torch; print(*torch.cuda.get_device_capability())"
    asked = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    if asked.returncode == 0:
        arch = "".join(asked.stdout.split())
        os.environ.setdefault("EFFICIENT_ATTN_CUDA_ARCHS", "90a" if arch == "90" else arch)
    return build(site, log, "cuda", CUDA_BUILD_S)


def conformance(environment: dict[str, str], out: Path) -> str:
    """The tests marked gpu, in processes that each take a share of them; returns what to say about it.

    Those of the experimental backend run in processes of their own: a kernel that faults takes its process with it.
    """
    if importlib.util.find_spec("pytest") is None:
        return f"conformance: NOT RUN, {sys.executable} has no pytest"
    count = shards()
    apart = max(1, count // 3)
    groups = {"not cuda": max(1, count - apart), "cuda": apart}
    running: dict[str, list[tuple[subprocess.Popen[bytes], Path]]] = {group: [] for group in groups}
    for group, shares in groups.items():
        for k in range(shares):
            log = out / f"conformance-{group.replace(' ', '-')}-{k}.log"
            command = [
                *(sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", group, "-p", "no:cacheprovider"),
                str(ROOT / "tests"),
            ]
            shard = environment | {"EFFICIENT_ATTN_SHARD": f"{k}/{shares}", "OMP_NUM_THREADS": "1"}
            with log.open("w") as file:
                process = subprocess.Popen(command, cwd=out, env=shard, stdout=file, stderr=subprocess.STDOUT)
            running[group].append((process, log))
    until = time.monotonic() + CONFORMANCE_S
    titles = {"not cuda": "conformance", "cuda": "conformance of the CUDA kernels (experimental)"}
    return "\n".join(_wait(titles[group], shares, until) for group, shares in running.items())


def _wait(title: str, running: list[tuple[subprocess.Popen[bytes], Path]], until: float) -> str:
    """How the shares of a group ended, those under way at `until` by being stopped."""
    said, failed = [], 0
    for k, (process, log) in enumerate(running):
        try:
            code = process.wait(max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = -1
        last = log.read_text().strip().splitlines()[-1:] or ["no output"]
        if code not in (0, 5):
            failed += 1
            said.append(f"  share {k}: {'out of time' if code == -1 else 'FAILED'}: {last[0]}")
        else:
            said.append(f"  share {k}: {last[0]}")
    return "\n".join([f"{title}: {'passed' if failed == 0 else f'{failed} of {len(running)} shares FAILED'}", *said])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench-results" / "gpu-check")
    parser.add_argument("--dry-run", action="store_true", help="link and compile, then show the plan")
    options = parser.parse_args()
    started, out = time.monotonic(), options.out.resolve()
    steps = "\n".join(f"  {k}. {step}" for k, step in enumerate(plan(out), 1))
    reason = without_gpu()
    if reason and not options.dry_run:
        print(f"gpu-check: skipped: {reason}.\nOn a machine with one it would:\n{steps}")
        return 0
    for name, effect in HELPFUL.items():
        if importlib.util.find_spec(name) is None:
            print(f"gpu-check: {name} is missing: {effect}")
    out.mkdir(parents=True, exist_ok=True)
    site = out / "site"
    link(site)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    environment.pop("TRITON_INTERPRET", None)
    built = [build(site, out / "build-cpu.log", "cpu", BUILD_S)]
    if not (options.dry_run and "EFFICIENT_ATTN_CUDA" not in os.environ):  # minutes, for nothing to run on
        built.append(build_cuda(site, out / "build-cuda.log"))
    print("".join(f"gpu-check: {line}\n" for line in built), end="", flush=True)
    probe = (
        "import efficient_attn as e, efficient_attn.benchmarks.__main__ as m; "
        "s = m.suites; print(e.__file__, len(list(s.get('gpu').configs(s.Options()))))"
    )
    imported = subprocess.run([sys.executable, "-c", probe], cwd=out, env=environment, capture_output=True, text=True)
    if imported.returncode != 0:
        print(f"gpu-check: the package cannot be imported:\n{imported.stderr[-2000:]}")
        return 1
    print(f"gpu-check: {imported.stdout.split()[1]} benchmark cells with {Path(imported.stdout.split()[0]).parent}")
    if options.dry_run:
        print(f"gpu-check: dry run{f' ({reason})' if reason else ''}; a run would:\n{steps}")
        return 0
    tested = conformance(environment, out)
    print(f"gpu-check: {tested}", flush=True)
    left = TOTAL_S - (time.monotonic() - started)
    notes = [*built, *(line for line in tested.splitlines() if not line.startswith(" ")), f"results in {out}"]
    command = [
        *(sys.executable, "-m", "efficient_attn.benchmarks", "gpu", "--out", str(out)),
        *("--seconds", f"{left - 30:.0f}"),
        *(f"--note={note}" for note in notes),
    ]
    try:  # it prints the summary, and nothing comes after that
        measured = subprocess.run(command, cwd=out, env=environment, timeout=max(left, 30)).returncode
    except subprocess.TimeoutExpired:
        print(f"gpu-check: the benchmarks did not end in time; what they measured is in {out / 'results.jsonl'}")
        measured = 1
    return 1 if measured or "FAILED" in tested or "NOT RUN" in tested else 0


if __name__ == "__main__":
    sys.exit(main())
