"""What ranks say to each other: torch.distributed with a time limit and errors that have names, and a count of bytes.

Tensors travel as bytes, so that every dtype goes through every engine (gloo knows no bfloat16). What is summed is
summed in the order of ranks, so that a result is the same to the bit in every run with as many ranks.
"""

from __future__ import annotations

import datetime
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..errors import CommunicationError, InputError, InputTypeError

# Its name since PyTorch 2.13, and before.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

GRACE = 2.0  # seconds
KEPT = 2**23  # bytes of a buffer that stays between calls

Views = Sequence[Sequence[Tensor]]  # for each rank, parts of tensors


class Passing(NamedTuple):
    """Messages on their way from one neighbour, and to the other."""

    works: tuple[Any, ...]
    arriving: tuple[Tensor, ...]
    leaving: tuple[Tensor, ...]  # must live until they are sent


class Swapping(NamedTuple):
    """An exchange that has begun, and all that `Exchange.finish` does with what comes."""

    works: tuple[Any, ...]
    came: list[Tensor]  # for each rank, bytes
    leaving: Views
    arriving: Views
    travels: torch.dtype | None
    add: bool
    buffers: tuple[Tensor, ...]  # must live until they are sent


class Buffers:
    """Memory in which messages stand, one of a name after the other.

    It is asked for once: what is given back between tensors of other sizes the allocator of the C library keeps, and a
    ring of 2 ranks grew by a third of what it needs. Between calls small ones stay, since the pages of new memory
    cost as much as to send them; on other devices PyTorch's own allocator does that, and knows of streams.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """What stands under a name, anew."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if name not in self.kept or self.kept[name].numel() < size or self.kept[name].device != device:
            self.kept.pop(name, None)
            self.kept[name] = torch.empty(size, dtype=torch.uint8, device=device)
        return self.kept[name][:size].view(dtype).view(*shape)

    def end(self) -> None:
        """Give back what is not kept between calls."""
        for name in [n for n, raw in self.kept.items() if raw.numel() > KEPT or raw.device.type != "cpu"]:
            del self.kept[name]


class Exchange:
    """The ranks of one mesh dimension.

    Args:
        mesh: a DeviceMesh of one dimension, or a process group.
        timeout: seconds after which a wait for another rank ends in `CommunicationError`. On NCCL the group's own
            timeout holds, since a wait does not stop the CPU there. On gloo every exchange gets this limit for itself:
            one that only its caller gave up would hold the end of the process until the group's own limit.

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
        self.buffers = Buffers()

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

    def swap(
        self, leaving: Views, arriving: Views, *, what: str, travels: torch.dtype | None = None, add: bool = False,
        alone: bool = False,
    ) -> None:  # fmt: skip
        """Copy what each rank has for this one to where it belongs.

        Args:
            leaving: for each rank the tensors that it gets, this one too; any strides.
            arriving: for each rank the tensors that are written, in the shapes that it sends.
            travels: the dtype on the way; default: that of each tensor.
            add: add to what stands there, in the order of ranks.
            alone: nothing leaves this rank, and the others do not call.
        """
        self.finish(self.begin(leaving, arriving, what=what, travels=travels, add=add, alone=alone), what=what)

    def begin(
        self, leaving: Views, arriving: Views, *, what: str, travels: torch.dtype | None = None, add: bool = False,
        alone: bool = False,
    ) -> Swapping:  # fmt: skip
        """Send what `swap` sends, and return while it travels. Only one exchange is under way at a time."""
        others = [r for r in range(self.ranks) if r != self.rank]
        outgoing, incoming = [0] * self.ranks, [0] * self.ranks
        for r in others:
            outgoing[r] = sum(_span(t, travels) for t in leaving[r])
            incoming[r] = sum(_span(t, travels) for t in arriving[r])
        if alone or not others:
            return Swapping((), [], leaving, arriving, travels, add, ())
        some = next((t for part in (*leaving, *arriving) for t in part), None)
        device = self._number_device() if some is None else some.device
        gone = self.buffers.take("leaving", (sum(outgoing),), torch.uint8, device)
        coming = self.buffers.take("arriving", (sum(incoming),), torch.uint8, device)
        sent = [t for r in others for t in leaving[r]]
        for view, tensor in zip(_messages(gone, sent, travels), sent, strict=True):
            view.copy_(tensor)
        self.sent[what] += sum(outgoing)
        works = self._start(
            what, lambda: (dist.all_to_all_single(coming, gone, incoming, outgoing, self.group, async_op=True),)
        )
        return Swapping(works, list(coming.split(incoming)), leaving, arriving, travels, add, (gone,))

    def finish(self, swapping: Swapping, *, what: str) -> None:
        """Wait for what `begin` has begun, and put it where it belongs."""
        if swapping.works:
            # A little longer than it may take, so that gloo has ended it when this ends with an error.
            self._wait(what, swapping.works, self.timeout + GRACE)
        for r, part in enumerate(swapping.arriving):
            if r != self.rank and not swapping.works:
                continue
            own = r == self.rank
            sources = swapping.leaving[r] if own else _messages(swapping.came[r], part, swapping.travels)
            for target, source in zip(part, sources, strict=True):
                if swapping.add:
                    target += source
                else:
                    target.copy_(source)

    def pass_on(
        self, leaving: Sequence[Tensor], arriving: Sequence[Tensor], to: int, source: int, *, what: str
    ) -> Passing:
        """Begin to send tensors to one rank while others, of the same dtypes, come from another; those that arrive
        without gaps, and none to be touched before `arrived`."""
        gone = tuple(as_bytes(tensor) for tensor in leaving)
        self.sent[what] += sum(map(Tensor.numel, gone))
        jobs = [dist.P2POp(dist.isend, part, self._global(to), self.group) for part in gone if part.numel()]
        for part in map(as_bytes, arriving):
            if part.numel():
                jobs.append(dist.P2POp(dist.irecv, part, self._global(source), self.group))
        works = self._start(what, lambda: tuple(dist.batch_isend_irecv(jobs))) if jobs else ()
        return Passing(works, tuple(arriving), gone)

    def arrived(self, passing: Passing, *, what: str) -> tuple[Tensor, ...]:
        """What came."""
        self._wait(what, passing.works, self.timeout)
        return passing.arriving

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)

    def _finish(self, what: str, start: Any) -> None:
        # A little longer than it may take, so that gloo has ended it when this ends with an error.
        self._wait(what, self._start(what, start), self.timeout + GRACE)

    def _start(self, what: str, start: Any) -> tuple[Any, ...]:
        try:
            with self._limited():
                return start()  # type: ignore[no-any-return]
        except RuntimeError as error:
            raise self._failure(what, error) from error

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """A block in which what gloo starts has `timeout`, whatever the group's own is."""
        if self._gloo is None:
            yield
            return
        before = self._gloo.options._timeout
        self._gloo._set_default_timeout(datetime.timedelta(seconds=self.timeout))
        try:
            yield
        finally:
            self._gloo._set_default_timeout(before)

    @functools.cached_property
    def _gloo(self) -> Any:
        """The group's engine for tensors on the CPU if that is gloo."""
        gloo = getattr(dist, "ProcessGroupGloo", None)
        try:
            engine = self.group._get_backend(torch.device("cpu"))
        except RuntimeError:
            return None
        return engine if gloo is not None and isinstance(engine, gloo) else None

    def _wait(self, what: str, works: tuple[Any, ...], seconds: float) -> None:
        limit = datetime.timedelta(seconds=seconds)
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


def _span(tensor: Tensor, dtype: torch.dtype | None) -> int:
    """The bytes of a tensor on its way, a multiple of 8 so that every dtype can begin behind it."""
    return -(-tensor.numel() * (dtype or tensor.dtype).itemsize // 8) * 8


def _messages(raw: Tensor, like: Sequence[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """The tensors in a buffer of bytes, one after the other, shaped like these."""
    found, place = [], 0
    for tensor in like:
        kind = dtype or tensor.dtype
        found.append(raw[place : place + tensor.numel() * kind.itemsize].view(kind).view(tensor.shape))
        place += _span(tensor, dtype)
    return found


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
        total = torch.zeros_like(grad[0])
        leaving, arriving = [[part] for part in grad.unbind(0)], [[total]] * exchange.ranks
        exchange.swap(leaving, arriving, what=f"gradients of {ctx.what}", add=True)
        exchange.buffers.end()
        return total, None, None


class Route(NamedTuple):
    """Where the parts of a tensor go, and where they arrive in a new one of `shape`."""

    tensor: Tensor
    shape: tuple[int, ...]
    leaving: Callable[[Tensor], list[list[Tensor]]]
    arriving: Callable[[Tensor], list[list[Tensor]]]


class _Moved(torch.autograd.Function):
    """`Exchange.swap` into new tensors; backward: the gradients go back the same way, and add up."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, what: str, routes: Sequence[Route], *tensors: Tensor) -> Any:
        ctx.exchange, ctx.what, ctx.shapes = exchange, what, [tensor.shape for tensor in tensors]
        ctx.ways = [(route.leaving, route.arriving) for route in routes]
        found = tuple(t.new_empty(route.shape) for t, route in zip(tensors, routes, strict=True))
        leaving = _together([route.leaving(t) for t, route in zip(tensors, routes, strict=True)])
        arriving = _together([route.arriving(t) for t, route in zip(found, routes, strict=True)])
        exchange.swap(leaving, arriving, what=what)
        exchange.buffers.end()
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        found = tuple(g.new_zeros(shape) for g, shape in zip(grads, ctx.shapes, strict=True))
        leaving = _together([way[1](g) for g, way in zip(grads, ctx.ways, strict=True)])
        arriving = _together([way[0](g) for g, way in zip(found, ctx.ways, strict=True)])
        ctx.exchange.swap(leaving, arriving, what=f"gradients of {ctx.what}", add=True)
        ctx.exchange.buffers.end()
        return (None, None, None, *found)


def _together(views: Sequence[Views]) -> list[list[Tensor]]:
    """The views of several tensors as one list for each rank."""
    return [[view for part in parts for view in part] for parts in zip(*views, strict=True)]


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


def moved(routes: Sequence[Route], exchange: Exchange, what: str) -> tuple[Tensor, ...]:
    """Several tensors in one exchange, differentiable."""
    bare = [route._replace(tensor=route.tensor.new_empty(0)) for route in routes]  # the graph keeps no tensor for it
    tensors = (route.tensor for route in routes)
    found: tuple[Tensor, ...] = _Moved.apply(exchange, what, bare, *tensors)  # type: ignore[no-untyped-call]
    return found
