"""What the keys of a block can weigh at most, without a look at each: how `tau_max` knows what a selection drops.

Keys k_j of a block with mean c are k_j = c + x_j. For a query q, with X_j = scale q . x_j <= M of variance s^2,

    n e^{scale q.c}  <=  sum_j e^{scale q.k_j}  <=  n e^{scale q.c} min(e^M, 1 + s^2 (e^M - 1 - M) / M^2)

on the left by Jensen's, on the right by Bennett's inequality. M is the smaller of what the box around the x_j allows
and |scale q| max |x_j|; s, with a unit vector u close to the direction in which keys vary most,

    s  <=  |scale q.u| sd(x.u) + |scale q - (scale q.u) u| sqrt(tr Cov - sd(x.u)^2)

A row that keeps the blocks S then drops at most tau = sum_{not S} upper / (sum_S lower + sum_{not S} upper).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ELEMENTS = 2**21  # of rows times blocks, that are looked at together
POWER_STEPS = 4
ROUNDING = 2.0**-21  # of a float32 score, times sqrt(D) |q| |k|; a kernel's sum of D products is far better
LARGEST = 600.0  # an exponent beyond which e^M stands for itself


class Summary(NamedTuple):
    """Blocks of keys, float64: (B, Hkv, C, D), and (B, Hkv, C) of one number each; `counts` is (B | 1, 1, C)."""

    counts: Tensor
    mean: Tensor
    low: Tensor
    high: Tensor
    direction: Tensor
    radius: Tensor
    along: Tensor  # sd(x.u)
    rest: Tensor  # the square root of the variance that is left
    longest: Tensor  # the largest |k_j|


def summarise(key: Tensor, key_mask: Tensor | None, block: int) -> Summary:
    """The blocks of keys (B, Hkv, Nk, D), of which those with key_mask (B, Nk) False count as not there."""
    Nk = key.shape[2]
    there = torch.ones(1, Nk, dtype=torch.bool, device=key.device) if key_mask is None else key_mask
    short = -Nk % block
    there = torch.nn.functional.pad(there, (0, short)).unflatten(1, (-1, block))[:, None, :, :, None]
    x = torch.nn.functional.pad(key.double(), (0, 0, 0, short)).unflatten(2, (-1, block)).masked_fill(~there, 0.0)
    count = there.sum((3, 4))
    share = 1.0 / count.clamp(min=1)[..., None]
    longest = x.norm(dim=-1).amax(-1)
    mean = x.sum(3) * share
    x = (x - mean.unsqueeze(3)).masked_fill(~there, 0.0)
    lengths = x.norm(dim=-1)
    u = x.gather(3, lengths.argmax(-1)[..., None, None].expand(*x.shape[:3], 1, x.shape[4])).squeeze(3)
    for _ in range(POWER_STEPS):
        u = u / u.norm(dim=-1, keepdim=True).clamp(min=1e-150)
        u = ((x @ u.unsqueeze(-1)) * x).sum(3)
    u = u / u.norm(dim=-1, keepdim=True).clamp(min=1e-150)
    along = (x @ u.unsqueeze(-1)).squeeze(-1).square().sum(-1) * share[..., 0]
    rest = (x.square().sum((3, 4)) * share[..., 0] - along).clamp(min=0.0)
    return Summary(count, mean, x.amin(3), x.amax(3), u, lengths.amax(-1), along.sqrt(), rest.sqrt(), longest)


def limits(query: Tensor, keys: Summary, scale: float) -> tuple[Tensor, Tensor]:
    """The logarithms of the lower and the upper bound, (B, Hq, N, C), for queries (B, Hq, N, D)."""
    Hkv, D = keys.mean.shape[1], query.shape[3]
    q = query.double().unflatten(1, (Hkv, -1)) * scale  # [B, Hkv, G, N, D]

    def of_blocks(x: Tensor) -> Tensor:
        return x[:, :, None, None]  # [B, Hkv, 1, 1, C]

    def product(x: Tensor) -> Tensor:
        found: Tensor = q @ x[:, :, None].mT  # [B, Hkv, G, N, C]
        return found

    length = q.norm(dim=-1, keepdim=True)
    box = q.clamp(min=0) @ keys.high[:, :, None].mT + q.clamp(max=0) @ keys.low[:, :, None].mT
    most = torch.minimum(box, length * of_blocks(keys.radius)).clamp(min=0.0)
    along = product(keys.direction)
    across = (length.square() - along.square()).clamp(min=0.0).sqrt()
    spread = along.abs() * of_blocks(keys.along) + across * of_blocks(keys.rest)
    m = most.clamp(min=1e-3, max=LARGEST)  # Bennett's bound grows with M, so that a larger M may stand for a small one
    bennett = torch.log1p(spread.square() * (torch.expm1(m) - m) / m.square())
    grown = torch.where(most > LARGEST, most, torch.minimum(most, bennett))
    doubt = ROUNDING * D**0.5 * length * of_blocks(keys.longest)
    count = keys.counts[:, :, None, None].expand(-1, -1, 1, 1, -1).log()
    middle = product(keys.mean) + count
    return (middle - doubt).flatten(1, 2), (middle + grown + doubt).flatten(1, 2)


def grow(
    chosen: Tensor, whole: Tensor, cut: Tensor, query: Tensor, key: Tensor, scale: float,
    key_mask: Tensor | None, block: int, tau_max: float,
) -> Tensor:  # fmt: skip
    """The selection, grown until no row drops more than tau_max of its softmax mass, at the last to all blocks.

    Args:
        chosen, whole, cut: bool (B, Hq, n_q, C): what is selected; what all rows of a block of queries see; what only
            some of them see, or see in part, which is kept and counted as nothing.
        query, key: (B, Hq, Nq, D) and (B, Hkv, Nk, D); key_mask (B, Nk): keys that are there. Queries all
            count, those of padding too, for which at most more is kept.
    """
    B, Hq, n_q, C = chosen.shape
    keys = summarise(key, key_mask, block)
    kept = chosen | cut
    at_once = max(1, ELEMENTS // max(B * Hq * block * C, 1))
    parts = []
    for first in range(0, n_q, at_once):
        rows = slice(first * block, min((first + at_once) * block, query.shape[2]))
        q = query[:, :, rows]
        short = -q.shape[2] % block
        there = torch.nn.functional.pad(torch.ones(q.shape[2], dtype=torch.bool, device=q.device), (0, short))
        there = there.view(-1, block, 1)
        bounds = limits(torch.nn.functional.pad(q, (0, 0, 0, short)), keys, scale)
        low, high = (bound.unflatten(2, (-1, block)) for bound in bounds)  # [B, Hq, n, block, C]
        blocks = slice(first, first + at_once)
        parts.append(_grown(kept[:, :, blocks], whole[:, :, blocks], low, high, there, tau_max))
    return torch.cat(parts, 2) if parts else kept


def _grown(kept: Tensor, whole: Tensor, low: Tensor, high: Tensor, there: Tensor, tau_max: float) -> Tensor:
    visible = whole.unsqueeze(3)
    low, high = low.masked_fill(~visible, -torch.inf), high.masked_fill(~visible, -torch.inf)
    most = high.amax(-1, keepdim=True).clamp(min=-1e300)
    low, high = (low - most).exp(), (high - most).exp()  # [B, Hq, n, block, C]
    free = whole & ~kept
    # The blocks that weigh most in any row come back first.
    weight = (high / high.sum(-1, keepdim=True).clamp(min=1e-300)).masked_fill(~there, 0.0).amax(3)
    order = weight.masked_fill(~free, -1.0).argsort(dim=-1, descending=True, stable=True)
    of_rows = order.unsqueeze(3).expand_as(high)
    free_high = high.masked_fill(~free.unsqueeze(3), 0.0).gather(-1, of_rows)
    free_low = low.masked_fill(~free.unsqueeze(3), 0.0).gather(-1, of_rows)
    sure = low.masked_fill(~(kept & whole).unsqueeze(3), 0.0).sum(-1, keepdim=True)
    dropped = free_high.flip(-1).cumsum(-1).flip(-1)  # [..., t]: what is left out when t blocks came back
    held = sure + free_low.cumsum(-1) - free_low
    within = (dropped <= tau_max * (held + dropped) * (1.0 - 1e-9)) | ~there
    enough = within.all(3)  # [B, Hq, n, C]
    number = torch.where(enough.any(-1), enough.int().argmax(-1), kept.shape[-1])
    back = torch.arange(kept.shape[-1], device=kept.device) < number.unsqueeze(-1)
    return kept | (free & torch.zeros_like(free).scatter(-1, order, back))
