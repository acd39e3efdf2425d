"""Suite ``memory``: peak extra memory of one call against its length, the check that sparse attention needs O(n)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from . import clock, inputs
from .ops import WARM_UP_LENGTH, binder, shaped, sized


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Peak bytes above the inputs of planning and running ``config``'s method once.

    ``config``: method (spec), seqlen, mode ("fwd", "fwd_bwd"), dtype, batch, heads, head_dim, threads.
    """
    torch.manual_seed(0)
    method = sized(config["method"], config["seqlen"])
    heads, head_dim, dtype = config["heads"], config["head_dim"], getattr(torch, config["dtype"])
    state = method.build(heads * head_dim, heads, head_dim, dtype=dtype)
    qkv = inputs.photograph_qkv(config["seqlen"], batch=config["batch"], heads=heads, head_dim=head_dim, dtype=dtype)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = shaped(method, query.shape[2]).attend(query, key, value, state=state)[0]
        return out

    binder(config["mode"], [t[:, :, :WARM_UP_LENGTH] for t in qkv], state)(attend)()
    call = binder(config["mode"], qkv, state)(attend)
    with clock.PeakMemory() as peak:
        call()
    return {"peak_bytes": peak.bytes, "bytes_per_token": round(peak.bytes / config["seqlen"], 1)}


def fitted_exponent(lengths: Sequence[int], peaks: Sequence[int]) -> float:
    """The least-squares slope of log(peak) over log(length): 1 for memory linear in the length, 2 for quadratic."""
    x, y = [math.log(n) for n in lengths], [math.log(max(p, 1)) for p in peaks]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)
