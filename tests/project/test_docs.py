"""Pages in docs/: links lead somewhere, and the Python of most of them runs from top to bottom."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
HUGGING_FACE = ("integrations.md", "models.md")
PAGES = (*HUGGING_FACE, "methods.md", "insight.md", "index.md", "choose.md", "long-sequences.md", "compat.md")


@pytest.mark.parametrize("page", PAGES)
def test_python_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    if page in HUGGING_FACE:
        pytest.importorskip("transformers")
        pytest.importorskip("diffusers")
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", (DOCS / page).read_text(encoding="utf-8")):
        assert target.startswith("http") or (DOCS / target).exists(), target
