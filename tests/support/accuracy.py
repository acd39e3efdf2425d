"""The error budget of contract rule 8: no fitted tolerances, but the error of plain PyTorch in the same dtype.

`gold` is the eager formula in float64 on the very same input values, written here on its own: it shares no code with
the backends, not even with the reference. Rounding is luck, and one order of summation may round better than it
should; eager's error is therefore the largest over a few orders of the keys and of the head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

OUTPUT_RATIO, GRADIENT_RATIO = 1.0, 1.5
ORDERS = 4
OUTPUTS = ("out", "lse")
OF_ROWS = ("sinks", "slopes", "table", "grid_table")  # parameters in float32 beside halves


@dataclass(frozen=True)
class Problem:
    """One call and its cotangents: all that decides the result. `kept` is where dropout lets a pair live, or None;
    `grad_weights` (B, Hq | 1, Nq, Nk) that of returned weights, of one head for their average."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    visible: Tensor  # broadcastable to (B, Hq, Nq, Nk)
    scale: float
    grad_out: Tensor
    grad_lse: Tensor | None = None
    kept: Tensor | None = None
    dropout_p: float = 0.0
    grad_weights: Tensor | None = None
    softcap: float = 0.0
    sinks: Tensor | None = None  # (Hq)
    slopes: Tensor | None = None  # (Hq), of a bias -slope |d|
    table: Tensor | None = None  # (Hq, 2 reach + 1), of a bias by the distance d
    offset: int = 0  # d = j - i - offset
    grid: tuple[int, int] = (0, 0)  # of the tokens of an image, one in front of it where grid_table has 3 rows more
    grid_table: Tensor | None = None  # ((2h - 1) (2w - 1), Hq), of a bias by distances in the grid
    rel_h: Tensor | None = None  # (2h - 1, D) or (Hq, 2h - 1, D), of a bias q_i . rel_h[y_i - y_j + h - 1]
    rel_w: Tensor | None = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The tensors that get a gradient, by name."""
        named = {"query": self.query, "key": self.key, "value": self.value, "bias": self.bias}
        named |= {"sinks": self.sinks, "slopes": self.slopes, "table": self.table}
        named |= {"grid_table": self.grid_table, "rel_h": self.rel_h, "rel_w": self.rel_w}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def distances(self) -> Tensor:
        """d of every pair, (Nq, Nk)."""
        return torch.arange(self.key.shape[2]) - torch.arange(self.query.shape[2])[:, None] - self.offset

    def full_bias(self, inputs: dict[str, Tensor]) -> Tensor | None:
        """Everything that is added to scores, of the `inputs` that there are, as one tensor."""
        parts = [inputs[name] for name in ("bias",) if name in inputs]
        if "slopes" in inputs:
            parts.append(-inputs["slopes"][:, None, None] * self.distances.abs().to(inputs["slopes"].dtype))
        if "table" in inputs:
            reach = inputs["table"].shape[1] // 2
            parts.append(inputs["table"][:, self.distances.clamp(-reach, reach) + reach])
        if "grid_table" in inputs:
            parts.append(self.by_grid(inputs["grid_table"]))
        if "rel_h" in inputs:
            (h, w), query = self.grid, inputs["query"]
            i, j = torch.arange(h * w)[:, None], torch.arange(h * w)
            for name, apart in (("rel_h", i // w - j // w + h - 1), ("rel_w", i % w - j % w + w - 1)):
                rows = inputs[name] if inputs[name].dim() == 3 else inputs[name][None]
                parts.append((query @ rows.mT).gather(3, apart.expand(*query.shape[:2], -1, -1)))
        return sum(parts[1:], parts[0]) if parts else None

    def by_grid(self, table: Tensor) -> Tensor:
        """(Hq, N, N): a table by distances in a grid, and the first token's three entries."""
        (h, w), N = self.grid, self.query.shape[2]
        i, j = torch.arange(h * w)[:, None], torch.arange(h * w)
        index = torch.full((N, N), -1)
        first = N - h * w
        index[first:, first:] = (i // w - j // w + h - 1) * (2 * w - 1) + i % w - j % w + w - 1
        if first:
            index[0, 1:], index[1:, 0], index[0, 0] = (table.shape[0] - n for n in (3, 2, 1))
        return table[index].permute(2, 0, 1)


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    bias: Tensor | None,
    scale: float,
    kept: Tensor | None = None,
    dropout_p: float = 0.0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and weights as a PyTorch user writes them, in the inputs' dtype; a fully masked row gives 0 and -inf."""
    repeats = query.shape[1] // max(key.shape[1], 1)
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.transpose(-1, -2)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    visible = visible.expand(scores.shape)
    if sinks is not None:  # keys that everybody sees, whose value is 0
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores, visible = torch.cat([scores, column], -1), torch.cat([visible, torch.ones_like(visible[..., :1])], -1)
        if scores.shape[-1] == 1:
            visible = torch.ones_like(scores, dtype=torch.bool)
        value = (
            torch.cat([value, torch.zeros_like(value[:, :, :1])], 2)
            if value.shape[2]
            else value.new_zeros(*value.shape[:2], 1, value.shape[3])
        )
        kept = None if kept is None else torch.cat([kept, torch.ones_like(kept[..., :1])], -1)
    empty = ~visible.any(-1, keepdim=True)
    lse = (
        torch.logsumexp(scores.masked_fill(~visible, -torch.inf), -1)
        if scores.shape[-1]
        else scores.sum(-1) - torch.inf
    )
    weights = torch.softmax(scores.masked_fill(~visible & ~empty, -torch.inf), -1).masked_fill(~visible, 0.0)
    if kept is not None:
        weights = weights.masked_fill(~kept, 0.0) / (1.0 - dropout_p)
    return weights @ value, lse, weights if sinks is None else weights[..., :-1]


def run_eager(problem: Problem, dtype: torch.dtype, order: int = 0) -> dict[str, Tensor]:
    """out, lse and the gradient of each input in `dtype`, summed in the given order (0: as the tensors lie)."""
    Nk, D = problem.key.shape[2:]
    generator = torch.Generator().manual_seed(order)
    keys, dims = (torch.randperm(n, generator=generator) if order else torch.arange(n) for n in (Nk, D))
    along_keys = lambda t: t[..., keys] if t is not None and t.shape[-1] == Nk else t  # noqa: E731
    leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in problem.inputs.items()}
    out, lse, weights = eager_attention(
        leaves["query"][..., dims],
        leaves["key"][:, :, keys][..., dims],
        leaves["value"][:, :, keys],
        along_keys(problem.visible),
        along_keys(problem.full_bias(leaves)),
        problem.scale,
        along_keys(problem.kept),
        problem.dropout_p,
        problem.softcap,
        leaves.get("sinks"),
    )
    outputs, cotangents = (out,), (problem.grad_out.to(dtype),)
    if problem.grad_lse is not None:
        outputs += (lse.masked_fill(lse == -torch.inf, 0.0),)
        cotangents += (problem.grad_lse.to(dtype),)
    if problem.grad_weights is not None:
        average = problem.grad_weights.shape[1] < weights.shape[1]
        weights = weights.mean(1, keepdim=True) if average else weights
        outputs, cotangents = (*outputs, weights), (*cotangents, along_keys(problem.grad_weights.to(dtype)))
    found = gradients(outputs, list(leaves.values()), cotangents)
    weights = weights.detach()[..., keys.argsort()]
    return {"out": out.detach(), "lse": lse.detach(), "weights": weights, **dict(zip(leaves, found, strict=True))}


def magnitudes(problem: Problem) -> dict[str, float]:
    """The largest sum of absolute terms behind each result: what its rounding errors are relative to (float64).

    A gradient that cancels to zero, as dP - delta does with one key, was still computed from terms of this size. The
    backward rebuilds P = exp(s - lse) from a stored lse, whose own rounding, half an ulp, every weight inherits, and
    with it that of s where an image's bias has been added; and of a returned weight the rounding of its one score is as
    large, with no sum around it.
    """
    absolute = {name: tensor.detach().double().abs() for name, tensor in problem.inputs.items()}
    repeats = problem.query.shape[1] // max(problem.key.shape[1], 1)
    key, value = (absolute[name].repeat_interleave(repeats, 1) for name in ("key", "value"))
    grad_out = problem.grad_out.double().abs()
    gold = run_eager(problem, torch.float64)
    scores = problem.query.double() @ problem.key.double().repeat_interleave(repeats, 1).mT * problem.scale
    if problem.softcap:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    added = problem.full_bias({name: tensor.detach().double() for name, tensor in problem.inputs.items()})
    scores = scores if added is None else scores + added
    lse = gold["lse"][..., None].masked_fill(gold["lse"][..., None] == -torch.inf, 0.0)
    weights = torch.exp(scores - lse).masked_fill(~problem.visible.expand(scores.shape), 0.0)
    terms = absolute["query"] @ key.mT * abs(problem.scale)
    image = [name for name in ("grid_table", "rel_h", "rel_w") if name in absolute]
    leaves = {name: absolute[name].clone().requires_grad_() for name in ("query", *image)}
    of_image = problem.full_bias(leaves) if image else None  # linear in each: its derivatives add up absolute terms
    if "rel_h" in image:
        terms = terms + of_image.detach()
    out = weights @ value / (1.0 - problem.dropout_p)
    delta = (grad_out * out).sum(-1, keepdim=True)
    if problem.grad_lse is not None:
        delta = delta + problem.grad_lse.double().abs()[..., None]
    grad_weights = torch.zeros(())
    if problem.grad_weights is not None:
        grad_weights = problem.grad_weights.double().abs() * problem.grad_weights.shape[1] / max(scores.shape[1], 1)
        delta = delta + (weights * grad_weights).sum(-1, keepdim=True) / (1.0 - problem.dropout_p)
    grad_scores = weights * ((grad_out @ value.mT + grad_weights) / (1.0 - problem.dropout_p) + delta)
    result = {"out": out, "lse": gold["lse"].abs().masked_fill(gold["lse"] == -torch.inf, 0.0)}
    result["weights"] = weights / (1.0 - problem.dropout_p)
    if terms.numel():
        result["lse"] = result["lse"] + terms.amax(-1)
    result["query"] = grad_scores @ key * abs(problem.scale)
    result["key"] = (grad_scores.mT @ absolute["query"]).unflatten(1, (-1, max(repeats, 1))).sum(2) * abs(problem.scale)
    result["value"] = (weights.mT @ grad_out).unflatten(1, (-1, max(repeats, 1))).sum(2) / (1.0 - problem.dropout_p)
    if problem.bias is not None:
        result["bias"] = grad_scores.sum_to_size(problem.bias.shape)
    if problem.sinks is not None:
        share = torch.exp(problem.sinks.detach().double()[:, None] - gold["lse"])
        result["sinks"] = (share * delta.squeeze(-1)).sum((0, 2))
    if problem.slopes is not None:
        result["slopes"] = (grad_scores * problem.distances.abs()).sum((0, 2, 3))
    if problem.table is not None:
        reach = problem.table.shape[1] // 2
        index = (problem.distances.clamp(-reach, reach) + reach).flatten()
        sums = torch.zeros(problem.table.shape, dtype=torch.float64)
        result["table"] = sums.index_add(1, index, grad_scores.sum(0).flatten(1))
    if of_image is not None:
        found = torch.autograd.grad(of_image.expand_as(scores), list(leaves.values()), grad_scores, allow_unused=True)
        of_query, *others = found
        result["query"] = result["query"] if of_query is None else result["query"] + of_query
        result |= dict(zip(image, others, strict=True))
    sizes = {name: float(tensor.max()) if tensor.numel() else 0.0 for name, tensor in result.items()}
    roundings = 1 if of_image is None else 2
    stored = 1.0 + roundings * float(lse.abs().max()) / 2 if lse.numel() else 1.0
    return {name: size if name in OUTPUTS else size * stored for name, size in sizes.items()}


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor], cotangents: tuple[Tensor, ...]) -> list[Tensor]:
    """Vector-Jacobian product, zeros where an input has no part."""
    found = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True)]


def assert_conforms(problem: Problem, ours: dict[str, Tensor], *, joined: bool = False) -> None:
    """Hold out, lse and the gradients in `ours` against the budget of rule 8; infinities must agree exactly.

    joined: out is made of parts joined by their lse, half an ulp of which is an error of a part's share.
    """
    gold, sizes = run_eager(problem, torch.float64), magnitudes(problem)
    if joined:
        lse = gold["lse"][gold["lse"].isfinite()]
        sizes["out"] *= 1.0 + (float(lse.abs().max()) / 2 if lse.numel() else 0.0)
    dtype = problem.query.dtype
    runs = [run_eager(problem, dtype, order) for order in range(ORDERS)]
    if dtype in (torch.bfloat16, torch.float16):  # lse is promised in float32
        for run, order in zip(runs, range(ORDERS), strict=True):
            run["lse"] = run_eager(problem, torch.float32, order)["lse"]
    for name, mine in ours.items():
        ratio = OUTPUT_RATIO if name in OUTPUTS else GRADIENT_RATIO
        eager = max((_error(run[name], gold[name]) for run in runs), default=0.0)
        if name in OF_ROWS:  # delta is made of the stored output, so that a sum of rows has its rounding
            eager += torch.finfo(dtype).eps * sizes[name] / ratio
        _assert_within(name, mine, gold[name], ratio * eager, sizes[name])


def _error(found: Tensor, gold: Tensor) -> float:
    finite = gold.isfinite()
    return float((found.double() - gold)[finite].nan_to_num().abs().max()) if finite.any() else 0.0


def _assert_within(name: str, mine: Tensor, gold: Tensor, allowed: float, size: float) -> None:
    """max |mine - gold| <= allowed + 1 ulp of `size`."""
    assert mine.shape == gold.shape, f"{name}: shape {tuple(mine.shape)}, expected {tuple(gold.shape)}"
    finite = gold.isfinite()
    assert torch.equal(mine.isfinite(), finite), (
        f"{name}: NaN or infinity where the definition has none, or the reverse"
    )
    assert torch.equal(mine.double()[~finite], gold[~finite]), f"{name}: another infinity than the definition"
    # float64 is its own gold, whose error is unknown: grant it the accumulated ulps that it cannot show.
    ulps = 64 if mine.dtype == torch.float64 else 1
    budget = allowed + ulps * torch.finfo(mine.dtype).eps * size
    error = _error(mine, gold)
    assert error <= budget, (
        f"{name}: error {error:.3e} > budget {budget:.3e} (eager {allowed:.3e} + {ulps} ulp of {size:.3e})"
    )
