"""Triton's interpreter, twice as quick: it spends its time on types of tensors, and on patching triton.language anew at
every call."""

from __future__ import annotations

from typing import Any

from triton.language import core
from triton.runtime import interpreter


class _Lasting:
    """What a patch returns; nothing is undone, for such a process interprets to its end."""

    def restore(self) -> None: ...


def patch_once() -> None:
    """Patch what a function sees at its first call and never again, and make each type and shape once."""
    patch, patched = interpreter._patch_lang, set()

    def once(function: Any) -> _Lasting:
        if id(function.__globals__) not in patched:
            patched.add(id(function.__globals__))
            patch(function)
        return _Lasting()

    interpreter._patch_lang = once

    # Sums of integers are watched for overflow, but nothing is said of one without debug.
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)

    find, found = interpreter._get_np_dtype, {}

    def dtype_of(type: Any) -> Any:
        name = type.scalar.name
        if name not in found:
            found[name] = find(type)
        return found[name]

    interpreter._get_np_dtype = dtype_of

    make_tensor, make_block, shapes, blocks = core.tensor.__init__, core.block_type.__init__, {}, {}

    def tensor(self: Any, handle: Any, type: Any) -> None:
        """As it does, but what follows from the type alone is made at its first tensor."""
        if type.name not in shapes:
            make_tensor(self, handle, type)
            shapes[type.name] = self.numel, self.shape, self.dtype
        self.handle, self.type = handle, type
        self.numel, self.shape, self.dtype = shapes[type.name]

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        """As it does, once for each element type and shape."""
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = vars(self)
        vars(self).update(blocks[key])

    core.tensor.__init__, core.block_type.__init__ = tensor, block
