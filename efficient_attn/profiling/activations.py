"""Queries, keys and values to measure on: random ones, photographs, or those of a model, captured while it runs.

A model is copied, its attention is converted to ours with dense attention, and the operands of our operator are kept:
what a layer attends to, with padding, causality and mask as the model sets them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..defaults import default_scale
from ..errors import InputError, UnsupportedError
from ..integrations import convert
from ..masks import BlockMask
from ..measuring.calls import Layer
from ..measuring.inputs import photograph_qkv
from ..multihead import MultiheadAttention
from ..ops.attention import MASK_OPERANDS, mask_arrays
from .model import run

KINDS = ("random", "photographs")
MAX_LAYERS = 4  # layers of a model that are measured, spread evenly


def load(config: Mapping[str, Any]) -> list[Layer]:
    """The layers that a cell measures.

    `config["activations"]`: "random" (the default: independent normal numbers), "photographs" (patches of
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


# --- from a model ---


class _Capture(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers: list[Layer] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        operators = torch.ops.efficient_attn
        if func in (operators.attention_forward.default, operators.attention_with_weights.default):
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
    softcap, sinks, diagonals = args[-4:-1]
    if softcap or sinks is not None or diagonals is not None:
        raise UnsupportedError("a layer has a softcap, sinks or a structured bias, which only exact attention knows")
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
