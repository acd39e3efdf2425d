"""Calls of attention that ranks make in tests of distributed/: functions of (group, ...) that a process can be told by
name, and what joins their answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from efficient_attn import BlockMask, attention, distributed
from efficient_attn.distributed import Shards, context_parallel
from support.accuracy import gradients
from support.cases import CASES, draw

SEED = 0x1234_5678_9ABC


def spread(x: Tensor, shards: Shards, rank: int, dim: int) -> Tensor:
    return shards.part(x, rank, dim)


def structured(leaves: dict[str, Tensor], alignment: str | None) -> Any:
    """What is passed as bias=, of the tensors that there are."""
    from efficient_attn import ALiBi, LowRankBias, RelativeBias, T5Bias

    kinds = {"table": RelativeBias, "slopes": ALiBi, "buckets": lambda table, a: T5Bias(table, alignment=a)}
    parts = [kind(leaves[name], alignment) for name, kind in kinds.items() if name in leaves]
    parts += [LowRankBias(leaves["u"], leaves["w"])] if "u" in leaves else []
    parts += [leaves["bias"]] if "bias" in leaves else []
    return (parts[0] if len(parts) == 1 else parts) if parts else None


def spread_of(name: str, tensor: Tensor, queries: Shards) -> str | None:
    """Along which tokens a tensor is spread, its dimension -2: "queries", "keys", or None where every rank has it."""
    if name == "bias":
        return "queries" if tensor.dim() > 1 and tensor.shape[-2] > 1 and queries.length > 1 else None
    return {"query": "queries", "u": "queries", "key": "keys", "value": "keys", "w": "keys"}.get(name)


def spread_leaves(given: dict[str, Tensor], rank: int, queries: Shards, keys: Shards) -> dict[str, Tensor]:
    """A rank's part of each tensor, which wants a gradient."""
    found = {}
    for name, tensor in given.items():
        along = {"queries": queries, "keys": keys}.get(spread_of(name, tensor, queries) or "")
        part = tensor if along is None else along.part(tensor, rank, tensor.dim() - 2)
        found[name] = part.detach().clone().requires_grad_()
    return found


def joined_gradients(parts: list[dict[str, Any]], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of the whole of every rank's: what every rank has gets the sum."""
    queries, keys = parts[0]["shards"]
    found = {}
    for name, tensor in given.items():
        grads = [part["gradients"][name] for part in parts]
        along = {"queries": queries, "keys": keys}.get(spread_of(name, tensor, queries) or "")
        if along is None:
            found[name] = torch.stack([grad.double() for grad in grads]).sum(0).to(grads[0].dtype)
        else:
            found[name] = along.whole(grads, tensor.dim() - 2)
    return found


TENSORS = ("query", "key", "value", "bias", "sinks", "slopes", "table")


def run_case(group: Any, name: str, dtype: torch.dtype, transport: str, layout: Any, backend: str = "auto") -> dict:
    """A conformance case on this rank's part; what it gets, gradients too, as parts."""
    case = next(case for case in CASES if case.name == name)
    drawn = draw(case, dtype)
    rank = dist.get_rank(group)
    with context_parallel(group, shards=layout, transport=transport, timeout=200) as context:
        queries, keys = context.shards(case.Nq), context.shards(case.Nk)
        leaves = spread_leaves({n: drawn[n] for n in TENSORS if drawn[n] is not None}, rank, queries, keys)
        given = {n: leaves[n] for n in ("query", "key", "value", "sinks") if n in leaves}
        out, lse = attention(
            **given, mask=drawn["mask"], bias=structured(leaves, None if case.causal else "top_left"),
            is_causal=case.causal is not None, causal_alignment=case.causal, scale=case.scale, softcap=case.softcap,
            dropout_p=case.dropout_p, dropout_seed=SEED, return_lse=True, backend=backend,
        )  # fmt: skip
        outputs, cotangents = (out,), (queries.part(drawn["grad_out"], rank, 2),)
        if case.grad_lse:
            outputs, cotangents = (out, lse), (*cotangents, queries.part(drawn["grad_lse"], rank, 2))
        found = dict(zip(leaves, gradients(outputs, list(leaves.values()), cotangents), strict=True))
        return {"out": out.detach(), "lse": lse.detach(), "gradients": found, "shards": (queries, keys)}


def joined(parts: list[dict], drawn: dict[str, Any]) -> dict[str, Tensor]:
    """The whole sequence's results of every rank's."""
    queries, _ = parts[0]["shards"]
    whole = {name: queries.whole([part[name] for part in parts], 2) for name in ("out", "lse")}
    return whole | joined_gradients(parts, {n: drawn[n] for n in TENSORS if drawn[n] is not None})


@dataclass
class Call:
    """A random configuration: whole tensors, and how they are spread."""

    tensors: dict[str, Tensor]  # query, key, value and what joins the scores: bias, sinks, slopes, table, buckets, u, w
    arguments: dict[str, Any]
    alignment: str | None  # of biases by relative position
    key_mask: Tensor | None
    grad: Tensor
    layout: Any
    transport: str
    method: Any = None
    at_once: int = 2**22  # see distributed/attention.py

    @property
    def sizes(self) -> tuple[int, int]:
        return self.tensors["query"].shape[2], self.tensors["key"].shape[2]


def made(call: Call, leaves: dict[str, Tensor], key_mask: Tensor | None, grad: Tensor) -> dict[str, Any]:
    """out and gradients of a call on these tensors, whole or a part."""
    from efficient_attn.functional import padded_attention

    arguments = dict(call.arguments)
    bias = structured(leaves, call.alignment)
    arguments |= {"bias": bias} if bias is not None else {}
    arguments |= {"sinks": leaves["sinks"]} if "sinks" in leaves else {}
    tensors, parameters = [leaves[name] for name in ("query", "key", "value")], {}
    if call.method is None:
        out = padded_attention(*tensors, key_mask, **arguments)
    else:
        method, state = call.method
        out, _ = method.attend(*tensors, state=state, key_mask=key_mask, **arguments)
        parameters = {} if state is None else dict(state.named_parameters())
    wanted = leaves | parameters
    return {
        "out": out.detach(),
        "gradients": dict(zip(wanted, gradients((out,), list(wanted.values()), (grad,)), strict=True)),
    }


def run_call(group: Any, call: Call) -> dict[str, Any]:
    """A call on this rank's part: out, gradients, bytes sent."""
    distributed.attention.AT_ONCE = call.at_once
    rank = dist.get_rank(group)
    with context_parallel(group, shards=call.layout, transport=call.transport, timeout=200) as context:
        queries, keys = map(context.shards, call.sizes)
        leaves = spread_leaves(call.tensors, rank, queries, keys)
        key_mask = None if call.key_mask is None else keys.part(call.key_mask, rank, 1)
        found = made(call, leaves, key_mask, queries.part(call.grad, rank, 2))
        return {**found, "sent": dict(context.exchange.sent), "shards": (queries, keys)}


def whole_call(call: Call) -> dict[str, Tensor]:
    """The same in this process."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in call.tensors.items()}
    found = made(call, leaves, call.key_mask, call.grad)
    return {"out": found["out"], **found["gradients"]}


def joined_call(parts: list[dict[str, Any]], call: Call) -> dict[str, Tensor]:
    queries, _ = parts[0]["shards"]
    given = call.tensors | (
        {} if call.method is None or call.method[1] is None else dict(call.method[1].named_parameters())
    )
    return {"out": queries.whole([part["out"] for part in parts], 2), **joined_gradients(parts, given)}


def dense(mask: BlockMask) -> Tensor:
    return mask.to_dense()


def repeated(group: Any, transport: str) -> list[bytes]:
    """The bits of out and gradients of one call, made twice."""
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 4, 100, 8).bfloat16() for _ in range(3))
        with context_parallel(group, transport=transport, timeout=200) as context:
            parts = [context.split(x, 2).clone().requires_grad_() for x in (q, k, v)]
            out = attention(*parts, is_causal=True, dropout_p=0.2, dropout_seed=3)
            grads = torch.autograd.grad(out.float().square().sum(), parts)
        found.append(b"".join(t.detach().view(torch.uint8).numpy().tobytes() for t in (out, *grads)))
    return found


def sent_by_window(group: Any, length: int, transport: str) -> int:
    """The bytes of keys and values that this rank sends in a forward of a causal window of 512."""
    from efficient_attn import SlidingWindow

    x = torch.randn(1, 1, length // dist.get_world_size(group), 16)
    with context_parallel(group, shards="contiguous", transport=transport, timeout=200) as context:
        attention(x, x, x, mask=SlidingWindow(left=512, right=0))
        return context.exchange.sent["keys and values"]


def peak_memory(group: Any, length: int, transport: str, mask: Any) -> int:
    """How much the memory of this process grows at most in a forward and backward, its part of the tensors included, in
    bytes; `transport` "": one process without context_parallel.

    What is freed goes back to the system at once here: what glibc keeps for itself differs from run to run.
    """
    import ctypes
    from contextlib import nullcontext
    from pathlib import Path

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    def step(length: int) -> None:
        n = length if context is None else context.shards(length).counts[context.rank]
        q, k, v = (torch.randn(1, 8, n, 64, requires_grad=True) for _ in range(3))
        out = attention(q, k, v, mask=mask)
        out.backward(torch.ones(()).expand_as(out))

    M_MMAP_THRESHOLD = -3
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    with context_parallel(group, transport=transport, timeout=200) if transport else nullcontext() as context:
        step(512)  # what libraries keep for themselves
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        step(length)
        return status("VmHWM") - before


def one_rank(group: Any) -> None:
    """A mesh of one rank is attention as it is, by every transport, to the bit."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 40, 8)
    for transport in ("auto", "gather", "ring", "all_to_all"):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        with context_parallel(group, transport=transport):
            out = attention(*(leaves[0],) * 3, is_causal=True)
            out.sum().backward()
        expected = attention(*(leaves[1],) * 3, is_causal=True)
        expected.sum().backward()
        assert torch.equal(out, expected) and torch.equal(leaves[0].grad, leaves[1].grad), transport


def short_and_cast(group: Any) -> None:
    """Fewer tokens than ranks, autocast, no gradients, a causal mask under another name of the group's dimension."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(group),), mesh_dim_names=("sequence",))
    generator = torch.Generator().manual_seed(0)
    for length in (0, 1, 3, 16, 17):
        x = torch.randn(1, 2, length, 8, generator=generator)
        for transport in ("gather", "ring", "all_to_all"):
            expected = attention(x, x, x, is_causal=True)
            with context_parallel(mesh["sequence"], transport=transport, timeout=200) as context:
                part = context.split(x, 2)
                with torch.no_grad():
                    out = attention(part, part, part, is_causal=True)
                assert not out.requires_grad
                torch.testing.assert_close(context.join(out, 2, length), expected)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    cast = attention(part, part, part, is_causal=True)
                assert cast.dtype == torch.bfloat16
                torch.testing.assert_close(context.join(cast, 2, length).float(), expected, atol=3e-2, rtol=3e-2)


def gradients_of_differences(group: Any, transport: str) -> None:
    """torch.autograd.gradcheck of attention on this rank's part, in float64, of a loss that all ranks have together."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 4, dtype=torch.float64) for _ in range(3))
    bias, sinks = torch.randn(1, 2, 40, 40, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    with context_parallel(group, transport=transport, timeout=200) as context:

        def whole(*tensors: Tensor) -> Tensor:
            parts = [context.split(t, 2) for t in tensors[:4]]
            out = attention(*parts[:3], bias=parts[3], sinks=tensors[4], softcap=3.0, is_causal=True)
            return context.join(out, 2, 40)

        leaves = [t.requires_grad_() for t in (q, k, v, bias, sinks)]
        generator, step = torch.Generator().manual_seed(1), 1e-6
        directions = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in leaves]
        weight = torch.randn(1, 2, 40, 4, generator=generator, dtype=torch.float64)
        found = torch.autograd.grad(whole(*leaves), leaves, weight / context.ranks)
        slope = torch.stack([(g * d).sum() for g, d in zip(found, directions, strict=True)])
        dist.all_reduce(slope, group=group)  # each rank has the gradient of its part of the input
        with torch.no_grad():
            for place, direction in enumerate(directions):
                ahead, behind = (
                    whole(*(t + sign * step * direction if n == place else t for n, t in enumerate(leaves)))
                    for sign in (1, -1)
                )
                difference = ((ahead - behind) * weight).sum() / (2 * step)
                torch.testing.assert_close(slope[place], difference, rtol=1e-6, atol=1e-7)
