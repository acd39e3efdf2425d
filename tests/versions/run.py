"""A sample of the tests on other versions of what the package depends on, each in an environment of its own.

    make test-versions                                 all of them
    make test-versions ARGS="triton-3.9 numpy-oldest"  some
    make test-versions ARGS=--light                    without those that download PyTorch
    make test-versions ARGS="--every 3"                every third test of each sample

A light environment sees the packages of the one that runs this file, with the packages that it names in front. A whole
one has what pip chooses for the sdist (PyTorch with its CUDA libraries: 6 GB, minutes), and the package built from it.
Environments are kept in .venv-versions/, whose size is what --remove gives back.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / ".venv-versions"
TESTS = ROOT / "tests"
INTERPRETER = {"TRITON_INTERPRET": "1"}

CASES = "bits or blocks_16 or blocks_grouped or blocks_window or causal or dropout or few_queries_b or bias_b"

# name: environment variables, and what pytest is asked for below tests/.
SAMPLES: dict[str, tuple[dict[str, str], list[str]]] = {
    "contract": ({}, ["contract/test_conformance.py", "masks/test_masks.py", "-k", "not float16"]),
    "module": ({}, ["module/test_multihead.py"]),
    "kernels": (INTERPRETER, [f"kernels/triton/interpreted_{name}.py" for name in ("kernels", "plan", "linear")]),
    "conformance": (INTERPRETER, ["contract/test_conformance.py", "-k", f"-float32] and ({CASES}) or bits-bfloat16]"]),
    "compiled": ({}, ["kernels/triton/test_triton_compile.py", "-k", "compiled_now"]),
    "transformers": ({}, [f"integrations/test_{n}.py" for n in ("huggingface", "huggingface_layers", "left_padding")]),
}  # fmt: skip
TRITON = ("kernels", "conformance", "compiled")
WHOLE = tuple(name for name in SAMPLES if name != "compiled")  # its table is the checkout's, no wheel has it


class Environment(NamedTuple):
    """What is installed, which samples run in it, and of a whole one, which pip resolves anew, the Python."""

    requirements: list[str]
    samples: tuple[str, ...]
    whole: bool = False
    python: str = ""


ENVIRONMENTS = {
    # The interpreters of 3.5 and 3.6 take arrays of one element for numbers, as NumPy did before 2.4.
    "triton-3.5": Environment(["triton==3.5.0", "numpy==1.26.4"], TRITON),
    "triton-3.6": Environment(["triton==3.6.0", "numpy==1.26.4"], TRITON),
    "triton-3.7": Environment(["triton==3.7.1"], TRITON),
    "triton-3.9": Environment(["triton==3.9.0"], TRITON),
    "transformers-oldest": Environment(["transformers==5.20.2"], ("transformers",)),
    "transformers-newest": Environment(["transformers==5.24.0"], ("transformers",)),
    "numpy-oldest": Environment(["numpy==1.26.4"], ("contract", "module")),
    "oldest": Environment(["torch==2.10.0", "transformers==5.20.2", "numpy==1.26.4"], WHOLE, whole=True, python="3.10"),
    "newest": Environment(["torch", "triton", "transformers", "numpy"], WHOLE, whole=True, python="3.13"),
}


def interpreter(version: str) -> str | None:
    """A Python of this version, by its name on PATH or among pyenv's."""
    named = [shutil.which(f"python{version}")]
    named += sorted(map(str, Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python{version}")))
    for found in filter(None, named):  # pyenv's shims are there for versions that it does not run
        if subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return found
    return None


def install(place: Path, requirements: list[str], *, alone: bool) -> None:
    """Install by this environment's pip; `alone`: without what they require."""
    pip = [sys.executable, "-m", "pip", "--python", str(place / "bin" / "python"), "--disable-pip-version-check"]
    subprocess.check_call([*pip, "install", "--quiet", *(["--no-deps"] if alone else []), *requirements])


def make(name: str, environment: Environment) -> Path:
    """The environment, made unless it is there; a whole one gets the package as it is now."""
    place = PLACE / name
    if not (place / "made").exists():
        shutil.rmtree(place, ignore_errors=True)
        python = (environment.whole and interpreter(environment.python)) or sys.executable
        subprocess.check_call([python, "-m", "venv", "--without-pip", str(place)])
        if environment.whole:
            install(place, [*environment.requirements, "pytest", "hypothesis", "safetensors"], alone=False)
        else:
            install(place, environment.requirements, alone=True)
            (site,) = place.glob("lib/python*/site-packages")
            seen = sysconfig.get_path("purelib")  # with its .pth files, one of which is the editable package's
            (site / "seen.pth").write_text(f"import site; site.addsitedir({seen!r})\n")
        (place / "made").touch()
    if environment.whole:
        dist = place / "dist"
        shutil.rmtree(dist, ignore_errors=True)
        subprocess.check_call(
            [sys.executable, "-m", "build", "--sdist", "--outdir", str(dist), str(ROOT)], stdout=subprocess.DEVNULL
        )
        install(place, ["--force-reinstall", *map(str, dist.glob("*.tar.gz"))], alone=True)
    return place


def versions(place: Path) -> str:
    """What the environment's tests will import."""
    program = (
        "import sys; from importlib import metadata\n"
        "names = ('torch', 'triton', 'transformers', 'numpy')\n"
        "print('Python', sys.version.split()[0], *(f'{name} {metadata.version(name)}' for name in names), sep=', ')"
    )
    said = subprocess.run([place / "bin" / "python", "-c", program], capture_output=True, text=True, check=True)
    return said.stdout.strip()


def run(place: Path, sample: str, every: int) -> bool:
    """Whether a sample passes. Its folder is no checkout, so that the package is the one that is installed."""
    variables, arguments = SAMPLES[sample]
    paths = [str(TESTS / a) if a.endswith(".py") else a for a in arguments]
    paths = [a if before != "-k" else f"({a}) and not gpu" for before, a in zip(["", *paths], paths, strict=False)]
    options = ["-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    options += ["-m", "not slow and not gpu", "-W", "ignore", "-o", "addopts=--strict-markers", "-p", "every"]
    command = [place / "bin" / "python", "-c", "import sys, pytest; sys.path.pop(0); sys.exit(pytest.main())"]
    variables = {
        **os.environ,
        **variables,
        "PYTHONPATH": str(ROOT / "tests" / "versions"),
        "EVERY": str(every if sample != "compiled" else 1),
    }
    started = time.monotonic()
    result = subprocess.run([*command, *options, *paths], capture_output=True, text=True, cwd=place, env=variables)
    lines = result.stdout.strip().splitlines() or ["nothing was said"]
    print(f"  {sample}: {lines[-1].strip('= ')} ({time.monotonic() - started:.0f} s)", flush=True)
    if result.returncode:
        print(f"exit code {result.returncode}", result.stdout[-6000:], result.stderr[-2000:], sep="\n")
    return result.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(ENVIRONMENTS)}; default: all")
    parser.add_argument("--light", action="store_true", help="leave out those that download PyTorch")
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="every N-th test of each sample, but all of `compiled`"
    )
    parser.add_argument("--remove", action="store_true", help="remove each environment when its tests are done")
    chosen = parser.parse_args()
    unknown = set(chosen.names) - set(ENVIRONMENTS)
    if unknown:
        parser.error(f"no environment {', '.join(sorted(unknown))}; there are {', '.join(ENVIRONMENTS)}")
    if chosen.every < 1:
        parser.error(f"--every takes 1 or more; got {chosen.every}")
    failed = []
    for name, environment in ENVIRONMENTS.items():
        if (chosen.names and name not in chosen.names) or (chosen.light and environment.whole):
            continue
        print(f"{name}: {', '.join(environment.requirements)}", flush=True)
        place = make(name, environment)
        print(f"  {versions(place)}", flush=True)
        failed += [f"{name} {sample}" for sample in environment.samples if not run(place, sample, chosen.every)]
        if chosen.remove:
            shutil.rmtree(place)
    print("failed: " + ", ".join(failed) if failed else "every sample passed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
