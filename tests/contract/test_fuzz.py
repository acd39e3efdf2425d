"""A sample of the random calls that `make fuzz` makes, of each family; support/fuzz.py says what they are."""

from __future__ import annotations

import pytest
from support import fuzz

SAMPLES = {"operator": 200, "method": 240, "mask": 80, "module": 120, "flash": 120}
GROUPS = 4
# Found wrong once: pairs that only a bias hides, and padding beside a mask, had a say in the choice of blocks.
FOUND = {"method": (1466, 1665, 2290, 2961), "module": (168, 325)}


def test_every_family_has_a_sample() -> None:
    assert set(SAMPLES) == set(fuzz.FAMILIES)


@pytest.mark.parametrize("part", range(GROUPS))
@pytest.mark.parametrize("family", SAMPLES)
def test_random_calls_equal_the_definition(family: str, part: int) -> None:
    for seed in range(part, SAMPLES[family], GROUPS):
        fuzz.FAMILIES[family](seed)


@pytest.mark.parametrize(("family", "seed"), [(family, seed) for family, seeds in FOUND.items() for seed in seeds])
def test_what_was_wrong_once_stays_right(family: str, seed: int) -> None:
    fuzz.FAMILIES[family](seed)


def test_a_wrong_call_is_counted_and_shown(monkeypatch, capsys) -> None:
    monkeypatch.setitem(fuzz.FAMILIES, "mask", lambda seed: 1 // (seed - 3))
    counts, wrong = fuzz.run("mask", 2, 4)
    assert sum(counts.values()) == 3 and len(wrong) == 1 and wrong[0].startswith("mask 3: ZeroDivisionError")
    assert "--first 3 --cases 1" in capsys.readouterr().out
