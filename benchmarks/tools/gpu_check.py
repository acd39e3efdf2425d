"""`make gpu-check`: the kernels on a machine with a GPU and no network, in two calls of about four minutes each.

    make gpu-check PYTHON=python3 OUT=dir                    # the first: CUDA kernels
    make gpu-check PYTHON=python3 OUT=dir ARGS="--call 2 --previous results.jsonl"    # Triton, and what failed

Stages, each of which can fail alone: the imports; the CUDA module (the one of `make cuda-carry` where it loads and is
of these sources, else built here); smoke, a process with a limit for each family of kernels (gpu_smoke.py), of which
what fails is left out below; speed against cuDNN and flash; conformance in four shards. A skipped test and a module
that does not load are failures. results.jsonl, summary.txt and logs.tgz lie in the folder after every stage, and the
rows of the stage under way too; SIGTERM ends a call with what was found, a full disk leaves what is printed. Only the
standard library is needed to start; nothing is installed. On a machine without a GPU it says so and shows its plan;
--dry-run shows it everywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_stages as stages  # a script's neighbour: the package is not linked yet
from gpu_stages import Ended, run_limited

ROOT, TOOLS = Path(__file__).resolve().parents[2], Path(__file__).resolve().parent
SMOKE = TOOLS / "gpu_smoke.py"
CALL_S = 240.0  # of a call; what is left when a stage begins bounds it
IMPORT_S, LOAD_S, BUILD_S = 40.0, 20.0, 150.0
START_S, FAMILY_S = 40.0, 20.0  # of a family of kernels: to its first answer, and from there
SPEED_S, CELL_S = 110.0, 25.0
SANITIZE_S = 60.0
SHARDS, TEST_S = 4, 30
SIDE_BY_SIDE = 4
LOG_BYTES = 2 * 2**20  # of one log, its end
IMPORTS = """
import importlib.util, json, sys, torch, triton
found = {n: importlib.util.find_spec(n) is not None for n in ("pytest", "ninja", "setuptools")}
gpu = torch.cuda.is_available()
found |= {"gpu": torch.cuda.get_device_name() if gpu else ""}
found |= {"capability": torch.cuda.get_device_capability() if gpu else ()}
print(json.dumps({"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0], **found}))
"""
CELLS = """
import json
from efficient_attn.benchmarks import suites
keys = ("case", "mode", "head_dim", "visible", "q_len")
print(json.dumps([{k: c[k] for k in keys} for c in suites.get("gpu").configs(suites.Options())]))
"""
LOADED = """
from efficient_attn.backends.cuda import attention as cuda
assert not cuda.missing(), cuda.missing()
import torch
where = cuda.kernels().__file__, cuda.kernels().architectures
if torch.cuda.is_available():
    assert cuda.has_code(where[1], torch.cuda.get_device_capability()), f"it was built for {where[1]}"
    assert cuda.kernels().most_shared_bytes(torch.cuda.current_device()) > 0
print(*where)
"""


class Check:
    """What the stages of one call share: places, time, what they found."""

    def __init__(self, out: Path, work: Path, seconds: float = CALL_S) -> None:
        self.out, self.work, self.until = out, work, time.monotonic() + seconds
        self.site, self.logs = work / "site", work / "logs"
        for folder in (out, work, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        self.failed: list[str] = []  # stages and families
        self.summary: list[str] = []
        path = os.pathsep.join(filter(None, [str(self.site), os.environ.get("PYTHONPATH", "")]))
        self.environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.environment.pop("TRITON_INTERPRET", None)
        self._published, self._writes = 0.0, threading.Lock()
        self.stopped = False  # by a signal: whatever runs is ended, and nothing else begins
        self.began: list[bool] = []  # of each family of kernels that ran, whether the GPU answered

    def left(self, most: float) -> float:
        return max(1.0, min(most, self.until - time.monotonic()))

    def row(self, **row: Any) -> None:
        try:
            with (self.work / "stages.jsonl").open("a") as file:
                file.write(json.dumps({"type": "gpu_check", **row}) + "\n")
        except OSError as error:
            self._unwritten(error)

    def say(self, text: str, failure: str = "") -> None:
        """A line of the summary; `failure`: what of this call failed by it."""
        self.summary.append(text)
        print(f"gpu-check: {text}", flush=True)
        if failure:
            self.failed.append(failure)

    def python(self, *arguments: str, log: str, seconds: float, **more: Any) -> Ended:
        """This Python with the linked package, under a limit; rows are published while it runs."""
        self._halt()
        command, environment = [sys.executable, *arguments], self.environment | more.pop("environment", {})
        where = self.logs / f"{log}.log"
        return run_limited(command, where, environment, seconds, cwd=self.work, tick=self.tick, **more)

    def tick(self) -> None:
        self._halt()
        if time.monotonic() - self._published > 5.0:
            self.publish(with_logs=False)

    def _halt(self) -> None:
        if self.stopped:
            raise SystemExit(1)  # in a thread of a stage it ends that one's process, and the thread

    def publish(self, with_logs: bool = True) -> None:
        """Put what there is into the folder that comes back; stages go on where that fails."""
        with self._writes:
            self._published = time.monotonic()
            try:
                parts = [*sorted(self.work.glob("*.jsonl")), *sorted(self.work.glob("*/results.jsonl"))]
                rows = "".join(line + "\n" for part in parts for line in stages.whole_lines(part))
                tables = [path.read_text() for path in sorted(self.work.glob("*/summary.txt"))]
                verdict = f"FAILED: {', '.join(self.failed)}" if self.failed else "nothing failed so far"
                self._put("summary.txt", "\n".join([verdict, *self.summary, *tables]).encode())
                self._put("results.jsonl", rows.encode())
                if with_logs:
                    self._put("logs.tgz", _ends(sorted(self.logs.glob("*"))))
            except OSError as error:
                self._unwritten(error)

    def _put(self, name: str, data: bytes) -> None:
        """The whole file or, whatever happens, the one that was there."""
        partial = self.out / f".{name}.partial"
        try:
            partial.write_bytes(data)
            partial.replace(self.out / name)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def _unwritten(self, error: OSError) -> None:
        """Said once: what is printed is then all that is left of the results."""
        if "results" not in self.failed:
            self.say(
                f"results: NOT WRITTEN ({error.filename or self.out}: {error.strerror}); see what is printed", "results"
            )


def _ends(logs: Sequence[Path]) -> bytes:
    """An archive of the ends of logs."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for path in logs:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - LOG_BYTES))
                data = file.read()
            entry = tarfile.TarInfo(path.name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


def link(site: Path) -> None:
    """efficient_attn below `site`, made of links to the checkout, without modules that lie there."""
    package = site / "efficient_attn"
    if package.exists():
        shutil.rmtree(package)
    package.mkdir(parents=True)
    for source in (ROOT / "efficient_attn").iterdir():
        if source.name != "__pycache__" and not source.name.startswith("_cuda."):
            (package / source.name).symlink_to(source)
    for name in ("kernels", "benchmarks"):
        (package / name).symlink_to(ROOT / name)


def sources_digest() -> str:
    """What a carried module must have been built from."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.is_file() and "cpu" not in path.parts:
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


# --- the stages ---


def imports(check: Check) -> dict[str, Any] | None:
    """What Python there is, or None where nothing can be done."""
    ended = check.python("-c", IMPORTS, log="imports", seconds=check.left(IMPORT_S))
    found: dict[str, Any] | None = stages.told(ended.output)
    if ended.status != "ok" or found is None:
        check.say(f"imports: FAILED ({ended.said()})", "imports")
        return None
    check.row(stage="imports", seconds=ended.seconds, **found)
    check.say(f"imports: {', '.join(f'{k} {v}' for k, v in found.items())}")
    if not found["gpu"]:
        check.say("imports: FAILED (PyTorch sees no CUDA GPU on this machine)", "imports")
        return None
    return found


def module(check: Check, carried: Path, capability: Sequence[int]) -> bool:
    """The CUDA module in the linked package: the carried one, else one that is built here."""
    link(check.site)
    place, why = check.site / "efficient_attn" / "_cuda.abi3.so", f"{carried / '_cuda.abi3.so'} is not there"
    if (carried / place.name).exists():
        of = (carried / "sources.txt").read_text().strip() if (carried / "sources.txt").exists() else "unknown sources"
        why = "" if of == sources_digest() else "it was built from other sources"
        if not why:
            shutil.copy(carried / place.name, place)
            ended = check.python("-c", LOADED, log="load-carried", seconds=check.left(LOAD_S))
            why = "" if ended.status == "ok" else ended.said()
    if why:
        check.say(f"module: not the carried one ({why}); building")
        why = _build(check, capability)
    check.row(stage="module", ok=not why, why=why)
    check.say(f"module: {f'FAILED: {why}' if why else 'loads'}", "module" if why else "")
    return not why


def _build(check: Check, capability: Sequence[int]) -> str:
    """Why the module could not be built, or an empty string."""
    arch = "".join(map(str, capability))
    environment = {"EFFICIENT_ATTN_CUDA": "1", "EFFICIENT_ATTN_CPU": "0"}
    environment["EFFICIENT_ATTN_CUDA_ARCHS"] = "90a" if arch == "90" else arch
    places = ["--build-lib", str(check.work / "lib"), "--build-temp", str(check.work / "objects")]
    command = [str(ROOT / "setup.py"), "build_ext", *places]
    ended = check.python(*command, log="build", seconds=check.left(BUILD_S), environment=environment, cwd_of=ROOT)
    if ended.status != "ok":
        return f"not built: {ended.said()}"
    for built in check.work.glob("lib/efficient_attn/_cuda*.so"):
        shutil.copy(built, check.site / "efficient_attn")
    ended = check.python("-c", LOADED, log="load-built", seconds=check.left(LOAD_S))
    return "" if ended.status == "ok" else f"built, but does not load: {ended.said()}"


def smoke(check: Check, families: Sequence[str]) -> list[str]:
    """The families that fail, each with what it ended with in the summary."""

    def one(name: str) -> str:
        if len(check.began) >= SIDE_BY_SIDE and not any(check.began):
            return f"FAILED: not run: none of {len(check.began)} before it got an answer of the GPU"
        rows = check.work / f"smoke-{name}.rows"
        command = [str(SMOKE), name, "--out", str(rows)]
        limit = {"ready": rows, "start": check.left(START_S)}
        ended = check.python(*command, log=f"smoke-{name}", seconds=check.left(FAMILY_S), **limit)
        check.began.append(any("ready" in row for row in stages.json_lines(rows)))
        return stages.smoke_verdict(ended, stages.json_lines(rows))

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        found = list(pool.map(one, families))
    wrong = []
    for name, why in zip(families, found, strict=True):
        for row in stages.json_lines(check.work / f"smoke-{name}.rows"):
            check.row(stage="smoke", family=name, **row)
        check.row(stage="smoke", family=name, verdict=why or "passed")
        check.say(f"smoke {name}: {why or 'passed'}", f"smoke {name}" if why else "")
        wrong += [name] if why else []
    return wrong


def take_two_passes(check: Check, wrong: list[str]) -> None:
    """Where the backward in one pass failed, and not the two kernels that it replaces: these serve what follows."""
    if "backward-128" in wrong and "two-passes-128" not in wrong:
        wrong.remove("backward-128")
        check.environment["EFFICIENT_ATTN_CUDA_TWO_PASSES"] = "1"
        check.say("backward-128 failed in one pass: what follows takes two passes")


def speed(check: Check, kernels: Sequence[str], without: Sequence[str]) -> None:
    """Cells of the suite `gpu` whose kernels passed, a row as soon as it is measured."""
    listed = check.python("-c", CELLS, log="cells", seconds=check.left(IMPORT_S))
    cells = stages.told(listed.output)
    if listed.status != "ok" or cells is None:
        check.say(f"speed: FAILED ({listed.said()})", "speed")
        return
    chosen = [c for c in cells if "cuda" not in kernels or not set(stages.families_of(c)) & set(without)]
    for cell in cells:
        if cell not in chosen:
            check.say(f"speed: {cell['case']} {cell['mode']} is left out: its kernels failed")
    if "one-pass-128" in without:
        kernels = [name for name in kernels if name != "cuda any order"]
    seconds = check.left(SPEED_S)
    command = ["-m", "efficient_attn.benchmarks", "gpu", "--out", str(check.work / "speed"), "--only", *kernels]
    command += ["--cell-seconds", str(CELL_S), "--seconds", f"{seconds - 5:.0f}"]
    for cell in chosen:
        command += ["--cell", f"{cell['case']}/{cell['mode']}"]
    ended = check.python(*command, log="speed", seconds=seconds) if chosen else None
    rows = [row for row in stages.json_lines(check.work / "speed" / "results.jsonl") if row.get("type") == "cell"]
    bad = [row for row in rows if row["status"] != "ok" or ("cuda" in kernels and "cuda" not in row["times_ms"])]
    for row in bad:
        why = str(row.get("message") or row.get("absent", {}).get("cuda", row["status"]))
        check.say(f"speed {row['config']['case']} {row['config']['mode']}: FAILED: {why[:200]}")
    if ended is None or ended.status not in ("ok", "hang") or bad or not rows:
        check.failed.append("speed")
    check.say(
        f"speed: {len(rows)} of {len(cells)} cells, {len(bad)} failed ({ended.said() if ended else 'nothing to run'})"
    )


def conformance(check: Check, choice: str, name: str) -> None:
    """The tests of one backend that need a GPU, in shards; whatever is not passed is a failure."""
    seconds, folder = check.left(600.0), check.work / f"tests-{name}"
    folder.mkdir(exist_ok=True)
    until = time.monotonic() + seconds - 3

    def shard(k: int) -> str:
        """Until every test ran, in as many processes as it takes; how the last one ended."""
        seen, said, tries = folder / f"{k}.rows", "not run", 0
        environment = {"EFFICIENT_ATTN_SHARD": f"{k}/{SHARDS}", "EFFICIENT_ATTN_OUTCOMES": str(seen)}
        environment["EFFICIENT_ATTN_TEST_SECONDS"] = str(TEST_S)
        environment["PYTHONPATH"] = os.pathsep.join([check.environment["PYTHONPATH"], str(TOOLS)])
        before = -1
        while time.monotonic() < until and tests_in(seen) > before:
            before, command = tests_in(seen), stages.pytest_command(ROOT, choice)
            log, limit = f"tests-{name}-{k}-{tries}", max(1.0, until - time.monotonic())
            said = check.python(*command, log=log, seconds=limit, environment=environment).said()
            tries += 1
            if stages.finished(stages.json_lines(seen)):
                return ""
        return said

    def tests_in(seen: Path) -> int:
        """Rows of tests: one more try makes sense only if the last one got further."""
        return sum("test" in row for row in stages.json_lines(seen))

    with ThreadPoolExecutor(SHARDS) as pool:
        ends = list(pool.map(shard, range(SHARDS)))
    counts, bad = stages.outcomes([row for k in range(SHARDS) for row in stages.json_lines(folder / f"{k}.rows")])
    for test, outcome in bad:
        check.row(stage="conformance", backend=name, test=test, outcome=outcome)
    for test, outcome in bad[:20]:
        check.say(f"conformance {name}: {outcome}: {test}")
    complete = not any(ends)
    good = complete and not bad and counts["passed"] > 0
    said = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())) or "no test ran"
    shards = "".join(f"; shard {k}: {said}" for k, said in enumerate(ends) if said)
    check.row(stage="conformance", backend=name, complete=complete, **counts)
    check.say(f"conformance {name}: {'passed' if good else 'FAILED'}: {said}{shards}", "" if good else f"tests {name}")


def sanitize(check: Check, families: Sequence[str]) -> None:
    """compute-sanitizer over the families that fail, to say where."""
    import gpu_sanitize

    sanitizer = gpu_sanitize.find_sanitizer()
    if families and sanitizer is None:
        check.say(
            "sanitizer: NOT RUN: no compute-sanitizer on PATH, in CUDA_HOME or in /usr/local/cuda/bin", "sanitizer"
        )
        return
    for name in families:
        for tool in ("memcheck", "racecheck"):
            rows = str(check.work / f"sanitize-{name}.rows")
            command = gpu_sanitize.command(str(sanitizer), tool, [str(SMOKE), name, "--out", rows, "--length", "300"])
            log = check.logs / f"sanitize-{name}-{tool}.log"
            ended = run_limited(
                command, log, check.environment, check.left(SANITIZE_S), cwd=check.work, tick=check.tick
            )
            code = None if ended.status == "hang" else ended.code
            check.say(f"sanitizer {name}: {gpu_sanitize.verdict(tool, code, ended.output, ended.seconds)}")
            check.row(stage="sanitizer", family=name, tool=tool, code=code)


# --- the calls ---


def plan(call: int, out: Path, carried: Path) -> list[str]:
    """What a call does, in order, with its limits."""
    families = stages.FAMILIES
    common = [
        f"imports: torch, triton, the GPU, at most {IMPORT_S:.0f} s",
        f"module: {carried}/_cuda.abi3.so where it loads and is of these sources, else built, at most {BUILD_S:.0f} s",
    ]
    first = [
        f"smoke: {len(families)} families, {SIDE_BY_SIDE} at once, each {START_S:.0f} s to begin and {FAMILY_S:.0f} s "
        f"from there, against float64 on the GPU: {', '.join(families)}",
        f"speed of what passed against cuDNN and flash, {CELL_S:.0f} s a cell, at most {SPEED_S:.0f} s",
        f"conformance of the CUDA kernels in {SHARDS} shards, {TEST_S} s a test, in the time that is left",
    ]
    second = [
        f"compute-sanitizer over the families that failed in the first call (--previous), {SANITIZE_S:.0f} s each tool",
        f"speed of Triton, compiled FlexAttention and the rest of the peers, at most {SPEED_S:.0f} s",
        f"conformance of the Triton kernels in {SHARDS} shards, {TEST_S} s a test, in the time that is left",
    ]
    last = f"after every stage results.jsonl, summary.txt and logs.tgz in {out}; at most {CALL_S:.0f} s in all"
    return [*common, *(first if call == 1 else second), last]


def run_call(check: Check, call: int, carried: Path, failed: Sequence[str]) -> None:
    found = imports(check)
    check.publish()
    if found is None:
        return
    if not (tested := found["pytest"]):
        check.say("pytest is missing: no conformance", "conformance")
    there = bool(guarded(check, "module", lambda: module(check, carried, found["capability"])))
    steps: list[tuple[str, Callable[[], object]]] = []
    if call == 1 and there:
        wrong = list(stages.FAMILIES)  # until the smoke test says otherwise
        steps.append(("smoke", lambda: wrong.__setitem__(slice(None), smoke(check, stages.FAMILIES))))
        steps.append(("two passes", lambda: take_two_passes(check, wrong)))
        steps.append(("speed", lambda: speed(check, ["cuda", "cuda any order", "flash", "cudnn"], wrong)))
        choice = "cuda and (bfloat16 or float16 or kernels)"
        steps += [("tests cuda", lambda: conformance(check, choice, "cuda"))] if tested else []
    if call == 2:
        if there:
            steps.append(("sanitizer", lambda: sanitize(check, failed)))
        peers = ["ours", "flex", "cudnn", "flash", "efficient", "tma", "dense"]
        steps.append(("speed", lambda: speed(check, peers, [])))
        steps += [("tests triton", lambda: conformance(check, "triton and not float64", "triton"))] if tested else []
    for name, step in steps:
        guarded(check, name, step)


def guarded(check: Check, name: str, step: Callable[[], object]) -> object:
    """A stage, whose own faults do not keep the next one from its turn; None then."""
    result = None
    try:
        result = step()
    except Exception as error:
        check.say(f"{name}: FAILED by itself ({type(error).__name__}: {error})", name)
    check.publish()
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench-results" / "gpu-check")
    parser.add_argument("--call", type=int, choices=(1, 2), default=1)
    parser.add_argument("--carried", type=Path, default=ROOT / "build" / "carry", help="the folder of make cuda-carry")
    parser.add_argument("--previous", type=Path, help="results.jsonl of the first call, for the second")
    parser.add_argument("--seconds", type=float, default=CALL_S)
    parser.add_argument("--dry-run", action="store_true", help="show the plan")
    options = parser.parse_args(arguments)
    if options.previous is not None and not options.previous.is_file():
        parser.error(f"--previous: there is no {options.previous}")
    out, steps = options.out.resolve(), plan(options.call, options.out.resolve(), options.carried.resolve())
    reason = "" if options.dry_run else without_gpu()
    if options.dry_run or reason:
        said = f"skipped: {reason}.\nOn a machine with one it would" if reason else "dry run; it would"
        print(f"gpu-check: {said}:\n" + "\n".join(f"  {k}. {step}" for k, step in enumerate(steps, 1)))
        return 0
    failed = stages.failed_before(options.previous)  # now: it may lie where this call writes
    work = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    check = Check(out, work, options.seconds)

    def stop(number: int, frame: object) -> None:
        if not check.stopped:  # once: what a second one interrupts is the writing of the results
            check.stopped = True
            check.say(f"stopped by {signal.Signals(number).name}", "stopped")
            raise SystemExit(1)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        run_call(check, options.call, options.carried.resolve(), failed)
    finally:  # whatever happens to this program: what was found comes back
        check.publish()
        for number, handler in before.items():
            signal.signal(number, handler)
    print(f"gpu-check: {f'FAILED: {chr(44).join(check.failed)}' if check.failed else 'passed'}; {out}", flush=True)
    return 1 if check.failed else 0


def without_gpu() -> str:
    """Why there is nothing to check here, or ''. Where there is a driver, whatever goes wrong is for the stages."""
    if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists():
        return ""
    probe = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 3)"
    try:
        code = subprocess.run([sys.executable, "-c", probe], capture_output=True, timeout=IMPORT_S).returncode
    except subprocess.TimeoutExpired:
        return f"PyTorch did not import within {IMPORT_S:.0f} s, and there is no driver"
    return "" if code == 0 else "PyTorch sees no CUDA GPU on this machine, and there is no driver"


if __name__ == "__main__":
    sys.exit(main())
