"""Pathfinder by its rules; tasks of the Long Range Arena and whole models as benchmark cells."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from efficient_attn.benchmarks import learning, suites
from efficient_attn.benchmarks.cache import cached
from efficient_attn.benchmarks.suites import lra
from efficient_attn.errors import InputError
from efficient_attn.training.data import pathfinder


def ends(curve):
    return [curve[0, 0], curve[-1, 1]]


@pytest.mark.parametrize("label", [0, 1])
def test_dots_lie_on_one_long_curve_or_on_both(label):
    for seed in range(5):
        drawing = pathfinder.draw(np.random.default_rng(seed), label)
        on = [
            next(n for n, curve in enumerate(drawing.curves[:2]) if any(np.allclose(dot, end) for end in ends(curve)))
            for dot in drawing.dots
        ]
        assert drawing.label == label and (len(set(on)) == 1) == bool(label)
        assert not np.allclose(drawing.dots[0], drawing.dots[1])


def test_curves_turn_a_little_and_keep_clear_of_each_other():
    drawing = pathfinder.draw(np.random.default_rng(3), 1)
    assert len(drawing.curves) >= 2 and all(len(curve) == 6 for curve in drawing.curves[:2])
    for curve in drawing.curves:
        along = curve[:, 1] - curve[:, 0]
        assert np.allclose(np.linalg.norm(along, axis=1), pathfinder.DASH)
        cosines = (along[:-1] * along[1:]).sum(1) / pathfinder.DASH**2
        assert (cosines >= np.cos(pathfinder.TURN) - 1e-9).all()
    middles = [curve.mean(axis=1) for curve in drawing.curves]
    for number, one in enumerate(middles):
        for other in middles[number + 1 :]:
            assert np.linalg.norm(one[:, None] - other, axis=-1).min() > 2


def test_what_is_drawn_is_in_the_image():
    drawing = pathfinder.draw(np.random.default_rng(0), 0, size=40)
    assert drawing.image.shape == (40, 40) and drawing.image.min() >= 0 and drawing.image.max() == 1
    for dot in drawing.dots:
        assert drawing.image[tuple(dot.astype(int))] == 1
    middles = np.concatenate([curve.mean(axis=1) for curve in drawing.curves]).astype(int)
    assert drawing.image[middles[:, 0], middles[:, 1]].min() > 0.2
    assert 0.05 < (drawing.image > 0.2).mean() < 0.5


def test_pathfinder_sequences_are_seeded_and_balanced():
    one, again, other = (pathfinder.generate(20, seed, size=24, dashes=5, distractors=2) for seed in (0, 0, 1))
    assert torch.equal(one.tokens, again.tokens) and not torch.equal(one.tokens, other.tokens)
    batch = one.batch(torch.arange(20))
    assert batch["tokens"].shape == (20, 576) and batch["label"].sum() == 10
    assert batch["tokens"].min() >= 1 and batch["tokens"].max() == pathfinder.GRAYS
    with pytest.raises(InputError, match="size >= 16"):
        pathfinder.generate(2, 0, size=8)
    with pytest.raises(InputError, match="no room"):
        pathfinder.generate(1, 0, size=16, dashes=40)


def test_what_is_made_once_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def make():
        made.append(1)
        return [torch.arange(3), {"a": 1.5}]

    first, second = (cached("x", make, key=1) for _ in range(2))
    assert len(made) == 1 and torch.equal(first[0], second[0]) and second[1] == {"a": 1.5}
    cached("x", make, key=2)
    assert len(made) == 2


SMALL = {"steps": 3, "batch": 4, "lr": 1e-3, "held_out": 8, "budget_s": 0.01, "threads": 1, "seed": 0}


@pytest.mark.parametrize("task", lra.TASKS)
def test_tasks_are_measured(task, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(lra.SIZES, task, {"small": {**lra.SIZES[task]["small"], **LITTLE.get(task, {})}})
    row = suites.get("lra").run_cell({**SMALL, "task": task, "size": "small", "method": "linformer:rank=16"})
    assert 0 <= row["score"] <= 1 and row["score_is"] == "accuracy" and 0 < row["baseline"] < 1
    assert row["ms"] > 0 and row["forward_ms"] > 0 and row["speedup_dense"] > 0 and row["tokens"] >= 64


LITTLE = {
    "listops": {"examples": 50, "held_out": 20},
    "pathfinder": {"examples": 12, "held_out": 4, "size": 20, "dashes": 3, "distractors": 1},
    "image": {"size": 8},
}


@pytest.mark.parametrize("model", ["bytes", "digits", "forecast", "clip"])
def test_models_are_measured(model):
    if model == "forecast":
        pytest.importorskip("statsmodels")
    suite = suites.get("models")
    configs = [config for config in suite.configs(suites.Options()) if config["model"] == model]
    config = next(config for config in configs if config["method"].startswith("linformer"))
    row = suite.run_cell({**config, **SMALL, "batch": 8})
    assert row["examples_per_s"] > 0 and row["inference_per_s"] > 0 and row["parameters"] > 10_000
    assert row["score_is"] == {"forecast": "mase", "clip": "zero_shot"}.get(model, "accuracy")


@pytest.mark.slow
def test_training_in_a_cell_learns():
    """The digits as pixels, far above always naming one class."""
    config = {**SMALL, "steps": 250, "batch": 32, "lr": 3e-3, "held_out": 300, "method": "dense"}
    task = lra.Pixels(size=8)
    row = learning.learn(lambda attention: lra.Pixels(attention=attention, size=8), task.splits(0), config)
    assert row["score"] > row["baseline"] + 0.3


def test_the_published_table_is_shown_beside_ours():
    ((title, rows),) = suites.get("lra").published.items()
    assert "Tay et al. 2020" in title and len(rows) == 11
    for row in rows:
        scores = [row[task] for task in ("ListOps", "Text", "Retrieval", "Image", "Pathfinder")]
        assert row["Avg"] == pytest.approx(sum(scores) / 5, abs=1.0)  # the paper's own averages differ a little
