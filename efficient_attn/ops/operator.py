"""What makes a PyTorch operator: its registration in one call, and the two ways in which a vmap can run it."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "efficient_attn"
_library = torch.library.Library(NAMESPACE, "DEF")

Function = Callable[..., Any]


def register(
    schema: str, *, kernel: Function, fake: Function, setup: Function, gradient: Function, vmap: Function
) -> None:
    """Define an operator: `kernel` computes it on every device, `fake` gives the shapes, `setup` keeps what `gradient`
    needs (torch.autograd.Function's setup_context and backward), and `vmap` maps it."""
    name = f"{NAMESPACE}::{schema.partition('(')[0]}"
    _library.define(schema)
    _library.impl(name.partition("::")[2], kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_library)
    torch.library.register_autograd(name, gradient, setup_context=setup, lib=_library)
    torch.library.register_vmap(name, vmap, lib=_library)


def one_by_one(operator: Any, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """Call `operator` for each element of the mapped dimension: right for any combination of mapped arguments."""

    def element(argument: Any, dim: int | None, index: int) -> Any:
        return argument if dim is None else argument.select(dim, index)

    dims = [dim if isinstance(argument, Tensor) else None for argument, dim in zip(args, in_dims, strict=True)]
    results = [
        operator(*(element(a, d, index) for a, d in zip(args, dims, strict=True))) for index in range(info.batch_size)
    ]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])


def in_one_batch(
    operator: Any, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...], folded: Container[int]
) -> tuple[Any, Any]:
    """Call `operator` once, the mapped dimension folded into the batch of the tensors whose numbers are `folded`."""

    def fold(tensor: Tensor, dim: int | None) -> Tensor:
        tensor = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return tensor.flatten(0, 1)

    operands = [
        fold(argument, dim) if number in folded and argument is not None else argument
        for number, (argument, dim) in enumerate(zip(args, in_dims, strict=True))
    ]
    results = operator(*operands)
    unfolded = tuple(r.unflatten(0, (info.batch_size, r.shape[0] // info.batch_size)) for r in results)
    return unfolded, (0,) * len(results)
