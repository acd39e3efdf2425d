"""Runs docs/examples.md from top to bottom and writes what its blocks print behind them, and their pictures beside it.

python docs/examples.py         (half a minute)
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "examples.md"
# A block, and what it printed when the page was made.
BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n.*?```\n)?", re.DOTALL)


def made(text: str, folder: Path) -> str:
    """The page with the output of each block behind it; `plt.savefig("x.png")` goes into a folder."""
    names: dict[str, object] = {}
    save = plt.savefig

    def run(found: re.Match[str]) -> str:
        code, printed = found["code"], io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, PAGE.name, "exec"), names)
        output = f"\n```text\n{printed.getvalue().rstrip()}\n```\n" if printed.getvalue() else ""
        return f"```python\n{code}```\n{output}"

    plt.savefig = lambda name, **options: save(folder / name, dpi=110, **options)
    try:
        return BLOCK.sub(run, text)
    finally:
        plt.savefig = save
        plt.close("all")


if __name__ == "__main__":
    PAGE.write_text(made(PAGE.read_text(encoding="utf-8"), DOCS), encoding="utf-8")
