"""The loop that trains any :class:`Task`: repeatable, interruptible, and the same in one process or many.

All data are read once before the first step, and a run goes on with the very same ones only.

All that a step depends on is the model, the optimizer, the number of the step and the random numbers' states. The
order of the data follows from seed and epoch, the learning rate from the step. So a run that goes on from a checkpoint
computes, on a CPU with as many threads, the same bits as one that was never interrupted.
"""

from __future__ import annotations

import json
import math
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import EfficientAttnError, InputError
from ..measuring import records
from ..measuring.run_folder import make_run_folder
from . import checkpoint, optimizer, options, start
from .data.base import SPLITS, Batch, Dataset
from .metrics import Metrics
from .options import TrainOptions
from .processes import Processes, accumulating, processes
from .task import Objective, Task, Values

CONFIG, RESULT, MODEL = "config.json", "result.json", "model"


class Interrupted(Exception):
    """A run that SIGINT or SIGTERM ended, after its checkpoint was written; `signum` says which."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name} after step {step}")
        self.signum, self.step = signum, step


class DivergedError(EfficientAttnError, RuntimeError):
    """A loss or gradient that is no finite number. The checkpoint is the one before it."""


class Reporter(Protocol):
    """Who is told how a run goes on."""

    def begin(self, step: int, total: int, notes: list[str]) -> None: ...

    def trained(self, record: dict[str, Any]) -> None: ...

    def evaluated(self, record: dict[str, Any]) -> None: ...

    def end(self) -> None: ...


class Silent:
    """Tells nobody."""

    def begin(self, step: int, total: int, notes: list[str]) -> None: ...

    def trained(self, record: dict[str, Any]) -> None: ...

    def evaluated(self, record: dict[str, Any]) -> None: ...

    def end(self) -> None: ...


def train(
    task: Task, chosen: TrainOptions, *, resume: bool = False, reporter: Reporter | None = None
) -> dict[str, Any]:
    """Train, evaluate on the test with the parameters that were best in validation, and return `result.json`.

    Under `torchrun` every process calls this; the first one writes and reports.

    Raises:
        InputError: data or options that cannot be trained on; a folder that holds a run already, without `resume`;
            with it, other data than the run began with.
        CheckpointError: nothing to go on from, or of something else.
        DivergedError: a loss that is no number.
        CommunicationError: another process that died or hangs.
        Interrupted: after SIGINT or SIGTERM, when the checkpoint is written.
    """
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    joined = processes(chosen.device, chosen.context_parallel, chosen.timeout)
    with joined as here, here.context_parallel(), _stops() as stops:
        run = _Run(task, chosen, here, resume, (reporter if here.first else None) or Silent(), stops)
        try:
            return run.all()
        finally:
            run.close()


class _Run:
    """One run; its state is what a checkpoint holds."""

    def __init__(
        self, task: Task, chosen: TrainOptions, here: Processes, resume: bool, reporter: Reporter, stops: _Stops
    ) -> None:
        self.task, self.options, self.here, self.reporter, self.stops = task, chosen, here, reporter, stops
        self.step, self.evaluated_at, self.seconds, self.cpu_seconds = 0, -1, 0.0, 0.0
        self.best: dict[str, float] | None = None
        _seed(chosen.seed)
        self.splits = task.splits(chosen.seed)
        fewest = {"--batch": chosen.batch} | {f"the {n} split": len(getattr(self.splits, n)) for n in SPLITS}
        for name, count in fewest.items():
            if count < task.least_batch:
                raise InputError(
                    f"{name} has {count} examples, and the loss of {task.name} is that of at least {task.least_batch}; "
                    "raise --batch or give more data"
                )
        self.global_batch = chosen.batch * chosen.accumulate * here.data_world
        self.steps_per_epoch = len(self.splits.train) // self.global_batch
        if not self.steps_per_epoch:
            raise InputError(
                f"a step of {self.global_batch} examples (batch {chosen.batch} x accumulate {chosen.accumulate} x "
                f"{here.data_world} processes) is more than the {len(self.splits.train)} that there are; lower --batch"
            )
        self.total = chosen.total_steps(self.steps_per_epoch)
        self.eval_every = chosen.eval_every or max(1, self.total // 10)
        self.save_every = chosen.save_every or max(1, self.total // 10)
        model = task.model(self.splits.about)
        last = chosen.out / checkpoint.LAST
        # A run that has begun and was killed before its first checkpoint goes on from its beginning.
        goes_on = resume and (last.exists() or not (chosen.out / CONFIG).exists())
        self.notes = start.adopt(task, model, chosen.start) if chosen.start and not goes_on else []
        if chosen.freeze:
            frozen = optimizer.freeze(model, chosen.freeze)
            self.notes.append(f"{frozen:,} parameters are frozen")
        self.model = model.to(here.device)
        self.parallel = here.parallel(Objective(self.model, task, self.splits.about), chosen.parallel)
        self.optimizer = optimizer.adamw(self.model, lr=chosen.lr, weight_decay=chosen.weight_decay)
        self.data = self.splits.fingerprint()  # reads every file, so that a damaged one is found before the first step
        _seed(chosen.seed + 1 + here.data_rank)
        if goes_on:
            self._load()
        elif resume:
            self.notes.append(f"there is no checkpoint in {chosen.out} yet: begins at the first step")
        elif here.first:
            # One that was killed before its first checkpoint may be begun again, by other options too.
            make_run_folder(chosen.out, holds_run=last.exists())
        if here.first:
            _write_json(chosen.out / CONFIG, self.config)
        here.wait()
        self.metrics = (
            Metrics(chosen.out, step=self.step, evaluated=self.evaluated_at, tensorboard=chosen.tensorboard)
            if here.first
            else None
        )
        self.ahead = _Ahead(self.splits.train, chosen, here, self.steps_per_epoch)

    @property
    def config(self) -> dict[str, Any]:
        """What `config.json` and checkpoints remember of the options."""
        return {"task": self.task.name, "task_options": vars(self.task), "options": options.describe(self.options)}

    def all(self) -> dict[str, Any]:
        """Every step that is left, and the test."""
        self.reporter.begin(self.step, self.total, self.notes)
        try:
            while True:
                if self._stop_asked():
                    raise Interrupted(self.stops.signum or signal.SIGINT, self.step)
                due = self.step == self.total or (self.step and self.step % self.eval_every == 0)
                if due and self.evaluated_at < self.step:
                    self._validate()
                    continue  # a signal meanwhile
                if self.step and self.step % self.save_every == 0:
                    self._save()
                if self.step == self.total:
                    break
                self._train_step()
        except Interrupted:
            self._save()
            raise
        self._save()
        return self._finish()

    def close(self) -> None:
        self.ahead.close()
        self.reporter.end()
        if self.metrics is not None:
            self.metrics.close()

    # --- a step ---

    def _train_step(self) -> None:
        begun, begun_cpu = time.perf_counter(), time.process_time()
        chosen, here = self.options, self.here
        self.parallel.train()
        if here.context > 1:  # they draw for parts of unequal size, and must draw alike what is done to whole examples
            _seed((chosen.seed + 1 + here.data_rank) * 1_000_003 + self.step)
        batches = [self._placed(batch) for batch in self.ahead.step(self.step)]
        weights = [self.task.weight(batch, self.splits.about) for batch in batches]
        (total_weight,) = here.sums(sum(weights))
        lr = optimizer.learning_rate(self.step, self.total, peak=chosen.lr, warmup=chosen.warmup, final=chosen.final_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        loss_here = 0.0
        for place, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            with accumulating(self.parallel, more=place + 1 < len(batches)):
                with self._autocast():
                    loss = self.parallel(batch)
                part = weight / max(total_weight, 1)
                (loss * (part * here.world)).backward()  # DDP and FSDP divide by the number of processes
                loss_here += loss.item() * part
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), chosen.clip or math.inf)
        norm = getattr(norm, "full_tensor", lambda: norm)()
        (loss_all,) = here.sums(loss_here)
        if not math.isfinite(loss_all) or not math.isfinite(norm.item()):
            raise DivergedError(
                f"step {self.step + 1}: the loss is {loss_all:g} and the gradient's norm {norm.item():g}; lower --lr "
                f"({chosen.lr:g}) or raise --warmup, and go on from the last checkpoint with --resume, or begin anew"
            )
        self.optimizer.step()
        self.step += 1
        self.seconds += time.perf_counter() - begun
        self.cpu_seconds += time.process_time() - begun_cpu
        record = {"type": "train", "step": self.step, "loss": loss_all, "lr": lr, "grad_norm": norm.item()}
        record["seconds"] = round(self.seconds, 3)
        if self.metrics is not None and (self.step % chosen.log_every == 0 or self.step == self.total):
            self.metrics.write(record)
        self.reporter.trained(record)

    def _placed(self, batch: Batch) -> Batch:
        return {name: value.to(self.here.device, non_blocking=True) for name, value in batch.items()}

    def _autocast(self) -> torch.autocast:
        mixed = self.options.precision == "bfloat16"
        return torch.autocast(self.here.device.type, dtype=torch.bfloat16, enabled=mixed)

    def _stop_asked(self) -> bool:
        """Whether any process got a signal: all of them stop after the same step."""
        (asked,) = self.here.sums(self.stops.signum is not None)
        return asked > 0

    # --- measuring ---

    def _validate(self) -> None:
        measured = self._measure(self.splits.valid, interruptible=True)
        if measured is None:
            return  # the next look at the signal ends the run; the validation is made after a resume
        record = {"type": "eval", "split": "valid", "step": self.step, **measured}
        value = measured[self.task.metric]
        better = self.best is None or (value > self.best["value"] if self.task.higher else value < self.best["value"])
        if better and math.isfinite(value):
            self.best = {"step": self.step, "value": value}
            weights = checkpoint.weights(self.model)
            if self.here.first:
                content = {"format": checkpoint.FORMAT, "step": self.step, "model": weights, "config": self.config}
                checkpoint.write_whole(self.options.out / checkpoint.BEST, content)
        if self.metrics is not None:
            self.metrics.write(record)
        self.reporter.evaluated(record)
        self.evaluated_at = self.step

    def _measure(self, data: Dataset, *, interruptible: bool = False) -> dict[str, float] | None:
        """The metrics of a split, or None when a signal came."""
        values = self._values(data, interruptible=interruptible)
        return None if values is None else self._summary(values)

    def _summary(self, values: Values) -> dict[str, float]:
        """The first process's numbers for all, so that all decide alike what is best."""
        return self.here.gather(self.task.summary(values, self.splits.about))[0]  # type: ignore[no-any-return]

    @torch.no_grad()
    def _values(self, data: Dataset, *, interruptible: bool = False) -> Values | None:
        """What the task measures of each example, or None when a signal came.

        Every process measures all of it, since the sharded parameters of FSDP need every process for each batch.
        """
        before = checkpoint.random_state()
        _seed(self.options.seed)
        self.parallel.eval()
        parts: list[Values] = []
        bounds = [*range(0, len(data), self.options.batch), len(data)]
        if len(bounds) > 2 and bounds[-1] - bounds[-2] < self.task.least_batch:
            del bounds[-2]  # the last examples are too few for a loss of their own
        for begin, end in pairwise(bounds):
            if interruptible and self.here.world == 1 and self.stops.signum is not None:
                checkpoint.set_random_state(before)
                return None
            batch = self._placed(data.batch(torch.arange(begin, end)))
            with self._autocast():
                parts.append({name: value.cpu() for name, value in self.parallel(batch, evaluate=True).items()})
        checkpoint.set_random_state(before)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _finish(self) -> dict[str, Any]:
        """Measures the test with the best parameters and writes what a user takes away."""
        self.here.wait()  # best.pt is the first process's
        if self.best is not None:
            checkpoint.load_weights(self.model, checkpoint.read(self.options.out / checkpoint.BEST)["model"])
        valid, values = self._measure(self.splits.valid), self._values(self.splits.test)
        assert values is not None
        details = self.task.details(values, self.splits.about)
        test = self._summary(values)
        trained = sum(parameter.numel() for parameter in self.model.parameters())
        result = {
            **self.config,
            "steps": self.step,
            "best_step": None if self.best is None else int(self.best["step"]),
            "examples": {name: len(getattr(self.splits, name)) for name in ("train", "valid", "test")},
            "parameters": trained,
            "data": self.data,
            "processes": self.here.world,
            "threads": torch.get_num_threads(),
            "environment": records.environment(),
            "training_seconds": round(self.seconds, 1),
            "training_cpu_seconds": round(self.cpu_seconds, 1),
            "valid": valid,
            "test": test,
            "baselines": self.splits.about.get("baselines", {}),
            "details": details,
        }
        weights = checkpoint.weights(self.model)
        if self.here.first:
            start.save_model(self.task, self.splits.about, weights, self.options.out / MODEL)
            _write_json(self.options.out / RESULT, result)
        self.here.wait()
        return result

    # --- checkpoints ---

    def _save(self) -> None:
        state = {
            "format": checkpoint.FORMAT,
            "step": self.step,
            "evaluated_at": self.evaluated_at,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "best": self.best,
            "total": self.total,
            "config": self.config,
            "data": self.data,
            "model": checkpoint.weights(self.model),
            "optimizer": checkpoint.optimizer_state(self.model, self.optimizer),
            "random": self.here.gather(checkpoint.random_state()),
        }
        if self.metrics is not None:
            self.metrics.sync()
            checkpoint.write_whole(self.options.out / checkpoint.LAST, state)
        self.here.wait()

    def _load(self) -> None:
        state = checkpoint.read(self.options.out / checkpoint.LAST)
        checkpoint.load_weights(self.model, state["model"])
        before = state.get("data")
        if before is None:
            self.notes.append("the checkpoint does not say of which data it is: whether they changed is not known")
        elif changed := [name for name in before if self.data.get(name) != before[name]]:
            raise InputError(
                f"the data are not those that the run in {self.options.out} began with ({', '.join(changed)} changed), "
                "so what it is tested on may be what it has learned from; put the data back, or start a new run"
            )
        checkpoint.load_optimizer_state(self.model, self.optimizer, state["optimizer"])
        self.step, self.evaluated_at = state["step"], state["evaluated_at"]
        self.seconds, self.cpu_seconds, self.best = state["seconds"], state["cpu_seconds"], state["best"]
        if self.step > self.total:
            raise InputError(f"the run has {self.step} steps behind it already, more than the {self.total} asked for")
        if state["total"] != self.total:
            self.notes.append(f"the run is {self.total} steps long now instead of {state['total']}: so is its schedule")
        for name in options.STEADYING:
            then, now = state["config"]["options"][name], getattr(self.options, name)
            if then != now:
                self.notes.append(f"--{name} is {now:g} from here on instead of {then:g}")
        if len(state["random"]) == self.here.world:
            checkpoint.set_random_state(state["random"][self.here.rank])
        else:
            _seed(self.options.seed + 1 + self.here.rank + 1000 * self.step)
            self.notes.append(f"{self.here.world} processes go on from {len(state['random'])}: other random numbers")
        self.notes.append(f"goes on after step {self.step} of {self.total}")


class _Ahead:
    """The batches of each step; those of the next one are made in a thread while this one is computed."""

    def __init__(self, data: Dataset, chosen: TrainOptions, here: Processes, steps_per_epoch: int) -> None:
        self.data, self.options, self.here, self.steps_per_epoch = data, chosen, here, steps_per_epoch
        self._maker = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[list[Batch]]] | None = None
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def step(self, step: int) -> list[Batch]:
        """The `accumulate` batches of a step for this process."""
        if self._next is None or self._next[0] != step:
            self._next = (step, self._maker.submit(self._make, step))
        found = self._next[1].result()
        self._next = (step + 1, self._maker.submit(self._make, step + 1))
        return found

    def _make(self, step: int) -> list[Batch]:
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(len(self.data), generator=generator))
        size, world = self.options.batch, self.here.data_world
        step_size = size * world * self.options.accumulate
        indices = self._order[1][place * step_size : (place + 1) * step_size].view(-1, world, size)
        return [self.data.batch(part) for part in indices[:, self.here.data_rank]]

    def close(self) -> None:
        self._maker.shutdown(cancel_futures=True)


class _Stops:
    """The first SIGINT or SIGTERM is remembered; a second one ends the process at once."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __call__(self, signum: int, frame: object) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum


@contextmanager
def _stops() -> Iterator[_Stops]:
    stops = _Stops()
    if threading.current_thread() is not threading.main_thread():
        yield stops  # only the main thread may set handlers
        return
    before = {number: signal.signal(number, stops) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    checkpoint.write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


__all__ = ["CONFIG", "RESULT", "DivergedError", "Interrupted", "Reporter", "Silent", "train"]
