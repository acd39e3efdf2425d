"""`Lazy`: what stands for a tensor that is not made, while the code that meets it may go on as if it were one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


class Lazy:
    """What stands for a tensor that is not made."""

    mode: Any
    lead: tuple[int, ...]
    query: Tensor
    key: Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.lead, self.query.shape[-2], self.key.shape[-2]))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.lead) + 2

    @property
    def ndim(self) -> int:
        return self.dim()

    @property
    def dtype(self) -> torch.dtype:
        return self.query.dtype

    @property
    def device(self) -> torch.device:
        return self.query.device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        first = args[0] if args else None
        if name in LIKE and isinstance(first, Tensor):
            return getattr(first, LIKE[name])(args[1].shape)
        if name in TURNED and not isinstance(first, Lazy) and len(args) > 1:  # 2 * scores, mask + scores
            return args[1].operate(name, first)
        if name == "where":
            lazy = args[1] if isinstance(args[1], Lazy) else args[2]
            with lazy.mode.pause():
                found = lazy.chosen(*args)
            return lazy.given_up(func, args, {}) if found is NotImplemented else found
        named = dict(kwargs or {})
        if not args and isinstance(named.get("input"), Lazy):
            args = (named.pop("input"),)
            first = args[0]
        if isinstance(first, Lazy):
            found = first.operate(name, *args[1:], **named)
            return first.given_up(func, args, named) if found is NotImplemented else found
        if name == "einsum" and isinstance(args[1], Lazy):
            found = args[1].operate("einsum", args[0], *args[2:])
            return args[1].given_up(func, args, named) if found is NotImplemented else found
        lazy = next(x for x in tree_leaves((args, named)) if isinstance(x, Lazy))
        return lazy.given_up(func, args, named)

    def operate(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """What an operation of tensors makes of this; NotImplemented for one that needs the tensor."""
        raise NotImplementedError

    def chosen(self, condition: Any, kept: Any, other: Any) -> Any:
        """What torch.where makes of this, one of `kept` and `other`; NotImplemented where it needs the tensor."""
        return NotImplemented

    def given_up(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operation on tensors that are made."""
        with self.mode.pause():
            return func(*tree_map(made, args), **tree_map(made, kwargs))

    def tensor(self) -> Tensor:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        if not callable(getattr(Tensor, name)):
            return getattr(self.tensor(), name)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = self.operate(name.strip("_"), *args, **kwargs)
            if result is NotImplemented:
                return self.given_up(getattr(Tensor, name), (self, *args), kwargs)
            if name.endswith("_") and isinstance(result, Lazy):
                vars(self).update(vars(result))
                return self
            return result

        return call


LIKE = {"reshape_as": "reshape", "view_as": "view", "expand_as": "expand"}
TURNED = frozenset({"add", "radd", "mul", "rmul", "multiply", "iadd", "imul"})


def made(x: Any) -> Any:
    """The tensor that a `Lazy` stands for; anything else as it is."""
    return x.tensor() if isinstance(x, Lazy) else x


def _operator(name: str) -> Callable[..., Any]:
    def call(self: Lazy, *args: Any) -> Any:
        result = self.operate(name, *args)
        if result is NotImplemented:
            return self.given_up(getattr(Tensor, f"__{name}__"), (self, *args), {})
        if name[0] == "i" and name in IN_PLACE and isinstance(result, Lazy):
            vars(self).update(vars(result))
            return self
        return result

    return call


IN_PLACE = frozenset({"iadd", "isub", "imul", "itruediv"})
OPERATORS = "add radd iadd sub rsub isub mul rmul imul truediv itruediv matmul getitem neg pow lt le gt ge"
for _name in OPERATORS.split(" "):
    setattr(Lazy, f"__{_name}__", _operator(_name))
