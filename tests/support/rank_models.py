"""Models and modules that ranks run and train in tests of distributed/."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from efficient_attn.distributed import Shards, context_parallel


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
    with context_parallel(group, timeout=200) if dist.get_world_size(group) > 1 else nullcontext():
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
    with context_parallel(mesh["context"], timeout=200):
        loss = language_loss(model, half)
        loss.backward()
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


def module_output(group: Any, x: Tensor, padding: Tensor, attention: str) -> tuple[Tensor, Shards]:
    """Our drop-in module on this rank's tokens."""
    from efficient_attn import MultiheadAttention

    torch.manual_seed(0)
    module = MultiheadAttention(16, 4, batch_first=True, attention=attention).eval()
    with context_parallel(group, timeout=200, shards="contiguous") as context:
        part, pad = context.split(x, 1), context.split(padding, 1)
        out, _ = module(part, part, part, key_padding_mask=pad, need_weights=False)
        return out.detach(), context.shards(x.shape[1])


def module_masks(group: Any, x: Tensor) -> dict[str, Any]:
    """Our drop-in module under masks of the whole sequence, its output joined; what is refused, in words."""
    from efficient_attn import MultiheadAttention
    from efficient_attn.errors import EfficientAttnError

    n, found = x.shape[1], {}
    for name, options in (("plain", {}), ("zero", {"add_zero_attn": True}), ("learned", {"add_bias_kv": True})):
        torch.manual_seed(0)
        module = MultiheadAttention(16, 4, batch_first=True, **options).eval()
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
        with context_parallel(group, timeout=200) as context:
            part, rows = context.split(x, 1), context.split(hidden, 0)
            masks = {"mask": {"attn_mask": hidden}, "promise": {"attn_mask": hidden, "is_causal": True}}
            masks |= {"scores": {"attn_mask": torch.zeros(rows.shape).masked_fill(rows, -torch.inf)}}
            masks |= {"local": {"attn_mask": rows[:, : len(rows)]}}
            for kind, arguments in masks.items():
                try:
                    out, _ = module(part, part, part, need_weights=False, **arguments)
                    found[name, kind] = context.join(out.detach(), 1, n)
                except EfficientAttnError as error:
                    found[name, kind] = f"{type(error).__name__}: {error}"
    return found


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
        with context_parallel(group, timeout=200) if several else nullcontext():
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
