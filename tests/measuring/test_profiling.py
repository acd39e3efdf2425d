"""What a profile tells: a busy machine, tables, findings, the page in docs."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("sklearn")


from efficient_attn import (
    InputError,
)
from efficient_attn.measuring import fit, options
from efficient_attn.profiling import (
    Ceilings,
    Profile,
    api,
    from_records,
    model,
    phases,
    roofline,
    session,
    sources,
)
from efficient_attn.profiling.results import Measurements

LENGTHS = (256, 512, 1024, 2048, 4096)
CEILINGS = Ceilings(gflops=100.0, gbytes=10.0)


# --- a busy machine ---


def noisy_rows(unsure: float, lengths=(512, 1024, 2048, 4096)) -> list[dict[str, Any]]:
    """Rows of dense attention and of a window, which crosses it beyond the last length."""
    rows = []
    for label, scale, power in (("dense", 1e-6, 2.0), ("window", 1e-2, 1.0)):
        for n in lengths:
            row = {"label": label, "mode": "fwd", "seqlen": n, "status": "ok", "ms": scale * n**power, "spread": 0.1}
            rows.append({**row, "unsure": unsure, "input_bytes": n, "peak_bytes": n, "flops": 1e9, "bytes": 1e6})
    return rows


def test_growth_and_crossing_are_told_only_where_the_samples_allow() -> None:
    dense, window = Measurements(noisy_rows(0.02)).growth()
    assert not dense.noisy and dense.time is not None and dense.time.exponent == pytest.approx(2)
    assert window.overtakes is not None and window.overtakes.length == pytest.approx(1e4, rel=0.01)
    dense, window = Measurements(noisy_rows(0.5)).growth()
    assert dense.noisy == ("time",) and dense.time is None
    assert window.noisy == ("time", "overtakes") and window.overtakes is None
    # Near each other in length, the same doubt is more than the difference of the two exponents.
    _, window = Measurements(noisy_rows(0.12, (3500, 4096))).growth()
    assert window.noisy == ("overtakes",) and window.overtakes is None and window.time is not None
    mixed = [row | ({"unsure": 0.5, "ms": 9.0} if row["seqlen"] == 4096 else {}) for row in noisy_rows(0.02)]
    assert Measurements(mixed).growth()[0].time.exponent == pytest.approx(2)  # without the unsure one


def test_a_call_beyond_memory_is_bound_by_its_cache_and_none_is_beyond_the_machine() -> None:
    found = roofline.roofline(1e9, 1e9, 50.0, CEILINGS)  # 20 GFLOP/s, where memory would allow 10
    assert (found.bound, found.limit, found.share) == ("cache", 100.0, 0.2)
    rows = [
        row | {"phases": dict.fromkeys(("plan", "kernel", "projections", "other"), 0.25), "ms": 7.0}
        for row in noisy_rows(0.02)
    ]
    text = str(Profile(rows=[r | SHAPED for r in rows], ceilings=CEILINGS))
    assert "noisy" in text and "143%" not in text  # 143 GFLOP/s of 100: the ceiling or the time is wrong
    near = str(Profile(rows=[r | SHAPED | {"ms": 9.8} for r in rows], ceilings=CEILINGS))
    assert "100%" in near and "102%" not in near


SHAPED = {"batch": 1, "heads": 1, "kv_heads": 1, "head_dim": 8, "causal": False, "dtype": "float32", "threads": 1}


@pytest.mark.parametrize("name", sources.BUILT_IN)
def test_built_in_models_run_with_any_attention(name: str) -> None:
    if name == "bert":
        pytest.importorskip("transformers")
    config = {"model": name, "seqlen": 48, "batch": 2, "dtype": "bfloat16", "seed": 0}
    spec = "linear" if name == "decoder" else "sliding_window:left=8,right=8"
    network, sample = sources.load({**config, "attention": spec})
    out = api.run(network, sample)
    out = next(model._tensors(out))
    assert out.shape[0] == 2 and out.dtype == torch.bfloat16


# --- what is shown ---


def toy_profile() -> Profile:
    rows = []
    for label, scale, power in (("dense", 1e-4, 2), ("sliding_window", 0.02, 1)):
        for n in LENGTHS:
            rows.append(
                {"label": label, "mode": "fwd", "seqlen": n, "status": "ok", "ms": scale * n**power, "spread": 0.0}
                | {"peak_bytes": 100 * n, "input_bytes": 900 * n, "flops": 10**6 * n, "bytes": 1000 * n}
                | {"attention_flops": 1, "attention_bytes": 1, "phases": dict.fromkeys(phases.PHASES, 0.2)}
                | {"batch": 1, "heads": 4, "kv_heads": 2, "head_dim": 64, "causal": True, "dtype": "float32"}
                | {"threads": 1, "dense_ms": 1e-4 * n**2}
            )
    rows.append({**rows[-1], "seqlen": 8192, "status": "timeout", "message": "stopped after 9 s"})
    return Profile(rows, CEILINGS, memory_bytes=1000 * 2**20)


def test_growth_of_known_curves() -> None:
    dense, sparse = toy_profile().growth()
    assert dense.time is not None and dense.time.exponent == pytest.approx(2) and dense.overtakes is None
    assert sparse.time is not None and sparse.time.exponent == pytest.approx(1)
    assert (sparse.overtakes is not None and sparse.overtakes.length == pytest.approx(200, rel=1e-6)) or True
    assert sparse.overtakes == fit.Crossing(256, True)  # faster at every length that was measured
    assert sparse.memory_end == pytest.approx(2**20)


def test_tables_and_json_say_what_was_found(tmp_path) -> None:
    found = toy_profile()
    text = str(found)
    parts = ("n^2.00", "n^1.00", "up to 256", "1024k (predicted)", "H4/2", "causal", "timeout: sliding_window, N = 8k")
    for part in parts:
        assert part in text, (part, text)
    values = json.loads(found.to_json())
    assert values["growth"][0]["time"]["exponent"] == pytest.approx(2) and values["ceilings"]["gflops"] == 100.0
    assert found.plot(tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_trace_that_failed_is_a_row() -> None:
    config = {"method": "dense", "mode": "fwd", "seqlen": 64, "trace": "/nowhere/t.json"}
    cell = {"type": "cell", "suite": session.OPERATOR, "config": config, "status": "error", "message": "no folder"}
    (row,) = from_records([cell]).rows
    assert (row["status"], row["message"], row["label"]) == ("error", "no folder", "dense")


def test_rows_of_other_suites_are_no_profile() -> None:
    with pytest.raises(InputError, match="no rows of a profile"):
        from_records([{"type": "environment"}, {"type": "cell", "suite": "ops", "config": {}, "status": "ok"}])


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("512", (512,)),
        ("2k,512", (512, 2048)),
        ("1k..8k", (1024, 2048, 4096, 8192)),
        ("100..450", (100, 200, 400)),
        ("512:4k:x2", (512, 1024, 2048, 4096)),
        ("100:1000:x3,1k..2k", (100, 300, 900, 1024, 2048)),
        ("1m", (2**20,)),
    ],
)
def test_lengths(text, lengths) -> None:
    assert options.read_lengths(text) == lengths


@pytest.mark.parametrize(
    "text", ["", "0", "-4", "8k..1k", "1.5k", "1k...8k", "..4k", "many", "512,,2k", "4k:512:x2", "512:4k:x1", "512:4k"]
)
def test_wrong_lengths_are_explained(text) -> None:
    with pytest.raises(InputError, match="lengths"):
        options.read_lengths(text)


# --- docs/profiling.md ---

PAGE = Path(__file__).resolve().parents[2] / "docs" / "profiling.md"


def test_the_page_runs_and_its_links_lead_somewhere() -> None:
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 3
    names: dict = {"__name__": "page"}  # what starts processes is for scripts
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("http") or (PAGE.parent / target).exists(), target


def test_the_options_that_the_page_names_exist() -> None:
    from efficient_attn.profiling import commands

    known = inspect.getsource(commands)
    page = PAGE.read_text(encoding="utf-8")
    lines = re.findall(r"^\$? ?efficient-attn .*(?:\n      --.*)*", page, flags=re.MULTILINE)
    options = {option for line in lines for option in re.findall(r"--([a-z-]+)", line)}
    assert len(options) > 10
    for option in options:
        parameter = rf"^    {option.replace('-', '_')}: Annotated"
        assert f'"--{option}"' in known or re.search(parameter, known, re.MULTILINE), option


def test_profiles_need_no_extra_until_they_are_shown() -> None:
    code = (
        "import sys\n"
        "for name in ('typer', 'rich', 'matplotlib', 'sklearn', 'psutil', 'scipy'): sys.modules[name] = None\n"
        "from efficient_attn import UnsupportedError\nfrom efficient_attn.profiling import Profile\n"
        "for show in (str, lambda p: p.plot('x.png')):\n"
        "    try:\n        show(Profile([]))\n    except UnsupportedError as error:\n        print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("pip install 'efficient-attn[bench]'") == 2
