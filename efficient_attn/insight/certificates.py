"""What a sparse mask loses, for certain: `certificate` and `sampled_certificate`.

With the weights P of the dense call, the pairs S that the mask shows and the others R, a row drops the mass
tau = sum_R P, and its output is wrong by exactly

    out - out_S = tau (out_R - out_S),          tau = 1 / (1 + exp(lse_S - lse_R))

where out_S, lse_S and out_R, lse_R are attention over each part (Tzachristas et al., arXiv:2512.07647).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import biases
from ..backends.reference.attention import visible_pairs
from ..biases import BiasLike
from ..errors import InputError, UnsupportedError
from ..functional import attention, hide_padding, merge_attention
from ..inputs import MaskLike, as_block_mask, causal_mask, is_pattern


class Certificate(NamedTuple):
    """What a mask loses, row by row; float32 (float64 for float64 inputs)."""

    tau: Tensor  # (B, Hq, Nq): the softmax mass of the pairs that the mask hides, from 0 to 1
    error: Tensor  # (B, Hq, Nq): |out - out_S|, the Euclidean norm of what the output is wrong by
    out: Tensor  # (B, Hq, Nq, Dv): what the mask gives, out_S
    dense: Tensor  # (B, Hq, Nq, Dv): what the dense call gives

    @property
    def relative_error(self) -> float:
        """|out - out_S| / |out| over all rows."""
        norm = float(self.dense.double().norm())
        return float(self.error.double().norm()) / norm if norm else 0.0


class Interval(NamedTuple):
    """An interval that holds the mean mass dropped, over all batch elements, heads and rows, with this confidence."""

    low: float
    mean: float
    high: float
    confidence: float
    rows: int  # that were looked at, in each batch element and head


def certificate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: MaskLike,
    key_mask: Tensor | None = None,
    bias: BiasLike = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Certificate:
    """What `mask` loses against dense attention on these inputs: exact, by attention over the pairs that it hides.

    Args:
        query, key, value: (B, Hq, Nq, D), (B, Hkv, Nk, D), (B, Hkv, Nk, Dv).
        mask: a `BlockMask`, a pattern or a sparse method, or a bool tensor.
        key_mask, bias, is_causal, causal_alignment, scale, softcap, sinks: the dense call that it stands in for, as in
            `attention`. Pairs that these hide are lost by neither; a sink stands beside the pairs that are shown.

    Returns:
        A `Certificate`, at the cost of dense attention and O(n) memory.

    Raises:
        InputError, InputTypeError: as `attention`; no mask.
    """
    parts, value = _parts(query, key, value, mask, key_mask, bias, is_causal, causal_alignment, scale, softcap, sinks)
    with torch.no_grad():
        out, lse = _attend(parts, parts.shown, value)
        rest, rest_lse = _attend(parts, parts.hidden, value)
        tau = _dropped(lse, rest_lse)
        error = tau * torch.linalg.vector_norm(rest.to(tau.dtype) - out.to(tau.dtype), dim=-1)
        dense, _ = merge_attention([out, rest], [lse, rest_lse])
    return Certificate(tau, error, out, dense)


def sampled_certificate(
    query: Tensor,
    key: Tensor,
    *,
    mask: MaskLike,
    key_mask: Tensor | None = None,
    bias: BiasLike = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    samples: int = 64,
    rows: int = 4,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
) -> Interval:
    """The mean mass that `mask` drops, from some of the query rows: an interval that holds it with a probability.

    Runs of `rows` neighbouring queries are drawn `samples` times, each anew; the interval is the empirical Bernstein
    bound (Maurer & Pontil, COLT 2009), which holds for any distribution of the masses.

    Args:
        query, key, mask, key_mask, bias, is_causal, causal_alignment, scale, softcap, sinks: as in `certificate`, but
            for biases by a few numbers, such as `ALiBi`: those go by where queries stand and are not served here.
        samples: how many runs are drawn, at least 2; the interval narrows with their square root.
        rows: queries of a run, which count as one sample.
        confidence: the probability that the interval holds the mean, over the drawing.
        generator: of the drawing.

    Raises:
        InputError: no queries, fewer than 2 samples, a confidence outside (0, 1); as `certificate`.
        UnsupportedError: a bias by a few numbers.
    """
    if samples < 2 or rows < 1 or not 0.0 < confidence < 1.0:
        raise InputError(
            f"samples must be at least 2, rows at least 1 and confidence in (0, 1); got {samples}, {rows}, {confidence}"
        )
    if biases.split(bias)[1]:
        raise UnsupportedError(
            "sampled_certificate attends from some of the queries, of which a structured bias does not know where they "
            "stand; use certificate, or pass the bias as a tensor"
        )
    parts, _ = _parts(query, key, key, mask, key_mask, bias, is_causal, causal_alignment, scale, softcap, sinks)
    Nq, Nk = query.shape[2], key.shape[2]
    if Nq == 0 or query.shape[0] * query.shape[1] == 0:
        raise InputError(f"there is no row to sample: query is {tuple(query.shape)}")
    runs = -(-Nq // rows)
    drawn = torch.randint(runs, (samples,), generator=generator)
    if Nq % rows and bool((drawn == runs - 1).any()):  # the last run is shorter: it stands for fewer rows
        shares = torch.full((runs,), float(rows))
        shares[-1] = Nq % rows
        drawn = torch.multinomial(shares, samples, replacement=True, generator=generator)
    blocks = [slice(run * rows, min((run + 1) * rows, Nq)) for run in drawn.tolist()]
    index = torch.cat([torch.arange(block.start, block.stop) for block in blocks]).to(query.device)
    sliced = parts._replace(
        query=parts.query[:, :, index],
        bias=_of_queries(parts.bias, index),
    )
    unit = query.new_zeros(key.shape[0], key.shape[1], Nk, 1)
    lses = []
    with torch.no_grad():
        for part in (parts.shown, parts.hidden):
            arrays = part.arrays()
            runs_of = [visible_pairs(arrays, b.stop - b.start, Nk, query.device, b.start) for b in blocks]
            lses.append(_attend(sliced, torch.cat(runs_of, 2), unit)[1])
    dropped = _dropped(*lses).split([block.stop - block.start for block in blocks], dim=2)
    found = torch.stack([run.double().mean() for run in dropped])
    mean, spread = float(found.mean()), float(found.var())
    doubt = math.log(4.0 / (1.0 - confidence))  # both sides, and the two terms of each
    reach = math.sqrt(2.0 * spread * doubt / samples) + 7.0 * doubt / (3.0 * (samples - 1))
    return Interval(max(0.0, mean - reach), mean, min(1.0, mean + reach), confidence, samples * rows)


class Growth(NamedTuple):
    """How often a pattern's `tau_max` had to add blocks, as shares of all blocks of queries that see any key."""

    grown: float  # at least one block was added
    dense: float  # all that they see is kept, so that nothing is gained
    density: float  # blocks that are kept, of those that are seen


def growth(
    pattern: Any,
    query: Tensor,
    key: Tensor,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
    scale: float | None = None,
) -> Growth:
    """What the `tau_max` of a `TopKBlocks` or `TopPBlocks` does to its selection on these inputs.

    Args:
        pattern: with tau_max. query, key, key_mask, is_causal, causal_alignment, scale: as in `attention`.

    Raises:
        InputError: a pattern without tau_max.
    """
    if getattr(pattern, "tau_max", None) is None:
        raise InputError(f"growth is about a TopKBlocks or TopPBlocks with tau_max=; got {pattern}")
    causal = causal_mask(query.shape[2], key.shape[2], is_causal, causal_alignment)

    def kept(tau_max: float | None) -> Tensor:
        chosen = dataclasses.replace(pattern, tau_max=tau_max)
        options: dict[str, Any] = {"scale": scale, "key_mask": key_mask, "within": causal}
        mask = as_block_mask(chosen, query, key, alignment=causal_alignment, **options)
        assert mask.indptr is not None
        return mask.indptr.diff()

    least, own, most = kept(None), kept(pattern.tau_max), kept(torch.finfo(torch.float64).tiny)
    rows = (most > 0).sum().clamp(min=1)
    grown, dense = (own > least).sum() / rows, ((own == most) & (most > 0)).sum() / rows
    return Growth(float(grown), float(dense), float(own.sum() / most.sum().clamp(min=1)))


# --- the two parts of the pairs ---


class _Parts(NamedTuple):
    query: Tensor
    key: Tensor
    bias: BiasLike
    scale: float | None
    softcap: float | None
    sinks: Tensor | None
    alignment: str | None
    shown: Any  # BlockMask
    hidden: Any


def _parts(
    query: Tensor, key: Tensor, value: Tensor, mask: MaskLike, key_mask: Tensor | None, bias: BiasLike,
    is_causal: bool, alignment: str | None, scale: float | None, softcap: float | None, sinks: Tensor | None,
) -> tuple[_Parts, Tensor]:  # fmt: skip
    """The pairs that are shown and those that are hidden, and the values without what padding holds."""
    if mask is None:
        raise InputError("a certificate is about a mask: pass mask=, a BlockMask, a pattern or a bool tensor")
    if is_pattern(mask):
        mask.check_scores(bias, softcap)
    causal = causal_mask(query.shape[2], key.shape[2], is_causal, alignment)
    within = causal if getattr(mask, "by_content", False) else None
    given = as_block_mask(mask, query, key, scale=scale, key_mask=key_mask, within=within, alignment=alignment)
    shown, hidden = (given, ~given) if causal is None else (given & causal, ~given & causal)
    dense, structured = biases.split(bias)
    key, value, padding, dense = hide_padding(query, key, value, key_mask, bias=dense)
    if padding is not None:
        there = as_block_mask(padding, query, key)
        shown, hidden = shown & there, hidden & there
    bias = biases.join(dense, structured)
    return _Parts(query, key, bias, scale, softcap, sinks, alignment, shown, hidden), value


def _of_queries(bias: BiasLike, index: Tensor) -> Tensor | None:
    """The rows of a bias tensor that belong to some queries."""
    dense = biases.split(bias)[0]
    return dense if dense is None or dense.dim() < 2 or dense.shape[-2] == 1 else dense[..., index, :]


def _attend(parts: _Parts, mask: Any, value: Tensor) -> tuple[Tensor, Tensor]:
    return attention(
        parts.query, parts.key, value, mask=mask, bias=parts.bias, scale=parts.scale, softcap=parts.softcap,
        sinks=parts.sinks if mask is parts.shown else None, causal_alignment=parts.alignment, return_lse=True,
    )  # fmt: skip


def _dropped(lse: Tensor, rest_lse: Tensor) -> Tensor:
    """The share of the rest; a row without any visible pair drops nothing."""
    share = torch.sigmoid(rest_lse - lse)
    return torch.where(rest_lse == -torch.inf, torch.zeros_like(share), share)
