"""How the CUDA module is built and found, what its launcher does, and what is said where it cannot serve. No GPU.

What takes minutes, compiling every unit, is `make cuda`; here is one unit, where nvcc is.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from setuptools.errors import CompileError
from support.cases import PLAIN_CALL

from efficient_attn import BlockMask, CudaError, explain
from efficient_attn.backends.cuda import attention as cuda
from efficient_attn.backends.cuda import linear_attention as cuda_linear
from efficient_attn.backends.words import pack_attention

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
spec = importlib.util.spec_from_file_location("efficient_attn_setup", ROOT / "setup.py")
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)

needs_nvcc = pytest.mark.skipif(setup.find_nvcc() is None, reason="nvcc is not here")
built = pytest.mark.skipif(bool(cuda.missing()), reason="efficient_attn._cuda is not built (make cuda)")


# --- setup.py ---


@pytest.mark.parametrize(
    ("named", "archs"),
    [("", ["80", "90a"]), ("90a", ["90a"]), ("90a;80;80", ["80", "90a"]), ("120f, 86 100a", ["86", "100a", "120f"])],
)
def test_the_architectures(named: str, archs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFICIENT_ATTN_CUDA_ARCHS", named)
    assert setup.cuda_archs() == archs


@pytest.mark.parametrize("named", ["75", "sm_80", "8.0", "80;volta", ";"])
def test_wrong_architectures_are_named(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFICIENT_ATTN_CUDA_ARCHS", named)
    with pytest.raises(CompileError, match=re.escape(f"EFFICIENT_ATTN_CUDA_ARCHS={named} ")):
        setup.cuda_archs()


@pytest.mark.parametrize(
    ("wanted", "nvcc", "extension"),
    [("0", "nvcc", None), (None, None, None), (None, "nvcc", None), ("1", None, False), ("1", "nvcc", False)],
)
def test_it_is_built_only_where_it_is_asked_for(
    wanted: str | None, nvcc: str | None, extension: bool | None, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """extension: whether its failure would be forgiven; None: it is not tried, which is said where it could be."""
    monkeypatch.delenv("EFFICIENT_ATTN_CUDA", raising=False)
    if wanted is not None:
        monkeypatch.setenv("EFFICIENT_ATTN_CUDA", wanted)
    monkeypatch.delenv("EFFICIENT_ATTN_CPU", raising=False)
    monkeypatch.setattr(setup, "find_nvcc", lambda: nvcc)
    found = {e.name: e.optional for e in setup.extensions()}
    assert found.get("efficient_attn._cuda") is extension
    assert found["efficient_attn._cpu"] is True
    assert ("EFFICIENT_ATTN_CUDA=1 builds it" in capsys.readouterr().out) == (wanted is None and nvcc is not None)


def test_a_word_that_is_not_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFICIENT_ATTN_CUDA", "yes")
    with pytest.raises(SystemExit, match="EFFICIENT_ATTN_CUDA=yes is not understood"):
        setup.extensions()


def test_cuda_home_comes_before_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup.find_nvcc() is None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    assert setup.find_nvcc() == str(tmp_path / "bin" / "nvcc")


def test_an_nvcc_that_lies_about_is_not_started(tmp_path: Path) -> None:
    """Its minutes are asked for, not found out: a build that says nothing of CUDA names the variable and goes on."""
    calls, fake = tmp_path / "calls", tmp_path / "bin" / "nvcc"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    fake.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "EFFICIENT_"))}
    environment |= {"PATH": f"{fake.parent}{os.pathsep}{environment['PATH']}", "EFFICIENT_ATTN_CPU": "0"}
    command = [sys.executable, "setup.py", "build", "--build-base", str(tmp_path / "build")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"{fake} would take minutes. EFFICIENT_ATTN_CUDA=1 builds it" in result.stdout
    assert not calls.exists() and not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize(("wanted", "status"), [("1", 1), ("0", 0)])
def test_without_nvcc(wanted: str, status: int, tmp_path: Path) -> None:
    environment = {
        **os.environ, "EFFICIENT_ATTN_CUDA": wanted, "EFFICIENT_ATTN_CPU": "0", "CUDA_HOME": str(tmp_path / "none"),
    }  # fmt: skip
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == status, result.stdout + result.stderr
    assert ("no nvcc in CUDA_HOME" in result.stderr) == (status == 1)
    assert not list(tmp_path.rglob("*.so"))


def test_the_plan_builds_every_unit_that_is_called() -> None:
    units = setup.cuda_units()
    chosen = {(Path(source).stem, *re.findall(r"=(\w+)", macros)) for source, macros in units.values()}
    assert chosen == {
        (f"attention_{op}", f"k{dtype}", str(head), extras)
        for op in ("forward", "backward")
        for dtype in ("BFloat16", "Float16")
        for head in (64, 128, 256)
        for extras in ("true", "false")
    } | {("attention_decode", f"k{dtype}") for dtype in ("BFloat16", "Float16")}
    plan = setup.cuda_ninja_file(Path("/out/_cuda.so"), "/some/nvcc", ["80", "90a"])
    assert sum(plan.count(f"/{source}\n") for source in {source for source, _ in units.values()}) == len(units)
    assert "code=[sm_80,compute_80] -gencode arch=compute_90a,code=sm_90a" in plan
    assert "-cudart static" in plan and "-lcuda" not in plan and "torch/include" not in plan
    assert "-lineinfo" not in plan and "-G" not in plan.split()
    linked = plan.split("build /out/_cuda.so: link ")[1].split()
    assert set(linked) == {f"{name}.o" for name in (*units, "linear_attention", "module", "launch")}


# --- the launcher ---


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one unit and the launcher, compiled as setup.py does but for sm_80 alone, and linked with a runtime
    that only remembers (cuda_launch/): `harness` for the launcher, `unit_harness` for both. No warning is let
    pass. The kernels of Hopper are launched, though empty in code for sm_80."""
    folder, tests, nvcc = tmp_path_factory.mktemp("cuda"), HERE / "cuda_launch", setup.find_nvcc()
    plan = setup.cuda_ninja_file(folder / "_cuda.so", nvcc, ["80"]).replace("HOPPER=false", "HOPPER=true")
    (folder / "build.ninja").write_text(plan.replace("flags = ", "flags = -Werror all-warnings ", 1))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    objects = ["launch.o", "attention_forward_bfloat16_64.o"]
    runs = [[shutil.which("ninja", path=path), "-C", folder, *objects]]
    for name in ("harness", "unit_harness"):
        sources = [tests / f"{name}.cpp", tests / "recorder.cpp", *objects[: 1 if name == "harness" else 2]]
        flags = ["-std=c++17", "-O1", "-cudart", "none", "-nodlink", "-Xcompiler=-Wall,-Wextra,-Werror,-pthread"]
        runs.append([nvcc, *flags, f"-I{ROOT / 'csrc'}", *sources, "-o", folder / name])
    for command in runs:
        result = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    return folder


@needs_nvcc
def test_the_launcher_on_a_runtime_that_remembers(linked: Path) -> None:
    result = subprocess.run([linked / "harness"], capture_output=True, text=True)
    assert result.returncode == 0 and "checks hold" in result.stdout, result.stdout + result.stderr


@needs_nvcc
@pytest.mark.parametrize(
    ("capability", "row_stride", "flags", "launched"),
    [
        # tiles of 128 queries: 2 * 4 * 3; on Hopper as many blocks as multiprocessors, here all tiles
        (90, 64, 0, [("sm90", "attention_forward", 24, 0)]),
        (90, 64, 1, [("sm90", "attention_forward", 24, 0), ("sm80", "attention_forward_safe", 24, 0)]),
        (90, 60, 0, [("sm80", "attention_forward", 24, 0)]),  # rows that no tensor map describes
        (80, 64, 1, [("sm80", "attention_forward", 24, 1), ("sm80", "attention_forward_safe", 24, 1)]),
    ],
)
def test_what_a_unit_launches(capability: int, row_stride: int, flags: int, launched: list, linked: Path) -> None:
    command = [linked / "unit_harness", *map(str, (capability, row_stride, flags))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    *lines, asked = result.stdout.splitlines()
    maps = [line.split()[1:] for line in lines if line.startswith("map")]
    kernels = [line.split() for line in lines if not line.startswith("map")]
    found = []
    for name, blocks, _, _, device in kernels:
        family, kernel = re.search(r"4(sm\d0).*?\d\d(attention_[a-z_]+)I", name).groups()
        found.append((family, kernel, int(blocks), int(device)))
    assert found == launched
    hopper = launched[0][0] == "sm90"
    assert maps == ([["300", "64"], ["500", "128"], ["500", "128"]] if hopper else [])
    large = {name for name, _, _, shared, _ in kernels if int(shared) > 48 * 1024}
    assert asked == f"asked for shared memory {len(large)} times" and len(large) >= hopper


# --- the module, where it is built ---


@built
def test_it_needs_the_driver_only() -> None:
    found = subprocess.run(["readelf", "-d", cuda.kernels().__file__], capture_output=True, text=True, check=True)
    needed = re.findall(r"\(NEEDED\).*\[(\S+)\]", found.stdout)
    assert needed and not [name for name in needed if re.match(r"libcu|libtorch|libc10|libnv", name)]


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    module = cuda.kernels()
    with pytest.raises(CudaError, match=r"cudaGetDevice failed: .*need an NVIDIA GPU"):
        module.most_shared_bytes(0)
    reasons = cuda.not_supported_reasons(PLAIN_CALL._replace(dtype=torch.bfloat16))
    assert reasons == ["it runs on CUDA tensors; these are on cpu"]
    how = (None, None, False, 0, "identity", 1.0)
    for n in (8, 200):  # few queries have kernels of their own
        q, lse, mask = (
            torch.zeros(1, 1, n, 16, dtype=torch.bfloat16),
            torch.zeros(1, 1, n),
            BlockMask(n, n).arrays(False),
        )
        for call in (
            lambda q=q, mask=mask: cuda.attention_forward(q, q, q, None, mask, 1.0, 0.0, None),
            lambda q=q, mask=mask, lse=lse: cuda.attention_backward(
                q, None, None, q, q, q, None, q, lse, mask, 1.0, 0.0, None, False
            ),
            lambda q=q: cuda_linear.linear_attention_forward(q, q, q, *how),
            lambda q=q, lse=lse: cuda_linear.linear_attention_backward(
                q, None, q, q, q, None, None, q, lse, lse, *how[2:]
            ),
        ):
            with pytest.raises(CudaError, match="need an NVIDIA GPU"):
                call()
    words = pack_attention(q, q, q, None, q, lse, mask, 1.0, 0.0, None)[1]
    assert module.flag_count(words, False) == 0
    with pytest.raises(ValueError, match="too short"):
        module.attention_forward(words[:-8], 0, 0, 0, 0)


# --- what explain() knows ---


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], architectures: str = "80;90a") -> None:
    """A GPU that is not there, and a module that was built."""
    monkeypatch.delenv("EFFICIENT_ATTN_CUDA_EMULATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    module = SimpleNamespace(
        architectures=architectures,
        shared_bytes=lambda widest: 132 * 1024 if widest > 128 else 66 * 1024,
        most_shared_bytes=lambda device: 99 * 1024 if capability in ((8, 6), (8, 9)) else 163 * 1024,
    )
    monkeypatch.setattr(cuda, "kernels", lambda: module)


def reasons(head_dim: int = 64) -> list[str]:
    call = PLAIN_CALL._replace(device=torch.device("cuda", 0), dtype=torch.float16, D=head_dim, Dv=head_dim)
    return cuda.not_supported_reasons(call)


def test_reasons_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
        gpu(monkeypatch, capability)
        assert reasons() == []
    gpu(monkeypatch, (7, 5))
    assert reasons() == ["it needs compute capability 8.0 or newer; Some GPU has 7.5"]
    gpu(monkeypatch, (8, 6))
    (why,) = reasons(head_dim=200)
    assert why.startswith("head dimensions 200 and 200 take 132 KiB of shared memory a block")
    gpu(monkeypatch, (9, 0))
    assert reasons(head_dim=200) == []
    gpu(monkeypatch, (8, 0), "90a")
    (why,) = reasons()
    assert why.startswith("it was built for 90a and Some GPU has 8.0") and "EFFICIENT_ATTN_CUDA_ARCHS" in why


def test_a_device_without_a_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch.device("cuda") is, which a tensor never has but a call that is only asked about may."""
    gpu(monkeypatch, (9, 0))
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(cuda.kernels(), "most_shared_bytes", lambda index: asked.append(index) or 2**18)
    call = PLAIN_CALL._replace(device=torch.device("cuda"), dtype=torch.float16)
    assert cuda.not_supported_reasons(call) == []
    assert cuda.not_supported_reasons(call._replace(device=torch.device("cuda", 1))) == []
    assert asked == [3, 1] and cuda.place(torch.device("cuda")) == (3, 77)


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("80;90a", (8, 0), True), ("80;90a", (8, 9), True), ("80;90a", (9, 0), True), ("80;90a", (12, 0), True),
        ("90a", (9, 0), True), ("90a", (10, 0), False), ("90a", (8, 0), False), ("86;90a", (8, 0), False),
        ("86", (9, 0), True), ("90a;100f", (10, 3), True), ("90a;100f", (12, 0), False), ("90a;100a", (10, 3), False),
    ],
)  # fmt: skip
def test_which_gpus_a_build_runs_on(architectures: str, capability: tuple[int, int], runs: bool) -> None:
    assert cuda.has_code(architectures, capability) == runs


def test_a_missing_module_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "MODULE", "efficient_attn._not_there")
    monkeypatch.setattr(cuda, "missing", cuda.missing.__wrapped__)
    monkeypatch.setattr(cuda, "kernels", cuda.kernels.__wrapped__)
    monkeypatch.setattr(cuda, "emulator_path", lambda: "")
    (why,) = cuda.not_supported_reasons(PLAIN_CALL._replace(device=torch.device("meta"), dtype=torch.float16))[:1]
    assert "is not built or cannot be loaded" in why and "make cuda" in why


def test_explain_says_experimental() -> None:
    q = torch.randn(1, 1, 8, 8)
    said = str(explain(q, q, q))
    assert "  cuda (EXPERIMENTAL: never run on a GPU): " in said and "  cpu: " in said


# --- make gpu-sanitize ---


def sanitize():
    sys.path.insert(0, str(ROOT / "benchmarks" / "tools"))
    try:
        import gpu_sanitize
    finally:
        sys.path.remove(str(ROOT / "benchmarks" / "tools"))
    return gpu_sanitize


def test_gpu_sanitize_shows_its_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitize().main(["--out", str(tmp_path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert all(f"--tool {tool} " in said for tool in ("memcheck", "racecheck", "initcheck", "synccheck"))
    assert said.count(str(ROOT / "tests" / "kernels" / "cuda" / "gpu_probe.py")) == 4


def test_its_verdicts() -> None:
    log = "========= COMPUTE-SANITIZER\n150 configurations, 0 of them outside the error budget\n"
    log += "========= ERROR SUMMARY: 0 errors\n"
    good = sanitize().verdict("memcheck", 0, log)
    assert good == "memcheck: passed: 150 configurations, 0 of them outside the error budget; ERROR SUMMARY: 0 errors"
    assert sanitize().verdict("racecheck", 9, log).startswith("racecheck: FAILED: 150")
    assert "not done in" in sanitize().verdict("racecheck", None, log)
    assert sanitize().verdict("racecheck", 1, "Error: no device").endswith("exit status 1: Error: no device")
