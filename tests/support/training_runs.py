"""A task of hundreds of steps a second, and what tests of the trainer do with runs of it."""

from __future__ import annotations

import dataclasses
import signal

import pytest
import torch
from torch import nn

pytest.importorskip("typer")
pytest.importorskip("sklearn")


from typer.testing import CliRunner

from efficient_attn import cli
from efficient_attn.training import TrainOptions, checkpoint, metrics, train
from efficient_attn.training.data.base import Splits, Tensors
from efficient_attn.training.task import Task, option

SMALL = {"dim": 16, "layers": 1, "heads": 2}

FEW = {
    "listops": {"min_length": 5, "max_length": 30, "examples": 40, "held_out": 8},
    "bytes": {"max_length": 32},
    "translate": {"below": 60, "examples": 40},
    "lm": {"length": 2000},
    "forecast": {"context": 12, "patch": 4, "stride": 4},
}


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


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"}).invoke(cli.app, ["train", *arguments])
