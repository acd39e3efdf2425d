"""`explain`: which backend a call would take, why not the others, and what the call costs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from . import backends, functional
from .backends.call import accumulation_dtype
from .biases import BiasLike
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


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: functional.MaskLike = None,
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
    prepared = functional.prepare(
        query, key, value, mask=mask, bias=bias, is_causal=is_causal, causal_alignment=causal_alignment, scale=scale,
        softcap=softcap, sinks=sinks, dropout_p=dropout_p, dropout_seed=dropout_seed, backend="reference",
    )  # fmt: skip
    query, key, value, bias, arrays = prepared[:5]
    modifiers = functional.modifier_names(*prepared[10:])
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
    return Explanation(serving[0] if serving else None, reasons, density, 2 * pairs * (call.D + call.Dv), moved)
