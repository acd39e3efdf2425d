"""What ranks say to each other: torch.distributed with a time limit and errors that have names, and a count of bytes.

Tensors travel as bytes, so that every dtype goes through every engine (gloo knows no bfloat16). What is summed is
summed in the order of ranks, so that a result is the same to the bit in every run with as many ranks.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..errors import CommunicationError, InputError, InputTypeError

# Its name since PyTorch 2.13, and before.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Passing(NamedTuple):
    """A message on its way from one neighbour, and one to the other."""

    works: tuple[Any, ...]
    arriving: Tensor
    leaving: Tensor  # must live until it is sent


class Exchange:
    """The ranks of one mesh dimension.

    Args:
        mesh: a DeviceMesh of one dimension, or a process group.
        timeout: seconds after which a wait for another rank ends in `CommunicationError`. On NCCL the group's own
            timeout holds, since a wait does not stop the CPU there.

    Raises:
        InputError: no process group, a mesh of several dimensions or one without this rank.
        InputTypeError: no mesh at all.

    Attributes:
        sent: bytes that this rank has sent, by what for; `sent.clear()` begins anew.
    """

    def __init__(self, mesh: DeviceMesh | dist.ProcessGroup, timeout: float) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise InputError("context_parallel needs torch.distributed; start with torchrun and init_process_group")
        if isinstance(mesh, DeviceMesh):
            if mesh.ndim != 1:
                raise InputError(
                    f"context_parallel takes a mesh of one dimension, got {mesh.ndim} ({mesh.mesh_dim_names}); take "
                    'the one whose ranks share a sequence: mesh["context"]'
                )
            if mesh.get_coordinate() is None:
                raise InputError(f"rank {dist.get_rank()} is not in the mesh {mesh}")
            self.group: Any = mesh.get_group()
        elif isinstance(mesh, dist.ProcessGroup):
            self.group = mesh
        else:
            raise InputTypeError(f"mesh must be a DeviceMesh or a process group, got {type(mesh).__name__}")
        if not timeout > 0:
            raise InputError(f"timeout must be positive seconds, got {timeout}")
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise InputError(f"rank {dist.get_rank()} is not in the group of context_parallel")
        self.timeout = timeout
        self.sent: Counter[str] = Counter()

    def device_reason(self, device: torch.device) -> str | None:
        """Why tensors on this device cannot travel, or None."""
        backend = self.group._get_backend_name() if hasattr(self.group, "_get_backend_name") else ""
        try:
            self.group._get_backend(device)
        except RuntimeError:
            return f"the group ({backend or dist.get_backend(self.group)}) has no engine for tensors on {device}"
        return None

    def gather_numbers(self, numbers: Sequence[int]) -> list[list[int]]:
        """The integers of every rank."""
        device = self._number_device()
        own = torch.tensor(numbers, dtype=torch.int64, device=device)
        return [part.tolist() for part in self.all_gather(own, what="agreement")]

    def _number_device(self) -> torch.device:
        nccl = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def all_gather(self, tensor: Tensor, *, what: str) -> list[Tensor]:
        """The tensors of every rank, of one shape and dtype."""
        if self.ranks == 1:
            return [tensor]
        raw = as_bytes(tensor)
        found = raw.new_empty(self.ranks * raw.numel())
        self.sent[what] += raw.numel() * (self.ranks - 1)
        if raw.numel():
            self._finish(what, lambda: (_all_gather(found, raw, self.group, async_op=True),))
        return (
            [part.view(tensor.dtype).view(tensor.shape) for part in found.split(raw.numel())]
            if raw.numel()
            else [tensor for _ in range(self.ranks)]
        )

    def swap(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]], *, what: str) -> list[Tensor]:
        """Send parts[r] to each rank r, and get a tensor of shapes[r] from it; a part of no elements sends nothing."""
        if self.ranks == 1:
            return [parts[0]]
        dtype, width = parts[0].dtype, parts[0].element_size()
        raw = [as_bytes(part) for part in parts]
        incoming = [width * int(torch.Size(shape).numel()) for shape in shapes]
        outgoing = [part.numel() for part in raw]
        self.sent[what] += sum(outgoing) - outgoing[self.rank]
        leaving, arriving = torch.cat(raw), raw[0].new_empty(sum(incoming))
        self._finish(
            what,
            lambda: (dist.all_to_all_single(arriving, leaving, incoming, outgoing, self.group, async_op=True),),
        )
        return [part.view(dtype).view(*shape) for part, shape in zip(arriving.split(incoming), shapes, strict=True)]

    def pass_on(self, tensor: Tensor, shape: Sequence[int], to: int, source: int, *, what: str) -> Passing:
        """Begin to send a tensor to one rank while one of `shape` and this dtype comes from another."""
        leaving = as_bytes(tensor)
        arriving = leaving.new_empty(tensor.element_size() * int(torch.Size(shape).numel()))
        self.sent[what] += leaving.numel()
        jobs = []
        if leaving.numel():
            jobs.append(dist.P2POp(dist.isend, leaving, self._global(to), self.group))
        if arriving.numel():
            jobs.append(dist.P2POp(dist.irecv, arriving, self._global(source), self.group))
        works = self._start(what, lambda: tuple(dist.batch_isend_irecv(jobs))) if jobs else ()
        return Passing(works, arriving.view(tensor.dtype).view(*shape), leaving)

    def arrived(self, passing: Passing, *, what: str) -> Tensor:
        """What came."""
        self._wait(what, passing.works)
        return passing.arriving

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)

    def _finish(self, what: str, start: Any) -> None:
        self._wait(what, self._start(what, start))

    def _start(self, what: str, start: Any) -> tuple[Any, ...]:
        try:
            return start()  # type: ignore[no-any-return]
        except RuntimeError as error:
            raise self._failure(what, error) from error

    def _wait(self, what: str, works: tuple[Any, ...]) -> None:
        limit = datetime.timedelta(seconds=self.timeout)
        for work in works:
            try:
                done = work.wait() if dist.get_backend(self.group) == "nccl" else work.wait(limit)
            except RuntimeError as error:
                raise self._failure(what, error) from error
            if done is False:
                raise self._failure(what, TimeoutError("no answer"))

    def _failure(self, what: str, error: Exception) -> CommunicationError:
        return CommunicationError(
            f"context parallel: rank {self.rank} of {self.ranks} could not finish the exchange of {what} within "
            f"{self.timeout:g} s: another rank has died, hangs, or calls something else "
            f"({str(error).splitlines()[0]}). See the first error of the other ranks; a larger timeout= of "
            "context_parallel helps where they are only slow"
        )


def as_bytes(tensor: Tensor) -> Tensor:
    """The elements of a tensor in a row, as uint8."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


# --- differentiable exchanges: their backward is the adjoint for the sum of every rank's loss ---


class _AllGather(torch.autograd.Function):
    """(...) -> (ranks, ...); backward: the sum over ranks of what each has for this one, in the order of ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, exchange: Exchange, what: str) -> Tensor:
        ctx.exchange, ctx.what = exchange, what
        return torch.stack(exchange.all_gather(tensor, what=what))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        exchange = ctx.exchange
        parts = list(grad.unbind(0))
        found = exchange.swap(parts, [parts[0].shape] * exchange.ranks, what=f"gradients of {ctx.what}")
        total = found[0].clone() if exchange.ranks > 1 else found[0]
        for part in found[1:]:
            total += part
        return total, None, None


class _Swap(torch.autograd.Function):
    """`Exchange.swap`; backward: the gradients go back the same way."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, shapes: Sequence[Sequence[int]], what: str, *parts: Tensor) -> Any:
        ctx.exchange, ctx.what, ctx.shapes = exchange, what, [part.shape for part in parts]
        found = tuple(exchange.swap(parts, shapes, what=what))
        return tuple(part.view_as(part) for part in found) if exchange.ranks == 1 else found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        found = ctx.exchange.swap(grads, ctx.shapes, what=f"gradients of {ctx.what}")
        return (None, None, None, *found)


def gathered(tensor: Tensor, exchange: Exchange, what: str) -> Tensor:
    """The tensors of all ranks, (ranks, ...), differentiable."""
    found: Tensor = _AllGather.apply(tensor, exchange, what)  # type: ignore[no-untyped-call]
    return found


def summed(tensor: Tensor, exchange: Exchange, what: str) -> Tensor:
    """The sum over all ranks, differentiable, the same to the bit on each."""
    parts = gathered(tensor, exchange, what).unbind(0)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def swapped(
    parts: Sequence[Tensor], shapes: Sequence[Sequence[int]], exchange: Exchange, what: str
) -> tuple[Tensor, ...]:
    """`Exchange.swap`, differentiable."""
    found: tuple[Tensor, ...] = _Swap.apply(exchange, shapes, what, *parts)  # type: ignore[no-untyped-call]
    return found
