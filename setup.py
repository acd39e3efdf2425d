"""Builds the native CPU module with ninja: one object per instruction set, chosen at run time, without PyTorch.

EFFICIENT_ATTN_CPU=0 skips the build, 1 insists on it; CXX names the compiler. Without a compiler the package still
installs, with a warning, and the reference backend serves.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
MODULE = "efficient_attn._cpu"
ISA_SOURCE = "csrc/cpu/kernels.cpp"
PLAIN_SOURCES = ["csrc/cpu/module.cpp", "csrc/cpu/dispatch.cpp", "csrc/cpu/parallel.cpp", "csrc/cpu/peak.cpp"]
COMMON_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-psabi -ffp-contract=fast -fno-math-errno"
ISA_FLAGS = "-fno-exceptions -fno-rtti -fno-threadsafe-statics"


def instruction_sets(build_dir: Path) -> dict[str, str]:
    """Name of each instruction set to build -> the compiler flags for it; what the compiler does not know is left
    out."""
    sets = {"baseline": ""}
    if platform.machine().lower() in ("x86_64", "amd64"):
        sets["avx2"] = "-march=x86-64-v3"
        sets["avx512"] = "-march=x86-64-v4 -mprefer-vector-width=512"
        sets["avx512_bf16"] = f"{sets['avx512']} -mavx512bf16"
        sets["amx_bf16"] = f"{sets['avx512_bf16']} -mamx-tile -mamx-bf16"
    return {name: flags for name, flags in sets.items() if accepts(find_compiler(), flags, build_dir)}


def find_compiler() -> str:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for name in candidates:
        if shutil.which(name.split()[0]):
            return name
    raise CompileError(f"no C++ compiler found (tried {', '.join(candidates)})")


def accepts(compiler: str, flags: str, build_dir: Path) -> bool:
    """Whether a small program compiles and links with the flags."""
    source = build_dir / "probe.cpp"
    source.write_text("int main() { return 0; }\n")
    command = [*compiler.split(), *flags.split(), str(source), "-o", str(build_dir / "probe")]
    return subprocess.run(command, capture_output=True).returncode == 0


def ninja_file(
    output: Path,
    build_dir: Path,
    *,
    sets: dict[str, str] | None = None,
    plain_sources: list[str] | None = None,
    flags: str = "",
    link: str = "-shared" if sys.platform != "darwin" else "-bundle -undefined dynamic_lookup",
) -> str:
    """The build plan: every kernel object from one source, plus what is around them.

    The defaults are the Python module's; tests/native/build_harness.py has its own ``plain_sources``, ``flags`` (which
    come after the usual ones) and ``link``.
    """
    import pybind11

    compiler = find_compiler()
    tuning = "".join(
        f" {flag}"
        for flag in ("-fno-trapping-math", "-fno-semantic-interposition")
        if accepts(compiler, flag, build_dir)
    )
    openmp = "-fopenmp" if accepts(compiler, "-fopenmp", build_dir) else ""
    includes = f"-I{ROOT / 'csrc'} -isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}"
    sets = instruction_sets(build_dir) if sets is None else sets
    known = " ".join(f"-DEFFICIENT_ATTN_HAVE_{name.upper()}=1" for name in sets)
    lines = [
        f"cxx = {compiler}",
        f"flags = {COMMON_FLAGS}{tuning} {includes} {known} {flags}",
        "rule compile",
        "  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx {link} $in -o $out {openmp} -pthread",
    ]
    objects = []
    for name, isa in sets.items():
        objects.append(f"kernels_{name}.o")
        lines += [f"build {objects[-1]}: compile {ROOT / ISA_SOURCE}"]
        lines += [f"  extra = {isa} {ISA_FLAGS} -DEFFICIENT_ATTN_ISA={name}"]
    for source in PLAIN_SOURCES if plain_sources is None else plain_sources:
        objects.append(Path(source).stem + ".o")
        lines += [f"build {objects[-1]}: compile {ROOT / source}", f"  extra = {openmp} -pthread"]
    lines += [f"build {output}: link {' '.join(objects)}", ""]
    return "\n".join(lines)


class NinjaBuild(build_ext):
    """Builds the extension with ninja and lets the installation go on when that is not possible."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve() / "cpu"
        build_dir.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            import ninja

            (build_dir / "build.ninja").write_text(ninja_file(output, build_dir))
            jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
            subprocess.check_call([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build_dir), "-j", jobs])
        except (ImportError, OSError, subprocess.CalledProcessError, CompileError) as error:
            hint = "install a C++17 compiler (g++ or clang++) and reinstall for the fast CPU kernels"
            raise CompileError(f"{MODULE} was not built: {error}; the reference backend serves; {hint}") from error


def packages() -> tuple[list[str], dict[str, str]]:
    """kernels/ and benchmarks/ live at the root of the repository and are installed below efficient_attn."""
    hidden = ["*__pycache__*"]
    names = find_namespace_packages(".", include=["efficient_attn", "efficient_attn.*"], exclude=hidden)
    places = {}
    for folder in ("kernels", "benchmarks"):
        names.append(f"efficient_attn.{folder}")
        names += [
            f"efficient_attn.{folder}.{name}"
            for name in find_namespace_packages(folder, exclude=[*hidden, "results*", "page"])
        ]
        places[f"efficient_attn.{folder}"] = folder
    return names, places


if __name__ == "__main__":
    wanted = os.environ.get("EFFICIENT_ATTN_CPU", "auto")
    names, places = packages()
    setup(
        packages=names,
        package_dir=places,
        package_data={"efficient_attn": ["py.typed"], "efficient_attn.benchmarks": ["page/*"]},
        ext_modules=[]
        if wanted == "0"
        else [Extension(MODULE, sources=[ISA_SOURCE, *PLAIN_SOURCES], optional=wanted != "1")],
        cmdclass={"build_ext": NinjaBuild},
    )
