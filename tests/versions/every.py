"""A pytest plugin: of the tests that are chosen, every n-th, spread evenly over all (EVERY=n); run.py's --every."""

from __future__ import annotations

import os

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    every = int(os.environ.get("EVERY", "1"))
    left = [item for n, item in enumerate(items) if n % every]
    items[:] = items[::every]
    config.hook.pytest_deselected(items=left)
