"""What makes a PyTorch operator: its registration in one call, and the two ways in which a vmap can run it.

`register` returns what the rest of the package calls: the operator, by whichever route the transformations understand
that are active. torch.func.grad passes register_autograd by, so that the formulas are there once more, as a
torch.autograd.Function; forward mode is one named error on both routes.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor

from ..tracing import has_tangent, no_forward_mode

NAMESPACE = "efficient_attn"
_library = torch.library.Library(NAMESPACE, "DEF")

Function = Callable[..., Any]


def register(
    schema: str, *, kernel: Function, fake: Function, setup: Function, gradient: Function, vmap: Function
) -> Function:
    """Define an operator and return what calls it.

    `kernel` computes it on every device, `fake` gives the shapes, `setup` keeps what `gradient` needs
    (torch.autograd.Function's setup_context and backward), and `vmap` maps it.
    """
    name = f"{NAMESPACE}::{schema.partition('(')[0]}"
    _library.define(schema)
    _library.impl(name.partition("::")[2], kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_library)
    torch.library.register_autograd(name, gradient, setup_context=setup, lib=_library)
    torch.library.register_vmap(name, vmap, lib=_library)
    operator = getattr(getattr(torch.ops, NAMESPACE), name.partition("::")[2])

    def refuse_forward_mode(*_: Any) -> Any:
        raise no_forward_mode(name.partition("::")[2].rpartition("_")[0].replace("_", " "))

    formulas = {"forward": operator, "setup_context": setup, "backward": gradient, "vmap": vmap}
    members: dict[str, Any] = {key: staticmethod(formula) for key, formula in formulas.items()}
    members |= {"jvp": staticmethod(refuse_forward_mode), "generate_vmap_rule": False}
    function: Any = type(name.partition("::")[2], (torch.autograd.Function,), members)

    def call(*operands: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return function.apply(*operands)
        if has_tangent(*operands):
            refuse_forward_mode()
        return operator(*operands)

    return call


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
