"""transformers: `register()` makes attn_implementation="efficient_attn", or "efficient_attn:<spec>", known to it.

    register()
    model = AutoModel.from_pretrained(path, attn_implementation="efficient_attn:bigbird:block=64")
    model.set_attn_implementation("efficient_attn")         # dense

Whatever stands behind the first colon is a spec of this package. A model's layers call `attend` below, its mask code
`huggingface_masks.pair_mask`; nothing n x n is made on the way. What a layer asks for and we do not have raises.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import InputError, UnsupportedError
from ..masks import BlockMask
from ..methods import DENSE, Method, parse
from ..methods.continuation import continuation, goes_by_positions
from ..methods.left_padding import Turned, left_padding, take
from ..patterns import Pattern
from ..tracing import is_jit_traced, is_recorded
from .huggingface_masks import PairMask, packed_documents, pair_mask
from .layer_state import LAYER_METHOD, layer_state
from .torch_sdpa import only_hides

NAME = "efficient_attn"

# What layers are passed besides and need no answer: bookkeeping, and what the mask says already.
HARMLESS = frozenset(
    {
        "cache_position",
        "position_ids",
        "position_embeddings",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "use_cache",
        "past_key_values",
        "past_key_value",
        "num_items_in_batch",
        "token_type_ids",
        "mm_token_type_ids",
        "labels",
        "logits_to_keep",
        "input_ids",
        "inputs_embeds",
        "decoder_input_ids",
        "interpolate_pos_encoding",
        "grid_thw",
        "deterministic",
        "layer_idx",
        "sliding_window",
        "max_length_q",
        "max_length_k",
    }
)
# Parts of multimodal models that have such layers alone, and masks of eager's form for them: they stay eager.
EAGER_PARTS = ("BridgeTowerVisionModel", "Gemma3nAudio", "Gemma4Audio")
STAYS_EAGER = "has attention layers of its own, which look up no implementation, and stays eager"
_in_part = False
# Beginning of a model's name -> layers in it that never look up an implementation, and whether they are all it has.
OWN_LAYERS = {
    "PegasusX": ("its encoder's global-local attention", False),
    "LongT5": ("its encoder's local or transient-global attention", False),
    "ClapAudio": ("its windows of attention", True),
    "PPFormulaNetVision": ("its attention with decomposed positions", True),
}
# Layers that say is_causal and attend to everything without a mask, in eager.
FULL_WITHOUT_MASK = frozenset(
    {
        "BltSelfAttention",
        "BridgeTowerSelfAttention",
        "Phi4MultimodalAudioAttention",
        "Phi4MultimodalVisionAttention",
    }
)
PACKED = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"})  # what DataCollatorWithFlattening says of documents
ADVICE = {
    "cache": "use generate() with a dynamic or static cache",
}


def register() -> None:
    """Make "efficient_attn" and "efficient_attn:<spec>" attention implementations of transformers, for every model.

    Call it once, before a model is made with that name or gets it by `set_attn_implementation`; again does nothing.
    Models that do not go through transformers' attention interface then raise for such a name instead of ignoring it.

    Raises:
        UnsupportedError: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise UnsupportedError("transformers is not installed; pip install 'efficient-attn[models]'")
    from transformers import PreTrainedModel

    _add(NAME)
    original = PreTrainedModel.get_correct_attn_implementation
    if getattr(original, "knows_efficient_attn", False):
        return

    @functools.wraps(original)
    def get_correct_attn_implementation(self: Any, requested_attention: str | None, is_init_check: bool = False) -> Any:
        if requested_attention is not None and requested_attention.partition(":")[0] == NAME:
            _add(requested_attention)
            vars(self)["_efficient_attn_name"] = _Registered(requested_attention)
            _refuse_in_class_tables(type(self), requested_attention)
            if type(self).__name__.startswith(EAGER_PARTS):
                warnings.warn(f"{type(self).__name__} {STAYS_EAGER}", stacklevel=3)
                return original(self, "eager", is_init_check)
            if not _in_part:
                _refuse_layers_of_their_own(self, requested_attention)
            if not self._can_set_attn_implementation():
                raise UnsupportedError(
                    f"{type(self).__name__} does not go through transformers' attention interface, so "
                    f"attn_implementation={requested_attention!r} would be ignored; use 'eager', or "
                    "efficient_attn.convert(model), which serves such layers one by one where it knows them"
                )
        return original(self, requested_attention, is_init_check)

    get_correct_attn_implementation.knows_efficient_attn = True  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation


def _refuse_in_class_tables(model: type, name: str) -> None:
    """Let layers that look their class up by the name, past transformers' interface, find one that says so."""

    def refuse(*arguments: Any, **keywords: Any) -> NoReturn:
        raise UnsupportedError(
            f"{model.__name__} looks the class of its attention layers up by name in a table of its own, so that "
            f"attn_implementation={name!r} would not reach them; use 'eager' and "
            "efficient_attn.convert(model), or name this package for its parts alone"
        )

    for variable, table in vars(sys.modules[model.__module__]).items():
        if variable.endswith("ATTENTION_CLASSES") and isinstance(table, dict):
            table.setdefault(name, refuse)


def _refuse_layers_of_their_own(model: Any, name: str) -> None:
    """Raise for a model that has layers which would go on as they are, as far as that is known before they run."""
    for prefix, (layers, always) in OWN_LAYERS.items():
        if type(model).__name__.startswith(prefix) and (always or ":" in name):
            raise UnsupportedError(
                f"{type(model).__name__}: {layers} looks up no attention implementation, so that {name!r} would not "
                f"reach it; use 'eager'{'' if always else f' or {NAME!r}'}, or convert(), which says what it leaves"
            )
    tables = [t for v, t in vars(sys.modules[type(model).__module__]).items() if v.endswith("ATTENTION_CLASSES")]
    classes = {c for table in tables if isinstance(table, dict) for c in table.values()}
    for layer in model.modules() if "_modules" in vars(model) else ():
        if type(layer) in classes:
            raise UnsupportedError(
                f"{type(model).__name__} has chosen the class of its layers, {type(layer).__name__}, when it was made, "
                f"by name in a table of its own, so that {name!r} would not reach them; use 'eager', or convert()"
            )


@contextlib.contextmanager
def in_part() -> Iterator[None]:
    """A range in which models keep layers that a name does not reach, for callers that report them."""
    global _in_part
    before, _in_part = _in_part, True
    try:
        yield
    finally:
        _in_part = before


class _Registered:
    """What a model carries so that its name is known wherever it is unpickled: another process, a pool of workers."""

    def __init__(self, name: str) -> None:
        register()
        _add(name)
        self.name = name

    def __reduce__(self) -> tuple[type[_Registered], tuple[str]]:
        return _Registered, (self.name,)


def implementation_name(attention: str | Method | Pattern) -> str:
    """The attn_implementation of a spec, a `Method` or a `Pattern`, such as "efficient_attn:linear"."""
    method = parse(attention)
    return NAME if method.is_dense else f"{NAME}:{method}"


def announce(model: Any, name: str) -> None:
    """Let a model whose layers are served one by one make its masks as those of an implementation."""
    _add(name)
    vars(model)["_efficient_attn_name"] = _Registered(name)
    model.config._attn_implementation_internal = name


def _add(name: str) -> None:
    """Put a name into both interfaces; a name in the first alone would lose padding and causality."""
    from transformers import AttentionInterface, AttentionMaskInterface

    if name not in AttentionInterface._global_mapping:
        spec = name.partition(":")[2]
        method = parse(spec) if spec else DENSE
        AttentionInterface.register(name, functools.partial(attend, method))
        AttentionMaskInterface.register(name, pair_mask)


def attend(
    method: Method,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PairMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend for a transformers layer.

    Args:
        query, key, value: (B, Hq, Nq, D), (B, Hkv, Nk, D), (B, Hkv, Nk, Dv); query may have batch 1.
        attention_mask: what `pair_mask` made; or 4-D, bool with True = attend, or float to add to the scores.
        is_causal: counts only without a mask; None: what the module says, which is not causal if it says nothing.
        position_bias: (B | 1, Hq, Nq, Nk), added to the scores.
        softcap: bounds the scaled scores before (Gemma 2). s_aux: (Hq), the logits of sinks (gpt-oss). sinks: those of
            each query, (B, Hq, Nq, 1) (Inkling 2). Dense and sparse methods know all three.
        indices: int (B, Nq, chosen), the keys that an indexer has left to each query besides what the mask says
            (DeepSeek sparse attention); n x n bits, for every method that takes a mask.

    Returns:
        out (B, Nq, Hq, Dv), and weights (B, Hq, Nq, Nk) if the call asked for them (output_attentions).

    Raises:
        UnsupportedError: arguments with a meaning that this package does not have, or that the method cannot serve,
            such as a softcap by a low-rank one. InputError: what does not fit together.
    """
    _check_arguments(kwargs)
    method = getattr(module, LAYER_METHOD, method)
    documents = packed_documents(kwargs, query, key)
    if query.shape[0] == 1 != key.shape[0]:
        query = query.expand(key.shape[0], -1, -1, -1)
    Nq, Nk = query.shape[2], key.shape[2]
    call: dict[str, Any]
    place: tuple[int, int] | None = None  # positions of query 0 and key 0
    if attention_mask is None:
        causal = (_says_causal(module) if is_causal is None else is_causal) and Nq > 1
        _check_window(kwargs.get("sliding_window"), Nk)
        call = {"is_causal": True, "causal_alignment": "top_left"} if causal else {}
        place = (0, 0) if causal else None
    elif isinstance(attention_mask, PairMask):
        call = _from_pairs(attention_mask, method, Nq, Nk)
        if attention_mask.start is not None:
            place = (attention_mask.start + attention_mask.offset, attention_mask.offset)
    else:
        call = _from_tensor(attention_mask, method, query, Nk)
    if documents is not None:
        call["mask"] = _both(call.get("mask"), documents)
    if indices is not None:
        call["mask"] = _both(call.get("mask"), _chosen(indices, Nq, Nk))
    if place is None and not method.is_dense:
        method = _without_place(method, module, Nq, Nk)
    if call.get("key_mask") is not None:
        call["key_mask"] = call["key_mask"].expand(key.shape[0], -1)
    if isinstance(position_bias, Tensor):
        bias = call.get("bias")
        call["bias"] = (position_bias if bias is None else position_bias + bias).to(query.dtype)
    elif position_bias is not None:
        call["bias"] = _biases(position_bias, call.get("bias"))
    if softcap is not None:
        call["softcap"] = float(softcap)
    if s_aux is not None:
        call["sinks"] = s_aux.to(query.dtype)
    if sinks is not None:
        call["sinks"] = sinks.squeeze(-1)
    left = _left_padding(method, attention_mask, call)
    turned = None
    if place is not None and (place[0] != place[1] or Nq != Nk):
        method, call = _among_earlier(method, call, query, key, place, left)
    elif left is not None:
        turned = Turned.by(left.expand(key.shape[0]), Nk)
        call = turned.call(call)
        query, key, value = (take(x, turned.there, 2) for x in (query, key, value))
    out, weights = method.attend(
        query,
        key,
        value,
        state=layer_state(method, module, query, key),
        scale=None if scaling is None or math.isclose(scaling, query.shape[-1] ** -0.5) else scaling,
        dropout_p=float(dropout),
        need_weights=weights_wanted(kwargs),
        **call,
    )
    if turned is not None:
        out = turned.undo(out)
        weights = None if weights is None else take(turned.undo(weights), turned.back, 3)
    return out.transpose(1, 2).contiguous(), weights


def _biases(given: Any, masked: Tensor | None) -> list[Any]:
    """Biases of which some are known by a few numbers, and a mask of numbers."""
    parts = list(given) if isinstance(given, (list, tuple)) else [given]
    return parts if masked is None else [*parts, masked]


def _says_causal(module: nn.Module) -> bool:
    """Whether a layer that gets no mask attends to its past alone; one that says nothing does not, as in eager."""
    return getattr(module, "is_causal", False) and type(module).__name__ not in FULL_WITHOUT_MASK


def _left_padding(method: Method, attention_mask: Any, call: dict[str, Any]) -> Tensor | None:
    """How far the first real token of each row is from the beginning, for a method to which that matters."""
    if not method.counts_positions:
        return None
    return attention_mask.left if isinstance(attention_mask, PairMask) else left_padding(call.get("key_mask"))


def _without_place(method: Method, module: nn.Module, Nq: int, Nk: int) -> Method:
    """The method for a call that does not say where its queries stand: dense where they attend to something else.

    Cross-attention and learned queries have no positions among the keys, of which a pattern or a low-rank method could
    mean anything. Queries of a causal layer have one, and must not be taken for the first ones.
    """
    cross = getattr(module, "is_cross_attention", False)
    cross |= getattr(module, "is_decoder", False) and not getattr(module, "is_causal", True)
    if cross or (Nq != Nk and not getattr(module, "is_causal", False)):
        return DENSE
    if Nq != Nk and goes_by_positions(method):
        raise UnsupportedError(
            f"{method} needs to know where {Nq} queries stand among {Nk} keys, which neither torch.compile with a "
            "cache nor a 4-D mask says; pass attention_mask as (batch, keys), and compile dense, or without a cache"
        )
    return method


def _check_arguments(kwargs: dict[str, Any]) -> None:
    for name, value in kwargs.items():
        if value is None or value is False or name in HARMLESS or name in PACKED:
            continue
        advice = ADVICE.get(name, "use attn_implementation='eager' for this model")
        raise UnsupportedError(
            f"the model passes {name} to its attention, which efficient_attn does not know; {advice}"
        )


def _check_window(window: int | None, Nk: int) -> None:
    if window is not None and Nk > window:
        raise UnsupportedError(
            f"the layer has sliding_window={window} for {Nk} keys and no mask that says so; call the model, not the "
            "layer, so that transformers makes one"
        )


def weights_wanted(kwargs: dict[str, Any]) -> bool:
    """Whether a model was called with output_attentions: as an argument, or by transformers' recording of outputs."""
    if kwargs.get("output_attentions"):
        return True
    from transformers.utils.output_capturing import _active_collector

    recorded = _active_collector.get()
    return recorded is not None and any("attentions" in name for name in recorded)


# --- masks ---


def _from_pairs(mask: PairMask, method: Method, Nq: int, Nk: int) -> dict[str, Any]:
    if mask.shape[-2:] == (1, Nk) != (Nq, Nk) and len(mask.shape) == 4:  # one row for every query
        mask = mask.expand(-1, -1, Nq, -1)
    if len(mask.shape) != 4 or mask.shape[2:] != (Nq, Nk):
        raise InputError(
            f"the mask is for {mask.shape[2]} queries and {mask.shape[3]} keys; the layer has {Nq} and {Nk}"
        )
    call: dict[str, Any] = {"key_mask": mask.key_mask}
    if mask.causal and mask.start in (0, Nk - Nq):
        return call | {"is_causal": True, "causal_alignment": "bottom_right" if mask.start else "top_left"}
    return call if mask.pairs is None else call | {"mask": mask.pairs}


def _chosen(indices: Tensor, Nq: int, Nk: int) -> BlockMask | Tensor:
    """The pairs that an indexer's choice of keys allows, (B, 1, Nq, Nk)."""
    if indices.dim() != 3 or indices.shape[1] != Nq:
        raise InputError(f"indices must be (batch, queries, chosen keys) for {Nq} queries; got {tuple(indices.shape)}")
    shown = indices.new_zeros(indices.shape[0], Nq, Nk, dtype=torch.bool).scatter(-1, indices.long(), True)[:, None]
    return shown if is_recorded() else BlockMask.from_dense(shown)


def _both(mask: BlockMask | Tensor | None, documents: BlockMask | Tensor) -> BlockMask | Tensor:
    """The pairs that both allow."""
    if mask is None:
        return documents
    if isinstance(documents, Tensor):  # a graph is recorded
        return documents & (mask if isinstance(mask, Tensor) else mask.to_dense().to(documents.device))
    return documents & (BlockMask.from_dense(mask) if isinstance(mask, Tensor) else mask.to(documents.device))


def _from_tensor(mask: Tensor, method: Method, query: Tensor, Nk: int) -> dict[str, Any]:
    """A 4-D tensor mask: as one bit a key where it is the same for all queries and heads, as bias where it is float."""
    if mask.dim() != 4 or (mask.dtype != torch.bool and not mask.is_floating_point()):
        raise InputError(
            f"a mask tensor must be (batch, heads, queries, keys), bool or float; got {mask.dtype} {tuple(mask.shape)}"
        )
    mask = mask[..., :Nk]
    if mask.is_floating_point() and not method.accepts_bias:
        mask = only_hides(mask)
    if mask.is_floating_point():
        return {"bias": mask.to(query.dtype)}
    same = all(mask.shape[d] == 1 or mask.stride(d) == 0 for d in (1, 2))
    if same and not is_jit_traced() and mask.shape[-1] == Nk:
        return {"key_mask": mask[:, 0, 0]}
    return {"mask": mask}


# --- queries that continue a sequence: cached generation ---


def _among_earlier(
    method: Method, call: dict[str, Any], query: Tensor, key: Tensor, place: tuple[int, int], left: Tensor | None
) -> tuple[Method, dict[str, Any]]:
    """The call for queries that are not the whole sequence: a pattern is that of the sequence, at their rows."""
    first, offset = place
    chosen, rows = continuation(
        method, query.shape[2], key.shape[2], num_heads=query.shape[1], first=first, offset=offset, left=left,
        device=query.device,
    )  # fmt: skip
    if rows is None:
        return chosen, call
    mask = call.get("mask")
    if isinstance(mask, Tensor):
        mask = BlockMask.from_dense(mask)
    return chosen, call | {"mask": rows if mask is None else rows & mask}
