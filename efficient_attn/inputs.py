"""What every call is asked before any work starts: tensors, masks, biases, padding. Each raises a named error."""

from __future__ import annotations

import functools
from typing import Any, TypeGuard

import torch
from torch import Tensor

from . import biases, sharding
from .backends.call import accumulation_dtype
from .biases import BiasLike
from .defaults import ALIGNMENTS, alignment_offset
from .errors import InputError, InputTypeError, UnsupportedError
from .masks import BlockMask
from .masks.algebra import seen_keys as seen_in_lists
from .patterns import Pattern
from .tracing import is_jit_traced, shapes_only

MAX_HEAD_DIM = 256  # on every backend
WIDEST = 576  # on a CPU: queries and keys of latent attention (DeepSeek-V2)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

MaskLike = BlockMask | Pattern | Tensor | None


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


def check_dropout(dropout_p: float) -> None:
    """Raise InputError unless 0 <= dropout_p < 1."""
    if not 0.0 <= dropout_p < 1.0:
        raise InputError(f"dropout_p must be in [0, 1), got {dropout_p}")


def resolve_seed(seed: int | Tensor | None) -> Tensor:
    """An int64 tensor with the dropout seed; None draws one from PyTorch's CPU generator."""
    if seed is None:
        return torch.randint(2**62, (), dtype=torch.int64, device="cpu")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise InputTypeError(f"dropout_seed must be one int64 value, got {tuple(seed.shape)} of {seed.dtype}")
        return seed.reshape(())
    return torch.tensor(int(seed), dtype=torch.int64, device="cpu")


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
        raise InputError(
            f"sinks must be (Hq) = ({query.shape[1]},), got {tuple(sinks.shape)}; sinks of each query are taken by "
            "attention and by dense and sparse methods. Elsewhere leave them out and take lse: with lse - sink as x, "
            "out * sigmoid(x) is the same, and torch.logaddexp(lse, sink) its lse"
        )
    if sinks.device != query.device:
        raise InputError(f"sinks are on {sinks.device}, query on {query.device}; move them")
    return sinks


def settle_structured(
    structured: list[biases.Bias], query: Tensor, key: Tensor, scale: float, cap: float, alignment: str | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Query and key with biases that are dot products beside them, the sum (1 | B, 1 | Hq, Nq + Nk - 1) of those by
    position, and of those by pairs (1 | B, 1 | Hq, Nq, Nk)."""
    diagonals: Tensor | None = None
    pairs: Tensor | None = None
    dtype = accumulation_dtype(query.dtype)
    queries, keys = [query], [key]
    for part in structured:
        name = type(part).__name__
        if isinstance(part, biases.Appended):
            if cap > 0.0:
                raise UnsupportedError(
                    f"{name} is a part of the dot products, which softcap would bound too; pass it as a tensor, or "
                    "leave softcap out"
                )
            if scale == 0.0:
                raise InputError(f"{name} is a part of scores times the scale; with scale=0 it would vanish")
            of_query, of_key = part.columns(query, key, scale)
            queries.append(of_query)
            keys.append(of_key)
        elif isinstance(part, biases.Pairwise):
            rows = part.rows(0, query.shape[2], query, key, dtype)
            pairs = rows if pairs is None else pairs + rows
        elif isinstance(part, biases.RelativePosition):
            line = part.diagonals(query, key, alignment, dtype)
            diagonals = line if diagonals is None else diagonals + line
        else:
            raise UnsupportedError(
                f"{name} is no bias that attention knows; derive it from one in efficient_attn.biases"
            )
    if len(queries) > 1:
        query, key = torch.cat(queries, -1), torch.cat(keys, -1)
        if query.shape[3] > WIDEST:
            appended = ", ".join(type(part).__name__ for part in structured if isinstance(part, biases.Appended))
            raise InputError(
                f"head_dim and the columns of {appended} must be at most {WIDEST} together; got {query.shape[3]}"
            )
    return query, key, diagonals, pairs


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


def tensors_of(bias: BiasLike) -> tuple[Any, ...]:
    """The tensors in what is passed as a bias."""
    if bias is None or isinstance(bias, Tensor):
        return (bias,)
    parts = bias if isinstance(bias, (list, tuple)) else [bias]
    found = [vars(part).values() if isinstance(part, biases.Bias) else (part,) for part in parts]
    return tuple(value for values in found for value in values if isinstance(value, Tensor))


def check_alignment(is_causal: bool, causal_alignment: str | None, q_len: int, kv_len: int) -> None:
    """Raise InputError for an unknown alignment, or for a causal call with Nq != Nk that names none."""
    if causal_alignment is not None and causal_alignment not in ALIGNMENTS:
        raise InputError(f"causal_alignment must be one of {ALIGNMENTS} or None, got {causal_alignment!r}")
    if is_causal and causal_alignment is None and q_len != kv_len:
        raise InputError(
            f"is_causal=True with {q_len} queries and {kv_len} keys is ambiguous; say causal_alignment='top_left' "
            "(query i sees keys 0..i) or 'bottom_right' (the last query sees every key)"
        )


def causal_mask(q_len: int, kv_len: int, is_causal: bool, causal_alignment: str | None) -> BlockMask | None:
    """What is_causal=True allows, None otherwise."""
    return BlockMask(q_len, kv_len).with_causal(causal_alignment or "top_left") if is_causal else None


# --- masks ---


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
    if is_pattern(mask):
        pattern = mask.aligned(alignment)
        return pattern.for_inputs(query, key, scale=scale, key_mask=key_mask, within=within)
    given = _check_mask(mask, query, key)
    if isinstance(given, Tensor):
        Nq, Nk = query.shape[2], key.shape[2]
        given = given.to(query.device)
        given = given.expand(*given.shape[:-2], Nq, Nk) if given.dim() > 1 else given.expand(Nq, Nk)
        return BlockMask.from_dense(given, static=(torch.compiler.is_compiling() or shapes_only(given)))
    return given if given.device is None or given.device == query.device else given.to(query.device)


def is_pattern(mask: MaskLike) -> TypeGuard[Pattern]:
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
