"""Which tokens an output comes from: `rollout` and `relevance`, for chosen tokens, at O(n) memory.

Both multiply a row r, the tokens that are asked about, from the last layer to the first:

    rollout     r <- (1 - residual) mean_h(P_h)^T r + residual r       Abnar & Zuidema, ACL 2020
    relevance   r <- r + mean_h((dP_h * P_h)^+)^T r                    Chefer, Gur & Wolf, CVPR 2021

with the weights P of a layer and their gradient dP_ij = dout_i . v_j; neither is ever held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import biases
from ..backends.reference import statistics as reference
from ..errors import InputError, UnsupportedError
from ..functional import hide_padding, prepare
from ..methods import Sparse
from .methods import method_statistics, pairs
from .observe import Observation


def rollout(layers: Sequence[Observation], rows: Tensor, *, residual: float = 0.5) -> Tensor:
    """How much each input token reaches the chosen ones, if every layer only mixed tokens by its attention.

    Args:
        layers: self-attention in the order in which it ran, of `observe(model, keep=True)`.
        rows: (B, N), what is asked about: 1 at a class token, or 1/n on n tokens.
        residual: the share that goes past each layer.

    Returns:
        (B, N); sums to what `rows` sums to where attention is softmax attention.

    Raises:
        InputError: layers without inputs, or of different lengths.
    """
    current = _check(layers, rows)
    for layer in reversed(layers):
        heads = layer.inputs["query"].shape[1] if layer.inputs else 1
        found = method_statistics(
            **_inputs(layer), want=("received",), row_weights=current[:, None].expand(-1, heads, -1)
        )
        assert found.received_weighted is not None
        current = residual * current + (1.0 - residual) * found.received_weighted[0].mean(1).to(current.dtype)
    return current


def relevance(layers: Sequence[Observation], rows: Tensor) -> Tensor:
    """The relevance of each input token for the value whose `backward()` ran inside `observe(model, keep=True)`.

    Args:
        layers: as for `rollout`, with gradients.
        rows: (B, N): 1 at the token that the value was computed from, a class token for example.

    Returns:
        (B, N), at least `rows`.

    Raises:
        InputError: layers without inputs or gradients, or of different lengths.
        UnsupportedError: low-rank methods, whose weights are not known one by one.
    """
    current = _check(layers, rows)
    for layer in reversed(layers):
        added = _times_gradient(layer, current, positive=True)
        current = current + added.mean(1).to(current.dtype)
    return current


def attention_times_gradient(layer: Observation) -> Tensor:
    """sum_i P_ij dP_ij of a layer, (B, Hq, Nk): what each key gives to the value whose backward ran, to first order.

    Raises: as `relevance`.
    """
    query = _inputs(layer)["query"]
    return _times_gradient(layer, query.new_ones(query.shape[0], query.shape[2]), positive=False)


def _check(layers: Sequence[Observation], rows: Tensor) -> Tensor:
    if not layers:
        raise InputError("there are no layers; run the model within observe(model, keep=True)")
    for layer in layers:
        batch = _inputs(layer)["query"].shape[0]
        if (batch, layer.queries) != tuple(rows.shape) or layer.keys != layer.queries:
            raise InputError(
                f"rows must be (B, N) and every layer attend from N tokens to the same N; got {tuple(rows.shape)}, and "
                f"{layer.name!r} has batch {batch}, {layer.queries} queries and {layer.keys} keys. Leave out layers "
                "that are no self-attention of these tokens"
            )
    return rows.detach().to(torch.promote_types(rows.dtype, torch.float32))


def _inputs(layer: Observation) -> dict[str, Any]:
    if layer.inputs is None:
        raise InputError(f"the inputs of {layer.name!r} were not kept; use observe(model, keep=True)")
    return layer.inputs


def _times_gradient(layer: Observation, rows: Tensor, *, positive: bool) -> Tensor:
    inputs = dict(_inputs(layer))
    if layer.grad_out is None:
        raise InputError(
            f"{layer.name!r} has no gradient: call backward() on the value in question within "
            "observe(model, keep=True), with gradients enabled and without need_weights of torch.nn.MultiheadAttention"
        )
    method = inputs.pop("method")
    if not isinstance(method, Sparse):
        raise UnsupportedError(f"relevance needs the weights of {layer.name!r} one by one; {method} does not have them")
    inputs.pop("state", None)
    query, key, value = (inputs.pop(name) for name in ("query", "key", "value"))
    key_mask = inputs.pop("key_mask", None)
    modifiers = {name: inputs.pop(name, None) for name in ("softcap", "sinks")}
    query, key, mask, bias = pairs(method, query, key, key_mask=key_mask, **inputs)
    places = {name: inputs[name] for name in ("is_causal", "causal_alignment", "scale") if name in inputs}
    dense, structured = biases.split(bias)
    key, value, mask, dense = hide_padding(query, key, value, key_mask, mask=mask, bias=dense, **places)
    bias = biases.join(dense, structured)
    with torch.no_grad():
        call = prepare(query, key, value, mask=mask, bias=bias, backend="reference", **places, **modifiers)
        grad_out = layer.grad_out.reshape(*query.shape[:3], value.shape[3])
        return reference.times_gradient(
            grad_out, call.query, call.key, call.value, call.bias, call.mask, call.scale, rows, positive,
            call.softcap, call.sinks, call.diagonals,
        )  # fmt: skip
