"""Nested tensors, strided and jagged: sequences of a batch with a length each, padded for the computation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import InputError, UnsupportedError
from ..methods.continuation import goes_by_positions

_functional: Any = F


def forward_nested(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    need_weights: bool,
    average_attn_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend within each sequence of nested tensors (strided or jagged); returns a nested tensor like query.

    The sequences are padded for the computation, the padding masked, so weights are (N, max L, max S).
    """
    _functional._mha_shape_check(query, key, value, None, None, module.num_heads)
    if not (query.is_nested and key.is_nested and value.is_nested) or not module.batch_first:
        raise UnsupportedError(
            "nested tensors need batch_first=True and must come as query, key and value together; got batch_first="
            f"{module.batch_first}, nested: query={query.is_nested}, key={key.is_nested}, value={value.is_nested}"
        )
    parts = {id(nested): nested.unbind() for nested in (query, key, value)}
    q_lengths, k_lengths, v_lengths = ([x.shape[0] for x in parts[id(nested)]] for nested in (query, key, value))
    if k_lengths != v_lengths or len(q_lengths) != len(k_lengths):
        raise InputError(
            f"each sequence needs as many values as keys; got lengths {q_lengths}, {k_lengths}, {v_lengths}"
        )
    placed = module.position_bias is None or getattr(module.position_bias(), "alignment", "top_left") == "top_left"
    if q_lengths != k_lengths and not placed:
        raise InputError(
            f"where nested queries of lengths {q_lengths} stand among keys of {k_lengths} is not known to "
            "position_bias; give it alignment='top_left' (query i at key i)"
        )
    if q_lengths != k_lengths and goes_by_positions(module.attention):
        # Padding keeps queries at their keys from the top left on; other places differ from sequence to sequence.
        top_left = getattr(module.attention, "alignment", None) == "top_left" and not module.dense_across
        dense = module.dense_across and max(q_lengths) != max(k_lengths)
        if not top_left and not dense:
            raise InputError(
                f"{module.attention} goes by positions, and where nested queries of lengths {q_lengths} stand among "
                f"keys of {k_lengths} is not known; say alignment=top_left (query i at key i), or use dense"
            )
    padded = {name: pad_sequence(list(sequences), batch_first=True) for name, sequences in parts.items()}
    padding = None
    if min(k_lengths) != max(k_lengths):
        positions = torch.arange(max(k_lengths), device=query.device)
        padding = positions >= torch.tensor(k_lengths, device=query.device)[:, None]
    q, k, v = (padded[id(nested)] for nested in (query, key, value))  # one object stays one object
    out, weights = module.forward(q, k, v, padding, need_weights, None, average_attn_weights)
    rows = [out[n, :length] for n, length in enumerate(q_lengths)]
    jagged: Any = query
    if query.layout is torch.jagged and jagged.lengths() is None:
        # The query's own offsets, for only then do the two add up in a residual connection.
        return torch.nested.nested_tensor_from_jagged(torch.cat(rows), offsets=jagged.offsets()), weights
    return torch.nested.as_nested_tensor(rows, layout=query.layout), weights
