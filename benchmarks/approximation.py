"""What each method loses against exact attention as its size grows, on the activations of a trained model.

python -m efficient_attn.benchmarks.approximation docs/approximation.png [results.json]

The model is the digits transformer of ``vit.py``, trained with exact attention on images enlarged to side x side, a
token a pixel. Its queries, keys and values go through every method as they are: nothing is trained to make up for a
method, so that Linformer stands for what pooling does. The error is |out - exact| / |exact|.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from efficient_attn import BlockMask, MultiheadAttention, attention, parse, truncated_svd_attention
from efficient_attn.methods import Hybrid, SparseMethod

from . import inputs, vit

SIDE, STEPS, IMAGES = 16, 150, 8
SEEDS = 4  # of random features; their errors are averaged

# Families of methods; {} is the size: a rank, or keys to each side. SVD is what a rank can do at best.
CURVES: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "best rank (SVD)": ("svd", (2, 4, 8, 16, 32, 64)),
    "Linformer": ("linformer:rank={}", (4, 8, 16, 32, 64, 128)),
    "Nystrom": ("nystrom:landmarks={}", (4, 8, 16, 32, 64, 128)),
    "Performer": ("performer:features={}", (8, 32, 128, 512)),
    "window": ("sliding_window:left={0},right={0}", (7, 15, 31, 47, 63, 95)),
    "window + centroids": ("sliding_window:left={0},right={0}+centroid:block=16", (0, 15, 31, 47, 63, 95)),
    "window + Nystrom": ("sliding_window:left={0},right={0}+nystrom:landmarks=16,block=16", (0, 15, 31, 47, 63, 95)),
    "window + Performer": (
        "sliding_window:left={0},right={0}+performer:features=128,block=16",
        (0, 15, 31, 47, 63, 95),
    ),
}


class Point(NamedTuple):
    """``scores``: how many numbers a query is compared with on average: exact keys, mixtures, landmarks or features."""

    spec: str
    scores: float
    error: float


def activations(side: int = SIDE, steps: int = STEPS, images: int = IMAGES) -> tuple[Tensor, Tensor, Tensor, float]:
    """Query, key and value (images, heads, side * side, head_dim) of the last block on held-out images, float64, and
    the accuracy that the trained model reaches on them all."""
    train, labels, test, test_labels = inputs.digits()
    train, test = (interpolate(x[:, None], (side, side), mode="bilinear")[:, 0] for x in (train, test))
    torch.manual_seed(0)
    model = vit.DigitsViT(lambda: MultiheadAttention(vit.DIM, vit.HEADS, batch_first=True))
    model.positions = nn.Parameter(torch.randn(side * side, vit.DIM) * 0.1)
    step = vit.trainer(model, train, labels, steps=steps)
    for _ in range(steps):
        step()
    seen: list[Tensor] = []
    block: Any = model.blocks[-1]
    handle = block.attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        accuracy = (model.eval()(test).argmax(-1) == test_labels).float().mean().item()
        projected = block.attention._project(*[seen[0][:images]] * 3)
        query, key, value = (block.attention._split_heads(x).double() for x in projected)
    handle.remove()
    return query, key, value, accuracy


@torch.no_grad()
def curve(name: str, query: Tensor, key: Tensor, value: Tensor) -> list[Point]:
    """The points of one family that make sense for this length."""
    template, sizes = CURVES[name]
    exact = attention(query, key, value)
    length = query.shape[2]

    def error(out: Tensor) -> float:
        return float((out - exact).norm() / exact.norm())

    points = []
    for size in sizes:
        spec = template.format(size)
        if template == "svd":
            points.append(Point(f"svd:rank={size}", size, error(truncated_svd_attention(query, key, value, size).out)))
        elif "performer" in spec:
            runs = [_attend(f"{spec},seed={seed}", query, key, value) for seed in range(SEEDS)]
            points.append(Point(spec, _scores(spec, size, length), sum(map(error, runs)) / SEEDS))
        elif size < length:
            points.append(Point(spec, _scores(spec, size, length), error(_attend(spec, query, key, value))))
    return points


def _attend(spec: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if spec.startswith("linformer"):
        spec += f",max_len={key.shape[2]}"
    method = parse(spec)
    heads, head_dim = query.shape[1], query.shape[3]
    state = method.build(heads * head_dim, heads, head_dim, dtype=query.dtype)
    return method.attend(query, key, value, state=state)[0]


def _scores(spec: str, size: int, length: int) -> float:
    method: Any = parse(spec)
    if isinstance(method, SparseMethod):
        mask: BlockMask = method.block_mask(length, length)  # type: ignore[attr-defined, unused-ignore]
        return mask.density * length
    if isinstance(method, Hybrid):
        tail: Any = method.tail
        near = method.sparse.block_mask(length, length).reblock(tail.block)  # type: ignore[attr-defined]
        columns = {"nystrom": "landmarks", "performer": "features"}.get(tail.name)
        far = getattr(tail, columns) if columns else length / tail.block
        return near.block_density * length + far
    return size


def draw(curves: Mapping[str, list[Point]], path: Path, about: str) -> None:
    """One line a family: error over scores a query, both on logarithmic axes."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.6), layout="constrained")
    for name, points in curves.items():
        style = "k--" if name.startswith("best") else "o-" if "+" in name else ".-"
        shown = [point for point in points if point.error > 1e-4]
        axes.loglog([p.scores for p in shown], [p.error for p in shown], style, label=name, markersize=5, linewidth=1.3)
    axes.set(xlabel="scores a query (exact keys + columns of the approximation)", ylabel="relative error of the output")
    axes.set_title(about, fontsize=9)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(picture: Path, results: Path | None) -> None:
    query, key, value, accuracy = activations()
    curves = {name: curve(name, query, key, value) for name in CURVES}
    for name, points in curves.items():
        print(f"{name:20}", "  ".join(f"{p.scores:.0f}: {p.error:.3f}" for p in points))
    about = f"digits transformer, {SIDE * SIDE} tokens, exact attention in training (test accuracy {accuracy:.1%})"
    draw(curves, picture, about)
    if results is not None:
        rows = [{"family": name, **point._asdict()} for name, points in curves.items() for point in points]
        results.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
