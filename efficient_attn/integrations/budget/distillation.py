"""Short distillation: what a method learns is fitted to dense attention in one layer, with the model frozen.

Of the batch elements of the calibrating sample the first half trains and the second half says when to stop: the
parameters with the smallest error there stay, those of the start included, so that little data harm nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ...methods import Method
from .layers import Call, State

RATE, FINAL = 5e-4, 0.05  # of Adam, and the share of it at the last step


def distilled(calls: Sequence[Call], method: Method, steps: int) -> State | None:
    """The method's parameters after so many steps on |(C - O) W|^2 / |O W|^2; None where it has none to learn.

    Args:
        calls: of one layer, with batches of 2 or more; in each the same parameters attend.
    """
    first = calls[0]
    state = first.build(method)
    learned = [] if state is None else [p for p in state.parameters() if p.requires_grad]
    if state is None or not learned:
        return None
    optimizer = torch.optim.Adam(learned, lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - (1.0 - FINAL) * step / max(steps, 1))
    targets = [_projected(call.out, call.project) for call in calls]
    sizes = [_halves(target) for target in targets]
    best, kept = torch.inf, copy.deepcopy(state.state_dict())
    for step in range(steps + 1):
        trained, checked = torch.zeros((), dtype=torch.float64), 0.0
        with torch.set_grad_enabled(step < steps):
            for call, target, (size, size_checked) in zip(calls, targets, sizes, strict=True):
                wrong, wrong_checked = _halves(_projected(call.attend(method, state), call.project) - target)
                trained = trained.to(wrong) + wrong / size.clamp(min=1e-30)
                checked += float(wrong_checked / size_checked.clamp(min=1e-30))
        if checked < best:  # never where it is nan
            best, kept = checked, copy.deepcopy(state.state_dict())
        if step < steps:
            optimizer.zero_grad()
            trained.backward()
            optimizer.step()
            schedule.step()
    query, key = first.query, first.key
    return State((query.shape[1] * query.shape[3], key.shape[1], query.shape[3]), kept)


def _projected(out: Tensor, project: Tensor | None) -> Tensor:
    """(B, H, N, Dv) by the layer's projection, (B, N, E); as (B, N, H Dv) where that is not known."""
    merged = out.transpose(1, 2).flatten(2)
    return merged if project is None or project.shape[1] != merged.shape[2] else merged @ project.T


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """|x|^2 of the batch elements that train, and of those that say when to stop."""
    middle = max(x.shape[0] // 2, 1)
    return x[:middle].square().sum(), x[middle:].detach().square().sum()
