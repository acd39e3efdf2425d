"""`make cuda-carry`: the CUDA module for one kind of GPU, built here to be carried to a machine that has one.

    python benchmarks/tools/cuda_carry.py [--out build/carry] [--archs 90a] [--only UNIT ...]

The module uses the stable ABI alone, so that the Python of the other machine need not be this one. Its size and the
unit that took longest are printed, and what ptxas said is judged as `make cuda-table` judges it: a wgmma that is not
left asynchronous, or a kernel that spills, fails the build.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from efficient_attn.benchmarks.tools import cuda_table, gpu_check

ROOT = cuda_table.ROOT
MODULE = "_cuda.abi3.so"


def plan(output: Path, archs: list[str]) -> str:
    """The build plan of setup.py, with ptxas talking and no warning let pass."""
    spec = importlib.util.spec_from_file_location("efficient_attn_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    nvcc = setup.find_nvcc()
    if nvcc is None:
        raise SystemExit("cuda-carry: no nvcc in CUDA_HOME or CUDA_PATH, on PATH or in /usr/local/cuda/bin")
    text: str = setup.cuda_ninja_file(output, nvcc, archs)
    return text.replace("flags = ", "flags = -Werror all-warnings -Xptxas -v ", 1)


def complaints(text: str) -> list[str]:
    """What is wrong with the kernels of a build, from all that it printed."""
    found = [line.strip() for line in text.splitlines() if re.search(r"\(C75\d\d\)", line)]
    return found + [said for row in cuda_table.read_report(text) if (said := cuda_table.complaint(row))]


def table(text: str) -> list[dict[str, Any]]:
    """The rows of `make cuda-table` for sm_90a in all that a whole build printed."""
    rows, version = cuda_table.read_report(text), cuda_table.nvcc_version()
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for dtype in cuda_table.DTYPES:
        for row in rows:
            linear = row["kernel"].startswith("linear")  # it reads every dtype
            if row["dtype"] in (dtype, None) and not (linear and dtype != "bfloat16"):
                key = (dtype, row["kernel"], row["head_dim"], row["extras"])
                shared = {"arch": "sm_90a", "dtype": dtype, "nvcc": version}
                found[key] = shared | row | {"dtype": dtype}
    return [found[key] for key in sorted(found)]


def longest(log: str) -> tuple[str, float]:
    """The unit that took longest and its seconds, from ninja's log of a build."""
    times = {}
    for line in log.splitlines()[1:]:
        begin, end, _, target, *_ = line.split("\t")
        times[Path(target).stem] = (int(end) - int(begin)) / 1000
    return max(times.items(), key=lambda item: item[1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "carry")
    parser.add_argument("--archs", default="90a", help="as in EFFICIENT_ATTN_CUDA_ARCHS")
    parser.add_argument("--only", nargs="*", default=[], help="compile these units and link nothing")
    parser.add_argument("--table", action="store_true", help="keep the rows of make cuda-table, after a whole build")
    options = parser.parse_args(arguments)
    out, archs = options.out.resolve(), options.archs.split(";")
    work = out.parent / f"{out.name}-objects"
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    (work / "build.ninja").write_text(plan(out / MODULE, archs))
    ninja = Path(importlib.import_module("ninja").BIN_DIR) / "ninja"
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    command = [ninja, "-C", work, "-j", jobs, *(f"{unit}.o" for unit in options.only)]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = []
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        if line.startswith("["):  # a unit is done
            print(line, end="", flush=True)
    # Units of an earlier run are not compiled again; what was said of them is kept beside them.
    report = work / "ptxas.log"
    with report.open("a") as file:
        file.writelines(said)
    if process.wait() != 0:
        print("".join(said)[-4000:])
        return 1
    wrong = complaints("".join(said))
    if options.table:
        cuda_table.replace(cuda_table.RESULTS, table(report.read_text()))
    unit, seconds = longest((work / ".ninja_log").read_text())
    if not options.only:
        module = out / MODULE
        (out / "sources.txt").write_text(gpu_check.sources_digest() + "\n")
        print(f"cuda-carry: {module}, {module.stat().st_size / 2**20:.1f} MiB, for {options.archs}")
    print(f"cuda-carry: the longest unit, {unit}, took {seconds:.0f} s")
    for one in wrong:
        print(f"cuda-carry: WRONG: {one}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
