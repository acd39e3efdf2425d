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
    with context_parallel(group, shards=layout, transport=transport, timeout=60) as context:
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
    with context_parallel(group, shards=call.layout, transport=call.transport, timeout=60) as context:
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


# --- models ---


def language_model(attention: str, *, rotary: bool = True, dropout: float = 0.0) -> Any:
    from efficient_attn.models import CausalLM, CausalLMConfig, TransformerConfig

    torch.manual_seed(0)
    decoder = TransformerConfig(
        hidden_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, causal=True, rotary=rotary, attention=attention,
        attention_dropout=dropout,
    )  # fmt: skip
    return CausalLM(CausalLMConfig(vocab_size=11, max_len=64, decoder=decoder, positions="learned"))


def language_loss(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    logits = model(ids, mask)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train_model(group: Any, attention: str, ids: Tensor, mask: Tensor | None, how: str) -> dict[str, Tensor]:
    """The loss and the gradients' mean over ranks of one step of a language model."""
    from contextlib import nullcontext

    from torch.utils.checkpoint import checkpoint

    model = language_model(attention)
    if how == "compile":
        model = torch.compile(model, backend="eager")
    if how == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model, process_group=group)
    if how == "checkpoint":
        for layer in model.decoder.layers:
            plain = layer.forward
            layer.forward = lambda x, plain=plain, **k: checkpoint(lambda y: plain(y, **k), x, use_reentrant=False)
    with context_parallel(group, timeout=60) if dist.get_world_size(group) > 1 else nullcontext():
        loss = language_loss(model, ids, mask)
        loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad.clone()
        if how != "ddp":
            dist.all_reduce(grad, group=group)
            grad /= dist.get_world_size(group)
        found[name.removeprefix("module.").removeprefix("_orig_mod.")] = grad
    return {"loss": loss.detach(), **found}


def train_on_mesh(group: Any, ids: Tensor) -> dict[str, Tensor]:
    """Two groups of two ranks: FSDP over all four, each pair shares the sequences of its half of the batch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    model = language_model("dense")
    for layer in model.decoder.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (4,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    half = ids.chunk(2)[mesh.get_local_rank("data")]
    with context_parallel(mesh["context"], timeout=60):
        loss = language_loss(model, half)
        loss.backward()
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


def module_output(group: Any, x: Tensor, padding: Tensor, attention: str) -> tuple[Tensor, Shards]:
    """Our drop-in module on this rank's tokens."""
    from efficient_attn import MultiheadAttention

    torch.manual_seed(0)
    module = MultiheadAttention(16, 4, batch_first=True, attention=attention).eval()
    with context_parallel(group, timeout=60, shards="contiguous") as context:
        part, pad = context.split(x, 1), context.split(padding, 1)
        out, _ = module(part, part, part, key_padding_mask=pad, need_weights=False)
        return out.detach(), context.shards(x.shape[1])


# --- what is refused, and what is counted ---


def refused(group: Any, name: str) -> str:
    """The error of a call that must be refused by every rank, before anything travels."""
    from efficient_attn import SlidingWindow
    from efficient_attn.errors import EfficientAttnError
    from efficient_attn.functional import attention_weights
    from efficient_attn.methods import parse

    rank = dist.get_rank(group)
    q = torch.randn(1, 2, 32, 4)
    try:
        with context_parallel(group, timeout=60) as context:
            if name == "lengths":
                attention(q[:, :, : 32 - 3 * rank], q, q)
            elif name == "masks":
                attention(q, q, q, mask=SlidingWindow(left=3 + rank, right=0))
            elif name == "bits":
                bits = torch.ones(64, 64, dtype=torch.bool)
                bits[5, 7] = rank == 0
                attention(q, q, q, mask=bits)
            elif name == "heads":
                attention(*(q[:, : 1 + rank],) * 3)
            elif name == "scale":
                attention(q, q, q, scale=1.0 + rank)
            elif name == "gradient":
                attention(q.clone().requires_grad_(rank == 0), q, q)
            elif name == "local mask":
                attention(q, q, q, mask=torch.ones(32, 32, dtype=torch.bool))
            elif name == "one rank":
                attention(q, q, q if rank == 0 else q[..., :0])
            elif name == "bias":
                attention(q, q, q, bias=torch.zeros(64, 64))
            elif name == "weights":
                attention_weights(q, q)
            elif name == "content":
                parse("topk_blocks").attend(q, q, q)
            elif name == "hybrid":
                parse("sliding_window+centroid").attend(q, q, q)
        return "nothing"
    except EfficientAttnError as error:
        sent = {what: size for what, size in context.exchange.sent.items() if what != "agreement"}
        return f"{type(error).__name__}: {error} {sent or ''}"


def repeated(group: Any, transport: str) -> list[bytes]:
    """The bits of out and gradients of one call, made twice."""
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 4, 100, 8).bfloat16() for _ in range(3))
        with context_parallel(group, transport=transport, timeout=60) as context:
            parts = [context.split(x, 2).clone().requires_grad_() for x in (q, k, v)]
            out = attention(*parts, is_causal=True, dropout_p=0.2, dropout_seed=3)
            grads = torch.autograd.grad(out.float().square().sum(), parts)
        found.append(b"".join(t.detach().view(torch.uint8).numpy().tobytes() for t in (out, *grads)))
    return found


def sent_by_window(group: Any, length: int, transport: str) -> int:
    """The bytes of keys and values that this rank sends in a forward of a causal window of 512."""
    from efficient_attn import SlidingWindow

    x = torch.randn(1, 1, length // dist.get_world_size(group), 16)
    with context_parallel(group, shards="contiguous", transport=transport, timeout=60) as context:
        attention(x, x, x, mask=SlidingWindow(left=512, right=0))
        return context.exchange.sent["keys and values"]


def peak_memory(group: Any, length: int) -> int:
    """How much the resident memory of this process grows at most in a forward and backward, in bytes."""
    import threading
    import time

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    with context_parallel(group, transport="ring", timeout=60) as context:
        n = context.shards(length).counts[dist.get_rank(group)]
        warm = [torch.randn(1, 1, 64, 64, requires_grad=True) for _ in range(3)]
        attention(*warm, is_causal=True).sum().backward()
        before, most, stop = resident(), [0], threading.Event()

        def watch() -> None:
            while not stop.is_set():
                most[0] = max(most[0], resident())
                time.sleep(0.001)

        watcher = threading.Thread(target=watch)
        watcher.start()
        q, k, v = (torch.randn(1, 2, n, 64, requires_grad=True) for _ in range(3))
        attention(q, k, v, mask=__import__("efficient_attn").SlidingWindow(left=64, right=0)).sum().backward()
        stop.set()
        watcher.join()
        return most[0] - before


def dies(group: Any, how: str, limit: float) -> str:
    """Rank 1 dies or hangs in the middle of a call; what the others say, and after how long."""
    import os
    import time

    from efficient_attn.errors import CommunicationError

    x = torch.randn(1, 2, 32, 4)
    with context_parallel(group, timeout=60):
        attention(x, x, x)  # both have begun
    with context_parallel(group, timeout=limit):
        if dist.get_rank(group) == 1:
            if how == "dies":
                os._exit(3)
            time.sleep(3 * limit)
            return "slept"
        began = time.monotonic()
        try:
            attention(x, x, x)
        except CommunicationError as error:
            assert time.monotonic() - began < 2 * limit
            return str(error)
    return "nothing"


def refused_by_python(group: Any) -> None:
    raise ValueError("nothing here")


def run_page(group: Any, text: str) -> None:
    """The Python of a page of documentation, from top to bottom."""
    exec(compile(text, "page", "exec"), {})


def train_long(group: Any, length: int, limit: int | None) -> tuple[str, int]:
    """A step of a language model whose process may take `limit` bytes more than before, and what it took at most."""
    import resource
    import threading
    import time
    from contextlib import nullcontext

    from efficient_attn.models import CausalLM, CausalLMConfig, TransformerConfig

    def data() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[5]) * 4096

    decoder = TransformerConfig(
        hidden_dim=64, num_layers=6, num_heads=2, causal=True, rotary=True, attention="sliding_window:left=64,right=0"
    )
    torch.manual_seed(0)
    model = CausalLM(CausalLMConfig(vocab_size=8, max_len=length, decoder=decoder, positions="none"))
    several = dist.get_world_size(group) > 1

    def step(ids: Tensor) -> None:
        with context_parallel(group, timeout=60) if several else nullcontext():
            language_loss(model, ids).backward()

    ids = torch.randint(0, 8, (1, length), generator=torch.Generator().manual_seed(0))
    step(ids[:, :256])
    before, most, stop = data(), [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            most[0] = max(most[0], data() - before)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (before + limit, hard))
        step(ids)
        answer = "trained"
    except (MemoryError, RuntimeError) as error:
        answer = f"refused: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        stop.set()
        watcher.join()
    return answer, most[0]
