"""How to train: what is the same for every task."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError

PRECISIONS = ("float32", "bfloat16")
PARALLEL = ("ddp", "fsdp")


@dataclass(frozen=True)
class TrainOptions:
    """Options of a run.

    Attributes:
        out: folder of the run: `config.json`, `metrics.jsonl`, `last.pt`, `best.pt`, `result.json` and
            `model/`, the best parameters for `from_pretrained`.
        steps: optimizer steps; or give `epochs`, passes over the training data.
        batch: examples at once in each process. A step takes `batch * accumulate * processes` examples.
        accumulate: batches whose gradients make one step.
        lr: highest learning rate, reached after the part `warmup` of the steps, from where it falls as a cosine to
            the part `final_lr` of it.
        weight_decay: of AdamW, for matrices; vectors (biases, norms) have none.
        clip: greatest norm of the gradient; 0 for no limit.
        precision: `float32`, or `bfloat16` for mixed precision by autocast; parameters stay float32.
        seed: of the data's division and order, the first parameters, dropout and augmentation.
        eval_every, save_every: steps between validations and checkpoints. Default: a tenth of the run.
        log_every: steps between lines of `metrics.jsonl`.
        threads: of the CPU; None for PyTorch's number. Sums may be rounded otherwise with another number.
        device: `cpu`, `cuda` or `auto`.
        parallel: with more than one process, `ddp` copies the model to each, `fsdp` shards it.
        context_parallel: so many processes in a row spread each sequence between them (see docs/distributed.md).
        timeout: seconds to wait for another process before the run ends with an error that says so.
        start: parameters to start from: the folder of another run, a `.pt` of one, or one of `save_pretrained`.
        freeze: parameters that do not learn: `body` (all but the head) or patterns of names, as `encoder.*`.
        tensorboard: write TensorBoard's files too. Default: if it is installed.
    """

    out: Path
    steps: int | None = None
    epochs: float | None = None
    batch: int = 64
    accumulate: int = 1
    lr: float = 1e-3
    warmup: float = 0.1
    final_lr: float = 0.0
    weight_decay: float = 0.05
    clip: float = 1.0
    precision: str = "float32"
    seed: int = 0
    eval_every: int | None = None
    save_every: int | None = None
    log_every: int = 1
    threads: int | None = None
    device: str = "auto"
    parallel: str = "ddp"
    context_parallel: int = 1
    timeout: float = 600.0
    start: Path | None = None
    freeze: tuple[str, ...] = ()
    tensorboard: bool | None = None

    def __post_init__(self) -> None:
        """Raise InputError for what no run can have."""
        if (self.steps is None) == (self.epochs is None):
            raise InputError("give --steps or --epochs, and not both")
        for name, least in (
            ("steps", 1),
            ("batch", 1),
            ("accumulate", 1),
            ("log_every", 1),
            ("seed", 0),
            ("threads", 1),
            ("context_parallel", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{_flag(name)} must be at least {least}, given {value}")
        for name in ("eval_every", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{_flag(name)} must be at least 1, given {value}")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise InputError(f"--epochs must be above 0, given {self.epochs}")
        if not 0 < self.lr < math.inf:
            raise InputError(f"--lr must be above 0, given {self.lr}; 0.001 is usual")
        if not 0 < self.timeout < math.inf:
            raise InputError(f"--timeout must be positive seconds, given {self.timeout}")
        for name in ("warmup", "final_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{_flag(name)} is a part, from 0 to 1, given {getattr(self, name)}")
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{_flag(name)} must be at least 0, given {getattr(self, name)}")
        if self.precision not in PRECISIONS:
            raise InputError(f"--precision {self.precision!r} does not exist; choose {' or '.join(PRECISIONS)}")
        if self.parallel not in PARALLEL:
            raise InputError(f"--parallel {self.parallel!r} does not exist; choose {' or '.join(PARALLEL)}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise InputError(f"--device {self.device!r} does not exist; choose auto, cpu or cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: PyTorch finds no GPU here; leave it out or choose cpu")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        return self.steps if self.steps is not None else max(1, math.ceil(self.epochs * steps_per_epoch))  # type: ignore[operator]


# What a resumed run may choose anew: what does not change what is computed; its length, which changes its schedule; and
# what a run needs that diverged.
STEADYING = ("lr", "warmup", "clip")
FREE_ON_RESUME = frozenset(
    {"out", "steps", "epochs", "save_every", "threads", "device", "context_parallel", "timeout", "tensorboard"}
    | {*STEADYING}
)


def describe(options: TrainOptions) -> dict[str, Any]:
    """The options as JSON values."""
    values = {**vars(options), "out": str(options.out), "freeze": list(options.freeze)}
    return values | {"start": None if options.start is None else str(options.start)}


def restore(values: dict[str, Any]) -> TrainOptions:
    """The options that :func:`describe` described."""
    start = values["start"]
    changed = {"out": Path(values["out"]), "start": start and Path(start), "freeze": tuple(values["freeze"])}
    return TrainOptions(**{**values, **changed})


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
