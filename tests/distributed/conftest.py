"""Ranks that all tests of a module share."""

import pytest

from efficient_attn.measuring.ranks import started


@pytest.fixture(scope="session")
def pair():
    """Two processes."""
    with started(2) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def four():
    """Four processes; slow tests only."""
    with started(4) as ranks:
        yield ranks
