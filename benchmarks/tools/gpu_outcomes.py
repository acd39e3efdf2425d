"""A pytest plugin that keeps the outcome of every test at once, in the JSONL file EFFICIENT_ATTN_OUTCOMES names.

A test that breaks the GPU's context ends the process, and so does one that takes more than EFFICIENT_ATTN_TEST_SECONDS:
a wait for the GPU ignores signals, and a thread of C that needs no lock of Python's does it. A process that died or was
stopped goes on, started again, behind the test that it died in: what the file holds is left out.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Errors of a kernel, after which a process's context is lost.
STICKY = ("illegal memory access", "misaligned address", "unspecified launch failure", "illegal instruction",
          "device-side assert", "cudaErrorLaunchFailure", "cudaErrorIllegalAddress")  # fmt: skip


def _write(**row: Any) -> None:
    with open(os.environ["EFFICIENT_ATTN_OUTCOMES"], "a") as file:
        file.write(json.dumps(row) + "\n")


def _seen() -> set[str]:
    path = Path(os.environ["EFFICIENT_ATTN_OUTCOMES"])
    lines = path.read_text().splitlines() if path.exists() else []
    return {json.loads(line).get("test") for line in lines if line.endswith("}")}


def pytest_collection_finish(session: Any) -> None:
    """Behind tests/conftest.py, which leaves the tests of a share."""
    seen = _seen()
    session.items[:] = [item for item in session.items if item.nodeid not in seen]


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _write(test=report.nodeid, outcome=f"not collected: {str(report.longrepr)[-300:]}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: Any) -> Iterator[None]:
    _write(test=item.nodeid)
    seconds = float(os.environ["EFFICIENT_ATTN_TEST_SECONDS"])
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or not report.passed:
        why = "" if report.passed else f": {str(report.longrepr)[-300:]}"
        _write(test=report.nodeid, outcome=f"{report.outcome}{why}")
        if report.failed and any(text in str(report.longrepr) for text in STICKY):
            os._exit(70)  # whatever this process asks of the GPU from here on would fail


def pytest_sessionfinish(session: Any, exitstatus: int) -> None:
    """Every test of the share ran."""
    _write(finished=int(exitstatus))
