"""The functions a user calls: `attention` and its relatives. `prepare` settles shapes, checks and masks, once a call.

Letters: B batch, Hq query heads, Hkv key/value heads, Nq queries, Nk keys, D head_dim, Dv value head_dim.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import backends, biases, query_sinks, repeated, sharding
from .backends.call import Call
from .biases import BiasLike
from .defaults import alignment_offset, default_scale
from .errors import InputError, UnsupportedError
from .inputs import (
    MaskLike,
    add_to_bias,
    as_block_mask,
    causal_mask,
    check_alignment,
    check_bias,
    check_dropout,
    check_key_mask,
    check_sinks,
    check_softcap,
    is_pattern,
    may_read,
    modifier_names,
    prepare_inputs,
    resolve_seed,
    seen_keys,
    select_keys,
    settle_structured,
    shown_by_bias,
    tensors_of,
)
from .masks import BlockMask, MaskArrays, PartedMask, trainable
from .ops import attention as ops
from .ops import union
from .pattern_operator import pattern_attention, pattern_of
from .patterns import Pattern, past_of
from .strips import by_strips, has_strips
from .torchscript import check_traceable, traced_attention
from .tracing import PLAN, is_jit_traced, named

TRACE_INSTEAD = "use torch.export or torch.compile"
DENSE = MaskArrays()


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: MaskLike = None,
    bias: BiasLike = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: MaskLike = None,
    bias: BiasLike = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: MaskLike = None,
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention over the visible pairs: softmax(cap(scale * query @ key^T) + bias) @ value.

    Args:
        query: (B, Hq, Nq, D), float32, float64, bfloat16 or float16; D and Dv from 1 to 576 (256 on a GPU).
        key: (B, Hkv, Nk, D), Hq a multiple of Hkv: query head h reads key head h // (Hq / Hkv).
        value: (B, Hkv, Nk, Dv).
        mask: a `BlockMask`, a pattern such as `SlidingWindow(left=200, right=0)`, or a bool tensor that broadcasts to
            (B, Hq, Nq, Nk) where True means "attend". A query that sees no key returns 0 (lse -inf, gradients 0).
            With Nq != Nk a pattern that goes by positions needs an alignment, its own or `causal_alignment`.
        bias: added to the scaled and capped scores; broadcasts to (B, Hq, Nq, Nk); in the query's dtype or float32
            (float64 for float64 inputs). Gets a gradient of its own shape. -inf masks a pair. Or, in O(n) memory, an
            `ALiBi`, `RelativeBias`, `T5Bias`, `LowRankBias`, `RelativeBias2D` or `DecomposedBias2D`; or a list of such,
            which add up.
        is_causal: query i sees keys up to i; with Nq != Nk, `causal_alignment` must say which corner the diagonal
            starts from: "top_left" (j <= i) or "bottom_right" (j <= i + Nk - Nq). It says the same, with or without
            is_causal, for a pattern that names no alignment itself.
        scale: default 1 / sqrt(D).
        softcap: None or c > 0: scaled scores x become c tanh(x / c), before any bias is added (Gemma 2).
        sinks: (Hq), one more score for each head, that of a key without a value (gpt-oss): in the query's dtype or
            float32. lse includes it; a query that sees no key returns 0 and the sink as its lse. Gets a gradient. Or
            (Hq, Nq) or (B, Hq, Nq), one for each query.
        dropout_p: probability of dropping an attention weight; kept ones are scaled by 1 / (1 - dropout_p).
        dropout_seed: int or int64 tensor with one element. The dropped pairs are a pure function of
            (seed, batch, head, query, key); None draws a seed from PyTorch's generator.
        return_lse: also return lse (B, Hq, Nq), the natural log-sum-exp of the scores, float32 (float64 for float64).
        backend: "auto" (the fastest that serves the call), or a name in `efficient_attn.backends.BACKENDS`; an
            explicit choice that cannot serve raises.

    Returns:
        out (B, Hq, Nq, Dv) in the query's dtype, or (out, lse). Under autocast the inputs are cast to its dtype first.

    Raises:
        InputError, InputTypeError: shapes, dtypes, devices or combinations that are not defined.
        UnsupportedError: the backend asked for cannot serve this call.
    """
    if sharding.active is not None:
        return sharding.active.attention(  # type: ignore[no-any-return]
            query, key, value, mask=mask, bias=bias, is_causal=is_causal, causal_alignment=causal_alignment,
            scale=scale, softcap=softcap, sinks=sinks, dropout_p=dropout_p, dropout_seed=dropout_seed,
            return_lse=return_lse, backend=backend,
        )  # fmt: skip
    modified = softcap is not None or sinks is not None or not (bias is None or isinstance(bias, Tensor))
    if sinks is not None and query_sinks.has_queries(sinks):
        return query_sinks.attend(  # type: ignore[no-any-return]
            attention, query, key, value, mask=mask, bias=bias, is_causal=is_causal, causal_alignment=causal_alignment,
            scale=scale, softcap=softcap, sinks=sinks, dropout_p=dropout_p, dropout_seed=dropout_seed,
            return_lse=return_lse, backend=backend,
        )  # fmt: skip
    if modified and has_strips(bias, query, key):
        return by_strips(  # type: ignore[no-any-return]
            attention, query, key, value, mask=mask, bias=bias, is_causal=is_causal, causal_alignment=causal_alignment,
            scale=scale, softcap=softcap, sinks=sinks, dropout_p=dropout_p, return_lse=return_lse, backend=backend,
        )  # fmt: skip
    plain = ops.is_plain(query, key, value, *((sinks, *tensors_of(bias)) if modified else (bias,)))
    if not plain and is_jit_traced():
        if modified:
            raise UnsupportedError(f"torch.jit.trace records no softcap, sinks or structured bias; {TRACE_INSTEAD}")
        dense = biases.split(bias)[0]
        return _traced(query, key, value, mask, dense, is_causal, causal_alignment, scale, dropout_p, return_lse)
    known = None
    if plain and bias is None and not modified and type(dropout_p) is float and dropout_p == 0.0:
        known = repeated.key_of(query, key, value, mask, is_causal, causal_alignment, scale, backend)
        entry = None if known is None else repeated.find(known)
        if entry is not None:
            out, lse = repeated.run(entry, query, key, value, return_lse)
            return out if lse is None else (out, lse)
    takes_parts = plain or (
        not modified and mask is not None and ops.is_only_watched(query, key, value, *tensors_of(bias))
    )
    takes_parts |= torch.compiler.is_compiling()
    call = prepare(
        query, key, value, mask=mask, bias=bias, is_causal=is_causal, causal_alignment=causal_alignment, scale=scale,
        softcap=softcap, sinks=sinks, dropout_p=dropout_p, dropout_seed=dropout_seed, backend=backend,
        parts=takes_parts,
    )  # fmt: skip
    query, key, value, bias, arrays, scale, dropout_p, seed, chosen, differentiable, parts = call[:11]
    options = (scale, dropout_p, seed, *call.modifiers)
    if call.pattern:
        out, lse = pattern_attention(query, key, value, call.pattern, scale, dropout_p, seed, chosen)
    elif parts is not None:
        function = union.union_attention if differentiable else union.union_forward
        with nullcontext() if plain else ops.watched("union_attention"):
            out, lse = function(query, key, value, bias, parts, scale, dropout_p, seed)
        if known is not None and not differentiable:
            repeated.remember(known, mask, query, key, value, arrays, scale, chosen, False, parts)
    elif differentiable and plain:
        out, lse = ops.direct_attention(query, key, value, bias, arrays, *options, chosen)
        if known is not None:
            repeated.remember(known, mask, query, key, value, arrays, scale, chosen, True)
    elif not plain:
        out, lse = ops.attention_forward(query, key, value, bias, *ops.operands(arrays), *options, chosen)
    else:  # nothing records the call: the dispatcher would cost more than a short one takes
        forward = backends.BACKENDS[chosen].attention.attention_forward
        out, lse = forward(query, key, value, bias, arrays, *options)
        if known is not None:
            repeated.remember(known, mask, query, key, value, arrays, scale, chosen, False)
    return (out, lse) if return_lse else out


def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    mask: MaskLike = None,
    bias: BiasLike = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    average: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The weights that `attention` applies to the values, (B, Hq, Nq, Nk): an explicit request for n x n memory.

    Arguments are those of `attention`. With a dropout seed the weights are the dropped and rescaled ones of the same
    call. Differentiable twice.

    Args:
        average: return the average over the heads, (B, Nq, Nk), without ever holding those of all heads.

    Raises what `attention` raises.
    """
    nothing = key[..., :1].detach() if isinstance(key, Tensor) else key  # values that cost next to nothing
    _, _, weights = attention_with_weights(
        query, key, nothing, mask=mask, bias=bias, is_causal=is_causal, causal_alignment=causal_alignment, scale=scale,
        softcap=softcap, sinks=sinks, dropout_p=dropout_p, dropout_seed=dropout_seed, average=average, backend=backend,
    )  # fmt: skip
    return weights


def attention_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: MaskLike = None,
    bias: BiasLike = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    average: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """out and lse of `attention`, and what multiplies the values, made in the pass that makes the output.

    Arguments are those of `attention` and `attention_weights`; returns out, lse and weights. A gradient of the weights
    goes to query, key and bias; they are no part of the output's own gradient.
    """
    modified = softcap is not None or sinks is not None or not (bias is None or isinstance(bias, Tensor))
    if sinks is not None and query_sinks.has_queries(sinks):
        return query_sinks.attend_with_weights(
            attention_with_weights, query, key, value, mask=mask, bias=bias, is_causal=is_causal,
            causal_alignment=causal_alignment, scale=scale, softcap=softcap, sinks=sinks, dropout_p=dropout_p,
            dropout_seed=dropout_seed, average=average, backend=backend,
        )  # fmt: skip
    plain = ops.is_plain(query, key, value, sinks, *tensors_of(bias))
    traced = not plain and is_jit_traced()
    if traced and modified:
        raise UnsupportedError(f"torch.jit.trace records no softcap, sinks or structured bias; {TRACE_INSTEAD}")
    call = prepare(
        query, key, value, mask=mask, bias=bias, is_causal=is_causal, causal_alignment=causal_alignment, scale=scale,
        softcap=softcap, sinks=sinks, dropout_p=dropout_p, dropout_seed=dropout_seed,
        backend="reference" if traced else backend, returns_weights=True,
    )  # fmt: skip
    q, k, v, given, arrays, factor, _, seed, chosen, differentiable = call[:10]
    modifiers = call.modifiers
    # The operator looks whether lse is fine enough to make weights of, where a backend does that.
    if traced or (plain and not differentiable and chosen not in ops.FROM_LSE_ALONE):
        function = backends.BACKENDS[chosen].attention.attention_with_weights
        out, lse, weights = function(q, k, v, given, arrays, factor, dropout_p, seed, average, *modifiers)
    else:
        mask_operands = ops.operands(arrays)
        out, lse, weights = ops.attention_with_weights(
            q, k, v, given, *mask_operands, factor, dropout_p, seed, average, *modifiers, chosen
        )
    if traced:  # torch.jit.trace records plain PyTorch operations, those of the output for other lengths too
        out = _traced(
            query, key, value, mask, biases.split(bias)[0], is_causal, causal_alignment, scale, dropout_p, False
        )
    return out, lse, weights.squeeze(1) if average else weights


def padded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    *,
    mask: MaskLike = None,
    bias: BiasLike = None,
    need_weights: bool | Literal["mean"] = False,
    **arguments: Any,
) -> Any:
    """`attention`, in which keys where `key_mask` is False have no influence, whatever they hold.

    The other arguments, and what is returned, are those of `attention`; with `need_weights` those of
    `attention_with_weights`, "mean" being its average.

    Padding at the end becomes lengths, and whole blocks are skipped. Holes become a bias of 0 and -inf, one number a
    key, on keys and values that are set to zero there; or block lists, where that bias would have to grow to n x n.
    Under torch.compile, torch.func and on a GPU the data is not looked at, and every padding becomes a bias.
    """
    if sharding.active is not None:
        if need_weights:
            sharding.refuse("attention weights")
        return sharding.active.attention(query, key, value, key_mask=key_mask, mask=mask, bias=bias, **arguments)
    dense, structured = biases.split(bias)
    key, value, mask, dense = hide_padding(query, key, value, key_mask, mask=mask, bias=dense, **arguments)
    bias = biases.join(dense, structured)
    if need_weights:
        average = need_weights == "mean"
        return attention_with_weights(query, key, value, mask=mask, bias=bias, average=average, **arguments)
    return attention(query, key, value, mask=mask, bias=bias, **arguments)


def hide_padding(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    *,
    mask: MaskLike = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
    scale: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor, MaskLike, Tensor | None]:
    """The key, value, mask and bias with which `attention` does what `padded_attention` says."""
    check_key_mask(key_mask, key)
    if key_mask is not None and is_pattern(mask):  # which chooses among the keys that are there
        causal = causal_mask(query.shape[2], key.shape[2], is_causal, causal_alignment)
        counted = seen_keys(key_mask, query, key, bias=bias)
        mask = as_block_mask(mask, query, key, scale=scale, key_mask=counted, within=causal, alignment=causal_alignment)
    if key_mask is not None and may_read(key_mask):
        mask, key_mask = _absorb(mask, key_mask, query, key, bias)
    if key_mask is not None:
        key, value = select_keys(key_mask, key, value)
        bias = add_to_bias(bias, key_mask, query)
    return key, value, mask, bias


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Join attention over disjoint sets of keys into attention over their union, as exactly as lse is known.

    A part's share is exp(lse), so that half an ulp of an lse is an error of its share: 2e-6 of it at |lse| = 32 in
    float32; where a bias of one number beyond 1e7 stands over every pair, nothing is left of the number of keys.

    Args:
        outs: each (B, H, Nq, Dv), from `attention(..., return_lse=True)` with the same queries.
        lses: each (B, H, Nq), natural log.

    Returns:
        (out, lse) of the union; out in the dtype of the first part, joined in the dtype of lse. Differentiable.

    Raises:
        InputError: no parts, or shapes that differ.
    """
    if not outs or len(outs) != len(lses):
        raise InputError(
            f"merge_attention needs as many outs as lses and at least one; got {len(outs)} and {len(lses)}"
        )
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != outs[0].shape or lse.shape != outs[0].shape[:-1]:
            raise InputError(
                f"parts must share one shape (B, H, Nq, Dv) with lse (B, H, Nq); got {tuple(out.shape)} and "
                f"{tuple(lse.shape)} beside {tuple(outs[0].shape)}"
            )
    stacked = torch.stack(tuple(lses))
    top = stacked.detach().amax(0)
    top = top.masked_fill(top == -torch.inf, 0.0)
    shares = torch.exp(stacked - top)
    total = shares.sum(0)
    empty = total == 0
    weights = shares / total.masked_fill(empty, 1.0)
    merged = (weights[..., None] * torch.stack(tuple(outs)).to(weights.dtype)).sum(0)
    lse = (torch.log(total.masked_fill(empty, 1.0)) + top).masked_fill(empty, -torch.inf)
    return merged.to(outs[0].dtype), lse


def _traced(
    query: Tensor, key: Tensor, value: Tensor, mask: MaskLike, bias: Tensor | None, is_causal: bool,
    causal_alignment: str | None, scale: float | None, dropout_p: float, return_lse: bool,
) -> Tensor:  # fmt: skip
    """`attention` for torch.jit.trace, of plain PyTorch operations; see torchscript.py."""
    check_traceable(mask, dropout_p, return_lse)
    with warnings.catch_warnings():  # that checks are made on the sample alone is as it should be
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        query, key, value = prepare_inputs(query, key, value)
        bias = None if bias is None else check_bias(bias, query, key)
        check_alignment(is_causal, causal_alignment, query.shape[2], key.shape[2])
        groups = int(query.shape[1]) // max(int(key.shape[1]), 1)
        scale = default_scale(scale, int(query.shape[3]))
    return traced_attention(
        query, key, value, mask=mask,  # type: ignore[arg-type]
        bias=bias, is_causal=is_causal,
        from_end=causal_alignment == "bottom_right", scale=scale, groups=groups,
    )  # fmt: skip


# --- one call, settled ---


class Prepared(NamedTuple):
    """A call that is checked and settled, as the operators and backends take it."""

    query: Tensor  # (B, Hq, Nq, D), cast as autocast asks for
    key: Tensor  # (B, Hkv, Nk, D)
    value: Tensor  # (B, Hkv, Nk, Dv)
    bias: Tensor | None  # each dimension 1 or full, of (B, Hq, Nq, Nk)
    mask: MaskArrays
    scale: float
    dropout_p: float
    dropout_seed: Tensor | None
    backend: str
    differentiable: bool  # whether a backward may follow
    parts: union.Parts | None = None  # what serves the call instead of `mask`, where that was asked for
    softcap: float = 0.0  # 0: none
    sinks: Tensor | None = None  # (Hq)
    diagonals: Tensor | None = None  # (1 | B, 1 | Hq, Nq + Nk - 1), of the accumulation dtype
    whole_because: str = ""  # why a mask that is a union of parts is taken as the ordinary one that it is too
    pattern: str = ""  # the JSON of a pattern that serves the call instead of `mask`, see pattern_operator.py

    @property
    def modifiers(self) -> tuple[float, Tensor | None, Tensor | None]:
        return self.softcap, self.sinks, self.diagonals


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: MaskLike = None,
    bias: BiasLike = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    backend: str = "auto",
    returns_weights: bool = False,
    parts: bool = False,
    transposed: bool = False,
) -> Prepared:
    """Check the arguments of `attention`, make its mask and choose its backend; raises what `attention` raises.

    Args:
        parts: whether the caller can take a mask that is a union of parts as that, or in a compiled program a pattern.
        transposed: whether the caller needs the lists of query blocks for each key block, gradients or not.
    """
    query, key, value = prepare_inputs(query, key, value)
    scale = default_scale(scale, query.shape[3])
    cap = check_softcap(softcap)
    sinks = None if sinks is None else check_sinks(sinks, query)
    bias, structured = biases.split(bias)
    shown_query, shown_key = query, key  # what patterns choose by
    diagonals = None
    if structured:
        query, key, diagonals, pairs = settle_structured(structured, query, key, scale, cap, causal_alignment)
        if pairs is not None:
            bias = pairs if bias is None else pairs + check_bias(bias, query, key)
    if bias is not None:
        bias = check_bias(bias, query, key)
    check_dropout(dropout_p)
    modifiers = modifier_names(cap, sinks, diagonals)
    arrays, block_mask, pattern = DENSE, None, ""
    compiled = parts and torch.compiler.is_compiling()
    parts = parts and not compiled
    if mask is not None or is_causal or causal_alignment is not None:
        Nq, Nk = query.shape[2], key.shape[2]
        check_alignment(is_causal, causal_alignment, Nq, Nk)
        if mask is not None:
            if is_pattern(mask):
                mask.check_scores(bias, softcap, structured or None)
            if compiled and not modifiers and bias is None:
                pattern = pattern_of(mask, is_causal, causal_alignment)
            if not pattern:
                causal = causal_mask(Nq, Nk, is_causal, causal_alignment)
                block_mask = _planned_mask(mask, shown_query, shown_key, causal, scale, causal_alignment, bias)
                if not parts or block_mask.union is None or modifiers:
                    arrays = block_mask.arrays()
        elif is_causal:
            arrays = MaskArrays(window_right=0, window_offset=alignment_offset(causal_alignment, Nq, Nk))
    select = backends.select if torch.compiler.is_compiling() else backends.cached_select
    call = describe(query, key, value, bias, arrays, dropout_p, returns_weights, modifiers)
    if pattern or (parts and block_mask is not None and block_mask.union is not None):
        call = call._replace(has_lists=True)
    chosen = select(backend, call)
    differentiable = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (query, key, value, bias, sinks, diagonals)
    )
    seed = resolve_seed(dropout_seed) if dropout_p > 0.0 else None
    whole_because = ""
    if parts and isinstance(block_mask, PartedMask):
        whole_because = _why_whole(block_mask, chosen, bias, differentiable, modifiers)
        if not whole_because:
            taken = _taken_parts(block_mask, chosen, differentiable)
            return Prepared(query, key, value, bias, arrays, scale, dropout_p, seed, chosen, differentiable, taken)
        arrays = block_mask.arrays()
    transposed = transposed or (differentiable and backends.BACKENDS[chosen].NEEDS_TRANSPOSED)
    if transposed and block_mask is not None:
        arrays = block_mask.arrays(transposed=True)
    if differentiable:
        arrays = trainable(arrays)
    return Prepared(
        query, key, value, bias, arrays, scale, dropout_p, seed, chosen, differentiable, None, cap, sinks, diagonals,
        whole_because, pattern,
    )  # fmt: skip


def _taken_parts(mask: PartedMask, backend: str, differentiable: bool) -> union.Parts:
    arrays = mask.part_arrays(differentiable and backends.BACKENDS[backend].NEEDS_TRANSPOSED)
    return union.Parts(mask, tuple(map(trainable, arrays)) if differentiable else arrays, backend)


def _why_whole(
    mask: PartedMask, backend: str, bias: Tensor | None, differentiable: bool, modifiers: tuple[str, ...]
) -> str:
    """Why a call takes a union as one mask in the order of the sequence; empty if it takes the parts."""
    if not backends.BACKENDS[backend].TAKES_ORDERS:
        return f"backend {backend} takes tokens in the order of the sequence"
    if modifiers:
        return f"parts are joined by lse, which {' and '.join(modifiers)} in each of them would spoil"
    if bias is None:
        return ""
    if bias.is_cuda and torch.cuda.is_current_stream_capturing():
        return "parts of a call with a bias are joined after a look at lse, which no CUDA graph records"
    orders = (order for part in mask.union for order in part[1:])
    if differentiable and bias.requires_grad and any(order is not None and order.shape[0] > 1 for order in orders):
        return "the gradient of the bias adds up heads whose tokens lie in different orders"
    return ""


@named(PLAN)
def _planned_mask(
    mask: BlockMask | Pattern | Tensor,
    query: Tensor,
    key: Tensor,
    causal: BlockMask | None,
    scale: float,
    alignment: str | None,
    bias: Tensor | None,
) -> BlockMask:
    counted, within = None, causal
    if causal is not None and isinstance(mask, Pattern) and mask.has_orders:  # which may have parts in the past alone
        mask, causal, within = past_of(mask, alignment), None, None
    if bias is not None and is_pattern(mask) and mask.by_content:
        shown = shown_by_bias(bias, query, key)
        within = causal if shown is None else shown if causal is None else shown & causal
        counted = seen_keys(None, query, key, mask=shown, bias=bias)
    block_mask = as_block_mask(mask, query, key, scale=scale, key_mask=counted, within=within, alignment=alignment)
    return block_mask if causal is None else block_mask & causal


def describe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    arrays: MaskArrays,
    dropout_p: float,
    returns_weights: bool = False,
    modifiers: tuple[str, ...] = (),
) -> Call:
    """The facts on which the backend is chosen."""
    B, Hq, Nq, D = query.shape
    _, Hkv, Nk, Dv = value.shape
    bias_dtype = None if bias is None else bias.dtype
    has_lists = arrays.indptr is not None
    sizes = (B, Hq, Hkv, Nq, Nk, D, Dv)
    return Call(query.device, query.dtype, bias_dtype, *sizes, has_lists, dropout_p, returns_weights, modifiers)


def _absorb(
    mask: MaskLike, key_mask: Tensor, query: Tensor, key: Tensor, bias: Tensor | None
) -> tuple[MaskLike, Tensor | None]:
    """Move key_mask into the mask where that is cheaper; returns the mask and what remains of key_mask."""
    lengths = key_mask.sum(-1)
    if bool((key_mask == (torch.arange(key_mask.shape[1], device=key_mask.device) < lengths[:, None])).all()):
        if bool((lengths == key_mask.shape[1]).all()):
            return mask, None
        padding = BlockMask.from_lengths(lengths, q_len=query.shape[2], kv_len=key.shape[2])
    elif bias is not None and bias.dim() > 1 and bias.shape[-2] > 1 and (bias.dim() < 4 or bias.shape[0] == 1):
        padding = BlockMask.from_dense(key_mask[:, None, None, :].expand(-1, 1, query.shape[2], -1))
    else:
        return mask, key_mask
    return padding if mask is None else as_block_mask(mask, query, key) & padding, None
