"""What the tails of hybrids share: the softmax sums over the blocks that a `Split` leaves out, not key by key.

G = Hq / Hkv, m features or landmarks, C blocks of keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputError
from ...inputs import select_keys
from ...options import Named, check_range
from ...tracing import without_autocast
from ..base import TAILS
from ..lowrank import drop_columns, drop_keys
from .split import Split

LEAST = {torch.float32: 1e-30, torch.float64: 1e-200}  # of sums of terms up to 1: what is smaller counts as none


class Branch(NamedTuple):
    """One part of a softmax.

    out: (B, Hq, Nq, Dv), its own average of the values.
    lse: (B, Hq, Nq), the logarithm of its mass on the scale of exact scores, -inf where it has none.
    weights: (B, Hq, Nq, Nk), what it multiplies the values with, or None.
    """

    out: Tensor
    lse: Tensor
    weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TailCall:
    """What a hybrid asks of its tail, beside query, key and value: the same for every tail.

    split: which pairs are exact, and which blocks are the tail's.
    state: what `Tail.build` returned.
    key_mask: the keys that any query sees, by `inputs.seen_keys`; None: all.
    is_causal, scale, dropout_p, dropout_seed, backend, need_weights: as in `Method.attend`.
    counted: whether this is a forward, which training counts; an analysis is none.
    """

    split: Split
    scale: float
    state: nn.Module | None = None
    key_mask: Tensor | None = None
    is_causal: bool = False
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None
    backend: str = "auto"
    need_weights: bool = False
    counted: bool = True


class Tail(Named):
    """The approximate part of a hybrid. Subclasses are frozen dataclasses, described like a `Method`."""

    family = "tail"
    registry = TAILS
    compounds: ClassVar[dict[str, Any]] = {}
    exact: ClassVar[bool] = False
    accepts_causal: ClassVar[bool] = False
    accepts_mask: ClassVar[bool] = True
    block: int

    def build(self, head_dim: int, *, device: Any = None, dtype: torch.dtype | None = None) -> nn.Module | None:
        """The state that `branch` needs, or None."""
        return None

    def branch(self, query: Tensor, key: Tensor, value: Tensor, call: TailCall) -> Branch:
        """The tail's part of the softmax. Differentiable in query, key and value."""
        raise NotImplementedError

    def _check_block(self) -> None:
        check_range(self, "block", 16, 256)
        if self.block % 16:
            raise InputError(f"{self.name}: block must be a multiple of 16 from 16 to 256, got {self.block}")


class FeatureTail(Tail):
    """A tail that factorises the kernel. Dropout drops whole keys, as in the low-rank methods."""

    signed: ClassVar[bool] = False  # whether a . b may be negative

    def factors(self, query: Tensor, key: Tensor, call: TailCall) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """a (B, Hkv, G, Nq, m), b (B, Hkv, 1 | G, Nk, m), log_scale (B, Hq, Nq), shift (B, Hkv, 1, C) or None: 0.

        e^{log_scale + shift} a_i . b_j, with the shift of j's block, is the tail's estimate of e^{scale q_i . k_j}.
        """
        raise NotImplementedError

    def branch(self, query: Tensor, key: Tensor, value: Tensor, call: TailCall) -> Branch:
        a, b, log_scale, shift = self.factors(query, key, call)
        dropout = call.dropout_p, call.dropout_seed
        out, lse = self._sums(a, b, drop_keys(value, *dropout), log_scale, shift, call)
        weights = None
        if call.need_weights:
            weights = drop_columns(_weights(a, b, shift, call).to(query.dtype), key.shape[1], *dropout)
        return Branch(out, lse, weights)

    def _sums(
        self, a: Tensor, b: Tensor, value: Tensor, log_scale: Tensor, shift: Tensor | None, call: TailCall
    ) -> tuple[Tensor, Tensor]:
        """out and lse: the sums of (a_i . b_j) [v_j, 1] over the tail.

        Keys of a block share their fate, so they are summed first: one state m x (Dv + 1) a block; the states that a
        block of queries sees are added up, never subtracted from a total, so that nothing cancels:
        O(N m Dv (1 + C / block)).
        """
        with without_autocast(value):
            v = value.to(b.dtype)
            v = torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)
            b, v = select_keys(call.key_mask, b.flatten(1, 2), v)
            groups = b.shape[1] // max(v.shape[1], 1)
            b = in_blocks(b, self.block).unflatten(1, (-1, max(groups, 1)))  # (B, Hkv, 1 | G, C, block, m)
            states = (b.mT @ in_blocks(v, self.block).unsqueeze(2)).flatten(-2)  # (B, Hkv, 1 | G, C, m (Dv + 1))
            seen, top = _block_weights(_by_group(call.split.tail, a), shift, v.dtype)
            # What is not finite in a block must not reach the queries that do not see it, and 0 * NaN is NaN.
            broken = ~states.isfinite().all(-1, keepdim=True)
            met = _by_group(call.split.tail, a).to(v.dtype) @ broken.to(v.dtype)  # (B, Hkv, 1 | G, query blocks, 1)
            poisoned = met > 0
            states = seen @ states.masked_fill(broken, 0.0)
            states = states.masked_fill(poisoned, torch.nan).unflatten(-1, (a.shape[-1], v.shape[-1]))
            rows = in_blocks(a.flatten(1, 2), self.block).unflatten(1, a.shape[1:3])
            sums = (rows @ states).flatten(3, 4)[..., : a.shape[3], :].flatten(1, 2)
            mass = sums[..., -1]
            if top is not None:
                top = top.expand(*a.shape[:3], -1).repeat_interleave(self.block, 3)[..., : a.shape[3]]
                log_scale = log_scale + top.flatten(1, 2)
            least = mass.new_full((), LEAST[mass.dtype])
            if self.signed:  # what cancels down to rounding is no mass
                of_ones = states[..., -1:].detach()
                size = (rows.detach().abs() @ of_ones.abs()).flatten(3, 4)[..., : a.shape[3], 0].flatten(1, 2)
                least = torch.maximum(least, size * (16 * torch.finfo(mass.dtype).eps))
            empty = mass <= least
            mass = mass.masked_fill(empty, 1.0)
            out = (sums[..., :-1] / mass[..., None]).masked_fill(empty[..., None], 0.0)
            return out.to(value.dtype), (mass.log() + log_scale).masked_fill(empty, -torch.inf)


def _by_group(tail: Tensor, a: Tensor) -> Tensor:
    """(B, 1 | Hq, query blocks, C) beside a (B, Hkv, G, Nq, m)."""
    return tail.unsqueeze(2) if tail.shape[1] == 1 else tail.unflatten(1, a.shape[1:3])


def _block_weights(seen: Tensor, shift: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """What the sums of each block of keys count for each block of queries (..., query blocks, C): 0 or 1, or, where
    blocks have a shift (..., C), e^{shift - top} with the largest one that is seen, top (..., query blocks).
    """
    if shift is None:
        return seen.to(dtype), None
    shifts = shift.detach().to(dtype).unsqueeze(-2).masked_fill(~seen, -torch.inf)
    top = largest(shifts)
    return (shifts - top).exp(), top.squeeze(-1)


def _weights(a: Tensor, b: Tensor, shift: Tensor | None, call: TailCall) -> Tensor:
    """The weights that `FeatureTail.branch` stands for."""
    weights = (a @ b.mT).flatten(1, 2)
    seen = call.split.tail.repeat_interleave(call.split.block, 2).repeat_interleave(call.split.block, 3)
    weights = weights.masked_fill(~seen[:, :, : weights.shape[2], : weights.shape[3]], 0.0)
    if shift is not None:
        factors, _ = _block_weights(_by_group(call.split.tail, a), shift, weights.dtype)
        factors = factors.repeat_interleave(call.split.block, -2).repeat_interleave(call.split.block, -1)
        factors = factors[..., : weights.shape[2], : weights.shape[3]]
        weights = (weights.unflatten(1, a.shape[1:3]) * factors).flatten(1, 2)
    if call.key_mask is not None:
        weights = weights.masked_fill(~call.key_mask[:, None, None, :], 0.0)
    mass = weights.sum(-1, keepdim=True)
    return torch.where(mass > 0, weights / mass.masked_fill(mass <= 0, 1.0), 0.0)


def largest(scores: Tensor) -> Tensor:
    """The maximum of each row, 0 for a row of -inf, as a constant."""
    top = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.new_zeros(*scores.shape[:-1], 1)
    return top.masked_fill(top == -torch.inf, 0.0)


def in_blocks(x: Tensor, block: int) -> Tensor:
    """(B, H, N, D) -> (B, H, blocks, block, D), the last one filled up with zeros."""
    missing = -x.shape[2] % block
    padded = F.pad(x, (0, 0, 0, missing)) if missing else x
    blocks: Tensor = padded.unflatten(2, (padded.shape[2] // block, block))
    return blocks
