"""docs/distributed.md runs, and `profile --context-parallel` says what its table says."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support import rank_models

from efficient_attn.distributed import Link
from efficient_attn.errors import InputError, UnsupportedError
from efficient_attn.profiling.ranks import profile_ranks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"


def test_the_page_runs_in_two_processes(pair):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 3
    pair.run(rank_models.run_page, "\n".join(blocks))


def predicted() -> tuple[str, str]:
    """The command of the page's table, and what it printed."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(r"<!-- predicted: (.*?) -->\n```\n(.*?)```\n<!-- end", text, flags=re.DOTALL)
    return found[1], found[2]


def test_the_first_rows_of_the_predicted_table():
    shape = {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16", "causal": True}
    made = str(profile_ranks("dense", 2**20, [8, 16], link="h200", **shape)).splitlines()
    assert predicted()[1].splitlines()[: len(made) - 1] == made[:-1]


@pytest.mark.slow
def test_the_predicted_table_is_that_of_its_command():
    command, table = predicted()
    words = shlex.split(command)
    assert words[:2] == ["efficient-attn", "profile"]
    made = subprocess.run(
        [sys.executable, "-m", "efficient_attn.cli", *words[1:]], capture_output=True, text=True, check=True
    )
    assert made.stdout == table


def test_a_prediction_needs_no_processes():
    found = profile_ranks("sliding_window:left=512,right=0", 65536, [1, 8, 64], link=Link(), layout="contiguous")
    assert found.fastest[8] == "gather" and not found.measured_link
    assert [row.ranks for row in found.rows] == [1, 8, 8, 8, 64, 64, 64]
    assert json.loads(json.dumps(found.to_json()))["rows"][0]["efficiency"] == 1.0
    assert all(0 < row.efficiency <= 1.01 and row.off is None for row in found.rows)


@pytest.mark.slow
def test_two_ranks_are_measured():
    found = profile_ranks("dense", 2048, [1, 2, 64], causal=True, beyond={"bandwidth": 1e12}, rounds=2, measure=2)
    assert [row.ranks for row in found.rows if row.measured is not None] == [1, 2, 2, 2]
    assert found.measured_link and found.link.bandwidth > 1e6 and "predicted ms" in str(found)


def test_what_cannot_be_profiled_is_refused():
    with pytest.raises(UnsupportedError, match="nystrom"):
        profile_ranks("nystrom", 64, [2])
    with pytest.raises(InputError, match="numbers of ranks"):
        profile_ranks("dense", 64, [0])
    with pytest.raises(InputError, match="--link"):
        profile_ranks("dense", 64, [2], link="string")
