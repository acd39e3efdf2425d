"""`explain`: which backend a call would take, why not the others, and what the call costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import backends, functional, inputs, query_sinks
from .backends.call import accumulation_dtype
from .backends.cpu import attention as cpu
from .biases import BiasLike
from .masks import BlockMask, parts
from .ops.attention import is_plain


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. `str()` gives the same as text.

    backend: the backend that serves the call, None if the one asked for cannot.
    reasons: for each backend, why it cannot serve; an empty list means that it can.
    density: visible pairs / (B * Hq * Nq * Nk).
    visited: the same of the pairs in the blocks that the backend visits, hidden ones included.
    parts: where the mask is taken as a union of parts, each in its own order of tokens, what they are; else empty.
    work: what the call is estimated to take, as a share of exact attention on all pairs: pairs visited, and in pairs
        the starts of blocks and the loads and joins of rows. From 1 on the mask is too short or too scattered to pay.
    whole_because: where it is such a union, and the call takes it in the order of the sequence all the same, why.
    flops: floating-point operations of the forward on the visible pairs: 2 * pairs * (D + Dv).
    bytes: what the forward must at least read and write: query, key, value, bias, mask, out and lse.
    """

    backend: str | None
    reasons: dict[str, list[str]]
    density: float
    flops: int
    bytes: int
    visited: float = 1.0
    parts: tuple[str, ...] = ()
    whole_because: str = ""
    work: float = 1.0

    def __str__(self) -> str:
        lines = [f"backend: {_label(self.backend) if self.backend else 'none can serve this call'}"]
        lines += [f"  {_label(name)}: {'; '.join(why) if why else 'can serve'}" for name, why in self.reasons.items()]
        lines.append(f"density: {self.density:.2%} of all pairs are visible, {self.visited:.2%} are visited")
        if self.density < 1.0:
            lines.append(f"work: about {self.work:.2%} of that of exact attention on all pairs{self._whether_it_pays}")
        if self.parts:
            count = "1 part" if len(self.parts) == 1 else f"{len(self.parts)} parts"
            lines.append(f"{count}, each in its own order of tokens, joined by lse:")
        lines += [f"  {part}" for part in self.parts]
        if self.whole_because:
            lines.append(
                f"the mask has parts in orders of their own, which this call does not take: {self.whole_because}"
            )
        lines.append(f"forward: {self.flops / 1e9:.3f} GFLOP, {self.bytes / 1e6:.3f} MB")
        return "\n".join(lines)

    @property
    def _whether_it_pays(self) -> str:
        return ", so that the mask does not pay here: it starts to with more tokens" if self.work >= 1.0 else ""


def _label(name: str) -> str:
    """A backend's name, with what is to be known before it is asked for."""
    why = backends.EXPERIMENTAL.get(name)
    return name if why is None else f"{name} (EXPERIMENTAL: {why})"


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: inputs.MaskLike = None,
    bias: BiasLike = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Explanation:
    """Say what `attention` would do with these arguments, without doing it.

    Raises what `attention` raises for wrong input, but not for a backend that cannot serve: that is part of the answer.
    """
    backends.check_name(backend)
    if sinks is not None and query_sinks.has_queries(sinks):  # which are beside the call of a backend
        query_sinks.check(sinks, query)
        sinks = None
    arguments: dict[str, Any] = {
        "mask": mask, "bias": bias, "is_causal": is_causal, "causal_alignment": causal_alignment, "scale": scale,
        "softcap": softcap, "sinks": sinks, "dropout_p": dropout_p, "dropout_seed": dropout_seed,
    }  # fmt: skip
    given = (query, key, value)
    prepared = functional.prepare(*given, **arguments, backend="reference")
    query, key, value, bias, arrays = prepared[:5]
    modifiers = inputs.modifier_names(*prepared.modifiers)
    call = functional.describe(query, key, value, bias, arrays, dropout_p, modifiers=modifiers)
    reasons = backends.not_supported_reasons(call)
    wanted = (n for n in reasons if n == backend or (backend == "auto" and backends.automatic(n, call.device)))
    serving = [name for name in wanted if not reasons[name]]
    block_mask = BlockMask.from_arrays(arrays, q_len=call.Nq, kv_len=call.Nk)
    density = block_mask.density
    rows = call.B * call.Hq * call.Nq
    pairs = round(density * rows * call.Nk)
    moved = (query.numel() + key.numel() + value.numel() + rows * call.Dv) * query.element_size()
    moved += rows * accumulation_dtype(call.dtype).itemsize + block_mask.nbytes
    moved += 0 if bias is None else bias.numel() * bias.element_size()
    chosen, taken, whole_because = serving[0] if serving else None, None, ""
    if chosen is not None and mask is not None and is_plain(*given, bias):
        again = functional.prepare(*given, **arguments, backend=chosen, parts=True)
        taken, whole_because = again.parts, again.whole_because
    seen = block_mask if taken is None else taken.mask
    visited = parts.visited(seen) / max(math.prod(seen.shape), 1)
    work = parts.cost(seen) / max(math.prod(seen.shape[2:]), 1)
    said: tuple[str, ...] = ()
    if taken is not None and taken.mask.union is not None:
        copies = [0] * len(taken.arrays)
        if chosen == "cpu":
            copies = [cpu.tiles_of_a_copy(query, key, value, part) for part in taken.arrays]
        said = tuple(map(_said, taken.mask.union, copies))
    flops = 2 * pairs * (call.D + call.Dv)
    return Explanation(chosen, reasons, density, flops, moved, visited, said, whole_because, work)


def _said(part: parts.Part, tiles: int) -> str:
    """One line about a part. tiles: of queries, which share one copy of their keys."""
    mask, shares = part.mask, (part.mask.density, part.mask.block_density)
    orders = [name for name, order in zip(("queries", "keys"), part[1:], strict=True) if order is not None]
    text = f"{mask.q_len} x {mask.kv_len} tokens in blocks of {mask.block_size[0]} x {mask.block_size[1]}, "
    text += f"{' and '.join(orders)} in another order" if orders else "in the order of the sequence"
    text += f", keys copied once for {tiles} tiles of queries" if tiles else ""
    return f"{text}: {shares[0]:.2%} of its pairs visible, {shares[1]:.2%} of its blocks visited"
