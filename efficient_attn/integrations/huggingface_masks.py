"""What transformers asks a mask function for, without the n x n tensor: padding as one bit a key, the rest analytic.

transformers describes a mask by a function of (batch, head, query, key) indices, a padding mask (B, keys), and where
queries and keys start. Causal and sliding-window functions become an interval of key - query, which costs no memory;
for one query any function is one bit a key; every other function is asked tile by tile for an exact `BlockMask`.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import InputError, UnsupportedError
from ..masks import BlockMask
from ..methods.left_padding import left_padding
from ..tracing import is_jit_traced, is_recorded
from ..varlen import varlen_mask

Interval = tuple[int | None, int | None]  # of key - query, both ends included; None: unlimited


class NotATensorError(UnsupportedError, AttributeError):
    """An attribute of tensors that a PairMask does not have; `hasattr` says no to it."""


@dataclass(frozen=True, eq=False)
class PairMask:
    """A mask on its way from a model's mask function to its attention layers.

    Attributes:
        shape: (B, 1, Nq, Nk), as a tensor in its place would have.
        key_mask: bool (B, Nk), True = attend, or None: padding.
        pairs: what is visible besides, or None for everything. A bool tensor only under torch.compile.
        start: the key that stands where query 0 does, for layers that attend to their own past; else None.
        offset: the position of key 0 in the sequence; not 0 where a cache has dropped the oldest keys.
        causal: whether `pairs` is exactly j <= i + start.
        left: how many tokens of each sequence are padding before the first real one, int64 (B,), or None for none.
        device: where the tensor in its place would be.

    It is asked for its shape, dtype and device, sliced, repeated, joined with others, added to numbers, or a condition,
    as a model does with its mask: then a tensor stands in for it, n x n, and so it does in the layers.
    """

    shape: tuple[int, ...]
    key_mask: Tensor | None = None
    pairs: BlockMask | Tensor | None = None
    start: int | None = None
    offset: int = 0
    causal: bool = False
    left: Tensor | None = None
    device: torch.device | str = "cpu"

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one of its numbers, as tensors have it."""
        return torch.Size(self.shape) if dim is None else self.shape[dim]

    @property
    def dtype(self) -> torch.dtype:
        """What a tensor in its place would have: True = attend."""
        return torch.bool

    def contiguous(self) -> PairMask:
        return self

    def to(self, *args: Any, **kwargs: Any) -> PairMask:
        """A mask in another place, as tensors have it; a dtype is of no meaning here and ignored."""
        device, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None:
            return self
        moved = {name: getattr(self, name) for name in ("key_mask", "pairs", "left")}
        moved = {name: value if value is None else value.to(device) for name, value in moved.items()}
        return dataclasses.replace(self, **moved, device=torch.device(device))

    def dense(self) -> Tensor:
        """The bool tensor of this shape, True = attend: n x n memory, for models that calculate with their mask."""
        pairs = self.pairs.to_dense() if isinstance(self.pairs, BlockMask) else self.pairs
        found = torch.ones((), dtype=torch.bool, device=self.device) if pairs is None else pairs.to(self.device)
        if self.key_mask is not None:
            found = found & self.key_mask[:, None, None, :].to(self.device)
        return found.expand(self.shape)

    def added(self, dtype: torch.dtype) -> Tensor:
        """What is added to scores: 0 where a pair is visible, else the least number, as eager's masks have it."""
        shown = self.dense()
        zeros = torch.zeros(shown.shape, dtype=dtype, device=shown.device)
        return zeros.masked_fill(~shown, torch.finfo(dtype).min)

    def __getitem__(self, index: Any) -> PairMask:
        parts = index if isinstance(index, tuple) else (index,)
        if len(parts) <= len(self.shape) and all(
            isinstance(part, slice) and part.step in (None, 1) and part.start in (None, 0)
            and (part.stop is None or (isinstance(part.stop, int) and part.stop >= size))
            for part, size in zip(parts, self.shape, strict=False)
        ):  # everything  # fmt: skip
            return self
        return _as_pair_mask(self.dense()[index])

    def __bool__(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"PairMask has no attribute {name!r}")
        if name in REARRANGING:
            return lambda *args, **kwargs: _as_pair_mask(getattr(self.dense(), name)(*args, **kwargs))
        if name == "logical_not":
            return self.__invert__
        raise NotATensorError(self._refusal(f"asks for {name} of"))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What models do with masks, on the tensor that it stands for; what could mean two things is refused."""
        name, kwargs = getattr(func, "__name__", str(func)), kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and not isinstance(x, PairMask)]
        floats = [x.dtype for x in given if x.is_floating_point()]
        if name in JOINING and floats:  # a model that joins its mask with numbers adds them to scores
            return func(*_without_masks(args, floats[0]), **_without_masks(kwargs, floats[0]))
        if name in REARRANGING | JOINING:
            return _as_pair_mask(func(*_without_masks(args), **_without_masks(kwargs)))
        if name in CHOOSING:
            return func(*_without_masks(args), **_without_masks(kwargs))
        cls._refuse(f"calls {name} on")
        return None

    def __add__(self, other: Any) -> Tensor:
        if not isinstance(other, Tensor) or not other.is_floating_point():
            self._refuse("calculates with")
        return self.added(other.dtype) + other

    __radd__ = __add__

    def __and__(self, other: Tensor | PairMask) -> PairMask:
        if isinstance(other, PairMask) and not any(isinstance(x.pairs, Tensor) for x in (self, other)):
            return self._joined(other)
        return _as_pair_mask(self.dense() & (other.dense() if isinstance(other, PairMask) else other))

    def _joined(self, other: PairMask) -> PairMask:
        """What both allow, without a tensor of pairs."""
        shape = torch.broadcast_shapes(self.shape, other.shape)
        pairs = [x.pairs for x in (self, other) if isinstance(x.pairs, BlockMask)]
        keys = [x.key_mask for x in (self, other) if x.key_mask is not None]
        return PairMask(
            tuple(shape), functools.reduce(operator.and_, keys) if keys else None,
            functools.reduce(operator.and_, pairs) if pairs else None, device=self.device,
        )  # fmt: skip

    def __or__(self, other: Tensor | PairMask) -> PairMask:
        return _as_pair_mask(self.dense() | (other.dense() if isinstance(other, PairMask) else other))

    __rand__, __ror__ = __and__, __or__

    def __invert__(self) -> Tensor:
        return ~self.dense()

    @classmethod
    def _refuse(cls, what: str) -> NoReturn:
        raise UnsupportedError(cls._refusal(what))

    @staticmethod
    def _refusal(what: str) -> str:
        return (
            f"this model {what} its attention mask, which it expects to be a tensor of numbers; efficient_attn keeps "
            "masks without n x n memory, True = attend. Use attn_implementation='sdpa' for it, or pass it a 4-D bool "
            "mask of your own"
        )


class MaskWithoutBias(PairMask):
    """A mask for layers that add ALiBi to their scores themselves.

    Falcon's model writes its ALiBi into a mask of four dimensions, which makes that one of pairs and heads, n x n each;
    any other goes to its layers as it is.
    """

    @property
    def ndim(self) -> int:
        return 0


def _layers_add_alibi(config: Any) -> bool:
    return getattr(config, "model_type", None) == "falcon" and bool(getattr(config, "alibi", False))


# Of a mask another mask; together with numbers, numbers; only where a bool is asked for.
REARRANGING = frozenset(
    {"expand", "expand_as", "repeat", "repeat_interleave", "broadcast_to", "unsqueeze", "squeeze", "view", "reshape",
     "flatten", "unflatten", "transpose", "permute", "narrow", "index_select", "clone", "detach", "tile", "swapaxes",
     "movedim", "select", "flip", "roll"}
)  # fmt: skip
JOINING = frozenset({"cat", "concat", "concatenate", "stack", "add"})
CHOOSING = frozenset(
    {"where", "masked_fill", "masked_fill_", "bitwise_and", "bitwise_or", "bitwise_not", "__and__", "__or__"}
)


def _as_pair_mask(shown: Tensor) -> PairMask:
    """The mask that a bool tensor is, of any shape."""
    return PairMask(tuple(shown.shape), None, shown, device=shown.device)


def _without_masks(arguments: Any, dtype: torch.dtype | None = None) -> Any:
    """The arguments with tensors in the place of masks: what is added to scores in a dtype, else True = attend."""
    return tree_map(
        lambda x: (x.dense() if dtype is None else x.added(dtype)) if isinstance(x, PairMask) else x, arguments
    )


def _refuse_operator(self: PairMask, *operands: Any) -> NoReturn:
    self._refuse("calculates with")


for _operator in ("sub", "rsub", "mul", "rmul", "truediv", "lt", "le", "gt", "ge", "neg", "setitem", "len", "iter"):
    setattr(PairMask, f"__{_operator}__", _refuse_operator)


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The function of a mask that is asked for without one."""
    return j <= i


def pair_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal,
    attention_mask: Tensor | PairMask | None = None,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **ignored: Any,
) -> PairMask | None:
    """The mask function to register in transformers' AttentionMaskInterface; its signature is transformers'.

    Args:
        q_offset, kv_offset: positions of the first query and the first key.
        mask_function: of (batch, head, query, key) positions.
        attention_mask: padding, bool (B, keys seen so far), or a mask that this function made before.
        allow_is_bidirectional_skip: whether None may stand for a mask that hides nothing.
        use_vmap: whether mask_function may ask about single positions only.
        config: of the model.

    Raises:
        InputError: a padding mask that is not (B, keys).
    """
    if isinstance(attention_mask, PairMask):
        return attention_mask
    made = _made(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
        allow_is_bidirectional_skip, use_vmap, device,
    )  # fmt: skip
    made = None if made is None else dataclasses.replace(made, device=torch.device(device))
    if made is not None and _layers_add_alibi(config):
        made = MaskWithoutBias(**vars(made))
    if made is None or made.key_mask is None or attention_mask is None or is_jit_traced():
        return made  # traced attention is dense, which asks for no places
    left = left_padding(attention_mask.bool())
    return made if left is None else dataclasses.replace(made, left=left.expand(batch_size))


def packed_documents(arguments: dict[str, Any], query: Tensor, key: Tensor) -> BlockMask | Tensor | None:
    """The documents that a layer's keyword arguments name, as DataCollatorWithFlattening passes them: cu_seq_lens_q and
    cu_seq_lens_k, where packed sequences begin, or seq_idx, the document of each token; None for none.

    Args:
        query, key: (1, heads, tokens of all documents, D); with seq_idx any batch.

    Returns:
        What a query may see, as to documents; a bool tensor while a graph is recorded.

    Raises:
        InputError: places that are not those of this layer's queries and keys.
    """
    starts_q, starts_k, ids = (arguments.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"))
    starts_q = starts_k if starts_q is None else starts_q
    starts_k = starts_q if starts_k is None else starts_k
    Nq, Nk = query.shape[2], key.shape[2]
    if starts_q is None or starts_k is None:
        if ids is None:
            return None
        if tuple(ids.shape) not in ((1, Nq), (query.shape[0], Nq)) or Nq != Nk:
            raise InputError(
                f"seq_idx {tuple(ids.shape)} must name the document of each of {Nq} tokens; this layer attends from "
                f"{Nq} to {Nk}"
            )
        if is_recorded():
            same: Tensor = (ids[:, :, None] == ids[:, None])[:, None]
            return same
        return _document_mask(ids)
    if query.shape[0] != 1:
        raise InputError(f"cu_seq_lens speak of one row of packed tokens; the batch has {query.shape[0]}")
    if is_recorded():
        own_q, own_k = (
            torch.bucketize(torch.arange(length, device=query.device), starts[1:].to(query.device), right=True)
            for starts, length in ((starts_q, Nq), (starts_k, Nk))
        )
        return (own_q[:, None] == own_k)[None, None]
    ends = int(starts_q[-1]), int(starts_k[-1])
    if ends != (Nq, Nk):
        raise InputError(
            f"cu_seq_lens end at {ends[0]} queries and {ends[1]} keys; this layer attends from {Nq} to {Nk}. Leave "
            "them out for a model whose layers see other tokens than the packed ones"
        )
    return varlen_mask(Nq, Nk, starts_q, starts_k, device=query.device)


def _document_mask(ids: Tensor) -> BlockMask:
    """The mask of documents (1 or B, N): in one row, each in one piece, that of packed sequences, which is kept."""
    if ids.shape[0] == 1 and ids.shape[1]:
        changes = (ids[0].diff() != 0).nonzero()[:, 0] + 1
        if int(ids[0].unique().numel()) > changes.numel():
            return varlen_mask(ids.shape[1], ids.shape[1], [0, *changes.tolist(), ids.shape[1]], device=ids.device)
    return BlockMask.from_documents(ids)


def _made(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None,
    allow_is_bidirectional_skip: bool,
    use_vmap: bool,
    device: torch.device | str,
) -> PairMask | None:
    """The mask of one function, `left` aside."""
    key_mask = _padding(attention_mask, batch_size, kv_length, kv_offset)
    tracing = is_recorded()
    if isinstance(q_offset, Tensor) and not tracing:
        q_offset = int(q_offset)
    shape = (batch_size, 1, q_length, kv_length)
    interval = _interval(mask_function)
    if interval == (None, None):
        return None if key_mask is None and allow_is_bidirectional_skip else PairMask(shape, key_mask)
    if is_jit_traced():  # the program runs on other lengths, too: nothing may be decided by this one
        asked = _asked(mask_function, batch_size, q_length, kv_length, q_offset, kv_offset, use_vmap, device)
        return PairMask(shape, key_mask, asked)
    start = None if isinstance(q_offset, Tensor) else q_offset - kv_offset
    if q_length == 1 and interval is not None and start is not None and _reaches_all(interval, start, kv_length):
        return PairMask(shape, key_mask, None, start, kv_offset)
    if q_length == 1:
        seen = _asked(mask_function, batch_size, 1, kv_length, q_offset, kv_offset, use_vmap, device)[:, 0, 0]
        return PairMask(shape, seen if key_mask is None else seen & key_mask, None, start, kv_offset)
    if interval is not None and start is not None:
        pairs = _window(interval, q_length, kv_length, start)
        return PairMask(shape, key_mask, pairs, start, kv_offset, causal=interval == (None, 0))
    if tracing:  # how many blocks a mask lists is not known while tracing: one bool a pair
        asked = _asked(mask_function, batch_size, q_length, kv_length, q_offset, kv_offset, use_vmap, device)
        return PairMask(shape, key_mask, asked, start, kv_offset)
    packed = _packed(mask_function)
    if packed is not None and start == 0 and q_length == kv_length == packed[0].shape[1]:
        pairs = _document_mask(packed[0].to(device)) & _window(packed[1], q_length, kv_length)
        return PairMask(shape, key_mask, pairs, start, kv_offset)
    ask = _one_by_one(mask_function) if use_vmap else mask_function
    pairs = BlockMask.from_predicate(
        lambda b, h, i, j: ask(b, h, i + q_offset, j + kv_offset),
        q_len=q_length,
        kv_len=kv_length,
        batch=batch_size,
        device=device,
    )
    return PairMask(shape, key_mask, pairs, start, kv_offset)


def _padding(attention_mask: Tensor | None, batch_size: int, kv_length: int, kv_offset: int) -> Tensor | None:
    """bool (B, kv_length), or None where no key is padding; keys that the mask does not reach are hidden."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[0] not in (1, batch_size):
        raise InputError(
            f"attention_mask must be (batch, keys) with batch {batch_size}, or 4-D; got {tuple(attention_mask.shape)}"
        )
    found = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if found.shape[1] < kv_length:
        found = torch.nn.functional.pad(found, (0, kv_length - found.shape[1]))
    found = found.expand(batch_size, -1)
    return None if not is_recorded() and bool(found.all()) else found


def _interval(mask_function: Callable[..., Any]) -> Interval | None:
    """The interval of key - query in which a mask function is true, or None if it is not known to be an interval.

    transformers joins its functions from closures; their names and variables say which. A function that is not known
    here costs speed and never correctness: it is asked instead. So are closures that torch.compile traces, whose
    variables cannot be read there.
    """
    known = sys.modules.get("transformers.masking_utils")
    if mask_function is causal or mask_function is getattr(known, "causal_mask_function", None):
        return (None, 0)
    if mask_function is getattr(known, "bidirectional_mask_function", None):
        return (None, None)
    name = getattr(mask_function, "__qualname__", "")
    if torch.compiler.is_compiling() or getattr(mask_function, "__module__", None) != "transformers.masking_utils":
        return None
    variables = _variables(mask_function)
    if name == "sliding_window_overlay.<locals>.inner_mask":
        return (1 - int(variables["sliding_window"]), None)
    if name == "sliding_window_bidirectional_overlay.<locals>.inner_mask":
        size = int(variables["sliding_window"])
        return (-size, size)
    if name != "and_masks.<locals>.and_mask":
        return None
    parts = [_interval(part) for part in variables["mask_functions"]]
    if None in parts:
        return None
    lows = [part[0] for part in parts if part is not None and part[0] is not None]
    highs = [part[1] for part in parts if part is not None and part[1] is not None]
    return (max(lows) if lows else None, min(highs) if highs else None)


def _packed(mask_function: Callable[..., Any]) -> tuple[Tensor, Interval] | None:
    """The documents (B, N) of a mask function for packed sequences, and the interval within each; None for others."""
    if getattr(mask_function, "__qualname__", "") != "and_masks.<locals>.and_mask":
        return None
    parts = {part.__qualname__: part for part in _variables(mask_function)["mask_functions"]}
    names = ("packed_sequence_mask_function", "remap_positions_for_packed_sequence")
    own, within = (parts.get(f"{name}.<locals>.inner_mask") for name in names)
    interval = None if within is None else _interval(_variables(within)["mask_function"])
    if len(parts) != 2 or own is None or interval is None:
        return None
    return _variables(own)["packed_sequence_mask"], interval


def _variables(function: Callable[..., Any]) -> dict[str, Any]:
    """What a closure holds."""
    names: tuple[str, ...] = function.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, function.__closure__ or (), strict=True)}


def _window(interval: Interval, q_length: int, kv_length: int, start: int = 0) -> BlockMask:
    """The pairs with key - query in an interval around 0, for a query 0 that stands at key `start`."""
    left, right = (-1 if end is None else abs(end) for end in interval)
    return BlockMask(q_length, kv_length, window=(left, right), window_offset=start)


def _reaches_all(interval: Interval, start: int, kv_length: int) -> bool:
    """Whether a query at key `start` sees every key."""
    low, high = interval
    return (low is None or start + low <= 0) and (high is None or start + high >= kv_length - 1)


def _asked(
    mask_function: Callable[..., Any],
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    use_vmap: bool,
    device: torch.device | str,
) -> Tensor:
    """What a function says about every pair, bool (B, 1, q_length, kv_length)."""
    b = torch.arange(batch_size, device=device)[:, None, None, None]
    h = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
    i = (torch.arange(q_length, device=device) + q_offset)[:, None]
    j = torch.arange(kv_length, device=device) + kv_offset
    seen: Tensor = (_one_by_one(mask_function) if use_vmap else mask_function)(b, h, i[None, None], j[None, None, None])
    return seen.expand(batch_size, 1, q_length, kv_length)


def _one_by_one(mask_function: Callable[..., Any]) -> Callable[..., Tensor]:
    """The function for index tensors, from one for single positions."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    def ask(*positions: Tensor) -> Tensor:
        spread = torch.broadcast_tensors(*positions)
        with TransformGetItemToIndex():
            seen: Tensor = torch.vmap(mask_function)(*(p.reshape(-1) for p in spread))
        return seen.reshape(spread[0].shape)

    return ask
