"""The figures of the page of `inspect`: small enough for 32,768 tokens, from one observed run each.

Of a head: its map of blocks (at most 64 x 64), what each token receives (a byte each), its entropy, its share of sinks,
its mean distance, and the tokens that get most. Of some queries spread over the input: the keys they look at.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..insight import observe
from ..integrations.fidelity import run

CELLS = 64  # of a map, at most, along each side
QUERIES = 192  # whose keys are kept
TOP, MOST = 4, 12  # keys of a query, and tokens of a head
WANT = ("entropy", "top", "received", "distance", "map", "shares")


def gather(
    model: nn.Module, sample: Any, told: Callable[[int, int], None] = lambda *_: None, part: str = ""
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """By call of attention, JSON values of what its heads do in the first element of the batch; and `observe.left`.

    Args:
        told: called with how many calls are done, of how many.
        part: the module whose calls are wanted; "": all.

    Raises:
        InputError: no call of attention was seen.
    """
    calls, length = _calls(model, sample)
    block = max(math.ceil(length / CELLS), 1)
    with _Telling(model, options={"top_k": TOP, "map_block": block}, told=lambda done: told(done, calls)) as seen:
        told(0, calls)
        run(model, sample)
    if not seen.layers:
        why = ", ".join(seen.left) or "the model makes no call that is known"
        raise InputError(f"no attention was seen in the model: {why}")
    return [_layer(call) for call in seen.layers if not part or call.name.split(".")[0] == part], seen.left


@dataclass
class _Telling(observe):
    """Says after each call how many there were."""

    told: Callable[[int], None] = print

    def _see(self, *call: Any) -> None:
        super()._see(*call)
        self.told(len(self.layers))


def _calls(model: nn.Module, sample: Any) -> tuple[int, int]:
    """How many calls there are, and the most keys of one."""
    with observe(model, want=()) as seen:
        run(model, sample)
    return len(seen.layers), max((call.keys for call in seen.layers), default=1)


def _layer(call: Any) -> dict[str, Any]:
    found, keys = call.statistics, call.keys
    received = found.received[0].float()  # [H, Nk]
    heads = []
    for head in range(received.shape[0]):
        one: dict[str, Any] = {"received": _bytes(received[head]), "most": _most(received[head])}
        if found.entropy is not None:
            one["entropy"] = round(float(found.entropy[0, head].mean()) / math.log(max(keys, 2)), 4)
        if found.distance is not None:
            one["distance"] = round(float(found.distance[0, head].mean()), 1)
        if found.shares is not None:
            one["sinks"] = round(float(found.shares["sinks"][0, head].mean()), 4)
        if found.map is not None:
            cells = found.map[0, head].float().clamp(min=0.0)  # those of a low-rank method may be negative
            one["map"] = _bytes((cells / cells.sum(1, keepdim=True).clamp(min=1e-30)).flatten())
            one["rows"], one["columns"] = cells.shape
        if found.top_keys is not None:
            one["top"] = _top(found.top_keys[0, head], found.top_weights[0, head])
        heads.append(one)
    return {"name": call.name, "method": call.method, "queries": call.queries, "keys": keys, "heads": heads}


def _bytes(values: Tensor) -> dict[str, Any]:
    """Numbers of 0 or more, by their square roots as a byte each: small ones stay visible."""
    values = values.clamp(min=0)
    largest = float(values.max()) if values.numel() else 0.0
    scaled = (values / max(largest, 1e-30)).sqrt().mul(255).round().to(torch.uint8).cpu()
    return {"of": largest, "bytes": base64.b64encode(bytes(scaled.tolist())).decode()}


def _most(received: Tensor) -> list[list[float]]:
    values, places = received.topk(min(MOST, received.numel()))
    return [[int(place), round(float(value), 3)] for place, value in zip(places, values, strict=True)]


def _top(keys: Tensor, weights: Tensor) -> list[Any]:
    """[query, [[key, weight], ...]] of queries spread over all."""
    rows = torch.linspace(0, keys.shape[0] - 1, min(QUERIES, keys.shape[0])).round().long().unique()
    return [
        [row, [[int(k), round(float(w), 4)] for k, w in zip(keys[row], weights[row], strict=True) if int(k) >= 0]]
        for row in rows.tolist()
    ]
