"""What we are compared with. A module in this folder with `PEERS` offers some; so does a file given to `--load`.

A peer builds, for a shape, its call and ours on the same inputs (`Pair`); whether their outputs are equal where they
should be is part of every record. An optional peer says why it is absent.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from efficient_attn.measuring import inputs

from .formulas import flex, linformer, nystrom, performer, sdpa, torch_module

__all__ = [
    "PEERS",
    "Pair",
    "Peer",
    "Shape",
    "flex",
    "get",
    "linformer",
    "missing",
    "names",
    "needs_gpu",
    "nystrom",
    "performer",
    "register",
    "sdpa",
    "torch_module",
]

Operator = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """What a peer is built for. Inputs are photograph patches (see `inputs`)."""

    seqlen: int
    batch: int = 1
    heads: int = 4
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    training: bool = False  # a backward follows

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def tolerance(self) -> float:
        """Of equal computations in this dtype."""
        return 1e-4 if self.dtype == torch.float32 else 2e-2

    def qkv(self) -> tuple[Tensor, ...]:
        """Query, key and value (B, H, N, D)."""
        shape = {"batch": self.batch, "heads": self.heads, "head_dim": self.head_dim}
        made = inputs.photograph_qkv(self.seqlen, dtype=self.dtype, **shape)
        return tuple(tensor.to(self.device) for tensor in made)

    def tokens(self) -> Tensor:
        """(B, N, H * D), for modules that project."""
        return self.qkv()[0].transpose(1, 2).flatten(2).contiguous()

    def heads_of(self, linear: nn.Module, x: Tensor) -> Tensor:
        """(B, N, H * D) through a projection to (B, H, N, D)."""
        projected: Tensor = linear(x)
        return projected.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)


@dataclass(frozen=True)
class Pair:
    """Two calls on the same inputs. `tolerance` bounds |theirs - ours| / |ours| (Frobenius); None: the two compute
    different things, and `note` says which."""

    inputs: tuple[Tensor, ...]
    ours: Operator
    theirs: Operator
    tolerance: float | None
    note: str = ""


@dataclass(frozen=True)
class Peer:
    """One implementation by others.

    Args:
        computes: in words, what both calls compute.
        build: the two calls for a shape.
        package: whose version is recorded.
        absent: why it cannot run here, or None; by default it can.
        trains: whether a backward can follow.
        compiles: its first call compiles, which is timed apart and left out where a run must be quick.
        apart: it has threads of its own, so that it is measured in a process of its own (see `engines`).
    """

    name: str
    computes: str
    build: Callable[[Shape], Pair]
    package: str = "torch"
    absent: Callable[[], str | None] = lambda: None
    trains: bool = True
    compiles: bool = False
    apart: bool = False


PEERS: dict[str, Peer] = {}


def register(peer: Peer) -> Peer:
    """Makes a peer known by its name."""
    PEERS[peer.name] = peer
    return peer


def _discover() -> None:
    for module in pkgutil.iter_modules(__path__):
        for peer in getattr(importlib.import_module(f"{__name__}.{module.name}"), "PEERS", ()):
            PEERS.setdefault(peer.name, peer)


def names() -> tuple[str, ...]:
    """All peers, absent ones too."""
    _discover()
    return tuple(PEERS)


def get(name: str) -> Peer:
    """The peer of a name; `KeyError` for one that does not exist."""
    _discover()
    return PEERS[name]


def missing(module: str, package: str) -> Callable[[], str | None]:
    """The `absent` of a peer that needs a module."""

    def reason() -> str | None:
        return None if importlib.util.find_spec(module) else f"{package} is not installed: pip install {package}"

    return reason


def needs_gpu(module: str, package: str) -> Callable[[], str | None]:
    """The `absent` of a peer that needs a module and an NVIDIA GPU."""

    def reason() -> str | None:
        if not torch.cuda.is_available():
            return f"{package} needs an NVIDIA GPU, and there is none"
        return missing(module, package)()

    return reason


def no_grad_of(module: Any) -> Any:
    """The module in evaluation, without gradients for its parameters: inputs alone are differentiated."""
    return module.eval().requires_grad_(False)
