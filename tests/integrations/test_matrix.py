"""What people do around a model x methods x models: each cell equals the plain call or raises one of our errors.

Every 11th cell is a default test, all of them are `slow`; `make works-with` writes them as docs/works-with.md.
"""

from __future__ import annotations

import pytest
from support.works_with import ACTIONS, METHODS, MODELS, NEEDS, outcome

pytest.importorskip("transformers")

LSH = "lsh:n_buckets=4"
FROZEN = {name for name in ACTIONS if "jit" in name or "onnx" in name}  # what holds PyTorch's own operators only


def may_be_refused(spec: str, name: str) -> bool:
    """What may be refused at all; anything else works or fails."""
    by_values = "compile" in name or "shapes" in name or "export" in name or name == "torch.func.vmap"
    return name == "torch.func.jvp" or (spec != "dense" and name in FROZEN) or (spec == LSH and by_values)


IN_A_PROCESS = "torch.save, torch.load in another process"


def cells() -> list[object]:
    found = []
    for number, (kind, spec, name) in enumerate((k, s, a) for k in MODELS for s in METHODS for a in ACTIONS):
        sampled = (number % 11 == 0 and name != IN_A_PROCESS) or (name, spec) == (IN_A_PROCESS, METHODS[2])
        marks = [] if sampled else [pytest.mark.slow]
        found.append(pytest.param(kind, spec, name, marks=marks, id=f"{kind}-{spec.partition(':')[0]}-{name}"))
    return found


@pytest.mark.parametrize(("kind", "spec", "name"), cells())
def test_a_cell(kind: str, spec: str, name: str) -> None:
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package)
    found = outcome(kind, spec, name)
    assert found == "yes" or may_be_refused(spec, name), found
