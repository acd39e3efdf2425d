"""How long sending takes: a model of links, given or measured, with which plans are priced and large runs predicted.

A message of n bytes takes latency + n / bandwidth. Ranks of one node have faster links than ranks of two. What a rank
receives from several others comes through one port of each kind, one after the other. Compute is pairs times FLOP/s,
and `call` for each call of a kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InputError


@dataclass(frozen=True)
class Link:
    """Speeds of links and of a rank.

    Fields:
        bandwidth: bytes a second of one rank, between ranks of one node.
        latency: seconds of a message.
        flops: FLOP a second of one rank in attention.
        node: ranks of a node; 0: all are in one.
        far_bandwidth, far_latency: between nodes; 0: as near.
        call: seconds of one call of a kernel beside its FLOPs.
        start: seconds until a call's ranks agree, before anything else travels.
        overlap: the part of the shorter one of computing and passing on that is hidden behind the longer one; 1 where
            links have engines of their own, 0 where the same cores do both.

    Raises:
        InputError: speeds that are not positive.
    """

    bandwidth: float = 2e9
    latency: float = 1e-4
    flops: float = 5e10
    node: int = 0
    far_bandwidth: float = 0.0
    far_latency: float = 0.0
    call: float = 2e-5
    overlap: float = 0.0
    start: float = 2e-4

    def __post_init__(self) -> None:
        for name in ("bandwidth", "flops"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}")
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise InputError(f"{field.name} must not be negative, got {getattr(self, field.name)}")

    def is_far(self, a: int, b: int) -> bool:
        """Whether two ranks are in different nodes."""
        return self.node > 0 and a // self.node != b // self.node

    def of(self, a: int, b: int) -> tuple[float, float]:
        """Latency and seconds a byte between two ranks."""
        if self.is_far(a, b):
            return self.far_latency or self.latency, 1.0 / (self.far_bandwidth or self.bandwidth)
        return self.latency, 1.0 / self.bandwidth

    def exchange(self, rank: int, messages: Sequence[tuple[int, float]]) -> float:
        """Seconds in which a rank gets (from whom, bytes), near and far at the same time."""
        near = far = 0.0
        for peer, size in messages:
            latency, per_byte = self.of(rank, peer)
            if self.is_far(rank, peer):
                far += latency + size * per_byte
            else:
                near += latency + size * per_byte
        return max(near, far)


H200 = Link(
    bandwidth=450e9,  # NVLink 4: 900 GB/s in both directions together
    latency=1e-5,
    flops=4e14,  # bfloat16 attention forward, as FlashAttention reaches on Hopper
    node=8,
    far_bandwidth=50e9,  # 400 Gb/s InfiniBand, one port a GPU
    far_latency=2e-5,
    overlap=1.0,
    call=1e-5,
    start=5e-5,
)
