"""What attention does, at O(n) memory: `attention_statistics`.

The statistics of the weights P_ij = exp(s_ij - lse_i) of a call, none of which is n x n. On CPUs one pass of the C++
kernels gathers them, on GPUs three Triton kernels, and what those do not serve the definition, a slice of query rows at
a time. Letters as in `functional`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, biases
from ..backends.call import accumulation_dtype
from ..backends.cpu import statistics as cpu
from ..backends.reference import statistics as reference
from ..backends.statistics import Found, Wanted
from ..backends.triton import statistics as triton
from ..biases import BiasLike
from ..defaults import alignment_offset
from ..errors import InputError, InputTypeError, UnsupportedError
from ..functional import Prepared, describe, hide_padding, prepare
from ..inputs import MaskLike
from ..tracing import shapes_only

WANT = ("entropy", "top", "received", "distance", "map", "shares")
MAX_TOP = 32
MAX_SETS = 32
SINKS = 4  # the first keys, where attention that has nowhere to go is put (Xiao et al., "Efficient Streaming Language
# Models with Attention Sinks", ICLR 2024)


class AttentionStatistics(NamedTuple):
    """What `attention_statistics` found; None where it was not asked for. float32 (float64 for float64 inputs)."""

    lse: Tensor  # (B, Hq, Nq)
    entropy: Tensor | None  # (B, Hq, Nq), in nats, from 0 (one key) to log Nk (all alike); differentiable
    top_weights: Tensor | None  # (B, Hq, Nq, top_k), descending, 0 beyond the visible keys
    top_keys: Tensor | None  # (B, Hq, Nq, top_k) int32, -1 beyond the visible keys; of equal weights the first key
    received: Tensor | None  # (B, Hq, Nk): sum_i P_ij, attention received by each key; differentiable
    received_weighted: Tensor | None  # (R, B, Hq, Nk): sum_i r_i P_ij for the given weightings; differentiable
    distance: Tensor | None  # (B, Hq, Nq): sum_j P_ij |x_i - j|, in tokens
    nearby: Tensor | None  # (B, Hq, Nq): sum of P_ij with |x_i - j| <= nearby
    shares: dict[str, Tensor] | None  # each (B, Hq, Nq): sum of P_ij over a set of keys
    map: Tensor | None  # (B, Hq, ceil(Nq / map_block), ceil(Nk / map_block)): sum of P_ij over a block of pairs

    @property
    def largest(self) -> Tensor | None:
        """The largest weight of each row, (B, Hq, Nq)."""
        return None if self.top_weights is None else self.top_weights[..., 0]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attention_statistics(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    *,
    mask: MaskLike = None,
    key_mask: Tensor | None = None,
    bias: BiasLike = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    want: Sequence[str] = WANT,
    top_k: int = 8,
    row_weights: Tensor | None = None,
    key_sets: Mapping[str, Tensor] | None = None,
    nearby: int = 64,
    map_block: int = 64,
    backend: str = "auto",
) -> AttentionStatistics:
    """Statistics of the weights that `attention` would apply, without ever holding them.

    Args:
        query, key: (B, Hq, Nq, D) and (B, Hkv, Nk, D), as in `attention`.
        value: not needed; (B, Hkv, Nk, Dv) is checked as `attention` would.
        mask, bias, is_causal, causal_alignment, scale, softcap, sinks: as in `attention`. Beside a sink, which is no
            key, the weights of a row add up to less than 1. key_mask: bool (B, Nk), True = attend.
        want: some of "entropy", "top", "received", "distance", "map", "shares".
        top_k: how many of the largest weights of each row, up to 32.
        row_weights: (R, B, Hq, Nq) or anything that broadcasts to (B, Hq, Nq): weightings r of the rows for
            `received_weighted`, for example 1 for the last 32 queries, as those want who compress a cache.
        key_sets: bool (Nk,) or (B, Nk) by name, at most 32: sets of keys for `shares`. None: the first 4, "sinks".
        nearby: how many tokens away a key still counts as near.
        map_block: queries, and keys, of one cell of the map.
        backend: "auto", "cpu", "triton" or "reference". "auto" takes the kernels of the tensors' device, and the
            reference, a slice of rows at a time, for what those do not serve: float64 and wide heads on a GPU.

    Returns:
        An `AttentionStatistics`. Distances go by x_i = i, or with causal_alignment="bottom_right" x_i = i + Nk - Nq.
        Gradients reach query, key, bias, sinks and row_weights through `entropy`, `received` and `received_weighted`,
        once; they are made by the reference, a slice of rows at a time, whatever the backend.

    Raises:
        InputError, InputTypeError: arguments that do not belong together; distances where Nq != Nk and no alignment
            says where the queries stand.
        UnsupportedError: the backend asked for cannot serve; tensors without values, or those of vmap.

    torch.compile leaves it out of its graph, so that it is not for fullgraph=True.
    """
    _check(want, top_k, nearby, map_block)
    value = key if value is None else value
    dense, structured = biases.split(bias)
    hidden_key, value, hidden_mask, dense = hide_padding(
        query, key, value, key_mask, mask=mask, bias=dense, is_causal=is_causal, causal_alignment=causal_alignment,
        scale=scale,
    )  # fmt: skip
    kernels = _kernels(backend, query)
    wants_received = "received" in want or row_weights is not None
    call = prepare(
        query, hidden_key, value, mask=hidden_mask, bias=biases.join(dense, structured), is_causal=is_causal,
        causal_alignment=causal_alignment, scale=scale, softcap=softcap, sinks=sinks, backend="reference",
        transposed=wants_received and kernels.NEEDS_TRANSPOSED,
    )  # fmt: skip
    (B, _, Nq, _), Nk = call.query.shape, call.key.shape[2]
    offset = _position_offset(causal_alignment, Nq, Nk) if "distance" in want else None
    sets, words = _asked_sets(key_sets, B, Nk, call.key.device) if "shares" in want else ((), None)
    weightings = None if row_weights is None else weightings_of_rows(row_weights, call.query)
    wanted = Wanted(
        top=top_k if "top" in want else 0,
        received=wants_received,
        row_weights=weightings,
        key_sets=words if sets else None,
        set_count=len(sets),
        map_block=map_block if "map" in want else 0,
        position_offset=offset,
        nearby=float(nearby),
    )
    found = _find(call, wanted, _serving(backend, kernels, call).attention_statistics)
    received = found.received if "received" in want else None
    return AttentionStatistics(
        lse=found.lse,
        entropy=found.entropy if "entropy" in want else None,
        top_weights=found.top_weights,
        top_keys=found.top_keys,
        received=None if received is None else received[0],
        received_weighted=None if weightings is None or found.received is None else found.received[1:],
        distance=found.distance,
        nearby=found.nearby,
        shares={name: found.shares[..., n] for n, name in enumerate(sets)} if found.shares is not None else None,
        map=found.map,
    )


# --- what was asked for ---


def check_want(want: Sequence[str]) -> None:
    """Raise InputError for what is no sequence of names of statistics."""
    if not isinstance(want, Collection) or isinstance(want, str) or any(name not in WANT for name in want):
        raise InputError(f"want must be a sequence of {list(WANT)}; got {want!r}")


def _check(want: Sequence[str], top_k: int, nearby: int, map_block: int) -> None:
    check_want(want)
    if not isinstance(top_k, int) or not 1 <= top_k <= MAX_TOP:
        raise InputError(f"top_k must be a whole number from 1 to {MAX_TOP}, got {top_k!r}")
    if not nearby >= 0 or not isinstance(map_block, int) or map_block < 1:
        raise InputError(
            f"nearby must be at least 0 and map_block a whole number from 1 on; got {nearby!r} and {map_block!r}"
        )


def _position_offset(alignment: str | None, q_len: int, kv_len: int) -> int:
    if alignment is None and q_len != kv_len:
        raise InputError(
            f"distances between {q_len} queries and {kv_len} keys are ambiguous: say causal_alignment='top_left' "
            "(query i stands at key i) or 'bottom_right' (the last query at the last key), or leave 'distance' out of "
            "want"
        )
    return alignment_offset(alignment, q_len, kv_len) if alignment is not None else 0


def sets_of_keys(
    given: Mapping[str, Tensor] | None, batch: int, kv_len: int, device: torch.device
) -> dict[str, Tensor]:
    """The sets, (1 | B, Nk) each, by name."""
    if given is None:
        return {"sinks": (torch.arange(kv_len, device=device) < SINKS)[None]}
    if len(given) > MAX_SETS:
        raise InputError(f"key_sets holds {len(given)} sets; at most {MAX_SETS} are counted in one pass")
    sets = {}
    for name, members in given.items():
        if not isinstance(members, Tensor) or members.dtype != torch.bool:
            kind = members.dtype if isinstance(members, Tensor) else type(members).__name__
            raise InputTypeError(f"key_sets[{name!r}] must be a bool tensor (Nk,) or (B, Nk), got {kind}")
        if members.shape not in ((kv_len,), (1, kv_len), (batch, kv_len)):
            raise InputError(
                f"key_sets[{name!r}] must be ({kv_len},) or ({batch}, {kv_len}), got {tuple(members.shape)}"
            )
        sets[name] = (members if members.dim() == 2 else members[None]).to(device)
    return sets


def _asked_sets(
    given: Mapping[str, Tensor] | None, batch: int, kv_len: int, device: torch.device
) -> tuple[tuple[str, ...], Tensor]:
    """The names of the sets, and the sets as bits of one int32 word a key, (1 | B, Nk)."""
    words = torch.zeros(1, kv_len, dtype=torch.int32, device=device)
    if given is None:
        words[:, :SINKS] = 1
        return ("sinks",), words
    sets = sets_of_keys(given, batch, kv_len, device)
    for bit, members in enumerate(sets.values()):
        # Bit 31 is the sign of a word.
        words = words + members.to(torch.int32) * (2**bit if bit < 31 else -(2**31))
    return tuple(sets), words


def weightings_of_rows(given: Tensor, query: Tensor) -> Tensor:
    """(R, B, Hq, Nq) in the accumulation dtype."""
    shape = query.shape[:3]
    if not isinstance(given, Tensor) or given.dim() > 4:
        raise InputTypeError("row_weights must be a tensor (B, Hq, Nq), or (R, B, Hq, Nq) for several weightings")
    try:
        wide = given.expand(given.shape[0] if given.dim() == 4 else 1, *shape)
    except RuntimeError as error:
        raise InputError(
            f"row_weights {tuple(given.shape)} does not broadcast to (B, Hq, Nq) = {tuple(shape)}"
        ) from error
    return wide.to(query.device, accumulation_dtype(query.dtype))


# --- finding it ---

KERNELS: dict[str, ModuleType] = {"triton": triton, "cpu": cpu, "reference": reference}


def _kernels(backend: str, query: Tensor) -> ModuleType:
    """The module that is asked for, or with "auto" the first that may serve tensors of this device."""
    if backend not in ("auto", *KERNELS):
        raise InputError(f"backend={backend!r} gathers no statistics; choose from {['auto', *KERNELS]}")
    if backend != "auto":
        return KERNELS[backend]
    device = query.device if isinstance(query, Tensor) else torch.device("cpu")
    for name, module in KERNELS.items():
        own = backends.BACKENDS[name].attention
        if name == "reference" or (backends.automatic(name, device) and not own.device_reasons(device)):
            return module
    raise AssertionError("the reference serves every device")


def _serving(backend: str, kernels: ModuleType, call: Prepared) -> ModuleType:
    """The module, or with "auto" the reference for a call that it does not serve."""
    if call.query.is_meta or shapes_only(call.query):
        raise UnsupportedError(
            "attention_statistics of tensors without values (on the meta device, or fake ones) is not defined; call it "
            "on real tensors, outside of torch.export and of a fullgraph of torch.compile"
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(call.query):
        raise UnsupportedError(
            "attention_statistics has no batching rule for torch.func; pass the batch as that of query"
        )
    name = next(name for name, module in KERNELS.items() if module is kernels)
    asked = describe(call.query, call.key, call.key, call.bias, call.mask, 0.0)
    reasons = backends.BACKENDS[name].attention.not_supported_reasons(asked)
    if reasons and backend == "auto":
        return reference
    if reasons:
        raise UnsupportedError(f"backend={backend!r} cannot serve this call: {'; '.join(reasons)}. Use backend='auto'")
    return kernels


def _find(call: Prepared, wanted: Wanted, kernel: Callable[..., Found]) -> Found:
    row_weights = wanted.row_weights
    trained = row_weights is not None and row_weights.requires_grad
    modifiers = (call.softcap, call.sinks, call.diagonals)
    if not call.differentiable and not (trained and torch.is_grad_enabled()):
        return kernel(call.query, call.key, call.bias, call.mask, call.scale, wanted, *modifiers)
    found: dict[str, Any] = {}
    apply: Any = _Differentiable.apply
    tensors = (call.query, call.key, call.bias, row_weights, call.sinks, call.diagonals)
    entropy, received = apply(*tensors, call, wanted, kernel, found)
    everything: Found = found["all"]
    return everything._replace(entropy=entropy, received=received if wanted.received else None)


class _Differentiable(torch.autograd.Function):
    """Entropy and attention received, whose backward makes the weights once more, a few rows at a time."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, bias: Tensor | None, row_weights: Tensor | None, sinks: Tensor | None,
        diagonals: Tensor | None, call: Prepared, wanted: Wanted, kernel: Callable[..., Found], found: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        result = kernel(query, key, bias, call.mask, call.scale, wanted, call.softcap, sinks, diagonals)
        found["all"] = result
        ctx.save_for_backward(query, key, bias, row_weights, sinks, diagonals)
        ctx.call = call.mask, call.scale, call.softcap
        ctx.received = wanted.received
        return result.entropy, result.entropy.new_empty(0) if result.received is None else result.received

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_entropy: Tensor, grad_received: Tensor) -> tuple[Any, ...]:
        query, key, bias, row_weights, sinks, diagonals = ctx.saved_tensors
        mask, scale, softcap = ctx.call
        gradients = reference.attention_statistics_backward(
            grad_entropy, grad_received if ctx.received else None, query, key, bias, row_weights, mask, scale, softcap,
            sinks, diagonals,
        )  # fmt: skip
        return (*gradients, None, None, None, None)
