"""The processes of a run: one, or those that `torchrun` started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import CommunicationError, EfficientAttnError, InputError


@dataclass(frozen=True)
class Processes:
    """This process among `world`, and where it computes; `context` of them in a row share each example's sequence."""

    rank: int
    world: int
    device: torch.device
    context: int = 1
    timeout: float = 600.0

    @property
    def data_world(self) -> int:
        """Into how many parts the examples of a step are divided."""
        return self.world // self.context

    @property
    def data_rank(self) -> int:
        """Which of these parts is this process's."""
        return self.rank // self.context

    def context_parallel(self) -> AbstractContextManager[Any]:
        """A block in which models spread sequences over the `context` processes."""
        if self.context == 1:
            return nullcontext()
        from torch.distributed.device_mesh import init_device_mesh

        from ..distributed import context_parallel

        mesh = init_device_mesh(self.device.type, (self.data_world, self.context), mesh_dim_names=("data", "context"))
        return context_parallel(mesh["context"], timeout=self.timeout)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    def sums(self, *values: float) -> list[float]:
        """The sums of some numbers over all processes, in float64."""
        if self.world == 1:
            return list(values)
        # MPS aside, every device has float64; gloo and nccl sum in the order of ranks, the same on each.
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in order of rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()

    def parallel(self, model: nn.Module, how: str) -> nn.Module:
        """The model in as many processes, by `ddp` or `fsdp`; parameters keep their names in `unwrapped`."""
        if self.world == 1:
            return model
        if how == "ddp":
            return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.world,))
        for module in list(model.modules()):
            if isinstance(module, nn.ModuleList):
                for layer in module:
                    fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model


@contextmanager
def processes(device: str, context: int = 1, timeout: float = 600.0) -> Iterator[Processes]:
    """The processes that `torchrun` describes in the environment, joined until the end of the block.

    Args:
        timeout: seconds to wait for another process.

    Raises:
        InputError: a number of processes that is no multiple of `context`.
        CommunicationError: another process that died or hangs, at the beginning or in the block.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world % context:
        raise InputError(
            f"--context-parallel {context} needs a multiple of {context} processes, and there are {world}; start with "
            f"torchrun --nproc-per-node {context} -m efficient_attn.cli train ..."
        )
    if world == 1:
        yield Processes(0, 1, torch.device(kind))
        return
    place = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(place)
    started_here = not dist.is_initialized()
    try:
        if started_here:
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
        yield Processes(dist.get_rank(), world, place, context, timeout)
    except RuntimeError as error:
        if isinstance(error, EfficientAttnError) or not _is_of_communication(error):
            raise
        raise CommunicationError(
            f"process {os.environ.get('RANK', '0')} of {world} could not reach another one within {timeout:g} s: it "
            f"has died or hangs ({str(error).splitlines()[0]}). See the first error of the others; a larger --timeout "
            "helps where one is only slow"
        ) from error
    finally:
        if started_here and dist.is_initialized():
            dist.destroy_process_group()


def _is_of_communication(error: RuntimeError) -> bool:
    """Whether torch.distributed says that another process is not to be reached; gloo has no class for it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel."""
    inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return inner


def accumulating(model: nn.Module, more: bool) -> Any:
    """A block whose backward does not exchange gradients yet when `more` batches of the step follow."""
    return model.no_sync() if more and isinstance(model, DistributedDataParallel) else nullcontext()


def whole(value: Tensor) -> Tensor:
    """A parameter or buffer with all of its shards, on the CPU."""
    value = value.detach()
    gather = getattr(value, "full_tensor", None)  # a DTensor's; its module is slow to import for who needs none
    return (value if gather is None else gather()).cpu()


def like(value: Tensor, target: Tensor) -> Tensor:
    """The whole `value` as this process holds `target`: its shard, device and dtype."""
    value = value.to(device=target.device, dtype=target.dtype)
    if not hasattr(target, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    return distribute_tensor(value, target.device_mesh, target.placements)
