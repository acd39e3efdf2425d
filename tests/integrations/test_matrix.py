"""What people do around a model x methods x models: each cell equals the plain call or raises one of our errors.

Every 11th cell is a default test, all of them are `slow`; `make works-with` writes them as docs/works-with.md.
"""

from __future__ import annotations

import pytest
from support.works_with import ACTIONS, METHODS, MODELS, outcome

pytest.importorskip("transformers")

REFUSALS = {  # what may be refused at all; anything else works or fails
    "lsh:n_buckets=4": {name for name in ACTIONS if "compile" in name or "shapes" in name or "export" in name}
    | {"torch.func.vmap"},
}
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
    found = outcome(kind, spec, name)
    assert found == "yes" or name in REFUSALS.get(spec, ()), found
