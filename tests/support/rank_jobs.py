"""What ranks do in tests of distributed/: functions of (group, ...) that a process can be told by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from efficient_attn import BlockMask, attention
from efficient_attn.distributed import Shards, context_parallel
from support.accuracy import gradients
from support.cases import CASES, Case, draw

SEED = 0x1234_5678_9ABC


def spread(x: Tensor, shards: Shards, rank: int, dim: int) -> Tensor:
    return shards.part(x, rank, dim)


def run_case(group: Any, name: str, dtype: torch.dtype, transport: str, layout: Any, backend: str = "auto") -> dict:
    """A conformance case on this rank's part; what it gets, the bias gradient too, as parts."""
    case = next(case for case in CASES if case.name == name)
    drawn = draw(case, dtype)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    with context_parallel(group, shards=layout, transport=transport, timeout=15) as context:
        queries, keys = context.shards(case.Nq), context.shards(case.Nk)
        part = {
            "query": queries.part(drawn["query"], rank, 2), "key": keys.part(drawn["key"], rank, 2),
            "value": keys.part(drawn["value"], rank, 2),
        }  # fmt: skip
        if drawn["bias"] is not None:
            bias = drawn["bias"]
            rows = bias.dim() > 1 and bias.shape[-2] > 1
            part["bias"] = queries.part(bias, rank, bias.dim() - 2) if rows else bias
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in part.items()}
        out, lse = attention(
            **leaves, mask=drawn["mask"], is_causal=case.causal is not None, causal_alignment=case.causal,
            scale=case.scale, dropout_p=case.dropout_p, dropout_seed=SEED, return_lse=True, backend=backend,
        )  # fmt: skip
        outputs, cotangents = (out,), (queries.part(drawn["grad_out"], rank, 2),)
        if case.grad_lse:
            outputs, cotangents = (out, lse), (*cotangents, queries.part(drawn["grad_lse"], rank, 2))
        found = dict(zip(leaves, gradients(outputs, list(leaves.values()), cotangents), strict=True))
        return {"out": out.detach(), "lse": lse.detach(), **found, "shards": (queries, keys), "ranks": ranks}


def joined(parts: list[dict], case: Case) -> dict[str, Tensor]:
    """The whole sequence's results of every rank's."""
    queries, keys = parts[0]["shards"]
    whole = {name: queries.whole([part[name] for part in parts], 2) for name in ("out", "lse", "query")}
    whole |= {name: keys.whole([part[name] for part in parts], 2) for name in ("key", "value")}
    if "bias" in parts[0]:
        biases = [part["bias"] for part in parts]
        rows = case.bias is not None and len(case.bias) > 1 and case.bias[-2] == 0 and case.Nq != 1
        if rows:
            whole["bias"] = queries.whole(biases, biases[0].dim() - 2)
        else:
            whole["bias"] = torch.stack([bias.double() for bias in biases]).sum(0).to(biases[0].dtype)
    return whole


@dataclass
class Call:
    """A random configuration: whole tensors, and how they are spread."""

    query: Tensor
    key: Tensor
    value: Tensor
    arguments: dict[str, Any]
    key_mask: Tensor | None
    grad: Tensor
    layout: Any
    transport: str
    method: Any = None


def run_call(group: Any, call: Call) -> dict[str, Any]:
    """A call on this rank's part: out, gradients, bytes sent."""
    from efficient_attn.functional import padded_attention

    rank = dist.get_rank(group)
    with context_parallel(group, shards=call.layout, transport=call.transport, timeout=15) as context:
        queries, keys = context.shards(call.query.shape[2]), context.shards(call.key.shape[2])
        q, k, v = (
            s.part(x, rank, 2).clone().requires_grad_()
            for s, x in ((queries, call.query), (keys, call.key), (keys, call.value))
        )
        key_mask = None if call.key_mask is None else keys.part(call.key_mask, rank, 1)
        arguments = dict(call.arguments)
        bias = arguments.pop("bias", None)
        if bias is not None:
            bias = (queries.part(bias, rank, 2) if bias.shape[2] > 1 else bias).clone().requires_grad_()
        if call.method is None:
            out = padded_attention(q, k, v, key_mask, bias=bias, **arguments)
        else:
            method, state = call.method
            out, _ = method.attend(q, k, v, state=state, key_mask=key_mask, **arguments)
        leaves = [q, k, v] + ([] if bias is None else [bias])
        parameters = [] if call.method is None or call.method[1] is None else list(call.method[1].parameters())
        found = gradients((out,), leaves + parameters, (queries.part(call.grad, rank, 2),))
        return {
            "out": out.detach(), "gradients": found, "sent": dict(context.exchange.sent),
            "shards": (queries, keys), "parameters": len(parameters),
        }  # fmt: skip


def whole_call(call: Call) -> dict[str, Any]:
    """The same in this process."""
    from efficient_attn.functional import padded_attention

    q, k, v = (x.clone().requires_grad_() for x in (call.query, call.key, call.value))
    arguments = dict(call.arguments)
    bias = arguments.pop("bias", None)
    bias = None if bias is None else bias.clone().requires_grad_()
    parameters = []
    if call.method is None:
        out = padded_attention(q, k, v, call.key_mask, bias=bias, **arguments)
    else:
        method, state = call.method
        out, _ = method.attend(q, k, v, state=state, key_mask=call.key_mask, **arguments)
        parameters = [] if state is None else list(state.parameters())
    leaves = [q, k, v] + ([] if bias is None else [bias])
    return {"out": out.detach(), "gradients": gradients((out,), leaves + parameters, (call.grad,))}


def joined_call(parts: list[dict[str, Any]], call: Call) -> dict[str, Any]:
    queries, keys = parts[0]["shards"]
    columns = list(zip(*(part["gradients"] for part in parts), strict=True))
    found = [queries.whole(columns[0], 2), keys.whole(columns[1], 2), keys.whole(columns[2], 2)]
    rest = columns[3:]
    if "bias" in call.arguments and call.arguments["bias"] is not None:
        biases = rest[0]
        rows = call.arguments["bias"].shape[2] > 1
        found.append(queries.whole(biases, 2) if rows else sum(biases[1:], biases[0]))
        rest = rest[1:]
    found += [sum(column[1:], column[0]) for column in rest]
    return {"out": queries.whole([part["out"] for part in parts], 2), "gradients": found}


def dense(mask: BlockMask) -> Tensor:
    return mask.to_dense()
