"""Fixtures for every test: uninitialised memory is NaN, and a backend that is not built skips with its reason.

Triton's kernels are one of the backends in two cases: on a machine with a GPU (marked gpu), and in a process that was
started with TRITON_INTERPRET=1, where they are the only one (tests/test_triton.py starts such processes). The CUDA
kernels are the only one in a process with EFFICIENT_ATTN_CUDA_TWIN (tests/test_cuda_host.py), and else none.
"""

import os

import pytest
import torch

from efficient_attn import backends
from efficient_attn.backends.call import Call

PLAIN_CALL = Call(torch.device("cpu"), torch.float32, None, 1, 1, 1, 8, 8, 8, 8, False, 0.0)


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
TWIN = bool(os.environ.get("EFFICIENT_ATTN_CUDA_TWIN"))
if INTERPRETED:
    from interpreter import patch_once

    patch_once()


def tested_backends():
    """The backends that this process tests, as parameters."""
    if INTERPRETED:
        return [pytest.param("triton", marks=pytest.mark.interpreter)]
    if TWIN:
        return [pytest.param("cuda", marks=pytest.mark.interpreter)]
    others = [name for name in backends.BACKENDS if name not in ("triton", "cuda")]
    return [*others, pytest.param("triton", marks=pytest.mark.gpu)] if torch.cuda.is_available() else others


@pytest.fixture
def device(backend):
    """Where the backend computes."""
    return torch.device("cuda" if backend == "triton" and not INTERPRETED else "cpu")


@pytest.fixture(params=tested_backends())
def backend(request):
    """Each backend in turn. Only a build without native code (EFFICIENT_ATTN_CPU=0) may skip the CPU one."""
    place = "cuda" if request.param == "triton" and not INTERPRETED else "cpu"
    reasons = backends.BACKENDS[request.param].not_supported_reasons(
        PLAIN_CALL._replace(
            device=torch.device(place), dtype=torch.bfloat16 if request.param == "cuda" else torch.float32
        )
    )
    if reasons and os.environ.get("EFFICIENT_ATTN_CPU") == "0":
        pytest.skip("; ".join(reasons))
    assert not reasons, f"backend {request.param} should serve a plain call: {reasons}"
    return request.param


def pytest_collection_modifyitems(items):
    """Tests that place their tensors on no device leave the GPU's kernels to those that do.

    EFFICIENT_ATTN_SHARD=k/n leaves every n-th test, from the k-th: `make gpu-check` runs the shares side by side.
    """
    if not INTERPRETED:
        on_gpu = [
            item for item in items if getattr(item, "callspec", None) and "triton" in item.callspec.params.values()
        ]
        items[:] = [item for item in items if item not in on_gpu or "device" in item.fixturenames]
    share = os.environ.get("EFFICIENT_ATTN_SHARD")
    if share:
        first, step = map(int, share.split("/"))
        items[:] = items[first::step]
