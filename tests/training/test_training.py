"""Training: options are checked first, steps are what they should be, tasks learn."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from support.training_runs import FEW, SMALL, Line, Watch, curve, invoke, run
from torch import nn

pytest.importorskip("typer")
pytest.importorskip("sklearn")


from efficient_attn import InputError, UnsupportedError
from efficient_attn.errors import CheckpointError
from efficient_attn.models import ViT
from efficient_attn.training import DivergedError, TrainOptions, checkpoint, metrics, optimizer, train
from efficient_attn.training.data.base import Subset
from efficient_attn.training.tasks import TASKS, Digits, Images, MaskedAutoencoding, SimClr, Translation

pytestmark = pytest.mark.usefixtures("one_thread")


# --- steps ---


def test_accumulated_batches_make_the_step_of_one_batch(tmp_path):
    """Exactly so even where batches hold different numbers of tokens, of which the loss is the mean."""
    task = Translation(source="digits", target="english", below=60, examples=40, **SMALL)
    for name, split in (("one", {"batch": 24}), ("three", {"batch": 8, "accumulate": 3})):
        run(task, tmp_path / name, steps=4, **split)
    one, three = ([line for line in curve(tmp_path / name) if line["type"] == "train"] for name in ("one", "three"))
    for left, right in zip(one, three, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-4)


def test_the_learning_rate_rises_and_falls():
    rates = [optimizer.learning_rate(step, 100, peak=2.0, warmup=0.1, final=0.25) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[55] == pytest.approx(2 * (0.25 + 0.75 / 2)) and 0.5 < rates[-1] < 0.502
    assert optimizer.learning_rate(0, 1, peak=1.0, warmup=0.0, final=0.0) == 1.0


def test_only_matrices_decay():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "linear": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    groups = optimizer.adamw(model, lr=1.0, weight_decay=0.3).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.3, 1), (0.0, 4)]
    assert groups[0]["params"][0] is model["linear"].weight
    model.requires_grad_(False)
    with pytest.raises(InputError, match="no parameter that learns"):
        optimizer.adamw(model, lr=1.0, weight_decay=0.0)


def test_gradients_are_clipped(tmp_path):
    def drift(name, **changes):
        run(Line(scale=100.0), tmp_path / name, steps=1, lr=1e-3, weight_decay=0.0, **changes)
        return metrics.read(tmp_path / name)[0]["grad_norm"]

    assert drift("free", clip=0.0) == pytest.approx(drift("clipped", clip=1e-3)), "what is logged is the norm before"
    moments = [
        torch.cat(
            [state["exp_avg"].flatten() for state in checkpoint.read(tmp_path / n / "last.pt")["optimizer"].values()]
        )
        for n in ("free", "clipped")
    ]
    assert moments[1].norm().item() == pytest.approx(1e-3 * (1 - optimizer.BETAS[0]), rel=1e-3)
    assert moments[0].norm() > 1000 * moments[1].norm()


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    with pytest.raises(DivergedError, match=r"lower --lr"):
        run(Line(scale=1e30), tmp_path / "a", steps=5)


def test_mixed_precision_keeps_parameters_in_float32(tmp_path):
    results = [
        run(Digits(augment=False, **SMALL), tmp_path / name, steps=30, batch=32, lr=3e-3, precision=name)
        for name in ("float32", "bfloat16")
    ]
    losses = [[line["loss"] for line in curve(tmp_path / name) if "lr" in line] for name in ("float32", "bfloat16")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)
    assert results[1]["options"]["precision"] == "bfloat16"
    weights = checkpoint.read(tmp_path / "bfloat16" / "last.pt")["model"]
    assert all(value.dtype == torch.float32 for value in weights.values())


def test_tensorboard_gets_the_curves(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(Line(), TrainOptions(out=tmp_path / "a", steps=6, eval_every=3, tensorboard=True))
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard"))
    events.Reload()
    losses = [line["loss"] for line in metrics.read(tmp_path / "a") if line["type"] == "train"]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses)
    assert [event.step for event in events.Scalars("valid/loss")] == [3, 6]


def test_tensorboard_is_asked_for_and_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="pip install tensorboard"):
        train(Line(), TrainOptions(out=tmp_path / "a", steps=6, tensorboard=True))


def test_the_best_validation_decides_what_is_kept(tmp_path):
    class Worse(Line):
        def evaluate(self, model, batch, about):
            calls.append(model[0].weight.sum().item())
            return {"loss": torch.full((len(batch["x"]),), float(len(calls) if len(calls) != 2 else 0))}

    calls = []
    result = run(Worse(), tmp_path / "a", steps=8, eval_every=2)
    assert result["best_step"] == 4 and calls[-1] == calls[1] != calls[3]


# --- starting from others, freezing ---


def test_fine_tuning_starts_from_pretraining(tmp_path):
    run(SimClr(**SMALL), tmp_path / "pre", steps=2, batch=8)
    watch = Watch()
    task = Digits(**SMALL)
    run(task, tmp_path / "fine", reporter=watch, steps=2, batch=8, start=tmp_path / "pre", freeze=("body",))
    assert "2 fresh: head.weight, head.bias" in watch.notes[0] and "parameters are frozen" in watch.notes[1]
    before, after = (checkpoint.read(tmp_path / name / "last.pt")["model"] for name in ("pre", "fine"))
    for name, value in after.items():
        if name.startswith("backbone."):
            assert torch.equal(value, checkpoint.read(tmp_path / "pre" / "best.pt")["model"][name]), name
    assert before.keys() != after.keys()
    moved = set(checkpoint.read(tmp_path / "fine" / "last.pt")["optimizer"])
    assert moved == {"head.weight", "head.bias"}
    # A saved model is a start too, and the run's folder holds one for from_pretrained.
    model = ViT.from_pretrained(tmp_path / "fine" / "model")
    assert torch.equal(model.head.weight, checkpoint.read(tmp_path / "fine" / "best.pt")["model"]["head.weight"])
    run(task, tmp_path / "again", steps=1, batch=8, start=tmp_path / "fine" / "model")
    with pytest.raises(CheckpointError, match="of other sizes"):
        run(Digits(**SMALL | {"dim": 32}), tmp_path / "b", steps=1, start=tmp_path / "pre")
    with pytest.raises(CheckpointError, match="no tensor that the model has"):
        run(Line(), tmp_path / "b", steps=1, start=tmp_path / "pre")
    with pytest.raises(InputError, match="does not exist"):
        run(task, tmp_path / "b", steps=1, start=tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"fits no parameter; the model's parts: backbone, head"):
        run(task, tmp_path / "b", steps=1, freeze=("encodre.*",))
    assert not (tmp_path / "b").exists(), "nothing is left behind by a run that did not start"


# --- options ---


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "--steps or --epochs"),
        ({"steps": 1, "epochs": 1}, "--steps or --epochs"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"epochs": -1}, "--epochs must be above 0"),
        ({"steps": 1, "batch": 0}, "--batch must be at least 1"),
        ({"steps": 1, "batch": 1000}, "lower --batch"),
        ({"steps": 1, "lr": 0.0}, "--lr must be above 0"),
        ({"steps": 1, "lr": math.nan}, "--lr must be above 0"),
        ({"steps": 1, "warmup": 2.0}, "--warmup is a part"),
        ({"steps": 1, "clip": -1.0}, "--clip must be at least 0"),
        ({"steps": 1, "precision": "fp8"}, "choose float32 or bfloat16"),
        ({"steps": 1, "device": "tpu"}, "choose auto, cpu or cuda"),
        ({"steps": 1, "parallel": "pipeline"}, "choose ddp or fsdp"),
        ({"steps": 1, "save_every": 0}, "--save-every must be at least 1"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(tmp_path, changes, says):
    with pytest.raises(InputError, match=says):
        run(Line(), tmp_path / "a", **changes)
    assert not (tmp_path / "a").exists()


def test_bad_tasks_are_refused(tmp_path):
    for make, says in [
        (lambda: Digits(attention="nothing"), "there is no method 'nothing'"),
        (lambda: Digits(layers=0), "--layers must be at least 1"),
        (lambda: Digits(dropout=1.0), "--dropout is a part"),
        (lambda: Digits(data="x"), "efficient-attn train images"),
        (lambda: Images(), "needs --data FOLDER"),
        (lambda: TASKS["forecast"](series="stocks"), "choose from sunspots"),
        (lambda: TASKS["forecast"](patch=500), "patches must fit"),
        (lambda: run(MaskedAutoencoding(overlap=1), tmp_path / "a", steps=1), "overlap"),
    ]:
        with pytest.raises(InputError, match=says):
            make()
    with pytest.raises(UnsupportedError, match="cannot be causal"):
        run(TASKS["lm"](attention="nystrom"), tmp_path / "a", steps=1)
    assert not (tmp_path / "a").exists()


# --- tasks ---


@pytest.mark.parametrize("attention", ["dense", "sliding_window:left=3,right=3"])
@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("images", "text")])
def test_every_parameter_of_every_task_learns(tmp_path, name, attention):
    """A gradient for each, as DDP requires; and every metric is a number."""
    if name == "forecast":
        pytest.importorskip("statsmodels")
    (tmp_path / "texts.csv").write_text("text,label\n" + "a short text,a\nanother one,b\n" * 20)
    data = {"data": str(tmp_path / "texts.csv")} if name == "bytes" else {}
    task = TASKS[name](attention=attention, **SMALL, **FEW.get(name, {}), **data)
    result = run(task, tmp_path / "a", steps=1, batch=2 if name == "lm" else 8)
    assert all(math.isfinite(value) for split in ("valid", "test") for value in result[split].values())
    assert task.metric in result["valid"]
    learned = checkpoint.read(tmp_path / "a" / "last.pt")["optimizer"]
    model = task.model(task.splits(0).about)
    assert set(learned) == {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    json.loads((tmp_path / "a" / "result.json").read_text())


def test_digits_are_learned_in_seconds(tmp_path):
    result = run(Digits(dim=32, layers=1, heads=2), tmp_path / "a", steps=120, batch=64, lr=5e-3)
    assert result["test"]["accuracy"] > 0.6 > 0.2 > result["baselines"]["majority"]


@pytest.mark.parametrize("name", ["clip", "simclr"])
def test_contrastive_tasks_refuse_batches_of_one_and_measure_every_example(tmp_path, monkeypatch, name):
    task = TASKS[name](**SMALL)
    with pytest.raises(InputError, match="--batch has 1 examples"):
        run(task, tmp_path / "a", steps=1, batch=1)
    assert not (tmp_path / "a").exists()
    splits = task.splits(0)
    object.__setattr__(splits, "valid", Subset(splits.valid, torch.arange(9)))  # 4 + 4 + 1: the last joins the others
    object.__setattr__(splits, "test", Subset(splits.test, torch.arange(2)))
    monkeypatch.setattr(type(task), "splits", lambda self, seed: splits)
    assert all(math.isfinite(value) for value in run(task, tmp_path / "a", steps=1, batch=4)["valid"].values())
    object.__setattr__(splits, "test", Subset(splits.test, torch.arange(1)))
    with pytest.raises(InputError, match="the test split has 1 examples"):
        run(task, tmp_path / "b", steps=1, batch=4)


def test_images_of_a_folder_are_learned(tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    for colour in ("red", "blue"):
        (tmp_path / "data" / colour).mkdir(parents=True)
        for number in range(20):
            pillow.new("RGB", (12, 9 + number), colour).save(tmp_path / "data" / colour / f"{number}.png")
    task = Images(data=str(tmp_path / "data"), image_size=8, **SMALL)
    assert run(task, tmp_path / "a", steps=20, batch=16, lr=1e-2)["test"]["accuracy"] == 1.0


# --- the command ---


def test_the_command_lists_and_explains_tasks():
    for shown in (invoke("--list").output, invoke("--help").output):
        assert all(name in shown for name in TASKS)
    page = invoke("listops", "--help").output
    assert "--max-args" in page and "--accumulate" in page and "--data" not in page


def test_the_command_trains_resumes_and_refuses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--dim", "16", "--layers", "1", "--heads", "2", "--batch", "8", "--no-tensorboard", "--threads", "1"]
    done = invoke("digits", *small, "--steps", "2", "--attention", "nystrom:landmarks=4", "--out", "a")
    assert done.exit_code == 0 and "accuracy" in done.output and "majority (baseline)" in done.output
    result = json.loads(Path("a/result.json").read_text())
    assert result["task_options"]["attention"] == "nystrom:landmarks=4" and result["options"]["steps"] == 2
    longer = invoke("digits", "--steps", "3", "--out", "a", "--resume")
    assert longer.exit_code == 0 and json.loads(Path("a/result.json").read_text())["steps"] == 3
    for arguments, says in [
        (["digits", "--steps", "3", "--out", "a"], "holds a run already"),
        (["digits", "--seed", "3", "--out", "a", "--resume"], "--seed 3 is not what the run in a began with"),
        (["mae", "--out", "a", "--resume"], "is of the task digits"),
        (["digits", "--out", "b", "--resume"], "there is no run in b"),
        (["digits", "--resume"], "there is no run of digits under runs"),
        (["digits", "--attention", "magic"], "there is no method 'magic'"),
    ]:
        refused = invoke(*arguments)
        assert refused.exit_code == 2 and says in refused.output, refused.output
    assert not Path("b").exists() and not Path("runs").exists()
    assert invoke("juggling").exit_code == 2


# --- the documentation ---


def test_the_page_shows_the_results_that_are_kept():
    """What training.md says is what docs/training.py makes of the result files, and holds what was asked of them."""
    pytest.importorskip("matplotlib")
    path = Path(__file__).resolve().parents[2] / "docs" / "training.py"
    spec = importlib.util.spec_from_file_location("training_page", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page() == module.PAGE.read_text(encoding="utf-8"), "run python docs/training.py"
    found = dict(module.runs())
    for name, result in found.items():
        assert metrics.read(module.RESULTS / name)[-1]["step"] == result["steps"]


def test_the_page_runs_and_its_links_lead_somewhere():
    pytest.importorskip("safetensors")
    docs = Path(__file__).resolve().parents[2] / "docs"
    text = (docs / "training.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(compile(block, "training.md", "exec"), {})
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (docs / target).exists(), target
    for name in re.findall(r"efficient-attn train (\w+)|efficient_attn.cli train (\w+)", text):
        assert "".join(name) in TASKS
