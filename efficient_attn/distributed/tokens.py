"""Tokens of buffers whose dimension 2 holds some runs of a sequence, one after the other."""

from __future__ import annotations

from typing import NamedTuple

from .shards import Run, Runs, overlap


class Stretch(NamedTuple):
    """Neighbouring tokens in two buffers."""

    there: int  # the first one's place in the one
    here: int  # and in the other
    tokens: int


def place_of(held: Runs, run: Run) -> int:
    """Where a run that is held without a gap begins in the buffer."""
    place = 0
    for start, stop in held:
        if start <= run[0] and run[1] <= stop:
            return place + run[0] - start
        place += stop - start
    raise AssertionError(f"{run} is not held")


def stretches(there: Runs, here: Runs, runs: Runs) -> tuple[Stretch, ...]:
    """The tokens of `runs`, which both buffers hold, cut where either has an edge."""
    return tuple(
        Stretch(place_of(there, piece), place_of(here, piece), piece[1] - piece[0])
        for a in there
        for b in here
        for piece in overlap(overlap((a,), (b,)), runs)
    )
