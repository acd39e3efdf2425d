"""CI, pre-commit and the Makefile ask for the same, and `make help` names every target."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def recipe(target: str) -> str:
    """The commands of a target."""
    (found,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.MULTILINE)
    return found


def test_help_comes_first_and_names_every_target() -> None:
    said = subprocess.run(["make", "-s", "-C", ROOT], capture_output=True, text=True, check=True).stdout
    (phony,) = re.findall(r"^\.PHONY: ((?:.*\\\n)*.*)", MAKEFILE, flags=re.MULTILINE)
    named = re.findall(r"^  make (\S+) +\S", said, flags=re.MULTILINE)
    assert sorted(named) == sorted(phony.replace("\\\n", "").split())


def test_ci_lints_before_it_tests() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines.index("make lint") < lines.index("make test")


def test_pre_commit_runs_the_tools_of_make_lint() -> None:
    yaml = pytest.importorskip("yaml")
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    hooks = re.findall(r"\.venv/bin/(\S+(?: check| format)?)", "\n".join(hook["entry"] for hook in repository["hooks"]))
    assert hooks == ["ruff check", "ruff format", "clang-format", "mypy"]
    assert hooks == re.findall(r"\$\(BIN\)/(\S+(?: check| format)?)", recipe("lint"))


def test_no_script_hides_a_module_of_python() -> None:
    """`python docs/x.py` imports from docs first: a statistics.py there would be everybody's `import statistics`."""
    scripts = [
        path
        for folder in ("docs", "examples", "benchmarks/tools", "tests/mutants")
        for path in ROOT.glob(f"{folder}/*.py")
    ]
    assert scripts and not {path.stem for path in scripts} & set(sys.stdlib_module_names)
