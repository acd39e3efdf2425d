"""Suite `calls`: what is timed side by side computes the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from efficient_attn.benchmarks import engines, users
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
    made = users.BUILDERS[cell["work"]](cell)
    found = {name: first(call()) for name, call in made.items()}
    engines.close(made.values())
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


def test_the_table_of_every_call(tmp_path) -> None:
    from efficient_attn.benchmarks.tools import call_table

    shape = {"call": "m(x)", "batch": 1, "seqlen": 16, "heads": 4, "head_dim": 64, "ms": 1.0, "peer": "sdpa"}
    shape |= {"work": "operator", "mode": "fwd_bwd", "peer_ms": 1.0}
    more = {"set": "avx512", "dtype": "float32", "figure": 2.0, "seqlen": 32}
    rows = [
        {**shape, **more},
        {**shape, "set": "avx2", "dtype": "float32", "figure": 1.5},
        {**shape, "set": "avx512", "dtype": "float32", "figure": 0.5},
        {**shape, "set": "avx512", "dtype": "bfloat16", "figure": 0.9, "work": "module"},
    ]
    text = call_table.table(rows).splitlines()
    assert text[0].endswith("| avx512 float32 | avx512 bfloat16 | avx2 float32 |")  # what has most rows first
    assert text[3].endswith("| 1 | sdpa 1 | **0.50** | **0.90** | 1.50 |")
    assert text[5].startswith("2 of 4 rows") and "Python" in text[6] and text[7].startswith("* Bound by not known")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{call_table.MARKS[0]}\nold\n{call_table.MARKS[1]}\nafter\n")
    call_table.write(page, "new")
    assert page.read_text() == f"before\n{call_table.MARKS[0]}\nnew\n{call_table.MARKS[1]}\nafter\n"


def test_the_table_of_sparse_methods(tmp_path) -> None:
    from efficient_attn.benchmarks.tools import sparsity_table

    config = {"pattern": "axial", "percent": None, "seqlen": 4096, "mode": "fwd", "dtype": "float32"}
    found = {"density": 0.03125, "visited": 0.0625, "parts": 2, "ms": 5.0, "efficiency": 0.5, "speedup_dense": 16.0}
    cell = {"type": "cell", "suite": "sparsity", "status": "ok", **found}
    changes: tuple[dict[str, Any], ...] = ({}, {"mode": "fwd_bwd"}, {"percent": 5}, {"ms": 4.0})
    of_config = ("mode", "percent")
    cells = [
        {**cell, **{k: v for k, v in new.items() if k not in of_config}}
        | {"config": config | {k: v for k, v in new.items() if k in of_config}}
        for new in changes
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in cells))
    page = tmp_path / "page.md"
    page.write_text("\n".join(sparsity_table.MARKS))
    assert sparsity_table.main([str(tmp_path), "--page", str(page)]) == 0
    line = "| 4096 | float32 | `axial` | 3.1% | 6.2% | 2 | 4 | 0.50 | 0.45 | 0.06 | 5 | 0.50 | 0.06 |"
    assert page.read_text().splitlines()[1:-1][2:] == [line]


def test_cells_are_chosen_by_direction_and_length() -> None:
    chosen = list(calls.configs(Options(quick=True, modes=("decode",), seqlens=(128,))))
    assert chosen and {(cell["mode"], cell["seqlen"]) for cell in chosen} == {("decode", 128)}


def test_a_set_below_the_best_holds_pytorch_to_it_too() -> None:
    from efficient_attn.benchmarks.tools import call_table

    held = call_table.environment("avx2", "avx512")
    assert held["EFFICIENT_ATTN_ISA"] == "avx2" and held["ATEN_CPU_CAPABILITY"] == "avx2"
    assert {"ATEN_CPU_CAPABILITY": "avx2"}.items() & call_table.environment("avx512", "avx512").items() == set()


def test_a_set_that_nothing_holds_mkl_to_is_left_out(monkeypatch, tmp_path, capsys):
    from efficient_attn.benchmarks.tools import call_table

    taken = []
    monkeypatch.setattr(call_table, "measure", lambda out, name, own, arguments: taken.append(name) or 1)
    monkeypatch.setattr(call_table.calls, "instruction_set", lambda: "avx2")
    for amd, expected in ((True, ["avx2"]), (False, ["baseline"])):
        monkeypatch.setattr(call_table, "holds_nothing", lambda amd=amd: amd)
        assert call_table.main(["--out", str(tmp_path), "--sets", "baseline,avx2"]) == 1
        assert taken == expected and ("baseline: left out" in capsys.readouterr().out) == amd
        taken.clear()
