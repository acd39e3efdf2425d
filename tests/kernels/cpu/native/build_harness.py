"""Builds the harness beside this file with the kernels' own build plan (setup.py) and sanitizers, and prints its path.

python tests/kernels/cpu/native/build_harness.py [FOLDER]  # default: build/sanitize; SANITIZE= leaves them out
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[3]
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"


def build_plan() -> ModuleType:
    """setup.py as a module: it builds nothing unless it is the program."""
    spec = importlib.util.spec_from_file_location("efficient_attn_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sanitizers_missing(build_dir: Path) -> str:
    """Why this compiler cannot build the harness, or an empty string."""
    setup = build_plan()
    build_dir.mkdir(parents=True, exist_ok=True)
    try:
        compiler = setup.find_compiler()
    except Exception as error:
        return str(error)
    return "" if setup.accepts(compiler, SANITIZERS, build_dir) else f"{compiler} cannot link {SANITIZERS}"


def build(build_dir: Path, wanted: Sequence[str] | None = None) -> Path:
    """The harness, up to date, with the kernels of the ``wanted`` instruction sets (and always baseline), or of all."""
    import ninja

    setup = build_plan()
    build_dir.mkdir(parents=True, exist_ok=True)
    sanitizers = os.environ.get("SANITIZE", SANITIZERS)
    every = setup.instruction_sets(build_dir)
    wanted = every if wanted is None else {*wanted, "baseline"}
    if any(name.endswith("_bf16") for name in wanted):  # they have avx512 for all but bfloat16
        wanted = {*wanted, "avx512"}
    sets = {name: flags for name, flags in every.items() if name in wanted}
    names = ",".join(f'"{name}"' for name in sets)
    # -O1: the sanitizers' checks take minutes to optimise further. Without them: as the kernels are shipped.
    flags = f"{'-O1 -g1' if sanitizers else ''} {sanitizers} -I{HERE} '-DINSTRUCTION_SETS={names}'"
    sources = [name for name in setup.PLAIN_SOURCES if not name.endswith("module.cpp")]
    sources += sorted(str(path.relative_to(ROOT)) for path in HERE.glob("*.cpp"))
    output = build_dir / "harness"
    plan = setup.ninja_file(output, build_dir, sets=sets, plain_sources=sources, flags=flags, link=sanitizers)
    (build_dir / "build.ninja").write_text(plan)
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build_dir), "-j", jobs]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return output


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "sanitize"
    print(build(folder.resolve()))
