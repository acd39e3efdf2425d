"""Padding on the left, as decoders have it: positions count from the first real token of each row.

A pattern such as Longformer's, whose first token is global, or one of blocks, would otherwise take padding for the
beginning, and a row would give something else in a batch than alone. Queries and keys are turned so that the padding
stands at the end, attended to, and turned back: O(n), and only where there is such padding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import biases
from ..errors import UnsupportedError
from ..inputs import may_read
from ..masks import BlockMask
from .base import Method


def left_padding(key_mask: Tensor | None) -> Tensor | None:
    """How many keys of each row (B, Nk), True = attend, come before its first real one: int64 (B,), None for none."""
    if key_mask is None or key_mask.shape[-1] == 0:
        return None
    pads = key_mask.int().argmax(-1)
    return None if may_read(pads, streams=True) and not bool(pads.any()) else pads


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

    def _pairs(self, pairs: Tensor) -> Tensor:
        """A mask or bias of pairs, turned."""
        pairs = take(take(pairs, self.there, 2), self.there, 3)
        if pairs.shape[2] == self.there.shape[1]:  # what padding sees must not cut blocks of the last tokens
            behind = self.padding.flip(1)[:, None, :, None]
            pairs = pairs.masked_fill(behind, True if pairs.dtype == torch.bool else 0.0)
        return pairs

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
        if isinstance(mask, Tensor):
            turned["mask"] = self._pairs(mask)
        bias, structured = biases.split(call.get("bias"))
        if any(not isinstance(part, biases.RelativePosition) for part in structured):
            raise UnsupportedError(
                "a batch that is padded on the left, a method whose positions count, and a bias by absolute positions "
                "do not go together; pad on the right, or use a dense or sliding_window method"
            )
        turned["bias"] = biases.join(None if bias is None else self._pairs(bias), structured)
        if call.get("key_mask") is not None:
            turned["key_mask"] = call["key_mask"].gather(1, self.there)
        return turned


def attend_from_first(
    method: Method, query: Tensor, key: Tensor, value: Tensor, *, state: nn.Module | None, **call: Any
) -> tuple[Tensor, Tensor | None]:
    """`Method.attend` of a sequence to itself; positions in a row padded on the left count from its first token."""
    key_mask, bias = call.get("key_mask"), biases.split(call.get("bias"))[0]
    if key_mask is None and bias is not None and bias.shape[1] == bias.shape[2] == 1:  # as nn.TransformerEncoder has it
        key_mask = (bias[:, 0, 0] != -torch.inf).expand(key.shape[0], -1)
    pads = left_padding(key_mask) if method.counts_positions and query.shape[2] == key.shape[2] else None
    if pads is None or key_mask is None:
        return method.attend(query, key, value, state=state, **call)
    # Tokens that are hidden here and there are no padding.
    pads = pads * ((key_mask[:, 1:] & ~key_mask[:, :-1]).sum(1) == 1)
    if may_read(pads, streams=True) and not bool(pads.any()):
        return method.attend(query, key, value, state=state, **call)
    turned = Turned.by(pads, key.shape[2])
    query, key, value = (take(x, turned.there, 2) for x in (query, key, value))
    out, weights = method.attend(query, key, value, state=state, **turned.call(call))
    if weights is None:
        return turned.undo(out), None
    averaged = weights.dim() == 3
    weights = take(turned.undo(weights[:, None] if averaged else weights), turned.back, 3)
    return turned.undo(out), weights.squeeze(1) if averaged else weights


def take(x: Tensor, order: Tensor, dim: int) -> Tensor:
    """x (B | 1, ., ., .) with a dimension in the order (B, N) of each row; a broadcast one stays."""
    if x.shape[dim] == 1 != order.shape[1]:
        return x
    x = x.expand(order.shape[0], -1, -1, -1)
    shape = [order.shape[0], 1, 1, 1]
    shape[dim] = order.shape[1]
    return x.gather(dim, order.view(shape).expand(x.shape))
