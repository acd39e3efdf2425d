"""What surrounds attention: projections to heads and back.

The parameters are read at every call, so that what others merge into them counts. Letters: N batch, L queries, S keys,
E embed_dim, H heads, D head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def project(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project to E features each; inputs that are one tensor share one matrix product."""
    E = module.embed_dim
    if not module._qkv_same_embed_dim:
        biases = (None, None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        return (
            F.linear(query, module.q_proj_weight, biases[0]),
            F.linear(key, module.k_proj_weight, biases[1]),
            F.linear(value, module.v_proj_weight, biases[2]),
        )
    weight = module.in_proj_weight
    bias = None if module.in_proj_bias is None else module.in_proj_bias.to(weight.dtype)
    if query is key and key is value:
        q, k, v = F.linear(query, weight, bias).chunk(3, dim=-1)
        return q, k, v
    q = F.linear(query, weight[:E], None if bias is None else bias[:E])
    if key is value:
        k, v = F.linear(key, weight[E:], None if bias is None else bias[E:]).chunk(2, dim=-1)
        return q, k, v
    k = F.linear(key, weight[E : 2 * E], None if bias is None else bias[E : 2 * E])
    return q, k, F.linear(value, weight[2 * E :], None if bias is None else bias[2 * E :])


def project_to_heads(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Project, and view as heads (N, H, L, D).

    Without a gradient the features of one product are taken apart as heads at once; with one that would copy the
    gradient once more.
    """
    if (
        query is key
        and key is value
        and query.dim() == 3
        and module._qkv_same_embed_dim
        and not torch.is_grad_enabled()
    ):
        weight, bias = module.in_proj_weight, module.in_proj_bias
        projected = F.linear(query, weight, None if bias is None else bias.to(weight.dtype))
        heads = projected.view(*query.shape[:2], 3, module.num_heads, module.head_dim)
        q, k, v = heads.permute((2, 0, 3, 1, 4) if module.batch_first else (2, 1, 3, 0, 4)).unbind(0)
        return q, k, v
    q, k, v = (split_heads(module, x) for x in project(module, query, key, value))
    return q, k, v


def split_heads(module: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """(L, N, E), (N, L, E) or (L, E) -> (N, H, L, D), a view."""
    x = x.view(*x.shape[:-1], module.num_heads, module.head_dim)
    if x.dim() == 3:
        return x.transpose(0, 1).unsqueeze(0)
    return x.transpose(1, 2) if module.batch_first else x.permute(1, 2, 0, 3)


def merge_heads(module: nn.MultiheadAttention, x: Tensor, batched: bool) -> Tensor:
    """(N, H, L, D) -> the layout of the query."""
    if not batched:
        return x.squeeze(0).transpose(0, 1).flatten(1)
    return (x.transpose(1, 2) if module.batch_first else x.permute(2, 0, 1, 3)).flatten(2)


def append_columns(module: nn.MultiheadAttention, x: Tensor, learned: Tensor | None) -> Tensor:
    """Append the learned row (add_bias_kv) and the zero row (add_zero_attn) to keys or values (N, H, S, D)."""
    rows = [x]
    if learned is not None:
        rows.append(learned.view(1, module.num_heads, 1, module.head_dim).to(x.dtype).expand(x.shape[0], -1, -1, -1))
    if module.add_zero_attn:
        rows.append(x.new_zeros(*x.shape[:2], 1, module.head_dim))
    return torch.cat(rows, dim=2)
