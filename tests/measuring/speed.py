"""The core cells under pytest-benchmark, to guard against regressions on one machine. Collected only when it is named:

pytest tests/measuring/speed.py --benchmark-autosave                                            before a change
pytest tests/measuring/speed.py --benchmark-compare --benchmark-compare-fail=median:10%         after it
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("sklearn")

from efficient_attn import attention
from efficient_attn.benchmarks import cases
from efficient_attn.benchmarks.suites import ops
from efficient_attn.measuring import calls, inputs

LENGTH = 2048
METHODS = (
    "dense",
    "sliding_window:left=128,right=128",
    "bigbird:block=64,window=3,global_blocks=2,random_blocks=2",
    "topk_blocks:block=64,fraction=0.1",
    "linformer:rank=128",
    "nystrom:landmarks=64",
    "performer:features=128",
    "linear",
)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads of a busy machine wait for each other; one is the steadier measure of a kernel."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("method", METHODS)
def test_operator(benchmark, method, mode):
    if mode == "decode" and method not in cases.DECODES:
        pytest.skip("not for one query alone")
    config = {"method": method, "seqlen": LENGTH, "mode": mode, "dtype": "float32", **cases.OPERATOR_SHAPE}
    benchmark.group = mode
    benchmark(ops.bound(config))


@pytest.mark.parametrize("percent", [50, 10])
def test_sparse(benchmark, percent):
    mask = inputs.random_blocks(LENGTH, LENGTH, percent / 100)
    qkv = inputs.photograph_qkv(LENGTH, **cases.OPERATOR_SHAPE)
    benchmark.group = "random blocks"
    benchmark(calls.binder("fwd", qkv)(lambda q, k, v: attention(q, k, v, mask=mask)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes(benchmark, dtype):
    qkv = inputs.photograph_qkv(LENGTH, dtype=getattr(torch, dtype), **cases.OPERATOR_SHAPE)
    benchmark.group = "dense, dtypes"
    benchmark(calls.binder("fwd", qkv)(attention))
