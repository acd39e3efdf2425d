"""Builds the site: docs/*.md, a page a method drawn by itself, and the reference of the docstrings, with strict links.

    make docs                   build/site/index.html
    make docs ARGS=--serve      also serves it on 127.0.0.1:8000

A page of a method is its class: name, formula, cost, paper, docstring, options, and the pairs that it shows, or, where
it shows none, the weights that it gives. Nothing stands in a page that does not stand in the class.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt

from efficient_attn import attention_weights
from efficient_attn.methods import METHODS
from efficient_attn.patterns import Pattern
from efficient_attn.patterns.__main__ import EXAMPLES

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
BUILD = ROOT / "build"
PAGES = BUILD / "pages"
LENGTH = 128  # tokens of the matrices of weights, at most a head dimension

NAV: list[Any] = [
    {"Start here": "index.md"},
    {"Drop-in": "integrations.md"},
    {"Choose a method": "choose.md"},
    {"Long sequences": "long-sequences.md"},
    {"Other libraries' interfaces": "compat.md"},
    {"Methods": ["methods.md"]},
    {"Models and training": ["models.md", "training.md", "works-with.md", "transformers-sweep.md"]},
    {"Measuring": ["profiling.md", "benchmarks.md"]},
    {"GPU": "gpu.md"},
    {"See attention": "insight.md"},
    {"How it is built": ["contract.md", "architecture.md", "contributing.md"]},
    {"Reference": []},
]  # fmt: skip
REFERENCE = {
    "attention": ("efficient_attn.functional", ("attention", "attention_weights", "merge_attention")),
    "packed sequences": ("efficient_attn.varlen", ("attention_varlen",)),
    "the module": ("efficient_attn.multihead", ("MultiheadAttention", "replace_attention")),
    "biases": (
        "efficient_attn.biases",
        ("ALiBi", "RelativeBias", "T5Bias", "LowRankBias", "RelativeBias2D", "DecomposedBias2D", "PositionBias"),
    ),
    "caches": ("efficient_attn.cache", ("KVCache", "PagedKVCache", "cached_attention", "paged_attention")),
    "masks": ("efficient_attn.masks.block_mask", ("BlockMask",)),
    "explain": ("efficient_attn.explanation", ("explain", "Explanation")),
    "flash-attn": ("efficient_attn.compat.flash_attn", None),
    "xformers": ("efficient_attn.compat.xformers", None),
    "FlexAttention": ("efficient_attn.compat.flex_attention", None),
    "errors": ("efficient_attn.errors", None),
}  # fmt: skip


def method_page(name: str, cls: Any, picture: str) -> str:
    """The page of a class."""
    lines = [f"# {name}", "", "| formula | cost | paper |", "| --- | --- | --- |"]
    lines += [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{cls.formula}`", cls.complexity, cls.paper)) + " |"
    ]
    lines += ["", f"![What {name} sees]({picture})", "", inspect.cleandoc(cls.__doc__ or ""), ""]
    options = [f for f in dataclasses.fields(cls) if f.name in cls.kinds]
    if options:
        lines += ["| option | what it holds | default |", "| --- | --- | --- |"]
        for option in options:
            default = "-" if option.default is dataclasses.MISSING else option.default
            lines.append(f"| `{option.name}` | {cls.kinds[option.name]} | `{default}` |")
    lines += ["", "```python", f'MultiheadAttention(embed_dim, num_heads, attention="{name}")', "```", ""]
    return "\n".join(lines)


def draw(name: str, cls: Any, file: Path) -> None:
    """The pairs that a pattern shows, or the weights that a method gives, of a walk of LENGTH steps."""
    figure, axes = plt.subplots(figsize=(4, 4), layout="constrained")
    walk = torch.randn(1, 1, LENGTH, 16, generator=torch.Generator().manual_seed(0)).cumsum(2) / 4
    example = next((pattern for pattern in EXAMPLES if type(pattern) is cls), None)
    if isinstance(example, Pattern):
        wide = torch.randn(1, 1, 484, 16, generator=torch.Generator().manual_seed(0)).cumsum(2) / 4
        example.for_inputs(wide, wide).plot(axes)
    else:
        method = cls()
        torch.manual_seed(0)
        state = method.build(16, 1, 16)
        values = torch.eye(LENGTH)[None, None]  # which the weights are applied to
        weights = method.attend(walk, walk, values, state=state)[0][0, 0].detach()
        exact = attention_weights(walk, walk)[0, 0]
        axes.imshow(weights.clamp(min=0).sqrt(), cmap="magma", vmax=float(exact.max().sqrt()))
        axes.set(title=f"weights, {LENGTH} tokens", xlabel="key", ylabel="query")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def write_pages() -> None:
    """Everything that mkdocs reads, into build/pages."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(DOCS, PAGES, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    shutil.copy(ROOT / "CONTRIBUTING.md", PAGES / "contributing.md")
    for page in PAGES.glob("*.md"):
        text = page.read_text(encoding="utf-8").replace("](../CONTRIBUTING.md)", "](contributing.md)")
        text = text.replace("](docs/", "](")
        # what lies beside docs/ in the repository is no page: its name stays
        page.write_text(re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", text), encoding="utf-8")
    methods, reference = PAGES / "methods", PAGES / "reference"
    methods.mkdir()
    reference.mkdir()
    entries = next(entry["Methods"] for entry in NAV if "Methods" in entry)
    for name, cls in METHODS.items():
        draw(name, cls, methods / f"{name}.png")
        (methods / f"{name}.md").write_text(method_page(name, cls, f"{name}.png"), encoding="utf-8")
        entries.append({name: f"methods/{name}.md"})
    entries = next(entry["Reference"] for entry in NAV if "Reference" in entry)
    for title, (module, names) in REFERENCE.items():
        file = re.sub(r"\W", "-", title)
        options = f"    options:\n      members: {json.dumps(names)}\n" if names else ""
        text = f"# {title}\n\n::: {module}\n{options}"
        (reference / f"{file}.md").write_text(text, encoding="utf-8")
        entries.append({title: f"reference/{file}.md"})


def configuration() -> dict[str, Any]:
    """mkdocs.yml, as JSON, which YAML reads."""
    python = {
        "paths": [str(ROOT)],
        "options": {
            "docstring_style": "google", "docstring_options": {"warnings": False}, "show_source": False,
            "show_root_heading": False, "show_root_toc_entry": False, "heading_level": 2, "separate_signature": True,
            "docstring_section_style": "list",
        },
    }  # fmt: skip
    schemes = [
        {"media": "(prefers-color-scheme: light)", "scheme": "default"},
        {"media": "(prefers-color-scheme: dark)", "scheme": "slate"},
    ]
    return {
        "site_name": "efficient-attn",
        "docs_dir": str(PAGES),
        "site_dir": str(BUILD / "site"),
        "use_directory_urls": False,  # so that the files open without a server
        "theme": {
            "name": "material",
            "font": False,
            "palette": schemes,
            "features": ["navigation.sections", "toc.follow"],
        },
        "markdown_extensions": [
            "tables",
            "admonition",
            "pymdownx.highlight",
            "pymdownx.superfences",
            {"toc": {"permalink": True}},
        ],
        "plugins": ["search", {"mkdocstrings": {"handlers": {"python": python}}}],
        "validation": {"links": {"not_found": "warn", "anchors": "warn", "unrecognized_links": "warn"}},
        "nav": NAV,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--serve", action="store_true", help="serve the site on 127.0.0.1:8000 when it is built")
    chosen = parser.parse_args()
    write_pages()
    file = BUILD / "mkdocs.yml"
    file.write_text(json.dumps(configuration(), indent=1), encoding="utf-8")
    os.environ["NO_MKDOCS_2_WARNING"] = "1"
    status = subprocess.call([sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-f", str(file)])
    if status == 0:
        print(f"{BUILD / 'site' / 'index.html'}")
        if chosen.serve:
            command = [sys.executable, "-m", "http.server", "8000", "--bind", "127.0.0.1", "-d", str(BUILD / "site")]
            return subprocess.call(command)
    return status


if __name__ == "__main__":
    sys.exit(main())
