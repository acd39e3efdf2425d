"""The tail by centroids: each block of n visible keys counts as n copies of its mean key and mean value.

    sum_{j in c} e^{scale q . k_j} v_j  ~  n_c e^{scale q . mean k  [+ scale^2 q^T Cov_c q / 2]} mean v

The mean is a lower bound of the mass (Jensen). The term in brackets is the second cumulant of the scores, exact for
keys that are normally distributed within the block, and far too large for scores that spread by more than a few.
O(N C D) for C = Nk / block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends.call import accumulation_dtype
from ...errors import UnsupportedError
from ...functional import attention, attention_weights
from ...inputs import MAX_HEAD_DIM, select_keys
from ...options import check_choice, register
from ...tracing import without_autocast
from ..lowrank import by_group
from .tail import Branch, Tail, TailCall, in_blocks

SECOND_ORDER = ("none", "diagonal", "full")
QUADRATIC_ROWS = 256  # query rows whose outer products exist at a time


@register
@dataclass(frozen=True)
class CentroidTail(Tail):
    """Each block of keys by its mean key, mean value and count.

    Fields:
        block: the size of a block.
        second_order: "none"; "diagonal": the variances of the key's components alone, which widens the head dimension
            to 2 D (D up to 128); "full": the whole covariance, O(N C D^2 + N D^2) time and a bias of (B, Hq, Nq, C).
    """

    name = "centroid"
    formula = "sum over blocks c of n_c e^(q mean k_c) (mean v_c)"
    paper = "this package"
    complexity = "n w d + n^2 d / block"
    accepts_causal = True

    block: int = 64
    second_order: str = "none"

    def check(self) -> None:
        self._check_block()
        check_choice(self, "second_order", SECOND_ORDER)

    def branch(self, query: Tensor, key: Tensor, value: Tensor, call: TailCall) -> Branch:
        members = _members(key, self.block, call.key_mask)
        query, means, mean_values, bias = self._centroids(query, key, value, members, call)
        shared: dict[str, Any] = {"mask": call.split.over_blocks, "bias": bias, "scale": call.scale}
        shared |= {"dropout_p": call.dropout_p, "dropout_seed": call.dropout_seed}
        out, lse = attention(query, means, mean_values, return_lse=True, backend=call.backend, **shared)
        weights = None
        if call.need_weights:  # a block's weight, spread evenly over its visible keys
            weights = attention_weights(query, means, **shared)
            weights = weights / members.sum(-1).to(weights.dtype).clamp(min=1)[:, None, None, :]
            weights = weights.repeat_interleave(self.block, dim=-1)[..., : key.shape[2]]
            if call.key_mask is not None:
                weights = weights.masked_fill(~call.key_mask[:, None, None, :], 0.0)
        return Branch(out.to(value.dtype), lse, weights)

    def _centroids(
        self, query: Tensor, key: Tensor, value: Tensor, members: Tensor, call: TailCall
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """query (B, Hq, Nq, D), mean keys (B, Hkv, C, D) and values, and the bias: all that exact attention needs."""
        dtype = accumulation_dtype(query.dtype)
        key, value = select_keys(call.key_mask, key, value)
        count = members.sum(-1)  # (1 | B, C)
        share = 1.0 / count.clamp(min=1).to(dtype)[:, None, :, None]
        with without_autocast(query):
            means = in_blocks(key, self.block).sum(3, dtype=dtype) * share
            mean_values = (in_blocks(value, self.block).sum(3, dtype=dtype) * share).to(value.dtype)
            bias = count.to(dtype).log()[:, None, None, :]  # -inf for a block of padding
            if self.second_order == "none":
                return query, means.to(key.dtype), mean_values, bias
            away = in_blocks(key.to(dtype), self.block) - means.unsqueeze(3)
            away = away * members.to(dtype)[:, None, :, :, None]
            if self.second_order == "full":
                covariance = away.mT @ away * share.unsqueeze(-1)  # (B, Hkv, C, D, D)
                spread: Tensor = _Quadratic.apply(by_group(query.to(dtype), key), covariance)  # type: ignore[no-untyped-call]
                return query, means.to(key.dtype), mean_values, bias + spread.flatten(1, 2) * (0.5 * call.scale**2)
            if 2 * query.shape[-1] > MAX_HEAD_DIM:
                raise UnsupportedError(
                    f"second_order='diagonal' doubles the head dimension, {query.shape[-1]}, which may then be at most "
                    f"{MAX_HEAD_DIM}; use second_order='none' or 'full'"
                )
            query = query.to(dtype)
            variances = away.square().sum(3) * share
            query = torch.cat([query, query.square() * (0.5 * call.scale)], -1)
            return query, torch.cat([means, variances], -1), mean_values.to(dtype), bias


class _Quadratic(torch.autograd.Function):
    """q_i^T C_c q_i for queries (B, Hkv, G, Nq, D) and symmetric C (B, Hkv, C, D, D): (B, Hkv, G, Nq, C).

    As q q^T, flat, times C, flat, for some rows at a time: O(QUADRATIC_ROWS D^2) memory, forward and backward.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(query: Tensor, matrices: Tensor) -> Tensor:
        flat = matrices.flatten(-2).mT.unsqueeze(2)  # (B, Hkv, 1, D D, C)
        parts = [_outer(rows) @ flat for rows in query.split(QUADRATIC_ROWS, 3)]
        return torch.cat(parts, 3)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        query, matrices = ctx.saved_tensors
        flat = matrices.flatten(-2).unsqueeze(2)  # (B, Hkv, 1, C, D D)
        grad_query, grad_flat = [], torch.zeros_like(matrices.flatten(-2))
        for rows, some in zip(query.split(QUADRATIC_ROWS, 3), grad.split(QUADRATIC_ROWS, 3), strict=True):
            mixed = (some @ flat).unflatten(-1, matrices.shape[-2:])
            grad_query.append(2.0 * (mixed @ rows.unsqueeze(-1)).squeeze(-1))
            grad_flat += (some.mT @ _outer(rows)).sum(2)
        return torch.cat(grad_query, 3), grad_flat.unflatten(-1, matrices.shape[-2:])


def _outer(rows: Tensor) -> Tensor:
    """(..., D) -> (..., D D)."""
    return (rows.unsqueeze(-1) * rows.unsqueeze(-2)).flatten(-2)


def _members(key: Tensor, block: int, key_mask: Tensor | None) -> Tensor:
    """bool (1 | B, C, block): the places of the blocks that hold a visible key."""
    if key_mask is None:
        key_mask = torch.ones(1, key.shape[2], dtype=torch.bool, device=key.device)
    members: Tensor = F.pad(key_mask, (0, -key.shape[2] % block)).unflatten(1, (-1, block))
    return members
