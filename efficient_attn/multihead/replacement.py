"""`replace_attention`: our module in the place of every torch.nn.MultiheadAttention of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import InputError
from ..handover import hand_over_hooks, put
from ..methods import Method, parse
from ..patterns import Pattern
from .module import MultiheadAttention, TorchMultiheadAttention, check_replaceable


def replace_attention(
    model: nn.Module,
    attention: str | Method | Pattern = "dense",
    *,
    predicate: Callable[[str, nn.MultiheadAttention], bool] | None = None,
) -> dict[str, nn.Module]:
    """Replace every `nn.MultiheadAttention` in `model` (also inside nn.Transformer, also ours) in place.

    The replacement holds the same Parameter objects, so optimisers and checkpoints stay valid, the same mode, and the
    same hooks: handles that were returned for them now act on it. A module that appears twice is replaced by one. What
    other code put around a module's forward goes on around the replacement's.

    Cross-attention stays dense unless it is named: the `multihead_attn` of nn.TransformerDecoderLayer is left alone
    without a predicate, and a replacement that is called with fewer or more queries than keys attends densely
    (`MultiheadAttention.dense_across`; set it False where the method is meant for such calls).

    Args:
        model: the module to search; itself not an attention module (use `MultiheadAttention.from_torch` for that).
        attention: a spec string, `Method` or `Pattern`. Modules that have this method already stay as they are. With
            linformer:share=layerwise all of them get one projection: that of the first which has it, or a new one.
        predicate: called with (name, module); False leaves that module alone.

    Returns:
        What was replaced, by name; `model.set_submodule(name, old)` puts it back.

    Raises:
        InputError: `model` is an attention module itself.
        UnsupportedError: a module of a subclass, whose own computation would be lost, or with a forward on the instance
            that does not lead to its own. Then nothing has been replaced.
        InputError: layers on different devices that would share a state. Likewise.
    """
    method = parse(attention)
    if isinstance(getattr(model, "_orig_mod", model), TorchMultiheadAttention):
        raise InputError(
            f"the model is a {type(model).__name__} and cannot be replaced inside itself; "
            "use MultiheadAttention.from_torch(model, attention=...)"
        )
    found: dict[str, Any] = {}
    shared: Any = None  # the state of all modules, for a method that shares one
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, TorchMultiheadAttention):
            continue
        if predicate is None:
            wanted = method.is_dense or not _attends_to_memory(model, name)
        else:
            wanted = predicate(name, module)
        if not wanted:
            continue
        check_replaceable(repr(name), module)
        has_method = getattr(module, "attention", None) == method
        if has_method and method.shares_state and shared is None:
            shared = module.method_state
        elif not has_method or (method.shares_state and module.method_state is not shared):
            found[name] = module
    replacements: dict[int, MultiheadAttention] = {}
    for module in found.values():
        if id(module) not in replacements:
            replacement = MultiheadAttention.from_torch(module, method, method_state=shared)
            replacement.dense_across = True
            replacements[id(module)] = replacement
            shared = replacement.method_state if method.shares_state else None
    for module in {id(m): m for m in found.values()}.values():
        hand_over_hooks(module, replacements[id(module)])
    return dict(put(model, name, replacements[id(module)]) for name, module in found.items())


def _attends_to_memory(model: nn.Module, name: str) -> bool:
    """Whether the submodule of this name is the cross-attention of a decoder layer of torch.nn."""
    path, _, last = name.rpartition(".")
    return last == "multihead_attn" and isinstance(model.get_submodule(path), nn.TransformerDecoderLayer)
