"""The list of deliberate faults keeps fitting the code; `make mutants` runs it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from mutants.faults import FAULTS

ROOT = Path(__file__).parents[2]


def test_every_fault_has_one_place_and_is_no_other() -> None:
    assert len(FAULTS) >= 80
    for fault in FAULTS:
        found = (ROOT / fault.file).read_text().count(fault.right)
        assert found == 1, f"{fault.name}: its text occurs {found} times in {fault.file}"
        assert fault.wrong != fault.right, fault.name
        for test in fault.tests.partition(" -k ")[0].split():
            assert (ROOT / test.partition("::")[0]).exists(), fault.name
    assert not [name for name, count in Counter(fault.name for fault in FAULTS).items() if count > 1]
