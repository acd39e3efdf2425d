"""What each method loses against exact attention as its size grows, on the activations of a trained model.

The suite `fidelity` measures and draws it. The model is the digits transformer of the suite `vit`, trained with exact
attention on images enlarged to side x side, a token a pixel. Its queries, keys and values go through every method as
they are: nothing is trained to make up for a method, so that Linformer stands for what pooling does. The error is
|out - exact| / |exact|.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from efficient_attn import BlockMask, MultiheadAttention, attention, parse, truncated_svd_attention
from efficient_attn.measuring import inputs
from efficient_attn.methods import Hybrid, Sparse
from efficient_attn.multihead.projections import project, split_heads

from .suites import vit

SIDE, STEPS, IMAGES = 16, 150, 8
SEEDS = 4  # of random features, blocks and planes; their errors are averaged
DRAWN = ("performer", "bigbird", "lsh")

# Families of methods; {} is the size: a rank, keys to each side, blocks or rounds. SVD is what a rank can do at best.
Family = tuple[str, tuple[float, ...]]
LOW_RANK: Mapping[str, Family] = {
    "best rank (SVD)": ("svd", (2, 4, 8, 16, 32, 64)),
    "Linformer": ("linformer:rank={}", (4, 8, 16, 32, 64, 128)),
    "Nystrom": ("nystrom:landmarks={}", (4, 8, 16, 32, 64, 128)),
    "Performer": ("performer:features={}", (8, 32, 128, 512)),
    "window + centroids": ("sliding_window:left={0},right={0}+centroid:block=16", (0, 15, 31, 47, 63, 95)),
    "window + Nystrom": ("sliding_window:left={0},right={0}+nystrom:landmarks=16,block=16", (0, 15, 31, 47, 63, 95)),
    "window + Performer": (
        "sliding_window:left={0},right={0}+performer:features=128,block=16",
        (0, 15, 31, 47, 63, 95),
    ),
}
SPARSE: Mapping[str, Family] = {
    "window": ("sliding_window:left={0},right={0}", (7, 15, 31, 47, 63, 95)),
    "dilated window": ("dilated:left={0},right={0},dilation=2", (4, 8, 16, 24, 32, 48)),
    "Longformer": ("longformer:window={0},global_tokens=4", (2, 8, 16, 32, 64, 96)),
    "BigBird": ("bigbird:block=16,window=1,global_blocks=1,random_blocks={}", (0, 1, 2, 4, 6, 8)),
    "neighborhood 2-D": ("neighborhood:kernel={}", (3, 5, 7, 9, 11)),
    "top-k blocks": ("topk_blocks:block=16,blocks={},sink=0", (1, 2, 3, 4, 6, 8, 12)),
    "top-p blocks": ("topp_blocks:block=16,mass={},sink=0", (0.2, 0.4, 0.6, 0.8, 0.9)),
    "LSH buckets": ("lsh:n_buckets=8,rounds={}", (1, 2, 3, 4, 6)),
}
CURVES: Mapping[str, Family] = {**LOW_RANK, **SPARSE}


class Point(NamedTuple):
    """`scores`: how many numbers a query is compared with on average: exact keys, mixtures, landmarks or features."""

    spec: str
    scores: float
    error: float


def activations(
    side: int = SIDE, steps: int = STEPS, images: int = IMAGES, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Query, key and value (images, heads, side * side, head_dim) of the last block on held-out images, float64, and
    the accuracy that the trained model reaches on them all."""
    train, labels, test, test_labels = inputs.digits()
    train, test = (interpolate(x[:, None], (side, side), mode="bilinear")[:, 0] for x in (train, test))
    torch.manual_seed(seed)
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
        projected = project(block.attention, *[seen[0][:images]] * 3)
        query, key, value = (split_heads(block.attention, x).double() for x in projected)
    handle.remove()
    return query, key, value, accuracy


def curve(name: str, query: Tensor, key: Tensor, value: Tensor) -> list[Point]:
    """The points of one family that make sense for this length: up to all of it."""
    exact = attention(query, key, value)
    found = (point(name, size, query, key, value, exact) for size in CURVES[name][1])
    return [each for each in found if each is not None]


@torch.no_grad()
def point(name: str, size: float, query: Tensor, key: Tensor, value: Tensor, exact: Tensor) -> Point | None:
    """One size of a family; None where it makes no sense for this length."""
    template = CURVES[name][0]
    length = query.shape[2]
    spec = template.format(size)

    def error(out: Tensor) -> float:
        return float((out - exact).norm() / exact.norm())

    if spec.startswith("neighborhood") and size > length**0.5:
        return None
    if template == "svd":
        return Point(f"svd:rank={size}", size, error(truncated_svd_attention(query, key, value, int(size)).out))
    if any(word in spec for word in DRAWN):
        drawn = [f"{spec},seed={seed}" for seed in range(SEEDS)]
        errors = [error(attend(each, query, key, value)) for each in drawn]
        scores = [_scores(each, size, query, key) for each in drawn]
        return Point(spec, sum(scores) / SEEDS, sum(errors) / SEEDS)
    if size >= length:
        return None
    return Point(spec, _scores(spec, size, query, key), error(attend(spec, query, key, value)))


def attend(spec: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return prepared(spec, query, key)(query, key, value)


def prepared(spec: str, query: Tensor, key: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The method of a spec with its state, for inputs of these shapes and this dtype."""
    if spec.startswith("linformer"):
        spec += f",max_len={key.shape[2]}"
    method = parse(spec)
    heads, head_dim = query.shape[1], query.shape[3]
    state = method.build(heads * head_dim, heads, head_dim, dtype=query.dtype)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = method.attend(query, key, value, state=state)[0]
        return out

    return call


def _scores(spec: str, size: float, query: Tensor, key: Tensor) -> float:
    method: Any = parse(spec)
    length = query.shape[2]
    if isinstance(method, Sparse):
        mask: BlockMask = method.pattern.for_inputs(query, key)
        return mask.density * length
    if isinstance(method, Hybrid):
        tail: Any = method.tail
        near = method.sparse.pattern.block_mask(length, length).reblock(tail.block)
        columns = {"nystrom": "landmarks", "performer": "features"}.get(tail.name)
        far = getattr(tail, columns) if columns else length / tail.block
        return near.block_density * length + far
    return size
