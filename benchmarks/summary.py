"""A run in a table of one line a method and at most five sentences: what is gained at which length, and what is lost.

Everything is computed from the rows of `ops` (and of `fidelity`, `vit` and `million` where a run has them); a figure
that a busy machine left unsure is marked `~`, and no sentence is made of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from efficient_attn.measuring import clock

from . import cases, suites, view
from .report import Table
from .suites import Claim, Column
from .view import Row

# Of methods, by the name before the colon; what is not here is "other".
GROUPS = {
    "exact": ("dense", "causal", "prefix_lm", "documents"),
    "windows": ("sliding_window", "dilated", "neighborhood", "deepspeed_local"),
    "global": ("longformer", "bigbird", "strided", "fixed", "deepspeed_fixed", "deepspeed_variable",
               "deepspeed_bigbird", "deepspeed_bslongformer"),
    "content": ("topk_blocks", "topp_blocks", "lsh", "sorted_buckets"),
    "image": ("neighborhood", "axial"),
    "low-rank": ("linformer", "nystrom", "performer", "linear"),
}  # fmt: skip
CLOSE = 0.2  # an error that many models stand, relative; the sentences are about methods within it
EVEN = 0.03  # of a ratio: as fast


def group(spec: str) -> str:
    """The group of a method."""
    if "+" in spec:
        return "hybrid"
    name = spec.partition(":")[0]
    if name in GROUPS["image"]:
        return "image"
    return next((known for known, names in GROUPS.items() if name in names), "other")


class Summary:
    """The rows of a run that a user's question is about: of one shape, the one with most rows."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = [row for row in rows if row["status"] == "ok"]
        steps = [row for row in view.done(rows, "ops") if row["mode"] in ("fwd", "fwd_bwd")]
        shapes = suites.groups(steps, "code", "dtype", "causal", "batch", "heads", "head_dim", "threads")
        chosen = max(shapes.values(), key=len, default=[])
        self.ops = {(row["mode"], row["seqlen"], row["method"]): row for row in chosen}
        self.methods = list(dict.fromkeys(method for _, _, method in self.ops))
        names = view.short_names(self.methods)
        self.names = {spec: _joined(name) for spec, name in names.items()}

    def lengths(self, mode: str) -> list[int]:
        return sorted({seqlen for found, seqlen, _ in self.ops if found == mode})

    def at(self, mode: str, seqlen: int) -> list[Row]:
        """The rows of one length, in the order of the methods."""
        return [self.ops[key] for key in ((mode, seqlen, method) for method in self.methods) if key in self.ops]

    def table(self) -> Table | None:
        """One line a method; None without rows."""
        if not self.ops:
            return None
        forward, training = self.lengths("fwd"), self.lengths("fwd_bwd")
        shown = forward[:: max(1, len(forward) // 3)][:3] + forward[-1:]
        shown = sorted(set(shown))
        longest = (forward or training)[-1]
        columns = [Column("method", "method", "text")]
        columns += [Column(f"{_size(n)}", f"fwd{n}") for n in shown]
        columns += [Column(f"train {_size(n)}", f"fwd_bwd{n}") for n in training[-2:]]
        columns += [Column(f"MiB {_size(longest)}", "memory"), Column(f"error {_size(longest)}", "error")]
        outside = {"trained": self._trained(), "digits": self._digits()}
        heads = {"trained": "error, trained", "digits": "digits"}
        columns += [Column(heads[name], name) for name, found in outside.items() if found]
        lines = [(self._sdpa_line(shown, training[-2:], outside), False)]
        for method in self.methods:
            cells = [self.names[method]]
            cells += [_speed(self.ops.get(("fwd", n, method))) for n in shown]
            cells += [_speed(self.ops.get(("fwd_bwd", n, method))) for n in training[-2:]]
            last = self.ops.get(("fwd" if forward else "fwd_bwd", longest, method), {})
            cells += [view.text(last.get("peak_bytes"), "mib"), _error(last.get("error"))]
            cells += [found.get(_family(method), "") for found in outside.values() if found]
            lines.append((cells, False))
        note = (
            "Speed as a multiple of torch's scaled_dot_product_attention in the same alternation, forward and training "
            "step (forward and backward) at each length. MiB: peak memory of a forward above its inputs. error: "
            "relative to exact attention, on photograph patches. "
        )
        if outside["trained"]:
            note += "error, trained: on activations of a trained model, a quarter of all scores. "
        if outside["digits"]:
            note += f"digits: test accuracy of a vision transformer after {self._steps()} steps. "
        note += f"~ unsure by more than {clock.UNSURE:.0%}."
        first = next(iter(self.ops.values()))
        shape = view.shape({key: first.get(key) for key in ("batch", "heads", "head_dim")})
        title = f"Speed against torch SDPA ({first['dtype']}, {shape}, {first['threads']} threads)"
        return Table(title, columns, [("", lines)], note)

    def _sdpa_line(self, forward: Sequence[int], training: Sequence[int], outside: Mapping[str, Any]) -> list[str]:
        """The first line: what a multiple of 1 is, in milliseconds."""
        cells = ["torch SDPA, ms"]
        for mode, lengths in (("fwd", forward), ("fwd_bwd", training)):
            for n in lengths:
                here = self.at(mode, n)
                cells.append(f"{here[0]['sdpa_ms']:.3g}" if here else "")
        return cells + [""] * (2 + sum(map(bool, outside.values())))

    def _trained(self) -> dict[str, str]:
        found = [row for row in self.rows if row["suite"] == "fidelity"]
        best = "minilm" if any(row["source"] == "minilm" for row in found) else "digits"
        found = [row for row in found if row["source"] == best]
        wanted = dict(cases.OVERVIEW_FAMILIES)
        result = {row["family"]: _error(row["error"]) for row in found if wanted.get(row["family"]) == row["size"]}
        return result

    def _digits(self) -> dict[str, str]:
        found = [row for row in self.rows if row["suite"] == "vit"]
        return {_family(row["method"]): f"{row['accuracy']:.1%}" for row in found}

    def _steps(self) -> int:
        return next(row["steps"] for row in self.rows if row["suite"] == "vit")

    def sentences(self) -> list[Claim]:
        """At most five, the gain first and the losses as openly."""
        found = [self._exact(), self._gain(), self._loss(), self._short(), self._learned(), self.million()]
        return [claim for claim in found if claim is not None][:5]

    def _exact(self) -> Claim | None:
        """Our exact attention beside PyTorch's, over all lengths and both directions."""
        rows = [row for row in self.ops.values() if row["method"] == "dense"]
        sure = [row for row in rows if not _unsure(row)]
        if not rows:
            return None
        ids = tuple(row["id"] for row in rows)
        if len(sure) < max(1, len(rows) // 2):
            return Claim("Exact attention beside torch SDPA: too noisy to tell, the machine is busy.", ids)
        best, worst = (pick(sure, key=lambda row: row["speedup_sdpa"]) for pick in (max, min))
        text = (
            f"Our exact attention runs at {_times(best['speedup_sdpa'])} of torch SDPA's speed at best ({_where(best)})"
        )
        text += f" and {_times(worst['speedup_sdpa'])} at worst ({_where(worst)})"
        slower = [row for row in sure if row["speedup_sdpa"] < 1 - EVEN]
        text += f"; it is slower in {len(slower)} of {len(sure)} cases." if slower else "; it is slower nowhere."
        return Claim(text, ids)

    def _gain(self) -> Claim | None:
        """At the longest length: the fastest within `CLOSE`, beside the best exact attention, ours or PyTorch's."""
        modes = [mode for mode in ("fwd", "fwd_bwd") if self.lengths(mode)]
        parts, ids = [], []
        for mode in modes:
            n = self.lengths(mode)[-1]
            near = [row for row in self._approximate(mode, n) if row["error"] <= CLOSE]
            sure = [row for row in near if not _unsure(row)]
            if not sure:
                parts.append(f"{_where_of(mode, n)} " + ("it is too noisy to tell" if near else "none is"))
                continue
            best = max(sure, key=gained)
            what = "none is faster than the best exact attention"
            if gained(best) > 1 + EVEN:
                what = f"{self.names[best['method']]} is {_times(gained(best))} as fast as the best exact attention"
                what += f" (error {best['error']:.0%})"
            parts.append(f"{_where_of(mode, n)} {what}")
            ids.append(best["id"])
        if not parts:
            return None
        return Claim(f"Within an error of {CLOSE:.0%}: " + "; ".join(parts) + ".", tuple(ids))

    def _loss(self) -> Claim | None:
        """What the fastest of all loses."""
        mode = "fwd" if self.lengths("fwd") else "fwd_bwd"
        if not self.lengths(mode):
            return None
        rows = self._approximate(mode, self.lengths(mode)[-1])
        sure = [row for row in rows if not _unsure(row)]
        if not sure:
            return None
        fastest = max(sure, key=gained)
        far = sorted((row for row in rows if row["error"] > CLOSE), key=lambda row: -row["error"])
        text = (
            f"The fastest, {self.names[fastest['method']]} ({_times(gained(fastest))}), errs by {fastest['error']:.0%}"
        )
        if far:
            named = ", ".join(f"{self.names[row['method']]} {row['error']:.0%}" for row in far[:4])
            text += f"; beyond {CLOSE:.0%} at {_size(far[0]['seqlen'])}: {named}"
        return Claim(text + ". These are losses without training; trained with a method, a model makes up for some.",
                     (fastest["id"], *(row["id"] for row in far[:4])))  # fmt: skip

    def _short(self) -> Claim | None:
        """From which length on anything within `CLOSE` beats the best exact attention."""
        lengths = self.lengths("fwd")
        loses: list[Row] = []
        for n in lengths:
            near = [row for row in self._approximate("fwd", n) if row["error"] <= CLOSE]
            if not near or any(_unsure(row) for row in near):
                continue
            best = max(near, key=gained)
            if gained(best) > 1 + EVEN:
                if not loses:
                    return None
                text = (
                    f"At {_size(loses[-1]['seqlen'])} tokens and below, nothing within {CLOSE:.0%} is faster than exact"
                )
                text += f" attention (the best, {self.names[loses[-1]['method']]}, runs at {_times(gained(loses[-1]))})"
                return Claim(f"{text}; from {_size(n)} on {self.names[best['method']]} is.", (best["id"],))
            loses.append(best)
        return None

    def _learned(self) -> Claim | None:
        rows = {row["method"]: row for row in self.rows if row["suite"] == "vit"}
        dense = rows.pop("dense", None)
        if dense is None or not rows:
            return None
        best, worst = (pick(rows.values(), key=lambda row: row["accuracy"]) for pick in (max, min))
        text = f"Trained on digits for {dense['steps']} steps, exact attention classifies {dense['accuracy']:.1%}, "
        text += f"{_name(best)} {best['accuracy']:.1%} (the best other)"
        text += f" and {_name(worst)} {worst['accuracy']:.1%} (the worst), one seed."
        return Claim(text, (dense["id"], best["id"], worst["id"]))

    def million(self) -> Claim | None:
        rows = [row for row in self.rows if row["suite"] == "million" and not clock.is_noisy(row)]
        claims = suites.get("million").claims(rows) if rows else ()
        return next(iter(claims), None)

    def _approximate(self, mode: str, n: int) -> list[Row]:
        return [row for row in self.at(mode, n) if row["method"] not in ("dense", "causal")]


def gained(row: Row) -> float:
    """The speed of a row as a multiple of the best exact attention, ours or PyTorch's, of the same alternation."""
    return float(min(row["sdpa_ms"], row["dense_ms"]) / row["ms"])


def _unsure(row: Row) -> bool:
    """Whether a row's time or those that it is compared with are too unsure for a sentence."""
    return clock.is_noisy(row) or any((row.get(f"{name}_unsure") or 0) > clock.UNSURE for name in ("sdpa", "dense"))


def _speed(row: Row | None) -> str:
    if not row:
        return ""
    return f"{row['speedup_sdpa']:.3g}x" + ("~" if _unsure(row) else "")


def _error(value: float | None) -> str:
    if value is None:
        return ""
    return "exact" if value < 1e-4 else f"{value:.0%}" if value >= 0.095 else f"{value:.1%}"


def _times(value: float) -> str:
    return f"{value:.2g}x" if value < 10 else f"{value:.0f}x"


def _size(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)


def _where_of(mode: str, n: int) -> str:
    return f"{'forward' if mode == 'fwd' else 'in a training step'} at {_size(n)} tokens"


def _where(row: Row) -> str:
    return f"{'forward' if row['mode'] == 'fwd' else 'training step'}, {_size(row['seqlen'])}"


def _joined(name: str) -> str:
    return name.replace("+", " + ")


def _name(row: Row) -> str:
    return _joined(next(iter(view.short_names([row["method"]]).values())))


_FAMILIES = {
    "window": "sliding_window", "Longformer": "longformer", "BigBird": "bigbird", "top-k blocks": "topk_blocks",
    "Linformer": "linformer", "Nystrom": "nystrom", "window + centroids": "sliding_window+centroid",
}  # fmt: skip


def _family(spec: str) -> str:
    """What suites with sizes of their own call the method of a spec: the family of `fidelity`."""
    name = "+".join(part.partition(":")[0] for part in spec.split("+"))
    return next((family for family, known in _FAMILIES.items() if known == name), name)
