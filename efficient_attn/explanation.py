"""`explain`: which backend a call would take, why not the others, and what the call costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import backends, functional
from .masks import BlockMask


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. `str()` gives the same as text.

    backend: the backend that serves the call, None if the one asked for cannot.
    reasons: for each backend, why it cannot serve; an empty list means that it can.
    density: visible pairs / (B * Hq * Nq * Nk).
    flops: floating-point operations of the forward on the visible pairs: 2 * pairs * (D + Dv).
    bytes: what the forward must at least read and write: query, key, value, bias, mask, out and lse.
    """

    backend: str | None
    reasons: dict[str, list[str]]
    density: float
    flops: int
    bytes: int

    def __str__(self) -> str:
        lines = [f"backend: {_label(self.backend) if self.backend else 'none can serve this call'}"]
        lines += [f"  {_label(name)}: {'; '.join(why) if why else 'can serve'}" for name, why in self.reasons.items()]
        lines.append(f"density: {self.density:.2%} of all pairs are visible")
        lines.append(f"forward: {self.flops / 1e9:.3f} GFLOP, {self.bytes / 1e6:.3f} MB")
        return "\n".join(lines)


def _label(name: str) -> str:
    """A backend's name, with what is to be known before it is asked for."""
    why = backends.EXPERIMENTAL.get(name)
    return name if why is None else f"{name} (EXPERIMENTAL: {why})"


def explain(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Explanation:
    """Say what `attention(query, key, value, **arguments)` would do, without doing it.

    Takes the arguments of `attention` and raises what it raises for wrong input, but not for a backend that cannot
    serve: that is part of the answer.
    """
    backend = arguments.get("backend", "auto")
    backends.check_name(backend)
    functional.check_tensors(query=query, key=key, value=value)
    query, key, value = functional.autocast(query, key, value)
    functional.check_inputs(query, key, value)
    bias = functional.check_bias(arguments.get("bias"), query, key)
    dropout_p = arguments.get("dropout_p", 0.0)
    functional.check_dropout(dropout_p)
    options = {name: arguments.get(name) for name in ("mask", "is_causal", "causal_alignment", "scale")}
    block_mask = _block_mask(query, key, **options)
    call = functional.describe(query, key, value, bias, block_mask.arrays(False), dropout_p)
    reasons = backends.not_supported_reasons(call)
    wanted = (n for n in reasons if n == backend or (backend == "auto" and backends.automatic(n, call.device)))
    serving = [name for name in wanted if not reasons[name]]
    density = block_mask.density
    pairs = round(density * call.B * call.Hq * call.Nq * call.Nk)
    size = query.element_size()
    moved = (query.numel() + key.numel() + value.numel() + call.B * call.Hq * call.Nq * call.Dv) * size
    moved += call.B * call.Hq * call.Nq * 4 + block_mask.nbytes
    moved += 0 if bias is None else bias.numel() * bias.element_size()
    return Explanation(serving[0] if serving else None, reasons, density, 2 * pairs * (call.D + call.Dv), moved)


def _block_mask(
    query: Tensor, key: Tensor, mask: Any, is_causal: bool | None, causal_alignment: str | None, scale: float | None
) -> BlockMask:
    """The mask of the call as one object, also where a call would need none."""
    q_len, kv_len = query.shape[2], key.shape[2]
    functional.check_alignment(bool(is_causal), causal_alignment, q_len, kv_len)
    causal = functional.causal_mask(q_len, kv_len, bool(is_causal), causal_alignment)
    if mask is None:
        return BlockMask(q_len, kv_len) if causal is None else causal
    block_mask = functional.as_block_mask(mask, query, key, scale=scale, within=causal)
    return block_mask if causal is None else block_mask & causal
