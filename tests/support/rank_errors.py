"""What goes wrong on ranks in tests of distributed/: bad arguments, and ranks that fail on the way."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from efficient_attn import attention
from efficient_attn.distributed import Shards, context_parallel
from support.awake import Awake


def refused(group: Any, name: str) -> str:
    """The error of a call that must be refused by every rank, before anything travels."""
    from efficient_attn import ALiBi, DecomposedBias2D, LowRankBias, RelativeBias, RelativeBias2D, SlidingWindow
    from efficient_attn.cache.reading import cached_attention
    from efficient_attn.errors import EfficientAttnError
    from efficient_attn.functional import attention_weights
    from efficient_attn.methods import parse

    rank = dist.get_rank(group)
    q = torch.randn(1, 2, 32, 4)
    try:
        with context_parallel(group, timeout=200) as context:
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
            elif name == "image":
                attention(q, q, q, bias=RelativeBias2D(torch.zeros(15 * 15, 2), (8, 8)))
            elif name == "image rows":
                attention(q, q, q, bias=DecomposedBias2D(torch.zeros(15, 4), torch.zeros(15, 4), (8, 8)))
            elif name == "weights":
                attention_weights(q, q)
            elif name == "sinks":
                attention(q, q, q, sinks=None if rank else torch.zeros(2))
            elif name == "softcap":
                attention(q, q, q, softcap=2.0 + rank)
            elif name == "biases":
                attention(q, q, q, bias=ALiBi(torch.ones(2)) if rank else RelativeBias(torch.ones(3)))
            elif name == "whole u":
                attention(q, q, q, bias=LowRankBias(torch.ones(64, 2), torch.ones(32, 2)))
            elif name == "low-rank sinks":
                parse("linear").attend(q, q, q, sinks=torch.zeros(2))
            elif name == "content":
                parse("topk_blocks").attend(q, q, q)
            elif name == "cache":
                cached_attention(q, q, q, torch.tensor([32]))
            elif name == "hybrid":
                parse("sliding_window+centroid").attend(q, q, q)
        return "nothing"
    except EfficientAttnError as error:
        sent = {what: size for what, size in context.exchange.sent.items() if what != "agreement"}
        return f"{type(error).__name__}: {error} {sent or ''}"


def fault(group: Any, how: str, when: str, transport: str, limit: float) -> tuple[str, float]:
    """Rank 1 ends or hangs at one place of a call; what the others say, and after how many seconds of waiting.

    when: "agreement", before the ranks compare what they were given; "keys", behind that, as the first keys would
        travel; "backward", behind a whole forward; "alone", without the others. Only from there on the limit is short:
        what comes before may take its time on a busy machine.
    """
    from efficient_attn import sharding
    from efficient_attn.errors import CommunicationError

    x = torch.randn(1, 2, 32, 4, requires_grad=True)
    began, clock = 0.0, Awake()
    if when == "alone":
        stop(how)
    try:
        with context_parallel(group, transport=transport, timeout=200) as context:
            exchange = context.exchange
            out = attention(x, x, x)

            def here() -> None:
                nonlocal began
                if dist.get_rank(group) == 1:
                    stop(how)
                exchange.timeout, began = limit, clock.seconds

            if when == "keys":

                def behind(send: Any) -> Any:
                    return lambda *arguments, **named: (here(), send(*arguments, **named))[1]

                exchange.begin, exchange.pass_on = behind(exchange.begin), behind(exchange.pass_on)  # type: ignore
            else:
                here()
            out.sum().backward() if when == "backward" else attention(x, x, x)
    except CommunicationError as error:
        assert sharding.active is None
        return str(error), clock.seconds - began
    return "nothing", 0.0


def stop(how: str) -> None:
    import os
    import signal
    import time

    time.sleep(0.3)  # what was sent has come
    if how == "exits":
        os._exit(3)
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raises":
        raise ValueError("of the user")
    time.sleep(600)


def hang(group: Any) -> None:
    stop("hangs")


def left_open(group: Any) -> list[Any]:
    """What a context leaves behind, after errors too."""
    from efficient_attn import sharding
    from efficient_attn.errors import EfficientAttnError

    found: list[Any] = []
    with context_parallel(group, timeout=200):
        try:
            with context_parallel(group):
                pass
        except EfficientAttnError as error:
            found.append(str(error))
        found.append(sharding.active is not None)  # the outer one still holds
    try:
        with context_parallel(group, timeout=200):
            raise KeyError("of the user")
    except KeyError:
        found.append(sharding.active is None)
    x = torch.randn(1, 2, 32, 4)
    torch.testing.assert_close(attention(x, x, x), attention(x, x, x, backend="reference"))
    with context_parallel(group, timeout=200) as context:  # and a new one works
        found.append(attention(*(context.split(x, 2),) * 3).shape[2] == context.shards(32).counts[context.rank])
    return found


def wrong_meshes(group: Any) -> list[str]:
    """The errors of meshes that cannot be, on this rank; nothing may travel, for the others are not asked."""
    from torch.distributed.device_mesh import init_device_mesh

    from efficient_attn.errors import EfficientAttnError

    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "context"))
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    other = alone[1 - dist.get_rank(group)]
    found = []
    given = ((mesh, {}), ("context", {}), (other, {}), (group, {"timeout": 0}), (group, {"shards": "spiral"}),
             (group, {"shards": Shards.contiguous(64, 3)}))  # fmt: skip
    for mesh_or_group, options in given:
        try:
            with context_parallel(mesh_or_group, **options):
                found.append("nothing")
        except EfficientAttnError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def refused_by_python(group: Any) -> None:
    raise ValueError("nothing here")
