"""A bias that is a product of two thin matrices."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import InputError
from .base import Appended, check


@dataclass(frozen=True, eq=False)
class LowRankBias(Appended):
    """u_i . w_j, appended to the dot products of queries and keys: no kernel sees it.

    Args:
        u: (Nq, R), or (1 | B, 1 | Hq, Nq, R), which gets a gradient as all biases do.
        w: (Nk, R), or (1 | B, 1 | Hkv, Nk, R): one for the query heads that share a key head. In half precision both
            are rounded as queries and keys are. D + R is at most what a head_dim may be.
    """

    u: Tensor
    w: Tensor

    def __post_init__(self) -> None:
        for name, tensor in (("u", self.u), ("w", self.w)):
            check(name, tensor, (2, 4), None)
        if self.u.shape[-1] != self.w.shape[-1]:
            shapes = f"{tuple(self.u.shape)} and {tuple(self.w.shape)}"
            raise InputError(f"u and w must share their last dimension; got {shapes}")

    def columns(self, query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return _of_heads(query, self.u / scale, "u"), _of_heads(key, self.w, "w")


def _of_heads(rows: Tensor, more: Tensor, name: str) -> Tensor:
    """u or w, for every head of queries or keys (B, H, N, D)."""
    more = more[(None,) * (4 - more.dim())]
    full = (*rows.shape[:3], more.shape[3])
    if more.shape[2] != full[2] or any(more.shape[d] not in (1, full[d]) for d in (0, 1)):
        raise InputError(
            f"{name} of LowRankBias, {tuple(more.shape)}, does not fit {tuple(rows.shape)}: it must be (1 | B, 1 | H, "
            "N, R); w has the heads of keys"
        )
    return more.to(rows.device, rows.dtype).expand(full)
