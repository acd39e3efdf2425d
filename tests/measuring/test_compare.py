"""`efficient-attn compare`: ratios, bootstrap intervals, and the exit code of a regression."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")

from typer.testing import CliRunner

from efficient_attn import InputError, cli
from efficient_attn.benchmarks import suites
from efficient_attn.benchmarks.compare import NEUTRAL, bootstrap, compare
from efficient_attn.measuring import records

ROOT = Path(__file__).resolve().parents[2]


def a_cell(times, status="ok", reference=None, seqlen=64, **metrics):
    config = {"method": "dense", "seqlen": seqlen, "mode": "fwd", "threads": 1, "budget_s": random.random()}
    cell = {"type": "cell", "id": str(seqlen), "suite": "ops", "status": status, "config": config}
    if status != "ok":
        return cell | {"message": "gone"}
    middle = sorted(times)[len(times) // 2]
    return cell | {"ms": middle, "spread": 0.1, "times": times, "reference_times": reference or [], **metrics}


def around(ms, count=30, seed=0):
    chance = random.Random(seed)
    return [ms * chance.uniform(0.97, 1.03) for _ in range(count)]


def verdict(before, after, **options):
    (found,) = compare([before], [after], **options)
    return found


def test_the_interval_holds_the_ratio_and_narrows_with_samples():
    few, many = (bootstrap(around(10, n), around(12, n, seed=1), 0.95) for n in (5, 300))
    for low, high in (few, many):
        assert low < 1.2 < high
    assert many[1] - many[0] < few[1] - few[0]
    assert bootstrap([1.0, 1.0], [1.0, 1.0], 0.95) is None


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(100):
        chance = random.Random(seed)
        a, b = ([chance.gauss(100, 5) for _ in range(25)] for _ in range(2))
        low, high = bootstrap(a, b, 0.9)
        covered += low <= 1 <= high
    assert 80 <= covered <= 99


def test_a_regression_lies_wholly_beyond_the_threshold():
    assert verdict(a_cell(around(10)), a_cell(around(12, seed=1))).verdict == "regression"
    assert verdict(a_cell(around(10)), a_cell(around(10.5, seed=1))).verdict == "same"
    assert verdict(a_cell(around(10)), a_cell(around(10.5, seed=1)), threshold=0.01).verdict == "regression"
    assert verdict(a_cell(around(12)), a_cell(around(10, seed=1))).verdict == "improvement"
    assert verdict(a_cell([10.0]), a_cell([20.0])).verdict == "unsure"


def test_a_cell_that_fails_now_is_named():
    assert verdict(a_cell(around(10)), a_cell([], status="oom")).verdict == "failed"
    assert verdict(a_cell([], status="oom"), a_cell(around(10))).verdict == "fixed"
    assert verdict(a_cell([], status="oom"), a_cell([], status="timeout")).verdict == "same"


def test_relative_takes_out_what_slowed_both():
    """Run B on a machine that is half as fast: twice the time of ours and of the peer."""
    before = a_cell(around(10), reference=around(20, seed=2))
    after = a_cell(around(20, seed=1), reference=around(40, seed=3))
    assert verdict(before, after).verdict == "regression"
    found = verdict(before, after, relative=True)
    assert found.verdict == "same" and found.ratio == pytest.approx(1, abs=0.03)
    assert verdict(a_cell(around(10)), a_cell(around(10)), relative=True).verdict == "unsure"  # no peer


def test_other_figures_are_compared_as_they_are():
    found = verdict(a_cell([1.0], peak_bytes=100), a_cell([1.0], peak_bytes=150), metric="peak_bytes")
    assert found.verdict == "regression" and found.ratio == 1.5
    assert verdict(a_cell([1.0], error=0.0), a_cell([1.0], error=0.0), metric="error").verdict == "same"


def metrics_of_every_suite():
    """The figures in the results that the project stands by, and in the columns of every suite."""
    found = set()
    for path in sorted((ROOT / "benchmarks" / "results").rglob("results.jsonl")):
        for record in records.read(path):
            if record.get("type") == "cell":
                numbers = (key for key, value in record.items() if type(value) in (int, float))
                found |= {(record["suite"], key) for key in numbers}
    for name in suites.names():
        columns = suites.get(name).columns
        found |= {(name, column.key) for column in columns if column.form not in ("text", "integer")}
    return sorted({key for _, key in found} - {"wanted", "result", "equal", "ceiling_share"})


LESS_IS_BETTER = (
    "ms",
    "weights_ratio",
    "bytes",
    "error",
    "loss",
    "difference",
    "scores",
    "spread",
    "unsure",
    "seconds",
    "trained_s",
    "token",
    "_ratio",
    "smape",
    "crps",
)


@pytest.mark.parametrize("metric", metrics_of_every_suite())
def test_every_metric_of_every_suite_has_a_direction(metric):
    if re.fullmatch(NEUTRAL, metric):
        with pytest.raises(InputError, match="what was measured"):
            verdict(a_cell([1.0], **{metric: 1.0}), a_cell([1.0], **{metric: 2.0}), metric=metric)
        return
    low = metric.endswith(LESS_IS_BETTER) or metric == "share"
    good, bad = (1.0, 2.0) if low else (2.0, 1.0)

    def cell(value):
        return a_cell([value] * 5) if metric == "ms" else a_cell([1.0], **{metric: value})

    for before, after, expected in (
        (good, bad, "regression"),
        (bad, good, "improvement"),
        (good, good, "same"),
        (good, math.nan, "regression"),
        (good, math.inf, "regression"),
        (math.nan, good, "fixed"),
        (0.0, bad, "regression" if low else "improvement"),
        (0.0, 0.0, "same"),
    ):
        assert verdict(cell(before), cell(after), metric=metric).verdict == expected, (before, after)


def test_a_score_goes_by_what_it_is():
    for score_is, expected in (("accuracy", "regression"), ("mase", "improvement")):
        before, after = (a_cell([1.0], score=score, score_is=score_is) for score in (0.95, 0.5))
        assert verdict(before, after, metric="score").verdict == expected


def test_a_target_goes_by_its_side():
    for most, expected in ((True, "regression"), (False, "improvement")):
        before, after = a_cell([1.0], figure=1.0), a_cell([1.0], figure=2.0)
        before["config"]["most"] = after["config"]["most"] = most
        assert verdict(before, after, metric="figure").verdict == expected


def test_a_figure_that_is_gone_is_a_failure_and_memory_from_nothing_a_regression(tmp_path):
    a = a_cell([1.0], peak_bytes=0, error=0.1)
    assert verdict(a, a_cell([1.0], peak_bytes=2**30), metric="peak_bytes").verdict == "regression"
    assert verdict(a, a_cell([1.0]), metric="error").verdict == "failed"
    assert verdict(a_cell([1.0]), a, metric="error").verdict == "fixed"
    for metric, worse in (("score", 0.5), ("error", math.nan)):
        good = write(tmp_path / metric, a_cell([1.0], score=0.95, error=0.1))
        result = invoke(good, write(tmp_path / f"worse {metric}", a_cell([1.0], **{metric: worse})), "--metric", metric)
        assert result.exit_code == 1 and "regression" in result.output, result.output


def write(path, *cells):
    path.mkdir()
    (path / "results.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    return str(path)


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"}).invoke(cli.app, ["compare", *arguments])


def test_the_exit_code_says_whether_something_got_slower(tmp_path):
    a = write(tmp_path / "a", a_cell(around(10)), a_cell(around(10), seqlen=128))
    same = write(tmp_path / "same", a_cell(around(10.1, seed=1)), a_cell(around(9.9, seed=2), seqlen=128))
    slow = write(tmp_path / "slow", a_cell(around(13, seed=1)), a_cell(around(10, seed=2), seqlen=128))
    result = invoke(a, same)
    assert result.exit_code == 0 and "2 same" in result.output, result.output
    result = invoke(a, slow)
    assert result.exit_code == 1 and "regression" in result.output and "geometric mean" in result.output
    assert invoke(a, slow, "--threshold", "0.5").exit_code == 0
    assert invoke(a, f"{slow}/results.jsonl").exit_code == 1


def test_what_cannot_be_compared_is_explained(tmp_path):
    a = write(tmp_path / "a", a_cell(around(10)))
    other = write(tmp_path / "b", a_cell(around(10), seqlen=256))
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([a, other], "no cell in common"),
        ([a, str(tmp_path / "empty")], "has no results.jsonl"),
        ([a, a, "--metric", "accuracy"], "no cell of both has this figure"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split()), result.output
