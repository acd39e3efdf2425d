"""A model trained for some steps with one method: what it reaches, and what a step costs beside exact attention."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from efficient_attn.measuring import clock
from efficient_attn.measuring.calls import sized
from efficient_attn.training.data.base import Batch, Dataset, Splits
from efficient_attn.training.optimizer import adamw, learning_rate
from efficient_attn.training.task import Task

from .suites import beside

EVALUATED_AT_ONCE = 64
WARMUP, FINAL, DECAY, CLIP = 0.1, 0.05, 0.01, 1.0


def learn(task: Callable[[str], Task], splits: Splits, config: Mapping[str, Any]) -> dict[str, Any]:
    """What `reached` and `cost` return, of one model.

    Args:
        task: makes the task with an attention of this spec.
        splits: its data.
        config: method (spec), steps, batch, lr, held_out (test examples that are looked at), budget_s, seed,
            and optionally metric, another of the task's.
    """
    return {**cost(task, splits, config), **reached(task, splits, config)}


def reached(task: Callable[[str], Task], splits: Splits, config: Mapping[str, Any]) -> dict[str, Any]:
    """Trains on seeded batches, then measures on test examples.

    Returns:
        score: the task's metric on the test examples, and `baseline` where the data has one; loss of the last steps;
        the seconds of training.
    """
    chosen, model = _seeded(task, splits, config)
    metric = config.get("metric", chosen.metric)
    started = time.perf_counter()
    losses = _train(chosen, model, _batches(splits.train, config["batch"], config["seed"]), config)
    trained_s = time.perf_counter() - started
    metrics = _evaluate(chosen, model, splits.test, splits.about, config)
    return {
        "score": round(metrics[metric], 4),
        "score_is": metric,
        "baseline": _baseline(splits.about, metric),
        "loss": round(sum(losses[-10:]) / len(losses[-10:]), 4),
        "trained_s": round(trained_s, 2),
    }


def cost(task: Callable[[str], Task], splits: Splits, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a step takes.

    Returns:
        The time of a step (forward, backward; `ms`) and of a forward alone in one alternation with the same model
        under exact attention; examples_per_s in training and inference; peak_bytes of a step; parameters; tokens.
    """
    chosen, model = _seeded(task, splits, config)
    first = next(_batches(splits.train, config["batch"], config["seed"]))
    step, forward = _calls(chosen, model, first)
    step()  # libraries wake up
    with clock.PeakMemory() as peak:
        step()
    calls = {"method": step, "forward": forward}
    if config["method"] != "dense":
        exact = task("dense")
        calls["dense"], calls["dense_forward"] = _calls(exact, exact.model(splits.about), first)
    times = clock.interleaved(calls, config["budget_s"])
    ms, forward_ms = times["method"]["ms"], times["forward"]["ms"]
    return {
        **beside(times, "method", ("dense",)),
        "forward_ms": forward_ms,
        "forward_speedup": round(times.get("dense_forward", times["forward"])["ms"] / forward_ms, 4),
        "examples_per_s": round(config["batch"] / ms * 1e3, 2),
        "inference_per_s": round(config["batch"] / forward_ms * 1e3, 2),
        "peak_bytes": peak.bytes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": _tokens(task("dense"), splits.about),
    }


def _seeded(task: Callable[[str], Task], splits: Splits, config: Mapping[str, Any]) -> tuple[Task, nn.Module]:
    """The task with its method made to its length, and its model."""
    chosen = task(str(sized(config["method"], _tokens(task("dense"), splits.about))))
    torch.manual_seed(config["seed"])
    return chosen, chosen.model(splits.about)


def _tokens(task: Task, about: Mapping[str, Any]) -> int:
    """At most: of a text, of an image with a token a pixel and one for its class, of a series."""
    pixels = about["image_size"] ** 2 + 1 if "image_size" in about else 0
    tokens: int = max(about.get("max_length", 0), pixels, getattr(task, "tokens", 0))
    return tokens


def _batches(data: Dataset, size: int, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield data.batch(torch.randint(len(data), (size,), generator=generator))


def _calls(task: Task, model: nn.Module, batch: Batch) -> tuple[clock.Call, clock.Call]:
    """Forward and backward of a batch, and forward alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    step = lambda: torch.autograd.grad(task.loss(model.train(), batch), parameters, allow_unused=True)  # noqa: E731
    return step, torch.no_grad()(lambda: task.loss(model.eval(), batch))


def _train(task: Task, model: nn.Module, batches: Any, config: Mapping[str, Any]) -> list[float]:
    optimizer = adamw(model, lr=config["lr"], weight_decay=DECAY)
    model.train()
    losses = []
    for step in range(config["steps"]):
        rate = learning_rate(step, config["steps"], peak=config["lr"], warmup=WARMUP, final=FINAL)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = task.loss(model, next(batches))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def _evaluate(
    task: Task, model: nn.Module, test: Dataset, about: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, float]:
    model.eval()
    indices = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[: config["held_out"]]
    found = [task.evaluate(model, test.batch(part), about) for part in indices.split(EVALUATED_AT_ONCE)]
    return task.summary({name: torch.cat([one[name] for one in found]) for name in found[0]}, about)


def _baseline(about: Mapping[str, Any], metric: str) -> float | None:
    """What a model must beat: of accuracy, always naming the most frequent class."""
    baselines = about.get("baselines", {})
    known = baselines.get("majority") if metric == "accuracy" else baselines.get(metric)
    return None if known is None else round(float(known), 4)
