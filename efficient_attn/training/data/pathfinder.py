"""Pathfinder: are two dots joined by a dashed curve? (Linsley et al. 2018; as a sequence of pixels in Tay et al. 2021)

Every image has two long curves of dashes and some short ones that distract, none touching another, and two dots on
ends of long curves: on both ends of one (label 1), or on an end of each (label 0). Curves turn a little from dash to
dash. Sizes scale with the image; 32 x 32 pixels, 1024 tokens, are those of the Long Range Arena.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import InputError
from .base import Sequences, Splits, majority

Floats = NDArray[np.float64]

LEAST_SIZE = 16
DASH, GAP, CLEARANCE, DOT, THICKNESS = 3.0, 1.5, 2.6, 1.7, 0.5  # in pixels of an image of 32
TURN = 0.45  # greatest change of direction from dash to dash, in radians
DISTRACTOR_DASHES = 2
TRIES = 12
GRAYS = 32  # levels of a pixel; token 0 pads


class Drawing(NamedTuple):
    """An image, float64 `[size, size]` in 0..1, and what it was drawn from: curves of dashes `[dashes, 2, 2]`
    (start and end, each y and x), the two long ones first, and the centres of the dots `[2, 2]`."""

    image: Floats
    label: int
    curves: list[Floats]
    dots: Floats


def load(
    seed: int, *, train: int = 8000, held_out: int = 1000, size: int = 32, dashes: int = 6, distractors: int = 5
) -> Splits:
    """Training examples, and `held_out` for validation and for test; batches have `tokens`, `lengths`, `label`.

    Args:
        size: height and width; a pixel is a token of `GRAYS` levels.
        dashes: of a long curve; distractors: short curves.

    Raises:
        InputError: sizes that cannot be.
    """
    counts = (train, held_out, held_out)
    first, valid, test = (
        generate(count, 3 * seed + part, size=size, dashes=dashes, distractors=distractors)
        for part, count in enumerate(counts)
    )
    baselines = {"majority": majority(first.others["label"], test.others["label"])}
    about = {"vocabulary": GRAYS + 1, "classes": 2, "max_length": size * size, "baselines": baselines}
    return Splits(first, valid, test, about)


def generate(count: int, seed: int, *, size: int = 32, dashes: int = 6, distractors: int = 5) -> Sequences:
    """`count` images as sequences of pixels, row by row; half of them are joined, one more or less."""
    if count < 1 or size < LEAST_SIZE or dashes < 2 or distractors < 0:
        raise InputError(
            f"Pathfinder needs count >= 1, size >= {LEAST_SIZE}, dashes >= 2 and distractors >= 0, "
            f"given {count=}, {size=}, {dashes=}, {distractors=}"
        )
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % 2)
    images = np.stack([draw(rng, int(label), size, dashes, distractors).image for label in labels])
    tokens = 1 + np.minimum((images * GRAYS).astype(np.int64), GRAYS - 1)
    return Sequences(
        torch.from_numpy(tokens.reshape(-1).astype(np.uint8)),
        torch.full((count,), size * size),
        label=torch.from_numpy(labels.astype(np.int64)),
    )


def draw(rng: np.random.Generator, label: int, size: int = 32, dashes: int = 6, distractors: int = 5) -> Drawing:
    """One image with this label.

    Raises:
        InputError: curves that are too long for the image.
    """
    for _ in range(200):
        curves: list[Floats] = []
        for length in (dashes, dashes, *[DISTRACTOR_DASHES] * distractors):
            curve = _curve(rng, length, size, curves)
            if curve is None and len(curves) < 2:
                break  # no room for a long curve: another image
            if curve is not None:
                curves.append(curve)
        else:
            one, other = curves[0], curves[1]
            ends = (one[0, 0], one[-1, 1]) if label else (one[0, 0], other[0, 0])
            dots = np.stack(ends)
            return Drawing(_paint(size, curves, dots), label, curves, dots)
    raise InputError(
        f"two curves of {dashes} dashes find no room in {size} x {size} pixels; fewer dashes or more pixels"
    )


def _curve(rng: np.random.Generator, length: int, size: int, others: list[Floats]) -> Floats | None:
    """A curve that keeps clear of the others, of itself and of the border; None when it finds no way."""
    unit = size / 32
    taken = np.concatenate([_points(curve) for curve in others]) if others else np.zeros((0, 2))
    border = DOT * unit + 0.5
    for _ in range(TRIES):
        place = rng.uniform(border, size - border, 2)
        angle = rng.uniform(0, 2 * math.pi)
        made: list[Floats] = []
        for number in range(length):
            for _ in range(TRIES):
                turned = angle + (rng.uniform(-TURN, TURN) if number else rng.uniform(0, 2 * math.pi))
                along = np.array([math.sin(turned), math.cos(turned)]) * unit
                start = place + (GAP * along if number else 0)
                dash = np.stack([start, start + DASH * along])
                own = _points(np.stack(made[:-1])) if len(made) > 1 else np.zeros((0, 2))
                if dash.min() >= border and dash.max() <= size - border and _clear(dash, taken, own, unit):
                    made.append(dash)
                    place, angle = dash[1], turned
                    break
            else:
                break
        if len(made) == length:
            return np.stack(made)
    return None


def _points(dashes: Floats) -> Floats:
    """Starts, middles and ends."""
    return np.concatenate([dashes[:, 0], dashes.mean(axis=1), dashes[:, 1]])


def _clear(dash: Floats, taken: Floats, own: Floats, unit: float) -> bool:
    points, near = _points(dash[None]), np.concatenate([taken, own])
    if not len(near):
        return True
    distances = np.linalg.norm(points[:, None] - near, axis=-1)
    return bool(distances.min() >= CLEARANCE * unit)


def _paint(size: int, curves: list[Floats], dots: Floats) -> Floats:
    """Dashes as lines and dots as discs, with soft edges."""
    unit = size / 32
    pixels = np.stack(np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5, indexing="ij"), axis=-1).reshape(
        -1, 1, 2
    )
    dashes = np.concatenate(curves)
    start, along = dashes[:, 0], dashes[:, 1] - dashes[:, 0]
    share = ((pixels - start) * along).sum(-1) / (along**2).sum(-1)
    nearest = start + np.clip(share, 0, 1)[..., None] * along
    lines = np.linalg.norm(pixels - nearest, axis=-1).min(axis=1)
    discs = np.linalg.norm(pixels - dots, axis=-1).min(axis=1)
    distance = np.minimum(lines - THICKNESS * unit, discs - DOT * unit)  # below 0: inside
    image: Floats = np.clip(0.5 - distance, 0, 1).reshape(size, size)
    return image


__all__ = ["Drawing", "draw", "generate", "load"]
