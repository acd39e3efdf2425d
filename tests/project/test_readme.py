"""README.md: its Python runs, its table of methods is fresh, and what it names exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("rich")

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[-1][:40])
def test_python_blocks_run(block):
    if "import transformers" in block or "from transformers" in block:
        pytest.importorskip("transformers")
    exec(compile(block, "README.md", "exec"), {})


def test_the_tables_of_methods_are_fresh():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "docs" / "readme.py")
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    methods = readme.METHODS.read_text(encoding="utf-8")
    assert readme.replaced(README, "methods", readme.short_table()) == README, "run: make readme"
    assert readme.replaced(methods, "methods", readme.full_table()) == methods, "run: make readme"


def test_it_is_short_and_its_figures_are_of_commits():
    assert len(README.splitlines()) <= 130 and BLOCKS
    assert "-dirty" not in README


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\S+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{re.escape(target)}:", makefile, flags=re.MULTILINE), target
