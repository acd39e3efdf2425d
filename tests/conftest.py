"""Fixtures for every test: uninitialised memory is NaN, and a backend that is not built skips with its reason."""

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


@pytest.fixture(params=list(backends.BACKENDS))
def backend(request):
    """Each backend in turn. Only a build without native code (EFFICIENT_ATTN_CPU=0) may skip the CPU one."""
    reasons = backends.BACKENDS[request.param].not_supported_reasons(PLAIN_CALL)
    if reasons and os.environ.get("EFFICIENT_ATTN_CPU") == "0":
        pytest.skip("; ".join(reasons))
    assert not reasons, f"backend {request.param} should serve a plain call: {reasons}"
    return request.param
