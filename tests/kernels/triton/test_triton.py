"""The Triton kernels in Triton's interpreter, in processes of their own: Triton reads the switch when it is
imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from efficient_attn import BlockMask, UnsupportedError, attention, explain
from efficient_attn.masks import MaskArrays

pytest.importorskip("triton")
HERE = Path(__file__).resolve().parent
TESTS = HERE.parents[1]
FILES = ("kernels", "edges", "modifiers", "plan", "linear", "orders")  # interpreted_*.py


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)


def pytest_passes(*arguments: str, at_least: int) -> None:
    """Run pytest in the interpreter. Fails unless that many tests passed: a selection that no longer fits the names
    would run fewer, or none."""
    result = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
    said = result.stdout[-4000:] + result.stderr[-1000:]
    found = re.search(r"(\d+) passed", said)
    passed = int(found[1]) if found else 0
    assert passed >= at_least, f"{passed} tests passed of at least {at_least}: {' '.join(arguments)}\n{said}"
    assert result.returncode == 0, said


def test_conformance() -> None:
    """In float32 without the longest cases, those that differ from another in a size alone, and those that
    interpreted_modifiers.py and interpreted_orders.py have, too; some with weights, and some where types matter: what
    is loaded, rounded and stored. All of them: below."""
    left_out = "softcap or sinks or alibi or table or parts or neighborhood or blocks_16_alike or blocks_128"
    left_out += " or few_queries_bits or few_queries_blocks_of or few_queries_of_many or few_queries_window"
    left_out += " or long_head_dim_128 or bits_sparse or causal_long or dense_long or window_narrow"
    left_out += " or bias_per_batch or bias_per_head or bias_per_query or bias_scalar or bias_heads"
    left_out += " or head_dim_1- or head_dim_8- or head_dim_40 or head_dim_64 or head_dim_200"
    left_out += " or value_dim_1- or value_dim_8- or value_dim_40 or value_dim_64 or value_dim_80 or value_dim_128"
    outputs = f"-float32] and not returned and not ({left_out})"
    of_heads = "one_query_grouped or lengths- or dropout_grouped"
    of_mean = "bottom_right or multi_query or dropout_blocks or bias_f"
    weights = f"returned and -float32] and (heads and ({of_heads}) or mean and ({of_mean}))"
    some = "head_dim_80 or large"
    cases = (
        f"{some} or value_dim_3- or causal_bottom_right- or blocks_16- or per_key or dropout- or softcap_sinks_table-"
    )
    halves = f"not returned and (-bfloat16 and ({cases}) or -float16 and ({some}))"
    selection = f"({outputs}) or ({weights}) or ({halves})"
    pytest_passes(str(TESTS / "contract" / "test_conformance.py"), f"-k={selection}", at_least=85)


def test_statistics_of_the_weights() -> None:
    cases = (
        "no_keys or no_queries or head_dim_200 or bottom_right_empty or lengths- or bits_shared or softcap_sinks_table-"
    )
    selection = f"not refusals and not gradients and not threads and (not every_case or -float32] and ({cases}))"
    pytest_passes(str(TESTS / "insight" / "test_statistics.py"), f"-k={selection}", at_least=30)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_statistics_of_every_case(dtype: str) -> None:
    selection = f"every_case and -{dtype}]"
    pytest_passes(str(TESTS / "insight" / "test_statistics.py"), f"-k={selection}", at_least=100)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_conformance_in_whole(dtype: str) -> None:
    pytest_passes(str(TESTS / "contract" / "test_conformance.py"), f"-k-{dtype}]", at_least=75)


def test_what_only_the_kernels_promise() -> None:
    """Of tokens in an order without the cases that another holds: a permutation, runs and subsets that come without
    lists or a bias, too."""
    files = [str(HERE / f"interpreted_{name}.py") for name in FILES]
    orders = "permutation or runs] or queries] or keys] or bias] or bias_rows or dropout] or lists]"
    linear = "equals_the_definition and not float32"
    selection = f"not (interpreted_orders and ({orders})) and not (interpreted_linear and {linear})"
    pytest_passes(*files, f"-k={selection}", at_least=95)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "tests"), [("linear", 23), ("orders", 24)])
def test_what_only_the_kernels_promise_in_whole(file: str, tests: int) -> None:
    pytest_passes(str(HERE / f"interpreted_{file}.py"), at_least=tests)


@pytest.mark.parametrize("selection", [pytest.param("no_such_name", marks=pytest.mark.slow), "zero_normaliser"])
def test_a_selection_of_too_few_tests_fails(selection: str) -> None:
    with pytest.raises(AssertionError, match=r"[01] tests passed of at least 2"):
        pytest_passes(str(HERE / "interpreted_linear.py"), "-k", selection, at_least=2)


def test_linear_attention_under_every_feature_map() -> None:
    cases = "equals_the_definition and (float32 and (odd or no-values or causal-masked) or bfloat16 and odd)"
    pytest_passes(str(TESTS / "methods" / "test_linear_attention.py"), "-k", cases, at_least=17)


def test_cpu_tensors_are_refused_without_the_interpreter() -> None:
    q = torch.randn(1, 1, 8, 8)
    with pytest.raises(UnsupportedError, match="TRITON_INTERPRET=1"):
        attention(q, q, q, backend="triton")
    answer = explain(q, q, q)
    assert answer.backend != "triton" and "CUDA tensors" in answer.reasons["triton"][0]


def test_the_interpreter_is_taken_by_name_only() -> None:
    program = (
        "import torch, efficient_attn as ea; q = torch.randn(1, 1, 8, 8); "
        "print(ea.explain(q, q, q).backend, ea.explain(q, q, q, backend='triton').backend)"
    )
    auto, named = run("-c", program).stdout.split()
    assert auto in ("cpu", "reference") and named == "triton"


def test_grids_come_from_shapes_alone() -> None:
    """A mask on the meta device, without data, will do: nothing that sizes a launch waits for the GPU."""
    from efficient_attn.backends.triton import shared

    mask = BlockMask.from_dense(torch.rand(200, 300) < 0.5, block_size=(48, 32)).to("meta").arrays(False)
    assert shared.tile_count(200, 16, mask, 0) == 15
    assert 0 <= shared.key_tile_count(300, 32, mask) <= 10
    assert not shared.lists_nothing(mask) and shared.hides_pairs(mask, None)


def test_kernels_and_their_steps_have_short_signatures() -> None:
    """Pointers, strides and constants are passed in tuples (kernels/tiles.py)."""
    from triton.runtime.jit import JITFunction

    from efficient_attn.backends.triton import shared

    functions = {name: f for name, f in vars(shared.kernels()).items() if isinstance(f, JITFunction)}
    assert {"attention_forward_kernel", "bias_gradient_kernel", "sums_kernel", "mask_scores"} <= set(functions)
    kernels = {name for name in functions if name.endswith("_kernel")}
    assert all(len(f.arg_names) < (20 if name in kernels else 13) for name, f in functions.items())


class Noted:
    """Stands for a kernel: a launch is noted, and nothing runs."""

    def __init__(self, name: str, launches: list[str]) -> None:
        self.name, self.launches = name, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(isinstance(size, int) for size in grid)
        return lambda *arguments, **options: self.launches.append(self.name)


class Allocations(TorchDispatchMode):
    """Notes the largest tensor that anything makes."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not made._is_view():
            self.largest = max(self.largest, made.numel())
        return made


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that the backend would launch."""
    from efficient_attn.backends.triton import shared

    noted: list[str] = []
    space = {
        k: Noted(k, noted) if k.endswith("_kernel") else v for k, v in vars(shared.kernels()).items() if k[:2] != "__"
    }
    monkeypatch.setattr(shared, "kernels", lambda: type("Kernels", (), space))
    return noted


@pytest.mark.parametrize("q_len", [1, 2048])
def test_a_launch_reads_no_tensor_and_allocates_what_is_linear(q_len: int, launches: list[str]) -> None:
    """On the meta device a tensor has no values: whatever waits for the GPU there raises here."""
    from efficient_attn.backends.triton import attention as backend

    length = 2048
    q, g = (torch.empty(2, 8, q_len, 16, device="meta") for _ in range(2))
    k, v = (torch.empty(2, 2, length, 16, device="meta") for _ in range(2))
    lists = BlockMask.from_dense(torch.ones(1, 8, q_len, length, dtype=torch.bool).tril(9)).with_lengths([7, length])
    lists.transposed()
    masks = [lists, BlockMask(q_len, length, window=(9, 2), window_offset=length - q_len)]
    for mask in (MaskArrays(), *(m.to("meta").arrays(True) for m in masks)):
        for bias in (None, torch.empty(1, 1, 1, length, device="meta")):
            for seed in (None, torch.empty((), dtype=torch.int64, device="meta")):
                how = (mask, -0.5, 0.0 if seed is None else 0.1, seed)
                launches.clear()
                with Allocations() as seen:
                    out, lse = backend.attention_forward(q, k, v, bias, *how)
                    backend.attention_backward(g, lse, None, q, k, v, bias, out, lse, *how, bias is not None)
                expected = {"attention_forward_kernel", "delta_kernel", "key_gradient_kernel", "query_gradient_kernel"}
                expected |= {"bias_gradient_kernel"} if bias is not None else set()
                expected |= {"merge_kernel"} if q_len == 1 and mask.indptr is None and seed is None else set()
                assert expected <= set(launches)
                # Results, delta and flags; of the few queries also a partial result a split.
                assert seen.largest <= max(q.numel() * (32 if q_len == 1 else 1), k.numel())


def test_statistics_read_no_tensor_either(launches: list[str]) -> None:
    from efficient_attn.backends.statistics import Wanted
    from efficient_attn.backends.triton import statistics

    length = 2048
    q, k = torch.empty(2, 8, length, 16, device="meta"), torch.empty(2, 2, length, 16, device="meta")
    rows, sets = torch.empty(40, 2, 8, length, device="meta"), torch.empty(1, length, dtype=torch.int32, device="meta")
    lists = BlockMask.from_dense(torch.ones(1, 8, length, length, dtype=torch.bool).tril(9)).with_lengths([7, length])
    lists.transposed()
    for mask in (MaskArrays(), lists.to("meta").arrays(True)):
        launches.clear()
        wanted = Wanted(8, True, rows, sets, 3, 64, 0, 64.0)
        with Allocations() as seen:
            found = statistics.attention_statistics(q, k, None, mask, 0.5, wanted, 2.0, torch.empty(8, device="meta"))
        assert {"row_statistics_kernel", "received_kernel", "mass_map_kernel"} <= set(launches)
        assert launches.count("received_kernel") == 2  # 41 weightings
        assert seen.largest <= rows.numel() + rows[0].numel() and found.map.shape == (2, 8, 32, 32)


def test_linear_attention_reads_no_tensor_either(launches: list[str]) -> None:
    from efficient_attn.backends.triton import linear_attention as triton_linear

    q, k, v = (torch.empty(2, heads, 4096, 16, device="meta") for heads in (4, 2, 2))
    alive = torch.empty(2, 4096, dtype=torch.bool, device="meta")
    for causal in (True, False):
        how = (causal, 0, "identity", 1.0)
        with Allocations() as seen:
            out, n, shift = triton_linear.linear_attention_forward(q, k, v, alive, None, *how)
            triton_linear.linear_attention_backward(out, n, q, k, v, alive, None, out, n, shift, *how)
        assert seen.largest <= q.numel() and {"state_kernel", "scan_kernel", "sums_kernel"} <= set(launches)


def test_autotuning_measures_once_and_keeps_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from efficient_attn.backends.triton import autotune

    monkeypatch.setenv("EFFICIENT_ATTN_CACHE", str(tmp_path / "cache"))
    measured = []
    candidates = [(64, 64, 4, 2), (128, 64, 8, 3), (32, 32, 4, 1)]

    def measure(candidate: tuple[int, ...]) -> float:
        measured.append(candidate)
        return {64: 2.0, 128: 1.0, 32: float("inf")}[candidate[0]]

    assert autotune.best("case", candidates, measure) == (128, 64, 8, 3) and len(measured) == 3
    assert autotune.best("case", candidates, measure) == (128, 64, 8, 3) and len(measured) == 3
    file = tmp_path / "cache" / "triton.json"
    assert (file.parent.stat().st_mode & 0o777) == 0o700 and list(file.parent.iterdir()) == [file]
    autotune._known.cache_clear()  # another process
    assert autotune.best("case", candidates, measure) == (128, 64, 8, 3) and len(measured) == 3
    assert autotune.best("case", candidates[2:], measure) == (
        32,
        32,
        4,
        1,
    )  # a kept choice that is no candidate any more
    file.write_text("{torn")
    autotune._known.cache_clear()
    assert autotune.best("case", candidates, measure) == (128, 64, 8, 3)
    file.parent.chmod(0o777)
    with pytest.raises(UnsupportedError, match="chmod 700"):
        autotune.best("case", candidates, measure)
