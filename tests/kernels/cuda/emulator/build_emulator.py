"""Builds the emulator's Python module with the C++ compiler and prints its path.

python tests/kernels/cuda/emulator/build_emulator.py [FOLDER] [SOURCES]     # default: build/cuda_emulator, csrc

A file that is older than one of its sources is built again. module.cpp alone includes the kernels; the other objects
are shared by all folders and lie in build/cuda_emulator.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[3]
OBJECTS = ROOT / "build" / "cuda_emulator"
FLAGS = ["-std=c++17", "-O2", "-g1", "-Wall", "-Wextra", "-Wno-psabi", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-ffp-contract=off"]


def compiler() -> str:
    return os.environ.get("CXX") or "g++"


def make(target: Path, inputs: Sequence[Path], arguments: Sequence[str | Path]) -> Path:
    """The target of a call of the compiler, up to date."""
    if not target.exists() or target.stat().st_mtime <= max(path.stat().st_mtime for path in inputs):
        partial = target.with_suffix(f".{os.getpid()}.tmp")
        command = [*compiler().split(), *map(str, arguments), "-o", str(partial)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        os.replace(partial, target)
    return target


def build(folder: Path, sources: Path = ROOT / "csrc", small: int = 0) -> Path:
    """The module, up to date, of the kernels in `sources`; small: only bfloat16 and the kernels for heads of that."""
    import pybind11

    for place in (folder, OBJECTS):
        place.mkdir(parents=True, exist_ok=True)
    headers, module = [*HERE.glob("*.h")], HERE / "module.cpp"
    kernels = [module, *headers, *HERE.glob("cuda/*.h"), *sources.rglob("*.h")]
    includes = [f"-I{HERE}", f"-I{sources}"]
    for path in (pybind11.get_include(), sysconfig.get_path("include")):
        includes += ["-isystem", path]
    chosen = [f"-DEFFICIENT_ATTN_EMULATOR_SMALL={small}"] if small else []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(make, folder / "module.o", kernels, [*FLAGS, *chosen, *includes, "-c", module])]
        for source in sorted({*HERE.glob("*.cpp")} - {module}):
            target = OBJECTS / f"{source.stem}.o"
            jobs.append(pool.submit(make, target, [source, *headers], [*FLAGS, "-c", source]))
    objects = [job.result() for job in jobs]
    return make(folder / "_cuda_emulator.so", objects, ["-shared", *objects])


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else OBJECTS
    print(build(where.resolve(), Path(sys.argv[2]).resolve() if len(sys.argv) > 2 else ROOT / "csrc"))
