"""Every backend has the same functions, with the same parameters in the same order (docs/contract.md)."""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest
import torch

from efficient_attn import backends
from efficient_attn.ops.attention import MASK_OPERANDS

PRIMITIVES = {
    "attention": ("attention_forward", "attention_with_weights", "attention_backward", "not_supported_reasons"),
    "linear_attention": ("linear_attention_forward", "linear_attention_backward", "not_supported_reasons"),
}


def parameters(module: ModuleType, function: str) -> list[str]:
    """Names in order, but for piece, the reference's own, for callers that walk the pairs piece by piece, and for
    those of backends that make results where they belong and go on from other parts'."""
    own = ("piece", "joined", "into", "added_to")
    return [name for name in inspect.signature(getattr(module, function)).parameters if name not in own]


@pytest.mark.parametrize("name", backends.BACKENDS)
@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_every_backend_mirrors_the_reference(name: str, primitive: str) -> None:
    module, reference = (getattr(backends.BACKENDS[n], primitive) for n in (name, "reference"))
    assert isinstance(module, ModuleType) and module.__name__ == f"efficient_attn.backends.{name}.{primitive}"
    for function in PRIMITIVES[primitive]:
        assert parameters(module, function) == parameters(reference, function), f"{name}/{primitive}.py: {function}"


@pytest.mark.parametrize("name", backends.BACKENDS)
def test_every_backend_says_which_lists_it_walks(name: str) -> None:
    assert isinstance(backends.BACKENDS[name].NEEDS_TRANSPOSED, bool)


@pytest.mark.parametrize("name", backends.BACKENDS)
def test_every_backend_says_whether_it_goes_on_from_other_parts(name: str) -> None:
    backend = backends.BACKENDS[name]
    forward, backward = backend.attention.attention_forward, backend.attention.attention_backward
    taken = [name in inspect.signature(forward).parameters for name in ("joined", "into")]
    taken.append("added_to" in inspect.signature(backward).parameters)
    assert set(taken) == {backend.JOINS_PARTS}


@pytest.mark.parametrize("name", ["attention_forward", "attention_with_weights", "attention_backward"])
def test_the_operator_passes_on_what_backends_take(name: str) -> None:
    taken = parameters(backends.BACKENDS["reference"].attention, name)
    schema = [argument.name for argument in getattr(torch.ops.efficient_attn, name).default._schema.arguments]
    start = taken.index("mask")
    assert schema[:start] == taken[:start] and schema[-1] == "backend"
    assert schema[start + MASK_OPERANDS : -1] == taken[start + 1 :]


@pytest.mark.parametrize("name", ["linear_attention_forward", "linear_attention_backward"])
def test_the_linear_operator_passes_on_what_backends_take(name: str) -> None:
    taken = parameters(backends.BACKENDS["reference"].linear_attention, name)
    schema = [argument.name for argument in getattr(torch.ops.efficient_attn, name).default._schema.arguments]
    assert schema == [*taken, "backend"]
