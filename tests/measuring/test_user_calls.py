"""Suite `calls`: what is timed side by side computes the same."""

from __future__ import annotations

import pytest
import torch

from efficient_attn.benchmarks import users
from efficient_attn.benchmarks.suites import Options, calls, get


def small(work: str, call: str, mode: str) -> dict:
    """The first cell of a kind, of a size that takes no time."""
    for cell in calls.configs(Options(quick=True, budget_s=0.01)):
        if (cell["work"], cell["call"], cell["mode"]) == (work, call, mode):
            kv_heads = {"kv_heads": min(cell["kv_heads"], 2)} if "kv_heads" in cell else {}
            return {
                **cell,
                **kv_heads,
                "batch": 2,
                "seqlen": 64,
                "heads": 2,
                "head_dim": 16,
                "window": min(cell.get("window", 0), 20),
            }
    raise KeyError((work, call, mode))


KINDS = sorted({(cell["work"], cell["call"], cell["mode"]) for cell in calls.configs(Options(quick=True))})


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_all_calls_of_a_cell_compute_the_same(kind) -> None:
    if kind[0] == "transformers":
        pytest.importorskip("transformers")
    cell = small(*kind)
    torch.manual_seed(0)
    found = {name: first(call()) for name, call in users.BUILDERS[cell["work"]](cell).items()}
    ours = found.pop("ours")
    assert found
    for name, theirs in found.items():
        if theirs.shape != ours.shape:  # (B, N, H * D)
            theirs = theirs.unflatten(-1, (ours.shape[1], -1)).transpose(1, 2)
        torch.testing.assert_close(
            ours.float(), theirs.float(), rtol=2e-4, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def first(result) -> torch.Tensor:
    """The output, or the first gradient, of a call."""
    while not isinstance(result, torch.Tensor):
        result = next(
            part for part in (result.to_tuple() if hasattr(result, "to_tuple") else result) if part is not None
        )
    return result


def test_a_row_names_the_fastest_other_way() -> None:
    row = calls.run_cell(small("operator", "attention(q, k, v)", "fwd"))
    assert row["peer_ms"] == min(row["others"].values()) and row["figure"] == pytest.approx(
        row["peer_ms"] / row["ms"], 1e-3
    )
    shape = {
        "id": "a",
        "call": "c",
        "mode": "fwd",
        "dtype": "float32",
        "batch": 1,
        "seqlen": 1,
        "heads": 1,
        "head_dim": 1,
    }
    said = [claim.text for claim in get("calls").claims([{**shape, "figure": 0.5, "peer": "sdpa"}])]
    assert said[0].startswith("0 of 1 calls") and said[1].startswith("0.50x of sdpa")
