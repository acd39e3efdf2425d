"""Fixtures for every test: uninitialised memory is NaN, and a backend that is not built skips with its reason.

Triton's kernels are one of the backends in two cases: on a machine with a GPU (marked gpu), and in a process that was
started with TRITON_INTERPRET=1, where they are the only one (kernels/triton/test_triton.py starts such processes). So
are the CUDA kernels, with a GPU where they are built, and alone in a process with EFFICIENT_ATTN_CUDA_EMULATOR
(kernels/cuda/test_cuda_emulator.py).
"""

import os
import signal

import pytest
import torch
from support.cases import PLAIN_CALL

from efficient_attn import backends
from efficient_attn.backends.cuda import attention as cuda

# Tests that run side by side (make test) have one thread each, and so have the processes that they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))

# What a script starts in its background ignores Ctrl-C, and so would every process that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill every torch.empty with NaN, so that an output element that no kernel writes fails its test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread():
    """Small operators on several threads crawl when other tests keep the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = bool(os.environ.get("EFFICIENT_ATTN_CUDA_EMULATOR"))
ON_GPU = () if INTERPRETED or EMULATED else ("triton", "cuda")  # backends whose tensors lie on a GPU
if INTERPRETED:
    from support.interpreter import patch_once

    patch_once()


def tested_backends():
    """The backends that this process tests, as parameters."""
    if INTERPRETED:
        return [pytest.param("triton", marks=pytest.mark.interpreter)]
    if EMULATED:
        return [pytest.param("cuda", marks=pytest.mark.interpreter)]
    others = [name for name in backends.BACKENDS if name not in ON_GPU]
    if not torch.cuda.is_available():
        return others
    return others + [pytest.param(name, marks=pytest.mark.gpu) for name in ON_GPU]


@pytest.fixture
def device(backend):
    """Where the backend computes."""
    return torch.device("cuda" if backend in ON_GPU else "cpu")


@pytest.fixture(params=tested_backends())
def backend(request):
    """Each backend in turn. Only a build without native code (EFFICIENT_ATTN_CPU=0, no nvcc) may skip its backend."""
    if request.param == "cuda" and "cuda" in ON_GPU and cuda.missing():
        pytest.skip(cuda.missing())
    reasons = backends.BACKENDS[request.param].attention.not_supported_reasons(
        PLAIN_CALL._replace(
            device=torch.device("cuda" if request.param in ON_GPU else "cpu"),
            dtype=torch.bfloat16 if request.param == "cuda" else torch.float32,
        )
    )
    if reasons and os.environ.get("EFFICIENT_ATTN_CPU") == "0":
        pytest.skip("; ".join(reasons))
    assert not reasons, f"backend {request.param} should serve a plain call: {reasons}"
    return request.param


def pytest_terminal_summary(terminalreporter):
    """What was skipped, a line for each reason."""
    reasons = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons.setdefault(reason.removeprefix("Skipped: "), []).append(report.nodeid)
    for reason, names in sorted(reasons.items()):
        files = {name.partition("::")[0] for name in names}
        where = files.pop() if len(files) == 1 else f"{len(files)} files"
        terminalreporter.write_line(f"skipped {len(names)} in {where}: {' '.join(reason.split())}")


def pytest_collection_modifyitems(items):
    """Tests that place their tensors on no device leave the GPU's kernels to those that do.

    Files of few and long tests come first: at the end of a run one would keep one process busy while the others wait.
    EFFICIENT_ATTN_SHARD=k/n leaves every n-th test, from the k-th: `make gpu-check` runs the shares side by side.
    """
    items[:] = [
        item
        for item in items
        if "device" in item.fixturenames
        or "backend" not in item.fixturenames
        or item.callspec.params["backend"] not in ON_GPU
    ]
    items.sort(key=lambda item: "kernels" not in item.path.parts)
    share = os.environ.get("EFFICIENT_ATTN_SHARD")
    if share:
        first, step = map(int, share.split("/"))
        items[:] = items[first::step]
