"""Builds the host twin's Python module with the C++ compiler and prints its path.

python tests/cuda_host/build_twin.py [FOLDER] [SOURCES]     # default: build/cuda_host, csrc

The module is made anew when a source is newer than it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[3]
FLAGS = ["-std=c++17", "-O2", "-g1", "-Wall", "-Wextra", "-Wno-psabi", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-ffp-contract=off"]
PARTS = ("module.cpp", "twin.cpp")


def compiler() -> str:
    return os.environ.get("CXX") or "g++"


def build(folder: Path, sources: Path = ROOT / "csrc", small: int = 0) -> Path:
    """The module, up to date, of the kernels in `sources`; small: only bfloat16 and the kernels for heads of that."""
    import pybind11

    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "_cuda_twin.so"
    inputs = [*HERE.rglob("*.cpp"), *HERE.rglob("*.h"), *sources.rglob("*.h")]
    if output.exists() and output.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
        return output
    includes = [f"-I{HERE}", f"-I{sources}"]
    for path in (pybind11.get_include(), sysconfig.get_path("include")):
        includes += ["-isystem", path]
    flags = [*FLAGS, *([f"-DEFFICIENT_ATTN_TWIN_SMALL={small}"] if small else [])]
    jobs = []
    for name in PARTS:
        command = [*compiler().split(), *flags, *includes, "-c", str(HERE / name), "-o", str(folder / f"{name}.o")]
        jobs.append(subprocess.Popen(command, stdout=sys.stderr))
    for job in jobs:
        if job.wait() != 0:
            raise subprocess.CalledProcessError(job.returncode, job.args)
    partial = folder / f"_cuda_twin.{os.getpid()}.tmp"
    objects = [str(folder / f"{name}.o") for name in PARTS]
    subprocess.run([*compiler().split(), "-shared", *objects, "-o", str(partial)], check=True, stdout=sys.stderr)
    os.replace(partial, output)
    return output


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "cuda_host"
    print(build(where.resolve(), Path(sys.argv[2]).resolve() if len(sys.argv) > 2 else ROOT / "csrc"))
