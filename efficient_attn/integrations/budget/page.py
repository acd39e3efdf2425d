"""What a search found as one HTML page: what each layer became and why, the choices that were measured, all figures.

The pictures are SVG in the page; there is no script and nothing that a network would have to bring.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from ..fidelity import MIB, Cost, LayerFidelity
from .calibration import Figures
from .search import NOTHING, Found

STYLE = """
:root{ color-scheme:light dark;--ink:#1a1c20;--soft:#666c76;--line:#d9dce1;--back:#fff;--one:#2463c5;--bad:#c2453c}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaee;--soft:#9aa1ad;--line:#3a3f48;--back:#16181c;
  --one:#7aa7f0;--bad:#ef8a80}
}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);max-width:62rem;margin:0 auto;
  padding:1.5rem}
h1{font-size:1.5rem;margin:0 0 .3rem}
h2{font-size:1.1rem;margin:2rem 0 .4rem}
p{margin:.3rem 0;max-width:46rem}
.soft{color:var(--soft)}
.cards{display:flex;flex-wrap:wrap;gap:.8rem;margin:1rem 0}
.cards div{border:1px solid var(--line);border-radius:.5rem;padding:.5rem .9rem}
.cards b{display:block;font-size:1.35rem}
.cards span{color:var(--soft);font-size:.85rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;width:100%}
th,td{text-align:right;padding:.22rem .6rem;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--soft)}
td:first-child,th:first-child,td.text,th.text{text-align:left}
td.text{white-space:normal;min-width:12rem}
tr.chosen td{font-weight:600}
code{font-size:.95em}
details{margin:.3rem 0}
summary{cursor:pointer}
svg{max-width:100%;height:auto}
svg text{fill:var(--soft);font-size:12px}
svg line{stroke:var(--line)}
.dot{fill:var(--one)}
.over{fill:none;stroke:var(--bad);stroke-width:1.5}
.limit{stroke:var(--bad)!important;stroke-dasharray:5 4}
""".strip()


def page(
    found: Found, layers: Mapping[str, LayerFidelity], before: Cost | None = None, after: Cost | None = None
) -> str:
    """The page.

    Args:
        layers: errors of the layers in the converted model. before, after: a forward of the original, and converted.
    """
    measure = "fall of the metric" if found.metric is not None else "relative error of the outputs"
    changed = sum(not method.is_dense for method in found.plan.methods.values())
    cards = [
        (f"{found.error:.3g}", f"{measure}, of a budget of {found.limit:g}"),
        ("-" if found.speedup is None else f"{found.speedup:.2f}x", "as fast as dense, by the same kernels"),
        (f"{changed} of {len(found.plan.layers)}", "layers changed"),
    ]
    if found.metric is not None:
        cards.append((f"{found.metric[0]:.4g} → {found.metric[1]:.4g}", "metric"))
    if before is not None and after is not None:
        cards.append((f"{before.bytes / MIB:.1f} → {after.bytes / MIB:.1f} MiB", "memory of a forward"))
    parts = [
        "<h1>Which attention each layer may have</h1>",
        f'<p class="soft">Measured on held-out samples of up to {max(found.table.lengths.values(), default=0)} tokens. '
        f"Dense attention itself differs by {found.dense_error:.1e}, which is rounding.</p>",
        '<div class="cards">' + "".join(f"<div><b>{a}</b><span>{escape(b)}</span></div>" for a, b in cards) + "</div>",
    ]
    if found.nothing:
        parts.append(f"<p><b>Nothing is gained:</b> {escape(found.nothing)}.</p>")
    parts += ["<h2>Layers</h2>", _layers(found, layers), "<h2>Choices that were measured</h2>", _front(found)]
    parts += [_trials(found), "<h2>Every candidate</h2>", *_candidates(found)]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Attention within a budget</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _layers(found: Found, layers: Mapping[str, LayerFidelity]) -> str:
    rows = []
    for name, method in found.plan.methods.items():
        figures = next((f for f in found.table.figures[name] if f.method == method), None)
        dense = found.table.dense[name]
        cost = dense if method.is_dense else math.nan if figures is None else figures.cost
        output = layers[name].output if name in layers else None
        rows.append(
            [
                _code(name),
                _code(str(method)),
                _number(None if figures is None else figures.error),
                _number(None if figures is None else figures.sensitivity),
                _number(output),
                _cost(found, dense),
                _cost(found, cost),
                escape(_why(found, name)),
            ]
        )
    rows += [[_code(name), _code("dense"), *["-"] * 5, escape(why)] for name, why in found.table.fixed.items()]
    heads = ["layer", "attention", "its error", "outputs move by", "its output, in the model", "dense", "now", "why"]
    return _table(heads, rows, text=(0, 1, 7))


def _why(found: Found, name: str) -> str:
    method = found.plan.methods[name]
    figures = found.table.figures[name]
    usable = [f for f in figures if not f.refused]
    if name in found.shares:
        near, far = found.shares[name]
        said = f"exact part {near:.0%}, tail {far:.0%} of the mass"
        return said + (
            "; the tail carries nothing" if far < NOTHING else "; the pattern carries nothing" * (near < NOTHING)
        )
    if not method.is_dense:
        return "heads choose by themselves" if " per_head" in f" {method}" else "the fastest that the budget allows"
    if not usable:
        return "no candidate is faster here"
    least = min(usable, key=lambda f: f.weight)
    return f"the least harmful, {least.method}, would move the outputs by {least.weight:.1e}"


def _trials(found: Found) -> str:
    rows = [
        [str(n), _cost(found, t.cost), _number(t.predicted), _number(t.error), escape(t.why)]
        for n, t in enumerate(found.trials, 1)
    ]
    if not rows:
        return '<p class="soft">None: no candidate is faster than dense attention.</p>'
    heads = ["trial", "time of attention", "predicted error", "measured error", "what"]
    return _table(heads, rows, text=(0, 4))


def _front(found: Found) -> str:
    """Measured error against predicted cost, with the budget as a line."""
    points = [(t.error, t.cost) for t in found.trials if math.isfinite(t.error)]
    total = sum(found.table.dense.values())
    if not points or not total:
        return ""
    right = 1.15 * max(found.limit, *(error for error, _ in points)) or 1.0

    def at(error: float, cost: float) -> tuple[float, float]:
        return 60 + 560 * error / right, 240 - 210 * min(cost / total, 1.0)

    marks = [
        f'<circle class="dot" cx="{at(0, total)[0]:.1f}" cy="{at(0, total)[1]:.1f}" r="5"><title>dense</title></circle>'
    ]
    for number, (error, cost) in enumerate(points, 1):
        (x, y), kind = at(error, cost), "dot" if error <= found.limit else "over"
        says = f"trial {number}: error {error:.3g}, {cost / total:.0%} of dense attention's time"
        marks.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{says}</title></circle>')
    x = at(found.limit, 0)[0]
    return (
        '<svg viewBox="0 0 660 290" width="660" role="img" aria-label="Error and cost of the choices">'
        '<line x1="60" y1="240" x2="620" y2="240"/><line x1="60" y1="30" x2="60" y2="240"/>'
        f'<line class="limit" x1="{x:.1f}" y1="20" x2="{x:.1f}" y2="240"/><text x="{x + 4:.1f}" y="28">budget</text>'
        f'{"".join(marks)}<text x="60" y="258">0</text><text x="620" y="258" text-anchor="end">{right:.2g}</text>'
        '<text x="340" y="278" text-anchor="middle">measured error</text>'
        '<text x="52" y="36" text-anchor="end">100 %</text>'
        '<text x="52" y="244" text-anchor="end">0</text><text x="66" y="14">time of attention, of dense</text></svg>'
    )


def _candidates(found: Found) -> list[str]:
    parts = []
    for name, figures in found.table.figures.items():
        dense, chosen = found.table.dense[name], found.plan.methods[name]
        rows, marked = [], []
        for f in sorted(figures, key=_by_weight):
            marked.append(f.method == chosen)
            rows.append(
                [
                    _code(str(f.method)),
                    _cost(found, f.cost),
                    _number(f.error),
                    _number(f.sensitivity),
                    escape(f.refused),
                ]
            )
        table = _table(["candidate", "time", "its error", "outputs move by", "why not"], rows, (0, 4), marked)
        parts.append(
            f"<details><summary>{_code(name)} <span class=soft>{found.table.heads[name]} heads, "
            f"{found.table.lengths[name]} tokens, dense {_cost(found, dense)}</span></summary>{table}</details>"
        )
    return parts


def _by_weight(figures: Figures) -> tuple[bool, float]:
    return bool(figures.refused), math.inf if math.isnan(figures.weight) else figures.weight


def _cost(found: Found, cost: float) -> str:
    if math.isnan(cost):
        return "-"
    return f"{cost:.4g}" if found.seconds is None else f"{cost * 1e3:.2f} ms"


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2e}"


def _code(text: str) -> str:
    return f"<code>{escape(text or '(the model)')}</code>"


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int] = (), chosen: Sequence[bool] = ()
) -> str:
    def cell(tag: str, column: int, content: str) -> str:
        return f"<{tag}{' class=text' if column in text else ''}>{content}</{tag}>"

    lines = ["".join(cell("th", n, escape(head)) for n, head in enumerate(heads))]
    lines += ["".join(cell("td", n, part) for n, part in enumerate(row)) for row in rows]
    marks = [False, *(chosen or [False] * len(rows))]
    body = "".join(f"<tr{' class=chosen' if m else ''}>{line}</tr>" for m, line in zip(marks, lines, strict=True))
    return f'<div class="scroll"><table>{body}</table></div>'
