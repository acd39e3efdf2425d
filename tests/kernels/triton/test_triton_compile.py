"""What Triton compiles the kernels to for sm_80 and sm_90, read without a GPU."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

pytest.importorskip("triton")
from efficient_attn.benchmarks.tools import triton_registers as registers
from efficient_attn.benchmarks.tools import triton_table as table
from efficient_attn.kernels import configs
from efficient_attn.kernels.configs import SHARED_MEMORY

ROWS = [json.loads(line) for line in table.RESULTS.read_text().splitlines()]
MATRIX = (
    "attention_forward_kernel", "key_gradient_kernel", "query_gradient_kernel", "bias_gradient_kernel",
    "row_statistics_kernel", "received_kernel", "mass_map_kernel",
)  # fmt: skip
FEW_BYTES = 32  # of a thread's stack, once a program: what the map keeps beside its cells, or a row beside its sums


def check(row: dict) -> None:
    """Shared memory within the limit, nothing spilled where a default configuration runs, tensor cores for halves."""
    assert row["shared"] <= SHARED_MEMORY[row["sm"]], row
    # The second launch of a masked call (safe) computes nothing unless a NaN was met. Beyond 128 dimensions two things
    # are not promised: exact float32, whose multiply-adds hold whole rows in registers even in the smallest tile that
    # there is, and linear attention.
    attention = row["kernel"] in MATRIX and (row["dtype"] != "float32" or row["head_dim"] <= 128)
    linear = row["feature"] == "linear" and row["dtype"] != "float32" and row["head_dim"] <= 128
    if (attention or linear) and not row["safe"]:
        assert row["spilled"] <= (FEW_BYTES if row["kernel"] == "mass_map_kernel" else 0), row
    if row["dtype"] != "float32" and row["kernel"] in MATRIX:
        assert row["mma"] + row["wgmma"] > 0, row
        if row["sm"] == 90 and row["block_q"] >= 64 and row["block_k"] >= 64:
            assert row["wgmma"] > 0, row
    by_tma = row["feature"] == "tma" and row["kernel"] == "attention_forward_kernel" and not row["safe"]
    assert (row["tma"] > 0) == by_tma, row
    if row["dtype"] == "float32" and row["kernel"] in MATRIX and not row["safe"]:
        assert row["mma"] + row["wgmma"] == 0, row  # exact float32 by default


def test_the_table_holds_every_configuration() -> None:
    kinds = {(row["sm"], row["dtype"], row["head_dim"], row["feature"]) for row in ROWS}
    assert kinds == {(sm, str(t).removeprefix("torch."), d, f) for sm, t, d, f in table.cases()}
    for row in ROWS:
        check(row)


@pytest.mark.parametrize(("sm", "head_dim", "feature"), [(90, 128, "lists"), (80, 64, "window")])
def test_compiled_now(sm: int, head_dim: int, feature: str) -> None:
    rows = table.compile_case(sm, torch.bfloat16, head_dim, feature)
    assert {"attention_forward_kernel", "key_gradient_kernel", "query_gradient_kernel"} <= {r["kernel"] for r in rows}
    assert any(row["safe"] for row in rows)
    for row in rows:
        check(row)
    kept = [
        r for r in ROWS if (r["sm"], r["dtype"], r["head_dim"], r["feature"]) == (sm, "bfloat16", head_dim, feature)
    ]
    tiles = [
        [{k: r.get(k) for k in ("kernel", "block_q", "block_k", "warps", "stages")} for r in s] for s in (rows, kept)
    ]
    assert tiles[0] == tiles[1], "benchmarks/results/triton/compile.jsonl is of other kernels; run make triton-table"


def test_compiled_now_with_products_and_sums_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for at each launch: Triton's own default, which 3.10 turns off, does not matter, and 3.9 does not warn."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    rows = table.compile_case(90, torch.bfloat16, 64, "decode")
    assert {r["kernel"] for r in rows} == {"attention_forward_kernel", "merge_kernel"}
    assert all(row["fma"] > 0 for row in rows)
    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        table.compile_case(80, torch.bfloat16, 64, "decode")
    assert not [w for w in said if "fusion" in str(w.message).lower()]


def test_the_rows_of_a_version() -> None:
    newest = max(configs.BY_VERSION, key=lambda name: tuple(map(int, name.split("."))))
    assert list(configs.BY_VERSION) == sorted(configs.BY_VERSION, key=lambda name: tuple(map(int, name.split("."))))
    for name, rows in configs.BY_VERSION.items():
        assert configs.of_version(f"{name}.1") is configs.of_version(f"{name}.0+git123") is rows
        for kernel, capability, half, size, kind in rows:
            assert size in configs.TABLE[kernel][capability][half] and kind in ("plain", "listed", "extras", "ordered")
    assert configs.of_version("3.8.0") is configs.BY_VERSION["3.7"]
    assert configs.of_version("3.12.1") is configs.BY_VERSION[newest]
    assert configs.of_version("3.4.0") is configs.BY_VERSION["3.6"]


@pytest.mark.parametrize("version", configs.BY_VERSION)
def test_a_launch_takes_the_rows_of_its_version(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "version_rows", lambda: configs.BY_VERSION[version])
    for (kernel, capability, half, size, kind), config in configs.BY_VERSION[version].items():
        flags = {"plain": {}, "listed": {"listed": True}, "extras": {"extras": True}, "ordered": {"ordered": True}}[
            kind
        ]
        assert configs.default_config(kernel, size, half, capability, **flags) == config
    monkeypatch.setattr(configs, "version_rows", dict)
    assert configs.default_config("forward", 100, True, 90) == configs.Config(128, 128, 8, 2)


def test_every_version_was_compiled_and_spills_where_it_is_said() -> None:
    """Linear attention holds its state and its rows in registers, of which there are too few beyond 128 features."""
    rows = [json.loads(line) for line in registers.RESULTS.read_text().splitlines()]
    wanted = {table.name_of(*case) for case in registers.cases()}
    for version in configs.BY_VERSION:
        found = {row["case"] for row in rows if row["triton"] == version}
        # Those of 3.7, with which the tests run, are compiled anew by the slow ones below.
        assert found <= wanted and (version == "3.7" or found == wanted), (version, wanted - found)
    for row in rows:
        _, dtype, head_dim, feature = row["case"].split("/")
        allowed = FEW_BYTES if row["kernel"] == "mass_map_kernel" else 0
        if feature == "linear":
            allowed = 600 if head_dim == "256" else 8 if dtype == "float32" else 0
        if row["kernel"] == "row_statistics_kernel" and (dtype, head_dim) == ("float32", "256"):
            allowed = FEW_BYTES
        assert row["spilled"] <= allowed, row
    assert registers.page(rows) in (table.RESULTS.parents[3] / "docs" / "gpu.md").read_text(), "make triton-registers"


@pytest.mark.slow
@pytest.mark.parametrize("case", table.cases(), ids=lambda c: "-".join(map(str, c)))
def test_every_configuration_compiles(case: tuple) -> None:
    for row in table.compile_case(*case):
        check(row)
