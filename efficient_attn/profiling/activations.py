"""Queries, keys and values to measure on: random ones, photographs, or those of a model, captured while it runs.

A model is copied, its attention is converted to ours with dense attention, and the operands of our operator are kept:
what a layer attends to, with padding, causality and mask as the model sets them.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..defaults import alignment_offset, default_scale
from ..errors import InputError, UnsupportedError
from ..integrations import convert
from ..masks import BlockMask
from ..measuring.inputs import photograph_qkv
from ..multihead import MultiheadAttention
from ..ops.attention import MASK_OPERANDS, mask_arrays
from .model import run

KINDS = ("random", "photographs")
ERROR_ROWS = 256  # queries, spread evenly, over which an error is taken
MAX_LAYERS = 4  # layers of a model that are measured, spread evenly


@dataclass
class Layer:
    """What one layer attends to: query (B, Hq, Nq, D), key (B, Hkv, Nk, D), value (B, Hkv, Nk, Dv), and which pairs
    count: causality (with its alignment), padding (B, Nk) and a mask of pairs."""

    query: Tensor
    key: Tensor
    value: Tensor
    is_causal: bool = False
    causal_alignment: str | None = None
    key_mask: Tensor | None = None
    mask: BlockMask | None = None
    scale: float | None = None

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def is_plain(self) -> bool:
        """Whether a shorter piece of it means the same."""
        return self.key_mask is None and self.mask is None and self.query.shape[2] == self.key.shape[2]

    def options(self, q_len: int) -> dict[str, Any]:
        """The keywords of `Method.attend`; causality of a piece needs no alignment."""
        alignment = self.causal_alignment if q_len == self.query.shape[2] else None
        options = {"is_causal": self.is_causal, "causal_alignment": alignment, "scale": self.scale}
        return options | {"key_mask": self.key_mask, "mask": self.mask}

    def value_like_output(self) -> Tensor:
        """A gradient of the output's shape, as structured as the values."""
        group = self.query.shape[1] // self.value.shape[1]
        rows = torch.arange(self.query.shape[2]) % self.value.shape[2]
        return self.value.detach().repeat_interleave(group, dim=1)[:, :, rows].roll(1, dims=2).contiguous()


def load(config: Mapping[str, Any]) -> list[Layer]:
    """The layers that a cell measures.

    ``config["activations"]``: "random" (the default: independent normal numbers), "photographs" (patches of
    scikit-learn's photographs), or the path of what `save` wrote.
    """
    torch.manual_seed(config["seed"])
    kind = config.get("activations", "random")
    dtype = getattr(torch, config["dtype"])
    if kind not in KINDS:
        return _restored(torch.load(kind, weights_only=True))
    batch, heads, kv_heads, length, head_dim = (
        config[name] for name in ("batch", "heads", "kv_heads", "seqlen", "head_dim")
    )
    if kind == "photographs":
        query, key, value = photograph_qkv(
            length, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype
        )
    else:
        query = torch.randn(batch, heads, length, head_dim, dtype=dtype)
        key, value = (torch.randn(batch, kv_heads, length, head_dim, dtype=dtype) for _ in range(2))
    return [Layer(query, key, value, is_causal=config["causal"])]


# --- from a model ----------------------------------------------------------------------------------------------------


class _Capture(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers: list[Layer] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.efficient_attn.attention_forward.default:
            self.layers.append(_layer(args))
        return func(*args, **(kwargs or {}))


def captured(model: nn.Module, sample: Any, layers: int = MAX_LAYERS) -> list[Layer]:
    """What the attention layers of a model attend to on a sample; at most `layers` of them, spread evenly.

    Args:
        model: any module that `convert` can convert; it is copied, not changed.
        sample: a tensor, a tuple of positional or a mapping of keyword arguments.

    Raises:
        InputError, ConversionError, UnsupportedError: the model cannot be converted, or a layer adds a bias to scores.
    """
    if isinstance(model, nn.MultiheadAttention):
        twin: nn.Module = MultiheadAttention.from_torch(copy.deepcopy(model)).eval()
    else:
        twin = copy.deepcopy(model).eval()
        convert(twin, "dense")
    capture = _Capture()
    with torch.no_grad(), capture:
        run(twin, sample)
    found = capture.layers
    if not found:
        raise InputError("no attention layer of the model ran on the sample")
    step = max(1, -(-len(found) // layers))
    return found[::step]


def _layer(args: tuple[Any, ...]) -> Layer:
    query, key, value, bias, *mask = args[: 4 + MASK_OPERANDS]
    padding = None if bias is None else _as_padding(bias)
    arrays = mask_arrays(*mask)
    q_len, kv_len = query.shape[2], key.shape[2]
    query, key, value = (t.detach().clone() for t in (query, key, value))
    scale = float(args[4 + MASK_OPERANDS])
    usual = abs(scale - default_scale(None, query.shape[3])) < 1e-6 * scale  # some methods have no other
    layer = Layer(query, key, value, key_mask=padding, scale=None if usual else scale)
    if arrays.kv_lengths is not None:
        inside = torch.arange(kv_len) < arrays.kv_lengths.cpu()[:, None]
        layer.key_mask = inside.expand(query.shape[0], -1).clone()
    offset = arrays.window_offset + arrays.window_right
    if arrays.indptr is None and arrays.window_left < 0 and arrays.window_right < 0:
        return layer
    if arrays.indptr is None and arrays.window_left < 0 and offset in (0, kv_len - q_len):
        layer.is_causal = True
        layer.causal_alignment = "top_left" if offset == 0 else "bottom_right"
        return layer
    layer.mask = BlockMask.from_arrays(arrays._replace(kv_lengths=None), q_len=q_len, kv_len=kv_len)
    return layer


def _as_padding(bias: Tensor) -> Tensor:
    """Padding (B, Nk) that came as a bias of 0 and -inf, one number a key."""
    if bias.shape[1] == bias.shape[2] == 1 and bool(((bias == 0) | (bias == -torch.inf)).all()):
        return (bias == 0)[:, 0, 0]
    raise UnsupportedError("a layer of this model adds a bias to its scores, which only dense attention can do")


def save(layers: Sequence[Layer], path: Path) -> None:
    """Write layers to a file that a worker can read (tensors and numbers only)."""
    found = []
    for layer in layers:
        parts = {name: getattr(layer, name) for name in layer.__dataclass_fields__ if name != "mask"}
        parts["mask"] = None if layer.mask is None else layer.mask._fields()
        found.append(parts)
    torch.save(found, path)


def _restored(found: Sequence[Mapping[str, Any]]) -> list[Layer]:
    return [
        Layer(**{**parts, "mask": None if parts["mask"] is None else BlockMask(**parts["mask"])}) for parts in found
    ]


# --- errors ----------------------------------------------------------------------------------------------------------


def relative_error(out: Tensor, layer: Layer) -> float:
    """|out - exact| / |exact| (Frobenius) over `ERROR_ROWS` queries, exact being dense attention in float64.

    In self-attention queries that are padding count no more than their keys.
    """
    length = layer.query.shape[2]
    rows = torch.linspace(0, length - 1, min(length, ERROR_ROWS)).round().long()
    visible = _visible(layer, rows)
    group = layer.query.shape[1] // layer.key.shape[1]
    scale = default_scale(layer.scale, layer.query.shape[-1])
    difference = norm = 0.0
    for b, h in itertools.product(*map(range, layer.query.shape[:2])):  # one head at a time: rows x keys in float64
        value = layer.value[b, h // group].double()
        scores = layer.query[b, h, rows].double() @ layer.key[b, h // group].double().mT * scale
        if visible is not None:
            scores = scores.masked_fill(~visible[b % visible.shape[0], h % visible.shape[1]], -torch.inf)
        if layer.key_mask is not None:
            scores = scores.masked_fill(~layer.key_mask[b], -torch.inf)
            value = value.masked_fill(~layer.key_mask[b, :, None], 0.0)
        exact = scores.softmax(dim=-1).nan_to_num(0.0) @ value  # a row without keys is 0
        counts = slice(None) if layer.key_mask is None or length != layer.key.shape[2] else layer.key_mask[b, rows]
        difference += (out[b, h, rows].double() - exact)[counts].square().sum().item()
        norm += exact[counts].square().sum().item()
    return float(f"{(difference / norm) ** 0.5:.3g}") if norm else float(difference > 0)


def _visible(layer: Layer, rows: Tensor) -> Tensor | None:
    """The pairs of some queries that causality and mask allow, bool (1 | B, 1 | Hq, rows, Nk); None: all."""
    length, kv_len = layer.query.shape[2], layer.key.shape[2]
    visible = None
    if layer.is_causal:
        offset = alignment_offset(layer.causal_alignment, length, kv_len)
        visible = (torch.arange(kv_len) <= rows[:, None] + offset)[None, None]
    if layer.mask is not None:
        drawn = layer.mask.to_dense()[:, :, rows]
        visible = drawn if visible is None else drawn & visible
    return visible
