"""The tails of a hybrid: the softmax sums over the blocks that a `Split` leaves out, without looking at every key.

Each returns a branch (out, lse): out (B, Hq, Nq, Dv) is the tail's own average of values, lse (B, Hq, Nq) the logarithm
of its mass on the scale of exact scores, -inf for a query without a tail. Differentiable in query, key and value.
G = Hq / Hkv, m features or landmarks, C blocks of keys.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.call import accumulation_dtype
from ..backends.features import CAUSAL_EXPONENT_LIMIT
from ..errors import InputError, UnsupportedError
from ..functional import MAX_HEAD_DIM, attention, attention_weights, select_keys
from ..lowrank.common import by_group
from ..lowrank.nystrom import iterative_pinv, segment_means
from .split import Split

SECOND_ORDER = ("none", "diagonal", "full")
QUADRATIC_ROWS = 256  # query rows whose outer products exist at a time


LEAST = {torch.float32: 1e-30, torch.float64: 1e-200}  # of sums of terms up to 1: what is smaller counts as none


class Branch(NamedTuple):
    """One part of a softmax: its own average of the values, and the logarithm of its mass."""

    out: Tensor
    lse: Tensor


# --- centroids -------------------------------------------------------------------------------------------------------


def centroid_branch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    split: Split,
    *,
    second_order: str = "none",
    key_mask: Tensor | None = None,
    scale: float,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Branch:
    """Each block of n visible keys counts as n copies of its mean key and mean value: O(N C D), C = Nk / block.

        sum_{j in c} e^{scale q . k_j} v_j  ~  n_c e^{scale q . mean k  [+ scale^2 q^T Cov_c q / 2]} mean v

    The mean is a lower bound of the mass (Jensen). The term in brackets is the second cumulant of the scores, exact for
    keys that are normally distributed within the block, and far too large for scores that spread by more than a few.

    Args:
        second_order: "none"; "diagonal": the variances of the key's components alone, which widens the head dimension
            to 2 D; "full": the whole covariance, O(N C D^2 + N D^2) time and a bias of (B, Hq, Nq, C).

    Raises:
        UnsupportedError: "diagonal" with D beyond 128.
    """
    query, means, mean_values, bias = _centroids(query, key, value, split, second_order, key_mask, scale)
    out, lse = attention(
        query,
        means,
        mean_values,
        mask=split.over_blocks,
        bias=bias,
        scale=scale,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=True,
        backend=backend,
    )
    return Branch(out.to(value.dtype), lse)


def centroid_weights(
    query: Tensor,
    key: Tensor,
    split: Split,
    *,
    second_order: str = "none",
    key_mask: Tensor | None = None,
    scale: float,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
) -> Tensor:
    """What multiplies the values in `centroid_branch`, (B, Hq, Nq, Nk): a block's weight, spread evenly."""
    query, means, _, bias = _centroids(query, key, key[..., :1], split, second_order, key_mask, scale)
    weights = attention_weights(
        query,
        means,
        mask=split.over_blocks,
        bias=bias,
        scale=scale,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
    )
    count = _counts(key, split.block, key_mask).to(weights.dtype).clamp(min=1)[:, None, None, :]
    spread = (weights / count).repeat_interleave(split.block, dim=-1)[..., : key.shape[2]]
    return spread if key_mask is None else spread.masked_fill(~key_mask[:, None, None, :], 0.0)


def _centroids(
    query: Tensor, key: Tensor, value: Tensor, split: Split, second_order: str, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query (B, Hq, Nq, D), mean keys (B, Hkv, C, D) and values, and the bias: all that exact attention needs."""
    dtype = accumulation_dtype(query.dtype)
    key, value = select_keys(key_mask, key, value)
    count = _counts(key, split.block, key_mask)  # (1 | B, C)
    share = 1.0 / count.clamp(min=1).to(dtype)[:, None, :, None]
    with torch.autocast(query.device.type, enabled=False):
        means = _in_blocks(key, split.block).sum(3, dtype=dtype) * share
        mean_values = (_in_blocks(value, split.block).sum(3, dtype=dtype) * share).to(value.dtype)
        bias = count.to(dtype).log()[:, None, None, :]  # -inf for a block of padding
        if second_order == "none":
            return query, means.to(key.dtype), mean_values, bias
        away = _in_blocks(key.to(dtype), split.block) - means.unsqueeze(3)
        away = away * _members(key, split.block, key_mask).to(dtype)[:, None, :, :, None]
        if second_order == "full":
            covariance = away.mT @ away * share.unsqueeze(-1)  # (B, Hkv, C, D, D)
            spread: Tensor = _Quadratic.apply(by_group(query.to(dtype), key), covariance)  # type: ignore[no-untyped-call]
            return query, means.to(key.dtype), mean_values, bias + spread.flatten(1, 2) * (0.5 * scale**2)
        if 2 * query.shape[-1] > MAX_HEAD_DIM:
            raise UnsupportedError(
                f"second_order='diagonal' doubles the head dimension, {query.shape[-1]}, which may then be at most "
                f"{MAX_HEAD_DIM}; use second_order='none' or 'full'"
            )
        query = query.to(dtype)
        variances = away.square().sum(3) * share
        query = torch.cat([query, query.square() * (0.5 * scale)], -1)
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


# --- feature maps ----------------------------------------------------------------------------------------------------


def performer_branch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    split: Split,
    projection: Tensor,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float,
) -> Branch:
    """The tail by positive random features: Scatterbrain's S + phi(Q) phi(K)^T, whose S removes the features' part in
    its support and puts the exact one in its place; here the features' part of the support is never added at all.

    Chen et al., "Scatterbrain: Unifying Sparse and Low-rank Attention", NeurIPS 2021, section 4. The kernel estimate is
    FAVOR+'s, with its true scale: phi(q) . phi(k) has the expectation e^{scale q . k}.
    """
    a, b, log_scale = _random_features(query, key, projection, key_mask, is_causal, scale)
    return _feature_branch(a, b, value, log_scale, split, key_mask)


def performer_tail_weights(
    query: Tensor,
    key: Tensor,
    split: Split,
    projection: Tensor,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float,
) -> Tensor:
    """What multiplies the values in `performer_branch`, (B, Hq, Nq, Nk)."""
    a, b, _ = _random_features(query, key, projection, key_mask, is_causal, scale)
    return _feature_weights(a, b, split, key_mask).to(query.dtype)


def _random_features(
    query: Tensor, key: Tensor, projection: Tensor, key_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """a (B, Hkv, G, Nq, m), b (B, Hkv, 1, Nk, m), log_scale (B, Hq, Nq): e^{log_scale} a . b = phi(q) . phi(k).

    Stabilised as in `performer_features`: each feature against its largest key, or with causality, where no factor may
    depend on keys to come, saturated at e^60.
    """
    if not 0.0 < scale < math.inf:
        raise InputError(f"a performer tail needs a positive scale (features take its square root), got {scale}")
    dtype = accumulation_dtype(query.dtype)
    (key,) = select_keys(key_mask, key)
    with torch.autocast(query.device.type, enabled=False):
        query, key, projection = query.to(dtype) * scale**0.5, key.to(dtype) * scale**0.5, projection.to(dtype)
        a = by_group(query, key) @ projection.mT
        b = key @ projection.mT - key.square().sum(-1, keepdim=True) / 2
        if is_causal or key.shape[2] == 0:
            b = b.clamp(max=CAUSAL_EXPONENT_LIMIT)
        else:
            if key_mask is not None:
                b = b.masked_fill(~key_mask[:, None, :, None], -torch.inf)
            highest = _largest(b.mT).mT  # (B, Hkv, 1, m)
            a, b = a + highest.unsqueeze(2), b - highest
        top = a.detach().amax(-1, keepdim=True)
        log_scale = top.squeeze(-1).flatten(1, 2) - query.square().sum(-1) / 2 - math.log(projection.shape[0])
        return (a - top).exp(), b.exp().unsqueeze(2), log_scale


def nystrom_branch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    split: Split,
    *,
    landmarks: int,
    pinv_iterations: int = 6,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    scale: float,
) -> Branch:
    """The tail by a Nystrom approximation of the kernel e^{scale q . k} itself, from m landmarks.

        e^{scale q . k}  ~  e^{scale q . K~^T}  pinv(e^{scale Q~ K~^T})  e^{scale Q~ . k}

    Landmarks and the iteration for the pseudo-inverse are those of Xiong et al. 2021 (see `nystrom_attention`), but the
    kernel is not normalised by rows first, for the tail's mass must be comparable to the exact part's. This is ours.
    An estimated mass may come out negative, as any Nystrom entry may; such a row keeps its exact part alone.
    """
    a, b, log_scale = _nystrom_features(query, key, landmarks, pinv_iterations, key_mask, query_mask, scale)
    return _feature_branch(a, b, value, log_scale, split, key_mask, signed=True)


def nystrom_tail_weights(
    query: Tensor,
    key: Tensor,
    split: Split,
    *,
    landmarks: int,
    pinv_iterations: int = 6,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    scale: float,
) -> Tensor:
    """What multiplies the values in `nystrom_branch`, (B, Hq, Nq, Nk)."""
    a, b, _ = _nystrom_features(query, key, landmarks, pinv_iterations, key_mask, query_mask, scale)
    return _feature_weights(a, b, split, key_mask).to(query.dtype)


def _nystrom_features(
    query: Tensor,
    key: Tensor,
    landmarks: int,
    pinv_iterations: int,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """a (B, Hkv, G, Nq, m), b (B, Hkv, G, Nk, m), log_scale (B, Hq, Nq): e^{log_scale} a . b estimates the kernel.

    With row sums d of e^{Q~ K~^T} the pseudo-inverse is that of a softmax, whose iteration converges, times 1 / d.
    Every exponential is taken against the maximum of its row, so that none overflows.
    """
    dtype = accumulation_dtype(query.dtype)
    m = min(landmarks, query.shape[2], key.shape[2])
    if 0 in (m, *query.shape[:2]):
        rows = by_group(query, key)[..., :1].to(dtype)
        return torch.zeros_like(rows), rows.new_zeros(*rows.shape[:3], key.shape[2], 1), rows.flatten(1, 2).squeeze(-1)
    with torch.autocast(query.device.type, enabled=False):
        query, (key,) = query.to(dtype), select_keys(key_mask, key.to(dtype))
        near, near_used = segment_means(query, m, query_mask)
        far, far_used = segment_means(key, m, key_mask)
        grouped, near, far = by_group(query, key) * scale, by_group(near, key) * scale, far.unsqueeze(2)
        far_scores = _hide(grouped @ far.mT, far_used, 1)  # (B, Hkv, G, Nq, m)
        middle = _hide(near @ far.mT, far_used, 1)
        near_scores = near @ key.unsqueeze(2).mT  # (B, Hkv, G, m, Nk)
        if key_mask is not None:
            near_scores = near_scores.masked_fill(~key_mask[:, None, None, None, :], -torch.inf)
        row, top = _largest(far_scores), _largest(near_scores)
        softmax = torch.softmax(middle, -1)
        if far_used is not None:
            softmax = torch.where(far_used.any(-1)[:, None, None, None, None], softmax, 0.0)
        inverse = iterative_pinv(_hide(softmax, near_used, 2, 0.0), pinv_iterations)
        lift = top.squeeze(-1) - torch.logsumexp(middle, -1)  # (B, Hkv, G, m)
        lift = _hide(lift.masked_fill(lift == torch.inf, -torch.inf), near_used, 1)
        highest = _largest(lift)
        a = torch.exp(far_scores - row) @ inverse * torch.exp(lift - highest).unsqueeze(-2)
        b = torch.exp(near_scores - top).mT
        return a, b, (row.squeeze(-1) + highest).flatten(1, 2)


def _largest(scores: Tensor) -> Tensor:
    """The maximum of each row, 0 for a row of -inf, as a constant."""
    top = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.new_zeros(*scores.shape[:-1], 1)
    return top.masked_fill(top == -torch.inf, 0.0)


def _hide(scores: Tensor, used: Tensor | None, dim: int, fill: float = -torch.inf) -> Tensor:
    """Fill the landmarks that do not exist, used (B, m) along dimension -dim."""
    if used is None:
        return scores
    shape = [used.shape[0], *([1] * (scores.dim() - 1))]
    shape[-dim] = used.shape[1]
    return scores.masked_fill(~used.view(shape), fill)


def _feature_branch(
    a: Tensor,
    b: Tensor,
    value: Tensor,
    log_scale: Tensor,
    split: Split,
    key_mask: Tensor | None,
    *,
    signed: bool = False,
) -> Branch:
    """Sum (a_i . b_j) [v_j, 1] over the tail, in a (B, Hkv, G, Nq, m) and b (B, Hkv, 1 | G, Nk, m).

    Keys of a block share their fate, so they are summed first: one state m x (Dv + 1) a block; the states that a block
    of queries sees are added up, never subtracted from a total, so that nothing cancels: O(N m Dv (1 + C / block)).
    """
    with torch.autocast(value.device.type, enabled=False):
        v = value.to(b.dtype)
        v = torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)
        b, v = select_keys(key_mask, b.flatten(1, 2), v)
        groups = b.shape[1] // max(v.shape[1], 1)
        b = _in_blocks(b, split.block).unflatten(1, (-1, max(groups, 1)))  # (B, Hkv, 1 | G, C, block, m)
        states = (b.mT @ _in_blocks(v, split.block).unsqueeze(2)).flatten(-2)  # (B, Hkv, 1 | G, C, m (Dv + 1))
        seen = split.tail
        seen = seen.unsqueeze(2) if seen.shape[1] == 1 else seen.unflatten(1, a.shape[1:3])
        # What is not finite in a block must not reach the queries that do not see it, and 0 * NaN is NaN.
        broken = ~states.isfinite().all(-1, keepdim=True)
        poisoned = (seen.to(v.dtype) @ broken.to(v.dtype)) > 0  # (B, Hkv, 1 | G, query blocks, 1)
        states = seen.to(v.dtype) @ states.masked_fill(broken, 0.0)
        states = states.masked_fill(poisoned, torch.nan).unflatten(-1, (a.shape[-1], v.shape[-1]))
        rows = _in_blocks(a.flatten(1, 2), split.block).unflatten(1, a.shape[1:3])
        sums = (rows @ states).flatten(3, 4)[..., : a.shape[3], :].flatten(1, 2)
        mass = sums[..., -1]
        least = mass.new_full((), LEAST[mass.dtype])
        if signed:  # what cancels down to rounding is no mass
            of_ones = states[..., -1:].detach()
            size = (rows.detach().abs() @ of_ones.abs()).flatten(3, 4)[..., : a.shape[3], 0].flatten(1, 2)
            least = torch.maximum(least, size * (16 * torch.finfo(mass.dtype).eps))
        empty = mass <= least
        mass = mass.masked_fill(empty, 1.0)
        out = (sums[..., :-1] / mass[..., None]).masked_fill(empty[..., None], 0.0)
        return Branch(out.to(value.dtype), (mass.log() + log_scale).masked_fill(empty, -torch.inf))


def _feature_weights(a: Tensor, b: Tensor, split: Split, key_mask: Tensor | None) -> Tensor:
    """The weights that `_feature_branch` stands for."""
    weights = (a @ b.mT).flatten(1, 2)
    seen = split.tail.repeat_interleave(split.block, 2).repeat_interleave(split.block, 3)
    weights = weights.masked_fill(~seen[:, :, : weights.shape[2], : weights.shape[3]], 0.0)
    if key_mask is not None:
        weights = weights.masked_fill(~key_mask[:, None, None, :], 0.0)
    mass = weights.sum(-1, keepdim=True)
    return torch.where(mass > 0, weights / mass.masked_fill(mass <= 0, 1.0), 0.0)


# --- blocks of keys --------------------------------------------------------------------------------------------------


def _in_blocks(x: Tensor, block: int) -> Tensor:
    """(B, H, N, D) -> (B, H, blocks, block, D), the last one filled up with zeros."""
    missing = -x.shape[2] % block
    padded = F.pad(x, (0, 0, 0, missing)) if missing else x
    blocks: Tensor = padded.unflatten(2, (padded.shape[2] // block, block))
    return blocks


def _members(key: Tensor, block: int, key_mask: Tensor | None) -> Tensor:
    """bool (1 | B, C, block): the places of the blocks that hold a visible key."""
    if key_mask is None:
        key_mask = torch.ones(1, key.shape[2], dtype=torch.bool, device=key.device)
    members: Tensor = F.pad(key_mask, (0, -key.shape[2] % block)).unflatten(1, (-1, block))
    return members


def _counts(key: Tensor, block: int, key_mask: Tensor | None) -> Tensor:
    """How many visible keys each block has, (1 | B, C)."""
    return _members(key, block, key_mask).sum(-1)
