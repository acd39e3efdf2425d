"""Training: interrupted runs go on bit for bit, options are checked first, tasks learn, checkpoints are whole."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("typer")
pytest.importorskip("sklearn")

from typer.testing import CliRunner

from efficient_attn import InputError, UnsupportedError, cli
from efficient_attn.errors import CheckpointError
from efficient_attn.models import ViT
from efficient_attn.training import DivergedError, Interrupted, TrainOptions, checkpoint, metrics, optimizer, train
from efficient_attn.training.data.base import Splits, Subset, Tensors
from efficient_attn.training.task import Task, option
from efficient_attn.training.tasks import TASKS, Digits, Images, MaskedAutoencoding, SimClr, Translation

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"dim": 16, "layers": 1, "heads": 2}


@dataclasses.dataclass(frozen=True)
class Line(Task):
    """A small regression with dropout: the trainer alone, at hundreds of steps a second."""

    name = "line"
    help = "A line."
    examples: int = option(100, "Examples.")
    scale: float = option(1.0, "Of the inputs.")

    def splits(self, seed):
        x = torch.randn(self.examples + 20, 4, generator=torch.Generator().manual_seed(seed)) * self.scale
        data = Tensors(x=x, y=x @ torch.tensor([1.0, -2.0, 3.0, 0.5]))
        train, held = torch.arange(self.examples), torch.arange(self.examples, self.examples + 20)
        return Splits(data.subset(train), data.subset(held), data.subset(held))

    def model(self, about):
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))

    def loss(self, model, batch):
        return (model(batch["x"]).squeeze(1) - batch["y"]).square().mean()

    def evaluate(self, model, batch, about):
        return {"loss": (model(batch["x"]).squeeze(1) - batch["y"]).square()}


class Watch:
    """A reporter that counts, and acts at chosen steps."""

    def __init__(self, **actions):
        self.actions, self.notes, self.steps, self.valid = actions, [], [], []

    def begin(self, step, total, notes):
        self.notes = notes

    def trained(self, record):
        self.steps.append(record["step"])
        self.actions.get(f"step{record['step']}", lambda: None)()

    def evaluated(self, record):
        self.valid.append(record["step"])
        self.actions.get(f"eval{record['step']}", lambda: None)()

    def end(self): ...


def run(task, out, *, resume=False, reporter=None, **changes):
    return train(task, TrainOptions(out=out, tensorboard=False, **changes), resume=resume, reporter=reporter)


def curve(folder):
    """The metrics without the times."""
    return [{key: value for key, value in line.items() if key != "seconds"} for line in metrics.read(folder)]


def same_weights(one, other):
    left, right = (checkpoint.read(folder / checkpoint.LAST)["model"] for folder in (one, other))
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def interrupt():
    signal.raise_signal(signal.SIGINT)


# --- going on ---


@pytest.mark.parametrize(
    ("task", "options"),
    [
        (Line(), {"steps": 40, "batch": 9, "accumulate": 2, "eval_every": 7, "save_every": 5}),
        (
            Digits(attention="performer:features=16", dropout=0.1, augment=True, **SMALL),
            {"steps": 12, "batch": 8, "eval_every": 5},
        ),
        (MaskedAutoencoding(**SMALL), {"steps": 12, "batch": 8, "precision": "bfloat16", "eval_every": 6}),
    ],
    ids=["line", "digits", "mae"],
)
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, task, options):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    expected = run(task, whole, **options)
    first, second = torch.randperm(options["steps"] - 1)[:2].sort().values.tolist()
    stops = {f"step{step + 1}": interrupt for step in (first, second)} | {"eval5": interrupt, "eval7": interrupt}
    for attempt in range(6):
        try:
            result = run(task, pieces, resume=attempt > 0, reporter=Watch(**stops), **options)
            break
        except Interrupted as stop:
            assert stop.signum == signal.SIGINT
            stops.pop(f"step{stop.step}", None) or stops.pop(f"eval{stop.step}")
            torch.manual_seed(attempt)  # whatever happens between the two processes
            torch.randn(100)
    assert attempt >= 2 and curve(pieces) == curve(whole) and same_weights(whole, pieces)
    assert result["test"] == expected["test"] and result["best_step"] == expected["best_step"]


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    """kill -9 leaves metrics behind that are later than the checkpoint, perhaps a torn line: they are made again."""
    options = {"steps": 30, "batch": 10, "save_every": 10, "eval_every": 6}
    run(Line(), tmp_path / "whole", **options)

    class Killed(Exception): ...

    def kill():
        raise Killed

    with pytest.raises(Killed):
        run(Line(), tmp_path / "killed", reporter=Watch(step27=kill), **options)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"type": "train", "st')
    (tmp_path / "killed" / ".last.pt.part").write_bytes(b"half a checkpoint")
    assert metrics.read(tmp_path / "killed")[-1]["step"] == 27
    watch = Watch()
    run(Line(), tmp_path / "killed", resume=True, reporter=watch, **options)
    assert watch.steps[0] == 21
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert same_weights(tmp_path / "killed", tmp_path / "whole")


def test_the_command_ends_with_the_signals_code_and_says_how_to_go_on(tmp_path):
    task, options = Digits(**SMALL), {"steps": 150, "batch": 8, "eval_every": 50, "threads": 1, "lr": 1e-3}
    run(task, tmp_path / "whole", **options)
    typed = (
        "digits --dim 16 --layers 1 --heads 2 --steps 150 --batch 8 --lr 1e-3 --warmup 0.1 --eval-every 50 --threads 1"
    )
    arguments = [*typed.split(), "--no-tensorboard", "--out", str(tmp_path / "a")]
    command = [sys.executable, "-m", "efficient_attn.cli", "train", *arguments]
    for number, more, lines in [(signal.SIGINT, [], 20), (signal.SIGTERM, ["--resume"], 40)]:
        process = subprocess.Popen([*command, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while _lines(tmp_path / "a") < lines and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(number)
        output, _ = process.communicate()
        assert process.returncode == 128 + number, output
        assert f"efficient-attn train digits --out {tmp_path / 'a'} --resume" in output
    run(task, tmp_path / "a", resume=True, **options)
    assert len(curve(tmp_path / "whole")) == 153
    assert curve(tmp_path / "a") == curve(tmp_path / "whole")
    assert same_weights(tmp_path / "a", tmp_path / "whole")


def _lines(out):
    try:
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def test_a_finished_run_can_be_made_longer(tmp_path):
    run(Line(), tmp_path / "a", steps=10)
    watch = Watch()
    result = run(Line(), tmp_path / "a", resume=True, reporter=watch, steps=15)
    assert watch.steps == [11, 12, 13, 14, 15] and result["steps"] == 15
    assert any("15 steps long now instead of 10" in note for note in watch.notes)
    with pytest.raises(InputError, match="15 steps behind it already"):
        run(Line(), tmp_path / "a", resume=True, steps=12)


def folder_of_images(root):
    pillow = pytest.importorskip("PIL.Image")
    for place, name in enumerate(["cat/0", "cat/1", "cat/2", "cat/3", "cat/4", "dog/0", "dog/1", "dog/2", "dog/3"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pillow.new("RGB", (8, 8), (20 * place, 0, 0)).save(root / f"{name}.png")
    return root


def brighter(file):
    pillow = pytest.importorskip("PIL.Image")
    pillow.new("RGB", (8, 8), "white").save(file)


CHANGES = {
    "a file is removed": lambda root: (root / "cat/2.png").unlink(),
    "a file is added": lambda root: shutil.copy(root / "cat/2.png", root / "cat/9.png"),
    "a file has other content": lambda root: brighter(root / "dog/1.png"),
    "a file changes its class": lambda root: (root / "cat/2.png").rename(root / "dog/9.png"),
    "a class has another name": lambda root: (root / "dog").rename(root / "wolf"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_goes_on_with_its_own_data_only(tmp_path, change):
    data = folder_of_images(tmp_path / "data")
    task, options = Images(data=str(data), image_size=8, **SMALL), {"batch": 4, "steps": 1}
    first = run(task, tmp_path / "a", **options)
    assert run(task, tmp_path / "a", resume=True, **options | {"steps": 2})["data"] == first["data"]
    CHANGES[change](data)
    last = (tmp_path / "a" / checkpoint.LAST).read_bytes()
    with pytest.raises(InputError, match="the data are not those that the run in"):
        run(task, tmp_path / "a", resume=True, **options | {"steps": 3})
    assert (tmp_path / "a" / checkpoint.LAST).read_bytes() == last


def test_every_file_is_read_before_the_first_step(tmp_path):
    data = folder_of_images(tmp_path / "data")
    for file in sorted(data.rglob("*.png")):
        whole = file.read_bytes()
        file.write_bytes(whole[:45])
        with pytest.raises(InputError, match=f"{file.name} cannot be read as an image"):
            run(Images(data=str(data), image_size=8, **SMALL), tmp_path / "a", steps=1, batch=4)
        assert not (tmp_path / "a").exists()
        file.write_bytes(whole)


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("images", "text")])
def test_a_fingerprint_is_that_of_the_data(tmp_path, name):
    """The same for the same seed in another object, and another one for another seed where that divides the data."""
    if name == "forecast":
        pytest.importorskip("statsmodels")
    (tmp_path / "texts.csv").write_text("text,label\n" + "".join(f"a text {n},{n % 2}\n" for n in range(40)))
    data = {"data": str(tmp_path / "texts.csv")} if name == "bytes" else {}
    task = TASKS[name](**FEW.get(name, {}), **data)
    one, same, other = (task.splits(seed).fingerprint() for seed in (0, 0, 1))
    assert one == same and len(set(one.values())) == 4
    assert (one["train"] == other["train"]) == (name in ("forecast", "lm")), "those are divided by place"


def test_a_checkpoint_that_does_not_know_its_data_goes_on_with_a_word(tmp_path):
    run(Line(), tmp_path / "a", steps=2)
    path, watch = tmp_path / "a" / checkpoint.LAST, Watch()
    state = checkpoint.read(path)
    del state["data"]
    checkpoint.write_whole(path, state)
    run(Line(), tmp_path / "a", resume=True, reporter=watch, steps=3)
    assert any("does not say of which data" in note for note in watch.notes)


def test_a_run_without_a_checkpoint_can_begin_again(tmp_path):
    with pytest.raises(ZeroDivisionError):
        run(Line(), tmp_path / "a", steps=10, save_every=10, reporter=Watch(step3=lambda: 1 / 0))
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        run(Line(), tmp_path / "nothing", resume=True, steps=10)
    run(Line(), tmp_path / "a", steps=4)
    assert [line["step"] for line in metrics.read(tmp_path / "a") if line["type"] == "train"] == [1, 2, 3, 4]
    with pytest.raises(InputError, match="holds a run already"):
        run(Line(), tmp_path / "a", steps=4)


def test_a_run_without_a_checkpoint_goes_on_from_its_beginning(tmp_path):
    options, watch = {"steps": 10, "save_every": 10}, Watch()
    run(Line(), tmp_path / "whole", **options)
    with pytest.raises(ZeroDivisionError):
        run(Line(), tmp_path / "a", reporter=Watch(step3=lambda: 1 / 0), **options)
    run(Line(), tmp_path / "a", resume=True, reporter=watch, **options)
    assert same_weights(tmp_path / "whole", tmp_path / "a") and curve(tmp_path / "whole") == curve(tmp_path / "a")
    assert any("begins at the first step" in note for note in watch.notes)


@pytest.mark.parametrize("save_every", [1, 20])
@pytest.mark.parametrize(
    "change", [["--lr", "0.001"], ["--lr", "0.001", "--warmup", "1.0"], ["--lr", "1e-3", "--clip", "1"]]
)
def test_the_advice_of_a_diverged_run_works(tmp_path, monkeypatch, change, save_every):
    """Also before the first checkpoint; and what was chosen anew stays so when the run goes on once more."""
    loss, factor = Digits.loss, [math.nan]
    monkeypatch.setattr(Digits, "loss", lambda *given: loss(*given) * factor[0])
    small = ["--dim", "16", "--layers", "1", "--heads", "2", "--batch", "8", "--no-tensorboard", "--threads", "1"]
    out = ["--out", str(tmp_path / "a")]
    failed = invoke("digits", *small, "--lr", "0.5", "--steps", "4", "--save-every", str(save_every), *out)
    assert failed.exit_code == 2 and "lower --lr (0.5) or raise --warmup" in " ".join(failed.output.split())
    factor[0] = 1.0
    gone_on = invoke("digits", *out, "--resume", *change)
    assert gone_on.exit_code == 0, gone_on.output
    again = invoke("digits", *out, "--resume", "--steps", "5")
    assert again.exit_code == 0 and "--lr" not in again.output
    assert json.loads((tmp_path / "a" / "result.json").read_text())["options"]["lr"] == 0.001


def test_a_damaged_config_is_explained(tmp_path):
    for content, says in [
        ('{"task": "dig', "is no JSON that can be read"),
        ("[]", "is no config of efficient-attn train"),
        ('{"task": "digits", "options": {}, "task_options": {}}', "another version"),
        ('{"task": "digits", "options": {"start": null}, "task_options": {"colour": 1}}', "another version"),
    ]:
        (tmp_path / "config.json").write_text(content)
        refused = invoke("digits", "--out", str(tmp_path), "--resume")
        assert refused.exit_code == 2 and says in " ".join(refused.output.split()), refused.output


def test_the_printed_command_can_be_pasted(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise Interrupted(signal.SIGINT, 3)

    monkeypatch.setattr("efficient_attn.training.trainer.train", interrupted)
    out = str(tmp_path / "my 'runs' $HOME")
    printed = next(line for line in invoke("digits", "--out", out).output.splitlines() if "--resume" in line)
    assert shlex.split(printed) == ["efficient-attn", "train", "digits", "--out", out, "--resume"]


def test_a_second_signal_ends_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(Line(), tmp_path / "a", steps=10, reporter=Watch(step3=lambda: (interrupt(), interrupt())))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "handlers are put back"


# --- checkpoints ---


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    checkpoint.write_whole(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_whole(path, b"new")
    assert path.read_bytes() == b"old"


def test_checkpoints_that_are_none_are_refused(tmp_path):
    run(Line(), tmp_path / "a", steps=4)
    last = tmp_path / "a" / "last.pt"
    whole = last.read_bytes()
    for content, says in [
        (whole[:1000], "no checkpoint that can be read"),
        (b"", "no checkpoint"),
        (b"text", "no check"),
    ]:
        last.write_bytes(content)
        with pytest.raises(CheckpointError, match=says):
            run(Line(), tmp_path / "a", resume=True, steps=6)
    torch.save({"something": 1}, last)
    with pytest.raises(CheckpointError, match="not a checkpoint of efficient-attn train"):
        checkpoint.read(last)
    torch.save(subprocess.Popen, last)  # what weights_only would have to execute
    with pytest.raises(CheckpointError, match="no checkpoint that can be read"):
        checkpoint.read(last)
    last.write_bytes(whole)
    with pytest.raises(CheckpointError, match="another model"):
        run(Digits(**SMALL), tmp_path / "a", resume=True, steps=6)


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

FEW = {
    "listops": {"min_length": 5, "max_length": 30, "examples": 40, "held_out": 8},
    "bytes": {"max_length": 32},
    "translate": {"below": 60, "examples": 40},
    "lm": {"length": 2000},
    "forecast": {"context": 12, "patch": 4, "stride": 4},
}


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


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"}).invoke(cli.app, ["train", *arguments])


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
