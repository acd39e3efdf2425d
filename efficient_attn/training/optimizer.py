"""AdamW with weight decay for matrices only, and the learning rate of each step."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ..errors import InputError

BETAS = (0.9, 0.98)


def learning_rate(step: int, total: int, *, peak: float, warmup: float, final: float) -> float:
    """Linear from near 0 to `peak` over the first `warmup * total` steps, then a cosine to `final * peak`.

    A pure function of the step (0 to total - 1), so that a checkpoint needs no schedule but this number.
    """
    rising = round(warmup * total)
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / max(1, total - rising)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def adamw(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) for the parameters that learn; those with fewer than two dimensions, and
    tables of embeddings or positions, do not decay.

    Raises:
        InputError: no parameter learns.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() >= 2 and id(parameter) not in tables and "position" not in name
            groups[0 if decays else 1].append(parameter)
    if not any(groups):
        raise InputError("--freeze leaves no parameter that learns")
    chosen = [
        {"params": group, "weight_decay": decay} for group, decay in zip(groups, (weight_decay, 0.0), strict=True)
    ]
    return torch.optim.AdamW([group for group in chosen if group["params"]], lr=lr, betas=BETAS)


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> int:
    """Stop parameters from learning, by patterns of their names (`body`: all but the head); returns how many.

    Raises:
        InputError: a pattern that no parameter fits, or `body` of a model without a head.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen: set[str] = set()
    for pattern in patterns:
        if pattern == "body":
            heads = tuple(getattr(model, "head_prefixes", tuple)())
            if not heads:
                raise InputError(f"--freeze body: {type(model).__name__} has no head of its own; name patterns instead")
            found = [name for name in names if not name.startswith(heads)]
        else:
            found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            parts = sorted({name.partition(".")[0] for name in names})
            raise InputError(f"--freeze {pattern!r} fits no parameter; the model's parts: {', '.join(parts)}")
        frozen.update(found)
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name in frozen)
