"""The low-rank methods over a sequence that is spread over ranks: what travels is small and has no length.

    linear, performer   S = sum_j b_j v_j^T and z = sum_j b_j, of all ranks; causal, of the runs before each run
    linformer           E K and F V, sums over ranks
    nystrom             the landmarks, sums over ranks; and softmax(Q~ K^T) V, joined by lse

Letters: B batch, Hq query heads, Hkv key heads, n this rank's tokens, F features, m landmarks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .. import sharding
from ..backends.call import accumulation_dtype
from ..backends.features import (
    RISE,
    SHIFTED,
    exponents,
    largest_shift,
    map_features,
    shifted_keys,
    shifted_queries,
)
from ..backends.reference.attention import dropout_keep
from ..defaults import default_scale
from ..errors import InputError, UnsupportedError
from ..functional import attention, merge_attention, padded_attention, prepare
from ..inputs import prepare_inputs, select_keys
from ..methods import Linear, Linformer, Method, Nystrom, Performer
from ..methods.linear import linear_attention
from ..methods.linformer import length_factors, sequence_projection
from ..methods.lowrank import by_group
from ..methods.nystrom import compared, iterative_pinv
from ..ops import attention as ops
from ..tracing import without_autocast
from .agreement import agree, as_number, shape_facts, text_digest, wanted
from .exchange import Exchange, gathered, summed
from .shards import Shards


@dataclasses.dataclass
class Call:
    """One call: this rank's tensors and what all ranks have agreed on."""

    exchange: Exchange
    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    whole_key_mask: Tensor | None
    queries: Shards
    keys: Shards
    scale: float | None
    dropout_p: float
    seed: int
    is_causal: bool
    backend: str

    @property
    def rank(self) -> int:
        return self.exchange.rank


def attend(
    context: Any, method: Method, query: Tensor, key: Tensor, value: Tensor, state: Any,
    arguments: dict[str, Any],
) -> Tensor:  # fmt: skip
    """out (B, Hq, n, Dv) of this rank's queries; `context` is the ContextParallel.

    Raises:
        UnsupportedError: a method without a form for several ranks, masks of pairs, a bias.
    """
    names = ("mask", "bias", "key_mask", "scale", "dropout_p", "dropout_seed", "is_causal", "backend")
    mask, bias, key_mask, scale, dropout_p, seed, is_causal, backend = map(arguments.get, names)
    dropout_p, is_causal, backend = dropout_p or 0.0, bool(is_causal), backend or "auto"
    tensors: list[Tensor] = []

    def facts() -> dict[str, int]:
        if type(method) not in METHODS:
            raise UnsupportedError(
                f"{method} has no form for a sequence that is spread over ranks; inside context_parallel use dense, a "
                "pattern of positions, linear, performer, linformer or nystrom"
            )
        if mask is not None or bias is not None:
            raise UnsupportedError(f"{method} forms no scores of pairs, so it cannot apply a mask of pairs or a bias")
        if is_causal and not method.accepts_causal:
            raise UnsupportedError(f"{method} cannot be causal; use performer, linear or a sparse method")
        tensors[:] = prepare_inputs(query, key, value)
        context._check(tensors, key_mask, dropout_p, backend)
        if isinstance(method, Nystrom) and method.conv:
            raise UnsupportedError(f"{method}: the convolution reaches over the edges of ranks; use conv=0")
        if isinstance(method, (Performer, Linformer)) and state is None:
            raise InputError(f"{method} needs state: pass what build(embed_dim, num_heads, head_dim) returned")
        found = shape_facts(tensors) | {"method": text_digest(str(method)), "dropout_p": as_number(dropout_p)}
        options = (scale, is_causal, key_mask is None, backend, wanted(*tensors))
        return found | {"options": text_digest(options)}

    with sharding.entered(None):
        q_counts, k_counts, agreed, _ = agree(context.exchange, query, key, facts, seed if dropout_p > 0.0 else 0)
        queries, keys = context._matching(q_counts, "queries"), context._matching(k_counts, "keys")
        if is_causal and queries.length != keys.length:
            raise UnsupportedError(f"causal {method} inside context_parallel needs as many queries as keys")
        whole = None if key_mask is None else context.whole_key_mask(key_mask, keys)
        q, k, v = tensors
        call = Call(
            context.exchange, q, k, v, key_mask, whole, queries, keys, scale, dropout_p, agreed, is_causal, backend
        )  # fmt: skip
        out: Tensor = METHODS[type(method)](method, state, call)
        return out


# --- states of linear attention ---


def _linear(method: Linear, state: Any, call: Call) -> Tensor:
    if call.scale is not None:
        raise UnsupportedError(f"elu(x) + 1 attention has no scale, got {call.scale}; leave it None")
    return _by_state(call, "elu", None, 1.0)


def _performer(method: Performer, state: Any, call: Call) -> Tensor:
    scale = default_scale(call.scale, call.query.shape[-1])
    if not scale > 0.0:
        raise InputError(f"Performer needs a positive scale (features take its square root), got {scale}")
    return _by_state(call, f"performer_{method.feature}", state.current(), scale)


def _by_state(call: Call, feature_map: str, projection: Tensor | None, scale: float) -> Tensor:
    query, value, key_mask = call.query, _dropped(call), call.key_mask
    dtype = accumulation_dtype(query.dtype)
    with without_autocast(query):
        a, b = _features(call, feature_map, projection, scale)
        (b, v) = select_keys(key_mask, b, value.to(dtype))
        columns = torch.cat([v, v.new_ones(*v.shape[:3], 1)], 3)  # the last one sums to the normaliser
        runs = call.keys.runs[call.rank] if call.is_causal else ((0, b.shape[2]),)
        sizes = [stop - start for start, stop in runs]
        parts = list(zip(b.split(sizes, 2), columns.split(sizes, 2), strict=True)) if sizes else []
        local = [keys.mT @ values for keys, values in parts]  # (B, Hkv, F, Dv + 1) of each run
        most = max(map(len, call.keys.runs)) if call.is_causal else 1
        # 0, and in the graph: a rank without tokens takes part in the backward, or the others wait for it.
        empty = b[:, :, :0].mT @ columns[:, :, :0]
        states = gathered(torch.stack(local + [empty] * (most - len(local))), call.exchange, "states") if most else None
        if not call.is_causal:
            assert states is not None
            return _divided(_times(a, states.sum((0, 1))), query.dtype)
        outs = []
        order = sorted((run, rank, n) for rank, held in enumerate(call.keys.runs) for n, run in enumerate(held))
        a_parts = a.split(sizes, 2) if sizes else ()
        for run, a_run, (b_run, columns_run) in zip(runs, a_parts, parts, strict=True):
            assert states is not None
            before = _earlier(states, [(rank, n) for other, rank, n in order if other < run])
            v_run = columns_run[..., :-1]
            out, normaliser = linear_attention(
                a_run, b_run, v_run, is_causal=True, return_normaliser=True, backend=call.backend
            )
            inner = torch.cat([out * normaliser[..., None], normaliser[..., None]], 3)
            outs.append(_divided(inner + _times(a_run, before), query.dtype))
        if not outs and states is not None:
            outs.append(_divided(_times(a, _earlier(states, [])), query.dtype))
        return torch.cat(outs, 2) if outs else query.new_zeros(*query.shape[:3], value.shape[3])


def _features(call: Call, feature_map: str, projection: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The features of this rank's queries and keys, under one shift for every rank's."""
    query, key, key_mask = call.query, call.key, call.key_mask
    if feature_map not in SHIFTED:
        found = map_features(query, key, key_mask, projection, call.is_causal, feature_map, scale)
        return found.a, found.b
    e = exponents(query, key, key_mask, projection, feature_map, scale)
    shift = _first(e.key.detach(), call) if call.is_causal else _largest(largest_shift(e.key), call)
    a, _, _ = shifted_queries(e, shift)
    b, _ = shifted_keys(e, shift)
    return a, b


def _first(exponents: Tensor, call: Call) -> Tensor:
    """The exponents of the first visible key of the whole sequence, (B, Hkv, F), which every causal query sees.

    Raises:
        UnsupportedError: a key on any rank exceeds them by so much that the shift would have to rise on the way.
    """
    B, Hkv, n, F = exponents.shape
    places = call.keys.positions(call.rank, exponents.device).expand(B, n)
    if call.key_mask is not None:
        places = places.masked_fill(~call.key_mask, call.keys.length)
    first = torch.full((B,), call.keys.length, device=exponents.device)
    own = exponents.new_zeros(B, Hkv, F)
    if n:
        first, index = places.min(1)
        own = exponents.take_along_dim(index[:, None, None, None], 2)[:, :, 0]
    own = own.nan_to_num(nan=0.0, posinf=0.0, neginf=torch.finfo(own.dtype).min)
    own = own.masked_fill((first == call.keys.length)[:, None, None], 0.0)
    told = torch.cat([first[:, None].double(), own.flatten(1).double()], 1)
    ranks = torch.stack(call.exchange.all_gather(told, what="states"))  # (ranks, B, 1 + Hkv F)
    earliest = ranks[:, :, 0].argmin(0)
    shift = ranks[earliest, torch.arange(B, device=earliest.device), 1:].view(B, Hkv, F).to(exponents.dtype)
    exceeds = ((exponents - shift[:, :, None] > RISE) & exponents.isfinite()).any()
    if bool(torch.stack(call.exchange.all_gather(exceeds.double().view(1), what="states")).any()):
        raise UnsupportedError(
            "causal linear attention over ranks knows one scale of its features for all time, and some keys lie more "
            f"than e^{RISE:g} above the first one; normalise the keys, or leave context_parallel"
        )
    return shift


def _largest(shift: Tensor, call: Call) -> Tensor:
    """The largest exponents of every rank's visible keys; 0 where none has any."""
    if call.key_mask is None:
        present = shift.new_full((shift.shape[0],), call.key.shape[2] > 0, dtype=torch.bool)
    else:
        present = call.key_mask.any(-1)
    own = shift.masked_fill(~present[:, None, None], -torch.inf)
    largest = torch.stack(call.exchange.all_gather(own, what="states")).amax(0)
    return largest.masked_fill(largest == -torch.inf, 0.0)


def _earlier(states: Tensor, places: list[tuple[int, int]]) -> Tensor:
    """The sum of states (ranks, runs, ...) at some places. The others are in the graph too: every rank waits, in the
    backward, for what every other one has to say of its states."""
    chosen = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
    for place in places:
        chosen[place] = True
    return torch.where(chosen[..., None, None, None, None], states, 0.0).sum((0, 1))


def _times(a: Tensor, state: Tensor) -> Tensor:
    """a (B, Hq, n, F) times states of key heads (B, Hkv, F, C)."""
    return (by_group(a, state) @ state[:, :, None]).flatten(1, 2)


def _divided(sums: Tensor, dtype: torch.dtype) -> Tensor:
    normaliser = sums[..., -1:]
    return torch.where(normaliser == 0, 0.0, sums[..., :-1] / normaliser.masked_fill(normaliser == 0, 1.0)).to(dtype)


# --- sums of projections ---


def _linformer(method: Linformer, state: Any, call: Call) -> Tensor:
    place = call.keys.positions(call.rank, call.key.device)
    whole = call.key.new_empty(()).expand(*call.key.shape[:2], call.keys.length, call.key.shape[3])
    E = sequence_projection("key_projection", state.key_projection, whole)[..., place]
    F_ = sequence_projection("value_projection", state.value(), whole)[..., place]
    key, value = select_keys(call.key_mask, call.key, call.value)
    dtype = accumulation_dtype(key.dtype)
    with without_autocast(key):
        mixed = torch.cat([E.to(dtype) @ key.to(dtype), F_.to(dtype) @ value.to(dtype)], 3)
        mixed = summed(mixed, call.exchange, "projections")
    k, v = mixed.to(key.dtype).split((key.shape[3], value.shape[3]), 3)
    grow_key, grow_value = length_factors(
        getattr(state, "length_powers", None), state.key_projection, whole, call.whole_key_mask
    )
    return _few_keys(call, (k * grow_key).contiguous(), (v * grow_value).contiguous())


def _few_keys(call: Call, key: Tensor, value: Tensor) -> Tensor:
    """Exact attention of this rank's queries to keys that every rank has, with dropout by global positions."""
    outs = []
    runs = (call.queries.runs[call.rank] if call.dropout_p > 0.0 else ()) or ((0, call.query.shape[2]),)
    place = 0
    for start, stop in runs:
        query = call.query[:, :, place : place + stop - start]
        place += stop - start
        ready = prepare(
            query, key, value, scale=call.scale, dropout_p=call.dropout_p, dropout_seed=call.seed, backend=call.backend
        )
        seed = torch.tensor((call.seed, 0, start, 0)) if call.dropout_p > 0.0 else None
        options = (ready.scale, call.dropout_p, seed, *ready.modifiers, ready.backend)
        outs.append(ops.attention_forward(*ready[:4], *ops.operands(ready.mask), *options)[0])
    return torch.cat(outs, 2)


def _nystrom(method: Nystrom, state: Any, call: Call) -> Tensor:
    query, key = call.query, call.key
    m = min(method.landmarks, call.queries.length, call.keys.length)
    if 0 in (m, *query.shape[:2]):
        return query.new_zeros(*query.shape[:3], call.value.shape[3])
    scale = default_scale(call.scale, query.shape[-1])
    same = call.queries.length == call.keys.length
    near, near_used = _segment_means(query, call.queries, m, call.whole_key_mask if same else None, call)
    far, far_used = _segment_means(key, call.keys, m, call.whole_key_mask, call)
    far = far.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    middle, far_bias = compared(near, near_used, far, far_used, scale)
    inverse = iterative_pinv(middle, method.pinv_iterations)
    part = padded_attention(
        near, key, _dropped(call), call.key_mask, scale=scale, return_lse=True, backend=call.backend
    )
    outs, lses = (gathered(t, call.exchange, "landmarks") for t in part)
    summary, _ = merge_attention(outs.unbind(0), lses.unbind(0))
    with without_autocast(query):
        summary = (inverse @ summary.to(inverse.dtype)).to(query.dtype)
    return attention(query, far, summary, bias=far_bias, scale=scale, backend=call.backend)


def _segment_means(
    x: Tensor, shards: Shards, segments: int, mask: Tensor | None, call: Call
) -> tuple[Tensor, Tensor | None]:
    """`nystrom.segment_means` of the whole sequence, (B, H, segments, D), from this rank's part of it."""
    dtype, place = accumulation_dtype(x.dtype), shards.positions(call.rank, x.device)
    row = torch.arange(segments, device=x.device)[:, None]
    used = None
    if mask is None:
        whole = torch.arange(shards.length, device=x.device) * segments // max(shards.length, 1) == row
    else:
        (x,) = select_keys(mask[:, place], x)
        length = mask.sum(-1, keepdim=True)
        used_count = length.clamp(max=segments)
        segment = (mask.cumsum(-1) - 1) * used_count // length.clamp(min=1)
        whole = ((segment[:, None, :] == row) & mask[:, None, :]).unsqueeze(1)  # (B, 1, segments, N)
        used = torch.arange(segments, device=x.device) < used_count
    weights = whole[..., place].to(dtype) / whole.sum(-1, keepdim=True).clamp(min=1)
    with without_autocast(x):
        return summed(weights @ x.to(dtype), call.exchange, "landmarks").to(x.dtype).contiguous(), used


def _dropped(call: Call) -> Tensor:
    """`lowrank.drop_keys` of this rank's part of the sequence."""
    value = call.value
    if call.dropout_p == 0.0:
        return value
    B, Hkv = value.shape[:2]
    parts = [
        dropout_keep((B, Hkv, 1, stop - start), call.dropout_p, torch.tensor((call.seed, 0, 0, start)), value.device)
        for start, stop in call.keys.runs[call.rank]
    ]
    if not parts:
        return value
    return torch.where(torch.cat(parts, 3).transpose(2, 3), value / (1.0 - call.dropout_p), 0.0)


METHODS: dict[type, Any] = {Linear: _linear, Performer: _performer, Linformer: _linformer, Nystrom: _nystrom}
