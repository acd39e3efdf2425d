"""Builds the native modules with ninja, without PyTorch.

efficient_attn._cpu: one object per instruction set, chosen at run time. EFFICIENT_ATTN_CPU=0 skips it, 1 insists on it;
CXX names the compiler. Without a compiler the package still installs, with a warning, and the reference backend serves.
EFFICIENT_ATTN_OBJECTS names a folder that keeps what was compiled for the next build.

efficient_attn._cuda: the CUDA kernels in many units, each for every architecture, which takes nvcc minutes: only
EFFICIENT_ATTN_CUDA=1 builds it, and insists, with the nvcc of CUDA_HOME, on PATH or in /usr/local/cuda.
EFFICIENT_ATTN_CUDA_ARCHS, 80;90a by default, names the architectures: 80 serves 8.0, 8.6 and 8.9 and, compiled by the
driver at first use, whatever has no code of its own; 90a serves 9.0. MAX_JOBS bounds the compilers at work.
"""

import itertools
import os
import platform
import re
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
ISA_SOURCES = ["csrc/cpu/attention.cpp", "csrc/cpu/linear_attention.cpp"]  # the one that takes longest first
PLAIN_SOURCES = ["csrc/cpu/module.cpp", "csrc/cpu/dispatch.cpp", "csrc/cpu/parallel.cpp", "csrc/cpu/peak.cpp"]
COMMON_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-psabi -ffp-contract=fast -fno-math-errno"
# GCC's -O3 takes a third longer over kernels for wide vectors, and nothing of it but this makes them faster. With AVX2
# a float32 bias's gradient loses a twentieth, dropout gains a thirtieth; linear attention is a sixth slower without it.
WIDE_OPTIMISATION = (
    "-O2 -ftree-vectorize -fvect-cost-model=dynamic"
    " --param max-inline-insns-auto=30 --param max-inline-insns-single=200 --param early-inlining-insns=14"
)
NEEDS_O3 = "linear_attention_avx2"
# Beside others, for processors from before 2013: a tenth slower, compiled in a third of the time.
BASELINE_OPTIMISATION = "-O1 -Wno-maybe-uninitialized"
ISA_FLAGS = "-fno-exceptions -fno-rtti -fno-threadsafe-statics"
CUDA_MODULE = "efficient_attn._cuda"
CUDA_PLAIN_SOURCES = [f"csrc/cuda/{name}" for name in ("linear_attention.cu", "module.cpp", "launch.cpp")]
CUDA_FLAGS = "-std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden,-Wall"
CUDA_ARCHS = "80;90a"
WITHOUT = {
    MODULE: "the reference backend serves; install a C++17 compiler (g++ or clang++) and reinstall for the CPU kernels",
    CUDA_MODULE: "Triton serves GPUs without EFFICIENT_ATTN_CUDA=1; CUDA_HOME names the toolkit (12.5 or newer)",
}


def instruction_sets(build_dir: Path) -> dict[str, str]:
    """Name of each instruction set to build -> the compiler flags for it; what the compiler does not know is left
    out."""
    compiler, sets = find_compiler(), {"baseline": ""}
    if platform.machine().lower() in ("x86_64", "amd64"):
        tuned = WIDE_OPTIMISATION if accepts(compiler, f"-Werror {WIDE_OPTIMISATION}", build_dir) else "-O3"
        sets["avx2"] = f"{tuned} -march=x86-64-v3"
        sets["avx512"] = f"{tuned} -march=x86-64-v4 -mprefer-vector-width=512"
        sets["avx512_bf16"] = f"{sets['avx512']} -mavx512bf16"
        sets["amx_bf16"] = f"{sets['avx512_bf16']} -mamx-tile -mamx-bf16"
    known = {name: flags for name, flags in sets.items() if accepts(compiler, flags, build_dir)}
    if len(known) > 1:  # a compiler for another processor has the baseline alone
        known["baseline"] = BASELINE_OPTIMISATION
    return known


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
    """The build plan: the units of every instruction set, plus what is around them.

    The defaults are the Python module's; tests/kernels/cpu/native/build_harness.py has its own `plain_sources`,
    `flags` (which come after the usual ones) and `link`.
    """
    import pybind11

    compiler = find_compiler()
    tuning = "".join(
        f" {flag}"
        for flag in ("-fno-trapping-math", "-fno-semantic-interposition")
        if accepts(compiler, flag, build_dir)
    )
    openmp = "-fopenmp" if accepts(compiler, "-fopenmp", build_dir) else ""
    python = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}"  # kernels know nothing of it
    sets = instruction_sets(build_dir) if sets is None else sets
    known = " ".join(f"-DEFFICIENT_ATTN_HAVE_{name.upper()}=1" for name in sets)
    lines = [
        f"cxx = {compiler}",
        f"flags = {COMMON_FLAGS}{tuning} -I{ROOT / 'csrc'} {known}",
        "rule compile",
        f"  command = $cxx $flags $extra {flags} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx {link} $in -o $out {openmp} -pthread",
    ]
    objects = []
    for source, (name, isa) in itertools.product(ISA_SOURCES, sets.items()):
        unit = f"{Path(source).stem}_{name}"
        if unit.startswith("linear") and name.endswith("_bf16"):  # they have avx512's
            continue
        objects.append(f"{unit}.o")
        lines += [f"build {objects[-1]}: compile {ROOT / source}"]
        lines += [f"  extra = {isa}{' -O3' * (unit == NEEDS_O3)} {ISA_FLAGS} -DEFFICIENT_ATTN_ISA={name}"]
    for source in PLAIN_SOURCES if plain_sources is None else plain_sources:
        objects.append(Path(source).stem + ".o")
        lines += [f"build {objects[-1]}: compile {ROOT / source}", f"  extra = {openmp} -pthread {python}"]
    lines += [f"build {output}: link {' '.join(objects)}", ""]
    return "\n".join(lines)


def find_nvcc() -> str | None:
    """The CUDA compiler, or None."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [str(Path(home) / "bin" / "nvcc") for home in homes] or ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, places)), None)


def cuda_archs() -> list[str]:
    """The architectures to compile for, oldest first, as in 80 or 90a."""
    named = os.environ.get("EFFICIENT_ATTN_CUDA_ARCHS") or CUDA_ARCHS
    archs = sorted(set(filter(None, re.split(r"[;, ]+", named))), key=lambda arch: (len(arch.rstrip("af")), arch))
    wrong = [arch for arch in archs if not re.fullmatch(r"[1-9]\d{1,2}[af]?", arch) or int(arch.rstrip("af")) < 80]
    if wrong or not archs:
        raise CompileError(
            f"EFFICIENT_ATTN_CUDA_ARCHS={named} names no architectures from 80 on; give them as in {CUDA_ARCHS}"
        )
    return archs


def cuda_units() -> dict[str, tuple[str, str]]:
    """Name of each unit -> its source and the macros that choose its kernels. Those that take longest first."""
    dtypes, units = ("BFloat16", "Float16"), {}
    for op, head, dtype, extras in itertools.product(("backward", "forward"), (256, 128, 64), dtypes, (True, False)):
        units[f"attention_{op}_{dtype.lower()}_{head}{'_extras' if extras else ''}"] = (
            f"csrc/cuda/attention_{op}.cu",
            f"-DEFFICIENT_ATTN_DTYPE=k{dtype} -DEFFICIENT_ATTN_HEAD={head} "
            f"-DEFFICIENT_ATTN_EXTRAS={str(extras).lower()}",
        )
    for dtype in dtypes:
        macros = f"-DEFFICIENT_ATTN_DTYPE=k{dtype}"
        units[f"attention_decode_{dtype.lower()}"] = ("csrc/cuda/attention_decode.cu", macros)
    return units


def cuda_ninja_file(output: Path, nvcc: str, archs: list[str]) -> str:
    """The build plan of the CUDA module. The runtime is linked in, so that it needs nothing but the driver."""
    codes = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
    if archs[0].isdecimal():
        codes[0] = f"-gencode arch=compute_{archs[0]},code=[sm_{archs[0]},compute_{archs[0]}]"
    host = f" -ccbin {os.environ['CXX']}" if os.environ.get("CXX") else ""
    includes = f"-I{ROOT / 'csrc'} -isystem {sysconfig.get_path('include')}"
    macros = (
        f"-DEFFICIENT_ATTN_HOPPER={str('90a' in archs).lower()} -DEFFICIENT_ATTN_CUDA_ARCHS='\"{';'.join(archs)}\"'"
    )
    lines = [
        f"nvcc = {nvcc}{host}",
        f"flags = {CUDA_FLAGS} {' '.join(codes)} {includes} {macros}",
        "rule compile",
        # nvcc names what is local to a unit by its file and a random number: here by the unit
        "  command = $nvcc $flags $extra -frandom-seed=$out -MMD -MF $out.d -c $in -o $out",
        "  description = nvcc $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $nvcc -shared -cudart static -nodlink -Xlinker --exclude-libs,ALL,-s $in -o $out",
    ]
    objects = []
    for source in CUDA_PLAIN_SOURCES:
        objects.append(Path(source).stem + ".o")
        lines += [f"build {objects[-1]}: compile {ROOT / source}"]
    for name, (source, macros) in cuda_units().items():
        objects.append(f"{name}.o")
        lines += [f"build {objects[-1]}: compile {ROOT / source}", f"  extra = {macros}"]
    lines += [f"build {output}: link {' '.join(objects)}", ""]
    return "\n".join(lines)


class NinjaBuild(build_ext):
    """Builds the extensions with ninja and lets the installation go on when that is not possible."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        kept = os.environ.get("EFFICIENT_ATTN_OBJECTS") or self.build_temp
        build_dir = Path(kept).resolve() / ext.name.rpartition("._")[2]
        build_dir.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            import ninja

            plan = ninja_file(output, build_dir) if ext.name == MODULE else self.cuda_plan(output)
            (build_dir / "build.ninja").write_text(plan)
            jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
            subprocess.check_call([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build_dir), "-j", jobs])
        except (ImportError, OSError, subprocess.CalledProcessError, CompileError) as error:
            raise CompileError(f"{ext.name} was not built: {error}; {WITHOUT[ext.name]}") from error

    def cuda_plan(self, output: Path) -> str:
        nvcc, archs = find_nvcc(), cuda_archs()
        if nvcc is None:
            raise CompileError("no nvcc in CUDA_HOME or CUDA_PATH, on PATH or in /usr/local/cuda/bin")
        architectures = ", ".join(f"sm_{arch}" for arch in archs)
        print(f"{CUDA_MODULE}: {nvcc} compiles {len(cuda_units())} units for {architectures}; this takes minutes")
        return cuda_ninja_file(output, nvcc, archs)


def extensions() -> list[Extension]:
    """The modules that the environment asks for; the CPU's is optional unless it is insisted on."""
    cpu, cuda = os.environ.get("EFFICIENT_ATTN_CPU") or "auto", os.environ.get("EFFICIENT_ATTN_CUDA") or "0"
    for name, given, allowed in (("CPU", cpu, ("0", "1", "auto")), ("CUDA", cuda, ("0", "1"))):
        if given not in allowed:
            raise SystemExit(f"EFFICIENT_ATTN_{name}={given} is not understood; use {' or '.join(allowed)}")
    found = []
    if cpu != "0":
        found.append(Extension(MODULE, sources=[*ISA_SOURCES, *PLAIN_SOURCES], optional=cpu != "1"))
    if cuda == "1":
        units = {source for source, _ in cuda_units().values()}
        found.append(Extension(CUDA_MODULE, sources=[*sorted(units), *CUDA_PLAIN_SOURCES], py_limited_api=True))
    elif "EFFICIENT_ATTN_CUDA" not in os.environ and find_nvcc() is not None:
        print(f"{CUDA_MODULE} is left out: {find_nvcc()} would take minutes. EFFICIENT_ATTN_CUDA=1 builds it")
    return found


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
    names, places = packages()
    setup(
        packages=names,
        package_dir=places,
        package_data={"efficient_attn": ["py.typed", "inspecting/page.html"], "efficient_attn.benchmarks": ["page/*"]},
        ext_modules=extensions(),
        cmdclass={"build_ext": NinjaBuild},
    )
