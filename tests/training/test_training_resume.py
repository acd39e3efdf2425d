"""Interrupted runs go on bit for bit, with their own data only; checkpoints are whole."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from support.training_runs import FEW, SMALL, Line, Watch, curve, interrupt, invoke, run, same_weights

pytest.importorskip("typer")
pytest.importorskip("sklearn")


from efficient_attn import InputError
from efficient_attn.errors import CheckpointError
from efficient_attn.training import Interrupted, checkpoint, metrics
from efficient_attn.training.tasks import TASKS, Digits, Images, MaskedAutoencoding

pytestmark = pytest.mark.usefixtures("one_thread")


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
        assert f" train digits --out {tmp_path / 'a'} --resume" in output
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
    assert shlex.split(printed)[-5:] == ["train", "digits", "--out", out, "--resume"]


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
