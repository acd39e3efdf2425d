"""How two runs of a model are compared: the relative error of what it returns, padding left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConversionError, InputError
from .. import fidelity

MASKS = ("attention_mask", "key_mask", "mask")  # of the tokens that are there, in a sample by names
Pick = Callable[[Any], Any]


@dataclass(frozen=True)
class Compared:
    """What of a model's outputs counts: what `pick` takes of what the model returns, or all floating-point tensors.

    Tokens that the sample's attention_mask hides do not count.
    """

    pick: Pick | None = None

    def outputs(self, returned: Any, sample: Any) -> list[Tensor]:
        """The tensors that are compared."""
        found = fidelity.comparable(returned if self.pick is None else self.pick(returned))
        there = _tokens_there(sample)
        return [_without_padding(fidelity.padded(y), there) for y in found]

    def run(self, model: nn.Module, sample: Any) -> list[Tensor]:
        """What counts of a run of the sample."""
        return self.outputs(fidelity.run(model, sample), sample)

    @staticmethod
    def error(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
        """|after - before| / |before|, of the tensor where it is largest; inf where shapes or NaN differ."""
        if [y.shape for y in before] != [y.shape for y in after]:
            return torch.inf
        worst = 0.0
        for old, new in zip(before, after, strict=True):
            old, new = old.double(), new.double()
            if not torch.equal(old.isfinite(), new.isfinite()):
                return torch.inf
            old, new = (y.nan_to_num(posinf=0.0, neginf=0.0) for y in (old, new))
            gap, size = float((new - old).norm()), float(old.norm())
            worst = max(worst, 0.0 if gap == 0.0 else gap / max(size, 1e-30))
        return worst


def _tokens_there(sample: Any) -> Tensor | None:
    """bool (B, N) of a sample by names that has padding."""
    if not isinstance(sample, Mapping):
        return None
    mask = next((sample[name] for name in MASKS if isinstance(sample.get(name), Tensor)), None)
    return mask.bool() if mask is not None and mask.dim() == 2 else None


def _without_padding(y: Tensor, there: Tensor | None) -> Tensor:
    if there is None or y.shape[:2] != there.shape or y.dim() < 3:
        return y
    return y.masked_fill(~there.to(y.device).reshape(*there.shape, *[1] * (y.dim() - 2)), 0.0)


def split(sample: Any, held_out: Any) -> tuple[Any, list[Any]]:
    """What calibrates, and the samples that validate: without `held_out`, the two halves of the sample's batch.

    Raises:
        InputError: a batch of one, of which nothing can be held out.
    """
    if held_out is not None:
        samples = list(held_out) if isinstance(held_out, list) else [held_out]
        if not samples:
            raise InputError("held_out is empty; give samples that the search does not calibrate on")
        return sample, samples
    sizes = [t.shape[0] for t in _leaves(sample) if t.dim() > 0]
    batch = sizes[0] if sizes else 0
    if batch < 2:
        raise InputError(
            f"the sample has a batch of {batch}, of which nothing can be held out to measure the error on; give a "
            "batch of 2 or more, whose second half is held out, or held_out="
        )
    return _slice(sample, 0, batch // 2, batch), [_slice(sample, batch // 2, batch, batch)]


def _leaves(sample: Any) -> list[Tensor]:
    if isinstance(sample, Tensor):
        return [sample]
    parts = sample.values() if isinstance(sample, Mapping) else sample if isinstance(sample, tuple) else ()
    return [part for part in parts if isinstance(part, Tensor)]


def _slice(sample: Any, first: int, end: int, batch: int) -> Any:
    if isinstance(sample, Tensor):
        return sample[first:end] if sample.dim() and sample.shape[0] == batch else sample
    if isinstance(sample, Mapping):
        return {name: _slice(part, first, end, batch) for name, part in sample.items()}
    return tuple([_slice(part, first, end, batch) for part in sample]) if isinstance(sample, tuple) else sample


def check_finite(error: float) -> float:
    """A number that a user's metric returned.

    Raises:
        ConversionError: none.
    """
    try:
        value = float(error)
    except (TypeError, ValueError):
        raise ConversionError(f"metric must return a number, higher for better; got {type(error).__name__}") from None
    if value != value:
        raise ConversionError("metric returned NaN for the model as it was; it must return a number, higher for better")
    return value
