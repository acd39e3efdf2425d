"""The CPU kernels alone under AddressSanitizer and UBSan: a short run of `native/` (`make sanitize`: a long one).

Two minutes, most of which compile: `make test-slow`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
NATIVE = Path(__file__).parent / "native"
FOLDER = ROOT / "build" / "sanitize-quick"  # one set fewer than make sanitize: half of the time is compilation
CASES = 150

pytestmark = pytest.mark.slow
sys.path.insert(0, str(NATIVE))
import build_harness  # noqa: E402

sys.path.remove(str(NATIVE))


@pytest.fixture(scope="module")
def harness() -> Path:
    cpu = pytest.importorskip("efficient_attn._cpu", reason="the native module is not built")
    missing = build_harness.sanitizers_missing(FOLDER)
    if missing:
        pytest.skip(missing)
    return build_harness.build(FOLDER, [cpu.instruction_set()])


def run(harness: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    return subprocess.run([str(harness), *arguments], capture_output=True, text=True, env=environment)


def test_random_calls_stay_in_their_memory_and_equal_the_definition(harness):
    result = run(harness, "--count", str(CASES))
    assert result.returncode == 0, result.stderr[-4000:]
    families = dict(re.findall(r"^(\w+): (\d+) random cases", result.stdout, re.MULTILINE))
    assert families["attention"] == families["malformed"] == str(CASES)


def test_a_wrong_argument_is_refused(harness):
    assert run(harness, "--family", "nothing").returncode == 2
    assert run(harness, "--count").returncode == 2
