"""The functions a user calls: `attention` and its relatives. `prepare` settles shapes, checks and masks, once a call.

Letters: B batch, Hq query heads, Hkv key/value heads, Nq queries, Nk keys, D head_dim, Dv value head_dim.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeGuard, overload

import torch
from torch import Tensor

from . import backends, biases, repeated, sharding
from .backends.call import Call, accumulation_dtype
from .biases import BiasLike
from .defaults import ALIGNMENTS, alignment_offset, default_scale
from .errors import InputError, InputTypeError, UnsupportedError
from .masks import BlockMask, MaskArrays, PartedMask, trainable
from .masks.algebra import seen_keys as seen_in_lists
from .ops import attention as ops
from .ops import union
from .patterns import Pattern
from .torchscript import check_traceable, traced_attention
from .tracing import PLAN, is_jit_traced, named, shapes_only

MAX_HEAD_DIM = 256  # on every backend
WIDEST = 576  # on a CPU: queries and keys of latent attention (DeepSeek-V2)
TRACE_INSTEAD = "use torch.export or torch.compile"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DENSE = MaskArrays()

MaskLike = BlockMask | Pattern | Tensor | None


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
            `ALiBi`, `RelativeBias`, `T5Bias` or `LowRankBias`; or a list of such, which add up.
        is_causal: query i sees keys up to i; with Nq != Nk, `causal_alignment` must say which corner the diagonal
            starts from: "top_left" (j <= i) or "bottom_right" (j <= i + Nk - Nq). It says the same, with or without
            is_causal, for a pattern that names no alignment itself.
        scale: default 1 / sqrt(D).
        softcap: None or c > 0: scaled scores x become c tanh(x / c), before any bias is added (Gemma 2).
        sinks: (Hq), one more score for each head, that of a key without a value (gpt-oss): in the query's dtype or
            float32. lse includes it; a query that sees no key returns 0 and the sink as its lse. Gets a gradient.
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
    modified = softcap is not None or sinks is not None or not (bias is None or isinstance(bias, Tensor))
    if sharding.active is not None:
        if modified:
            sharding.refuse("attention with softcap, sinks or a structured bias")
        return sharding.active.attention(  # type: ignore[no-any-return]
            query, key, value, mask=mask, bias=bias, is_causal=is_causal, causal_alignment=causal_alignment,
            scale=scale, dropout_p=dropout_p, dropout_seed=dropout_seed, return_lse=return_lse, backend=backend,
        )  # fmt: skip
    plain = ops.is_plain(query, key, value, *((sinks, *_tensors_of(bias)) if modified else (bias,)))
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
    call = prepare(
        query, key, value, mask=mask, bias=bias, is_causal=is_causal, causal_alignment=causal_alignment, scale=scale,
        softcap=softcap, sinks=sinks, dropout_p=dropout_p, dropout_seed=dropout_seed, backend=backend, parts=plain,
    )  # fmt: skip
    query, key, value, bias, arrays, scale, dropout_p, seed, chosen, differentiable, parts, *modifiers = call
    options = (scale, dropout_p, seed, *modifiers)
    if parts is not None:
        function = union.union_attention if differentiable else union.union_forward
        out, lse = function(query, key, value, bias, parts, scale, dropout_p, seed)
    elif differentiable and plain:
        out, lse = ops.direct_attention(query, key, value, bias, arrays, *options, chosen)
    elif not plain:
        out, lse = ops.attention_forward(query, key, value, bias, *ops.operands(arrays), *options, chosen)
    else:  # nothing records the call: the dispatcher would cost more than a short one takes
        forward = backends.BACKENDS[chosen].attention.attention_forward
        out, lse = forward(query, key, value, bias, arrays, *options)
        if known is not None:
            repeated.remember(known, mask, query, key, value, arrays, scale, chosen)
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
    plain = ops.is_plain(query, key, value, sinks, *_tensors_of(bias))
    traced = not plain and is_jit_traced()
    if traced and modified:
        raise UnsupportedError(f"torch.jit.trace records no softcap, sinks or structured bias; {TRACE_INSTEAD}")
    call = prepare(
        query, key, value, mask=mask, bias=bias, is_causal=is_causal, causal_alignment=causal_alignment, scale=scale,
        softcap=softcap, sinks=sinks, dropout_p=dropout_p, dropout_seed=dropout_seed,
        backend="reference" if traced else backend, returns_weights=True,
    )  # fmt: skip
    q, k, v, given, arrays, factor, _, seed, chosen, differentiable, _, *modifiers = call
    if traced or (plain and not differentiable):
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
        refuse_modifiers("inside context_parallel", bias, **arguments)
        arguments = {name: given for name, given in arguments.items() if name not in ("softcap", "sinks")}
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
    if key_mask is not None and _is_pattern(mask):  # which chooses among the keys that are there
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
) -> Prepared:
    """Check the arguments of `attention`, make its mask and choose its backend; raises what `attention` raises.

    Args:
        parts: whether the caller can take a mask that is a union of parts as that.
    """
    query, key, value = prepare_inputs(query, key, value)
    scale = default_scale(scale, query.shape[3])
    cap = check_softcap(softcap)
    sinks = None if sinks is None else check_sinks(sinks, query)
    bias, structured = biases.split(bias)
    shown_query, shown_key = query, key  # what patterns choose by
    diagonals = None
    if structured:
        query, key, diagonals = settle_structured(structured, query, key, scale, cap, causal_alignment)
    if bias is not None:
        bias = check_bias(bias, query, key)
    check_dropout(dropout_p)
    modifiers = modifier_names(cap, sinks, diagonals)
    parts = parts and not modifiers  # a union joins its parts by lse, and scores in their own order
    arrays, block_mask = DENSE, None
    if mask is not None or is_causal or causal_alignment is not None:
        Nq, Nk = query.shape[2], key.shape[2]
        check_alignment(is_causal, causal_alignment, Nq, Nk)
        if mask is not None:
            if _is_pattern(mask):
                mask.check_scores(bias, softcap, structured or None)
            causal = causal_mask(Nq, Nk, is_causal, causal_alignment)
            block_mask = _planned_mask(mask, shown_query, shown_key, causal, scale, causal_alignment, bias)
            if not parts or block_mask.union is None:
                arrays = block_mask.arrays()
        elif is_causal:
            arrays = MaskArrays(window_right=0, window_offset=alignment_offset(causal_alignment, Nq, Nk))
    select = backends.select if torch.compiler.is_compiling() else backends.cached_select
    call = describe(query, key, value, bias, arrays, dropout_p, returns_weights, modifiers)
    if parts and block_mask is not None and block_mask.union is not None:
        call = call._replace(has_lists=True)
    chosen = select(backend, call)
    differentiable = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (query, key, value, bias, sinks, diagonals)
    )
    seed = resolve_seed(dropout_seed) if dropout_p > 0.0 else None
    if parts and isinstance(block_mask, PartedMask):
        if backends.BACKENDS[chosen].TAKES_ORDERS and not _shares_bias(block_mask, bias, differentiable):
            taken = _taken_parts(block_mask, chosen, differentiable)
            return Prepared(query, key, value, bias, arrays, scale, dropout_p, seed, chosen, differentiable, taken)
        arrays = block_mask.arrays()
    if differentiable and block_mask is not None and backends.BACKENDS[chosen].NEEDS_TRANSPOSED:
        arrays = block_mask.arrays(transposed=True)
    if differentiable:
        arrays = trainable(arrays)
    return Prepared(
        query, key, value, bias, arrays, scale, dropout_p, seed, chosen, differentiable, None, cap, sinks, diagonals
    )


def _taken_parts(mask: PartedMask, backend: str, differentiable: bool) -> union.Parts:
    arrays = mask.part_arrays(differentiable and backends.BACKENDS[backend].NEEDS_TRANSPOSED)
    return union.Parts(mask, tuple(map(trainable, arrays)) if differentiable else arrays, backend)


def _shares_bias(mask: PartedMask, bias: Tensor | None, differentiable: bool) -> bool:
    """Whether the gradient of a bias sums up pairs that lie in different tiles, as heads have orders of their own."""
    if bias is None or not (differentiable and bias.requires_grad):
        return False
    assert mask.union is not None
    return any(order is not None and order.shape[0] > 1 for part in mask.union for order in part[1:])


def prepare_inputs(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three tensors, cast as autocast asks for; raises unless they are tensors that belong together."""
    sharding.refuse("what was called")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise InputTypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise InputError(
                f"{name} must have 4 dimensions (batch, heads, length, head_dim), got {tuple(tensor.shape)}"
            )
    query, key, value = autocast(query, key, value)
    check_inputs(query, key, value)
    return query, key, value


def check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise unless query (B, Hq, Nq, D), key (B, Hkv, Nk, D) and value (B, Hkv, Nk, Dv) belong together."""
    dtype, device = query.dtype, query.device
    if dtype not in DTYPES or key.dtype != dtype or value.dtype != dtype:
        raise InputTypeError(
            f"query, key and value must share one dtype of float32, float64, bfloat16, float16; got {dtype}, "
            f"{key.dtype}, {value.dtype}. Cast them, or call under torch.autocast"
        )
    if key.device != device or value.device != device:
        raise InputError(f"query, key and value must be on one device; got {device}, {key.device}, {value.device}")
    B, Hq, _, D = query.shape
    Bk, Hkv, Nk, Dk = key.shape
    Bv, Hv, Nv, Dv = value.shape
    if Bk != B or Bv != B or Hkv != Hv or Nk != Nv or Dk != D:
        raise InputError(
            "expected query (B, Hq, Nq, D), key (B, Hkv, Nk, D), value (B, Hkv, Nk, Dv); got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if Hq != Hkv and (Hkv == 0 or Hq % Hkv):
        raise InputError(f"the query heads must be a multiple of the key/value heads; got Hq={Hq}, Hkv={Hkv}")
    if not 1 <= D <= WIDEST or not 1 <= Dv <= WIDEST:
        raise InputError(
            f"head_dim must be from 1 to {WIDEST}; got D={D}, Dv={Dv}. Take more heads, or leave "
            "this layer to PyTorch (attn_implementation='sdpa' of a transformers model)"
        )


def check_bias(bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return the bias with 4 dimensions, each 1 or full; raise unless it broadcasts to (B, Hq, Nq, Nk)."""
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        kind = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise InputTypeError(f"bias must be a floating-point tensor, got {kind}; a bool tensor is a mask: pass mask=")
    allowed = (query.dtype, accumulation_dtype(query.dtype))
    if bias.dtype not in allowed:
        raise InputTypeError(f"bias must be {' or '.join(map(str, dict.fromkeys(allowed)))}, got {bias.dtype}; cast it")
    if bias.device != query.device:
        raise InputError(f"bias is on {bias.device}, query on {query.device}; move it")
    full = (*query.shape[:3], key.shape[2])
    if bias.dim() > 4:
        raise InputError(f"bias must have at most 4 dimensions, got {tuple(bias.shape)}")
    bias = bias[(None,) * (4 - bias.dim())] if bias.dim() < 4 else bias
    if any(given != size and given != 1 for given, size in zip(bias.shape, full, strict=True)):
        raise InputError(f"bias {tuple(bias.shape)} does not broadcast to (B, Hq, Nq, Nk) = {full}")
    return bias


# --- what else is done to scores ---


def check_softcap(softcap: float | None) -> float:
    """The cap as a number, 0 for None; raises unless it is None or positive and finite."""
    if softcap is None:
        return 0.0
    if isinstance(softcap, Tensor) or not 0.0 < softcap < float("inf"):
        raise InputError(f"softcap must be None or a positive finite number, got {softcap!r}")
    return float(softcap)


def check_sinks(sinks: Tensor, query: Tensor) -> Tensor:
    """Raise unless sinks are (Hq), in the query's dtype or that of its sums, on its device."""
    allowed = (query.dtype, accumulation_dtype(query.dtype))
    if not isinstance(sinks, Tensor) or sinks.dtype not in allowed:
        kind = sinks.dtype if isinstance(sinks, Tensor) else type(sinks).__name__
        if not isinstance(sinks, Tensor) or not sinks.is_floating_point() or not autocasts(query.device):
            names = " or ".join(map(str, dict.fromkeys(allowed)))
            raise InputTypeError(f"sinks must be a tensor of {names}, got {kind}; cast it")
        sinks = sinks.to(allowed[-1])
    if tuple(sinks.shape) != (query.shape[1],):
        raise InputError(f"sinks must be (Hq) = ({query.shape[1]},), got {tuple(sinks.shape)}")
    if sinks.device != query.device:
        raise InputError(f"sinks are on {sinks.device}, query on {query.device}; move them")
    return sinks


def settle_structured(
    structured: list[biases.Bias], query: Tensor, key: Tensor, scale: float, cap: float, alignment: str | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Query and key with low-rank biases beside them, and the sum (1 | B, 1 | Hq, Nq + Nk - 1) of those by position."""
    diagonals: Tensor | None = None
    for part in structured:
        if isinstance(part, biases.LowRankBias):
            if cap > 0.0:
                raise UnsupportedError(
                    "LowRankBias is a part of the dot products, which softcap would bound too; pass u @ w.mT as a "
                    "tensor, or leave softcap out"
                )
            query, key = part.appended(query, key, scale)
        else:
            assert isinstance(part, biases.RelativePosition)
            line = part.diagonals(query, key, alignment, accumulation_dtype(query.dtype))
            diagonals = line if diagonals is None else diagonals + line
    if query.shape[3] > WIDEST:
        raise InputError(
            f"head_dim and the rank of LowRankBias must be at most {WIDEST} together; got {query.shape[3]}"
        )
    return query, key, diagonals


def modifier_names(cap: float, sinks: Tensor | None, diagonals: Tensor | None) -> tuple[str, ...]:
    """What of this a call has, in words."""
    if not cap and sinks is None and diagonals is None:
        return ()
    has = {"softcap": cap > 0.0, "sinks": sinks is not None, "bias by relative position": diagonals is not None}
    return tuple(name for name, present in has.items() if present)


def refuse_modifiers(
    where: str, bias: BiasLike = None, *, softcap: float | None = None, sinks: Tensor | None = None, **_: Any
) -> None:
    """Raise UnsupportedError if a call has a soft cap, sinks or a structured bias, which `where` nobody knows."""
    structured = bias is not None and bool(biases.split(bias)[1])
    has = {"softcap": softcap is not None, "sinks": sinks is not None, "a structured bias": structured}
    found = [name for name, present in has.items() if present]
    if found:
        raise UnsupportedError(
            f"{' and '.join(found)} cannot be served {where}; use attention() or a sparse method outside of it"
        )


def _tensors_of(bias: BiasLike) -> tuple[Any, ...]:
    """The tensors in what is passed as a bias."""
    if bias is None or isinstance(bias, Tensor):
        return (bias,)
    parts = bias if isinstance(bias, (list, tuple)) else [bias]
    found = [vars(part).values() if isinstance(part, biases.Bias) else (part,) for part in parts]
    return tuple(value for values in found for value in values if isinstance(value, Tensor))


def check_dropout(dropout_p: float) -> None:
    """Raise InputError unless 0 <= dropout_p < 1."""
    if not 0.0 <= dropout_p < 1.0:
        raise InputError(f"dropout_p must be in [0, 1), got {dropout_p}")


def check_alignment(is_causal: bool, causal_alignment: str | None, q_len: int, kv_len: int) -> None:
    """Raise InputError for an unknown alignment, or for a causal call with Nq != Nk that names none."""
    if causal_alignment is not None and causal_alignment not in ALIGNMENTS:
        raise InputError(f"causal_alignment must be one of {ALIGNMENTS} or None, got {causal_alignment!r}")
    if is_causal and causal_alignment is None and q_len != kv_len:
        raise InputError(
            f"is_causal=True with {q_len} queries and {kv_len} keys is ambiguous; say causal_alignment='top_left' "
            "(query i sees keys 0..i) or 'bottom_right' (the last query sees every key)"
        )


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
    if bias is not None and _is_pattern(mask) and mask.by_content:
        shown = shown_by_bias(bias, query, key)
        within = causal if shown is None else shown if causal is None else shown & causal
        counted = seen_keys(None, query, key, mask=shown, bias=bias)
    block_mask = as_block_mask(mask, query, key, scale=scale, key_mask=counted, within=within, alignment=alignment)
    return block_mask if causal is None else block_mask & causal


def causal_mask(q_len: int, kv_len: int, is_causal: bool, causal_alignment: str | None) -> BlockMask | None:
    """What is_causal=True allows, None otherwise."""
    return BlockMask(q_len, kv_len).with_causal(causal_alignment or "top_left") if is_causal else None


def as_block_mask(
    mask: BlockMask | Pattern | Tensor,
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    within: BlockMask | None = None,
    alignment: str | None = None,
) -> BlockMask:
    """Turn what a user passes as `mask` into a BlockMask on the query's device that fits (B, Hq, Nq, Nk).

    `scale`, `key_mask` and `within` are for patterns that look at queries and keys, see `Pattern.for_inputs`;
    `alignment` for those that go by positions, see `Pattern.aligned`.
    """
    if _is_pattern(mask):
        pattern = mask.aligned(alignment)
        return pattern.for_inputs(query, key, scale=scale, key_mask=key_mask, within=within)
    given = _check_mask(mask, query, key)
    if isinstance(given, Tensor):
        Nq, Nk = query.shape[2], key.shape[2]
        given = given.to(query.device)
        given = given.expand(*given.shape[:-2], Nq, Nk) if given.dim() > 1 else given.expand(Nq, Nk)
        return BlockMask.from_dense(given, static=(torch.compiler.is_compiling() or shapes_only(given)))
    return given if given.device is None or given.device == query.device else given.to(query.device)


def _is_pattern(mask: MaskLike) -> TypeGuard[Pattern]:
    """Whether a mask is a pattern, or the method of one."""
    return not isinstance(mask, (BlockMask, Tensor)) and hasattr(mask, "for_inputs")


def _check_mask(mask: BlockMask | Pattern | Tensor, query: Tensor, key: Tensor) -> BlockMask | Tensor:
    """The mask; raises unless it is a BlockMask or a bool tensor that fits (B, Hq, Nq, Nk)."""
    B, Hq, Nq, _ = query.shape
    Nk = key.shape[2]
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool:
            raise InputTypeError(
                f"mask must be a bool tensor (True = attend), got {mask.dtype}; additive values are bias="
            )
        full = (B, Hq, Nq, Nk)
        if mask.dim() > 4 or any(g not in (1, f) for g, f in zip(mask.shape[::-1], full[::-1], strict=False)):
            raise InputError(f"mask {tuple(mask.shape)} does not broadcast to (B, Hq, Nq, Nk) = {full}")
        return mask
    if not isinstance(mask, BlockMask):
        raise InputTypeError(f"mask must be a BlockMask, a pattern, a bool tensor or None, got {type(mask).__name__}")
    if (mask.q_len, mask.kv_len) != (Nq, Nk):
        raise InputError(f"the mask is for {mask.q_len} queries and {mask.kv_len} keys; this call has {Nq} and {Nk}")
    lengths = 1 if mask.kv_lengths is None else mask.kv_lengths.shape[0]
    if mask.batch not in (1, B) or mask.heads not in (1, Hq) or lengths not in (1, B):
        raise InputError(
            f"the mask is for batch {max(mask.batch, lengths)} and {mask.heads} heads; this call has {B} and {Hq}"
        )
    return mask


def resolve_seed(seed: int | Tensor | None) -> Tensor:
    """An int64 tensor with the dropout seed; None draws one from PyTorch's CPU generator."""
    if seed is None:
        return torch.randint(2**62, (), dtype=torch.int64, device="cpu")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise InputTypeError(f"dropout_seed must be one int64 value, got {tuple(seed.shape)} of {seed.dtype}")
        return seed.reshape(())
    return torch.tensor(int(seed), dtype=torch.int64, device="cpu")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as torch.autocast asks for, when it is on for the tensors' device; float64 stays."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # autocast knows no meta device
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def autocasts(device: torch.device) -> bool:
    """Whether torch.autocast is on for this device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


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


# --- padding: a mask over keys, (B, Nk) bool with True = attend, without n x n memory ---


def check_key_mask(key_mask: Tensor | None, key: Tensor) -> None:
    """Raise unless `key_mask` is None or bool (B, Nk) on the device of key (B, Hkv, Nk, D)."""
    if key_mask is None:
        return
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
        kind = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
        raise InputTypeError(f"key_mask must be a bool tensor (B, Nk) with True = attend, got {kind}")
    if key_mask.shape != (key.shape[0], key.shape[2]):
        raise InputError(f"key_mask must be (B, Nk) = {(key.shape[0], key.shape[2])}, got {tuple(key_mask.shape)}")
    if key_mask.device != key.device:
        raise InputError(f"key_mask is on {key_mask.device}, key on {key.device}; move it")


def select_keys(key_mask: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Set masked rows of (B, H, Nk, ...) tensors to zero; neither their content nor a gradient passes."""
    if key_mask is None:
        return tensors
    return tuple(t.masked_fill(~key_mask[:, None, :, None], 0.0) for t in tensors)


def add_to_bias(bias: Tensor | None, key_mask: Tensor, query: Tensor) -> Tensor:
    """Set the bias to -inf where a key is masked; without a bias the result is (B, 1, 1, Nk)."""
    visible = key_mask[:, None, None, :]
    if bias is None:
        bias = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(visible, bias, -torch.inf)


def seen_keys(
    key_mask: Tensor | None,
    query: Tensor,
    key: Tensor,
    *,
    mask: BlockMask | Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
) -> Tensor | None:
    """The keys that any query of their batch element may see, by every route of hiding: bool (B, Nk); None: all.

    What a method makes of all keys together (landmarks, means, buckets, a choice of blocks) must leave out the others,
    whatever they hold, as it leaves out those that `key_mask` hides.
    """
    check_key_mask(key_mask, key)
    (B, _, Nq, _), Nk = query.shape, key.shape[2]
    check_alignment(is_causal, causal_alignment, Nq, Nk)
    parts = [] if key_mask is None else [key_mask]
    causal = causal_mask(Nq, Nk, is_causal and (mask is not None or Nq != Nk), causal_alignment)
    if mask is not None:
        _check_mask(mask, query, key)
    if causal is not None:
        parts.append(seen_in_lists(*causal.parts).to(query.device))
    # Lists cannot be read while tracing: who has made them says so when they are to be joined with others.
    if isinstance(mask, BlockMask) and not (
        (torch.compiler.is_compiling() or shapes_only(query)) and mask.indptr is not None
    ):
        mask = as_block_mask(mask, query, key)
        parts.append(seen_in_lists(*(mask if causal is None else mask & causal).parts).to(query.device))
    tensors = [mask] if isinstance(mask, Tensor) else []
    if bias is not None:
        tensors.append(check_bias(bias, query, key) != -torch.inf)
    for pairs in tensors:
        pairs = pairs.to(query.device)[(None,) * (4 - pairs.dim())]
        if is_causal and pairs.shape[2] > 1:
            i, j = torch.arange(Nq, device=query.device)[:, None], torch.arange(Nk, device=query.device)
            pairs = pairs & (j <= i + alignment_offset(causal_alignment, Nq, Nk))
        parts.append(pairs.any(2).any(1))
    if not parts:
        return None
    seen = functools.reduce(torch.logical_and, parts).expand(B, Nk)
    return None if may_read(seen) and bool(seen.all()) else seen


def shown_by_bias(bias: Tensor, query: Tensor, key: Tensor) -> BlockMask | None:
    """The mask of the pairs that -inf in a bias leaves, for patterns that choose by content; None where it hides none,
    or the same keys from all queries and heads, or while tracing, where no list may depend on values."""
    bias = check_bias(bias, query, key).detach()
    if (bias.shape[1] == 1 and bias.shape[2] == 1) or not may_read(bias, streams=True):
        return None
    shown = bias != -torch.inf
    return None if bool(shown.all()) else as_block_mask(shown, query, key)


def may_read(key_mask: Tensor, *, streams: bool = False) -> bool:
    """Whether values may steer Python: not while tracing or mapping, and not where reading would stall a stream."""
    return (
        (streams or key_mask.device.type == "cpu")
        and not (torch.compiler.is_compiling() or shapes_only(key_mask))
        and not is_jit_traced()
        and not torch._C._are_functorch_transforms_active()
        and type(key_mask) is Tensor
    )


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
