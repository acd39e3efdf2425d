"""Builds the site: docs/*.md, a page a method drawn by itself, and the reference of the docstrings, with strict links.

    make docs                   build/site/index.html
    make docs ARGS=--serve      also serves it on 127.0.0.1:8000

A page of a method is its class: name, formula, cost, paper, docstring, options, and the pairs that it shows, or, where
it shows none, the weights that it gives. Beside the class stands only when it is worth a try (WHEN).
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
STYLE = "site.css"
# The theme's headings are thin and grey, in the dark hardly to be read.
HEADINGS = ".md-typeset h1, .md-typeset h2 { color: var(--md-default-fg-color); font-weight: 400; }\n"
LENGTH = 128  # tokens of the matrices of weights, at most a head dimension

NAV: list[Any] = [
    {"Start here": "index.md"},
    {"Drop-in": "integrations.md"},
    {"Choose a method": "choose.md"},
    {"Long sequences": "long-sequences.md"},
    {"Examples": "examples.md"},
    {"Distributed": "distributed.md"},
    {"Other libraries' interfaces": "compat.md"},
    {"Methods": ["methods.md"]},
    {"Models and training": ["models.md", "training.md", "works-with.md", "transformers-sweep.md"]},
    {"Measuring": ["profiling.md", "benchmarks.md", "fields.md"]},
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


# When a method is worth a try, and when not: the part of its page that no class can know.
WHEN = {
    "dense": (
        "the sequence is short enough, or nothing may be lost",
        "profile says that time or memory grows too fast",
    ),
    "sliding_window": (
        "near pairs matter most, as in text, audio and series",
        "answers lie far away in a single layer",
    ),
    "causal": ("text is generated token by token and nothing may be lost", "the whole input is known at once"),
    "dilated": (
        "a wider reach than a window's is wanted for as many pairs",
        "neighbours differ: most of them are skipped",
    ),
    "strided": (
        "the sequence has a period, as images in rows or days",
        "there is no period that the stride could match",
    ),
    "fixed": (
        "segments have an end that can sum them up, as sentences do",
        "what matters lies in the middle of segments",
    ),
    "longformer": (
        "a few tokens stand for all, as [CLS] or a question does",
        "no token is special; a window costs less",
    ),
    "prefix_lm": ("a prompt is read in both directions before text is generated", "there is no prompt"),
    "documents": (
        "several documents are packed into one sequence",
        "there is one document, or lengths differ little: pad",
    ),
    "bigbird": ("text is long, and any two tokens should be few steps apart", "queries and keys are two sequences"),
    "neighborhood": ("tokens are an image, whose near patches matter most", "the tokens are no grid"),
    "axial": ("tokens are an image or a table, read along rows and columns", "what matters lies diagonally off"),
    "topk_blocks": ("few far keys matter, other ones for each query", "decoding token by token, unless queries=first"),
    "topp_blocks": (
        "as topk_blocks, where some queries need many keys and others few",
        "every query should cost the same",
    ),
    "deepspeed_fixed": (
        "a model was trained with DeepSpeed's FixedSparsityConfig",
        "starting afresh: see longformer and fixed",
    ),
    "deepspeed_variable": (
        "a model was trained with DeepSpeed's VariableSparsityConfig",
        "starting afresh: see bigbird and longformer",
    ),
    "deepspeed_bigbird": ("a model was trained with DeepSpeed's BigBirdSparsityConfig", "starting afresh: see bigbird"),
    "deepspeed_bslongformer": (
        "a model was trained with DeepSpeed's BSLongformerSparsityConfig",
        "starting afresh: see longformer",
    ),
    "deepspeed_local": (
        "a model was trained with DeepSpeed's LocalSlidingWindowSparsityConfig",
        "starting afresh: see sliding_window",
    ),
    "lsh": ("a model was trained with Reformer's buckets", "torch.compile(fullgraph=True) or vmap must trace it"),
    "sorted_buckets": ("equal buckets by content, so that all queries cost the same", "the model is causal"),
    "linear": (
        "memory and time must not grow with the past, and the model is trained with it",
        "taken untrained: it errs most",
    ),
    "linformer": (
        "the length is fixed, and its projections are trained or distilled",
        "the model is causal or lengths vary",
    ),
    "nystrom": ("attention is smooth: of the untrained methods it often errs least", "the model is causal"),
    "performer": (
        "causal attention of low rank, at linear cost",
        "attention is peaked: many features are needed, or a window",
    ),
}


def method_page(name: str, cls: Any, picture: str) -> str:
    """The page of a class."""
    lines = [f"# {name}", "", "| formula | cost | paper |", "| --- | --- | --- |"]
    lines += [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{cls.formula}`", cls.complexity, cls.paper)) + " |"
    ]
    use, leave = WHEN[name]
    lines += ["", f"* **Use it** when {use}.", f"* **Leave it** when {leave}."]
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
    (PAGES / STYLE).write_text(HEADINGS, encoding="utf-8")
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
        "extra_css": [STYLE],
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
