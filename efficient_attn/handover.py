"""How one module takes another's place: what it carries, its hooks, its wrappers and its slot in the model.

Tools wrap a module's forward on the instance: `module.forward = timed(module.forward)`, recipes that force
need_weights, accelerate's hooks. Such a function holds the old module's forward, in a closure, a `functools.partial` or
another attribute, and on a new module it would still run the old one; here it is made to run the new one.
"""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

from torch import nn


class _Walk:
    """One pass over callables, from `old` to `new`. `reached`: whether old's forward was found."""

    def __init__(self, old: nn.Module, new: nn.Module) -> None:
        self.old, self.new, self.reached = old, new, False
        self.made: dict[int, Any] = {}

    def follow(self, value: Any) -> Any:
        """`value` with every way to the old module leading to the new one; `value` itself where it knows none."""
        if value is self.old:
            return self.new
        if not isinstance(value, (types.MethodType, types.FunctionType, functools.partial)):
            return value
        if id(value) not in self.made:
            self.made[id(value)] = value  # a function may know itself
            self.made[id(value)] = self._followed(value)
        return self.made[id(value)]

    def _followed(self, value: Any) -> Any:
        if isinstance(value, types.MethodType):
            owner, function = self.follow(value.__self__), self.follow(value.__func__)
            if value.__self__ is self.old and value.__func__ is type(self.old).forward:
                self.reached, function = True, type(self.new).forward
            return (
                value if owner is value.__self__ and function is value.__func__ else types.MethodType(function, owner)
            )
        if isinstance(value, functools.partial):
            function, arguments = self.follow(value.func), [self.follow(argument) for argument in value.args]
            keywords = {name: self.follow(argument) for name, argument in value.keywords.items()}
            copied: Any = functools.partial(function, *arguments, **keywords)
        else:
            cells = value.__closure__ or ()
            held = [self.follow(content) for content in map(_content, cells)]
            if all(now is before for now, before in zip(held, map(_content, cells), strict=True)):
                return value
            # Cells that stay are shared, so that a counter in one goes on.
            closure = tuple(
                cell if now is _content(cell) else types.CellType(now) for cell, now in zip(cells, held, strict=True)
            )
            copied = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, closure)
            copied.__kwdefaults__, copied.__qualname__ = value.__kwdefaults__, value.__qualname__
            copied.__module__, copied.__doc__ = value.__module__, value.__doc__
        copied.__dict__.update({name: self.follow(attribute) for name, attribute in value.__dict__.items()})
        return copied


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def clone(module: nn.Module, cls: type) -> Any:
    """A shallow copy as class `cls`: the same parameters and submodules in containers of its own.

    Functions among the attributes that lead to `module`, as wrappers of its forward do, lead to the copy.
    """
    copied: Any = object.__new__(cls)
    for name, value in vars(module).items():
        if name != "_compiled_call_impl":
            vars(copied)[name] = copy.copy(value) if isinstance(value, (dict, set)) else value
    walk = _Walk(module, copied)
    for name, value in vars(module).items():
        if walk.follow(value) is not value:
            vars(copied)[name] = walk.follow(value)
    return copied


def hides_forward(module: nn.Module) -> bool:
    """Whether the module has a forward on the instance from which no way to its class's own forward is found."""
    if "forward" not in vars(module):
        return False
    walk = _Walk(module, nn.Module())
    for value in vars(module).values():  # accelerate keeps the old forward as another attribute
        walk.follow(value)
    return not walk.reached


def hand_over_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give `new` the hook dictionaries that users' handles point to; `old` keeps copies."""
    for name, value in list(old.__dict__.items()):
        if isinstance(value, dict) and "_hooks" in name:
            own = new.__dict__[name]
            old.__dict__[name], new.__dict__[name] = copy.copy(value), value
            value.update(own)


def put(model: nn.Module, name: str, new: nn.Module) -> tuple[str, nn.Module]:
    """Set the submodule of this name, and return the name and the module that `set_submodule` takes to undo it.

    What `torch.compile(submodule)` made runs the submodule that it was made of, so it is made anew.
    """
    path, _, last = name.rpartition(".")
    parent: Any = model.get_submodule(path)
    if last == "_orig_mod":
        name, new = path, type(parent)(new, parent.dynamo_ctx)
    old = model.get_submodule(name)
    model.set_submodule(name, new)
    return name, old
