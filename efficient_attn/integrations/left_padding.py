"""Padding on the left, as decoders of transformers have it: positions count from the first real token of each row.

A pattern such as Longformer's, whose first token is global, or one of blocks, would otherwise take padding for the
beginning, and a row would give something else in a batch than alone. Queries and keys are turned so that the padding
stands at the end, attended to, and turned back: O(n), and only where there is such padding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..masks import BlockMask


def left_padding(key_mask: Tensor | None) -> Tensor | None:
    """How many keys of each row (B, Nk), True = attend, come before its first real one: int64 (B,), None for none."""
    if key_mask is None or key_mask.shape[-1] == 0:
        return None
    pads = key_mask.int().argmax(-1)
    return None if not torch.compiler.is_compiling() and not bool(pads.any()) else pads


class Turned(NamedTuple):
    """Which token comes where, (B, N): `there` puts the first real one first, `back` undoes it; `padding` before."""

    there: Tensor
    back: Tensor
    padding: Tensor

    @classmethod
    def by(cls, pads: Tensor, length: int) -> Turned:
        places = torch.arange(length, device=pads.device)
        pads = pads[:, None]
        return cls((places + pads) % length, (places - pads) % length, places < pads)

    def undo(self, x: Tensor) -> Tensor:
        """Rows (B, H, N, .) where they were; those of padding are 0, as a query's that sees no key."""
        return take(x, self.back, 2).masked_fill(self.padding[:, None, :, None], 0.0)

    def call(self, call: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `Method.attend` that speak of positions, turned.

        Raises:
            UnsupportedError: block lists, which are the same for rows that would be turned differently.
        """
        mask, turned = call.get("mask"), dict(call)
        if isinstance(mask, BlockMask) and (mask.indptr is not None or mask.kv_lengths is not None):
            raise UnsupportedError(
                "a batch that is padded on the left, a method whose positions count, and a mask function of the model "
                "that is no window do not go together; pad on the right, or use a dense or sliding_window method"
            )
        for name in ("mask", "bias"):
            if isinstance(call.get(name), Tensor):
                turned[name] = take(take(call[name], self.there, 2), self.there, 3)
        if call.get("key_mask") is not None:
            turned["key_mask"] = call["key_mask"].gather(1, self.there)
        return turned


def take(x: Tensor, order: Tensor, dim: int) -> Tensor:
    """x (B | 1, ., ., .) with a dimension in the order (B, N) of each row; a broadcast one stays."""
    if x.shape[dim] == 1 != order.shape[1]:
        return x
    x = x.expand(order.shape[0], -1, -1, -1)
    shape = [order.shape[0], 1, 1, 1]
    shape[dim] = order.shape[1]
    return x.gather(dim, order.view(shape).expand(x.shape))
