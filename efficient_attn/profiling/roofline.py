"""The roofline: how fast a call could be on this machine, and which ceiling it would meet (Williams et al., 2009)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..backends.cpu import attention as cpu


@dataclass(frozen=True)
class Ceilings:
    """What the machine was measured to do: float32 operations and copied bytes per second, in units of 10^9.

    kind: what was measured: "fma" (fused multiply-adds in registers), or "sgemm" without the native module.
    bfloat16_rate: products of bfloat16 for each one of float32: 2 where the kernels multiply them in pairs.
    unsure: half-width of the 95 % interval of either, relative: on a busy machine.
    """

    gflops: float
    gbytes: float
    kind: str = "fma"
    threads: int = 1
    bfloat16_rate: float = 1.0
    unsure: float = 0.0

    def flops_for(self, dtype: str) -> float:
        """The compute ceiling of a dtype. float16 is multiplied in float32; float64 has half as many lanes."""
        return self.gflops * {"float64": 0.5, "bfloat16": self.bfloat16_rate}.get(dtype, 1.0)


@dataclass(frozen=True)
class Roofline:
    """One call under the ceilings.

    Attributes:
        intensity: operations for each byte.
        attained: 10^9 operations a second.
        limit: what the lower one of the two ceilings allows at this intensity, likewise.
        bound: "compute" or "memory", which ceiling that is; "cache" where the call is faster than memory allows, since
            its bytes came from caches: then the limit is that of compute.
        share: attained / limit.
    """

    intensity: float
    attained: float
    limit: float
    bound: str
    share: float


def roofline(flops: float, moved: float, ms: float, ceilings: Ceilings, dtype: str = "float32") -> Roofline:
    """Place a call of `flops` operations and `moved` bytes that takes `ms` under the ceilings."""
    peak = ceilings.flops_for(dtype)
    intensity = flops / max(moved, 1)
    limit = min(peak, intensity * ceilings.gbytes)
    attained = flops / ms / 1e6
    bound = "compute" if limit == peak else "memory" if attained <= limit else "cache"
    if bound == "cache":
        limit = peak
    return Roofline(intensity, attained, limit, bound, attained / limit if limit else 0.0)


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the ceilings with `config`'s threads for `budget_s` seconds: a suite of the benchmark runner."""
    from ..measuring import clock

    compute, copy = clock.fma_ceiling(), clock.copy_ceiling()
    # One after the other: OpenMP's threads spin on for a while after a copy, and would take cores from the next call.
    times = {
        name: clock.interleaved({name: ceiling.call}, config["budget_s"] / 2)[name]
        for name, ceiling in (("compute", compute), ("copy", copy))
    }
    return {
        "gflops": compute.giga_per_second(times["compute"]["ms"]),
        "gbytes": copy.giga_per_second(times["copy"]["ms"]),
        "kind": compute.name,
        "threads": torch.get_num_threads(),
        "bfloat16_rate": 2.0 if not cpu.MISSING and cpu._cpu.instruction_set().endswith("_bf16") else 1.0,
        "unsure": max(found["unsure"] for found in times.values()),
        "spreads": {name: found["spread"] for name, found in times.items()},
    }
