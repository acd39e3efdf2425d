"""The tail by a Nystrom approximation of the kernel e^{scale q . k} itself, from m landmarks.

    e^{scale q . k}  ~  e^{scale q . K~^T}  pinv(e^{scale Q~ K~^T})  e^{scale Q~ . k}

Landmarks and the iteration for the pseudo-inverse are those of Xiong et al. 2021 (see `nystrom_attention`), but the
kernel is not normalised by rows first, for the tail's mass must be comparable to the exact part's. This is ours.
An estimated mass may come out negative, as any Nystrom entry may; such a row keeps its exact part alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...backends.call import accumulation_dtype
from ...errors import UnsupportedError
from ...inputs import select_keys
from ...options import check_range, register
from ...tracing import without_autocast
from ..lowrank import by_group
from ..nystrom import iterative_pinv, segment_means
from .tail import FeatureTail, TailCall, largest


@register
@dataclass(frozen=True)
class NystromTail(FeatureTail):
    """The kernel interpolated from landmarks. Not causal: landmarks mix positions.

    In self-attention (Nq = Nk) the key mask also says which queries shape the landmarks.

    Fields:
        landmarks, pinv_iterations: as in `Nystrom`.
        block: queries and keys are exact or in the tail by whole blocks of this size.
    """

    name = "nystrom"
    formula = "e^(QK~^T) pinv(e^(Q~K~^T)) e^(Q~K^T) outside the window"
    paper = "this package, after Xiong et al. 2021"
    complexity = "n (w + m) d + n^2 m d / block^2"
    signed = True

    landmarks: int = 32
    pinv_iterations: int = 6
    block: int = 64

    def check(self) -> None:
        check_range(self, "landmarks", 1)
        check_range(self, "pinv_iterations", 1, 100)
        self._check_block()

    def factors(self, query: Tensor, key: Tensor, call: TailCall) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The pseudo-inverse of e^{Q~ K~^T} is that of its softmax, whose iteration converges, over the row sums.

        Every exponential is taken against the maximum of its row, so that none overflows.
        """
        if call.is_causal:
            raise UnsupportedError(
                "a nystrom tail cannot be causal: its landmarks mix positions. Use +performer or +centroid"
            )
        dtype = accumulation_dtype(query.dtype)
        m = min(self.landmarks, query.shape[2], key.shape[2])
        if 0 in (m, *query.shape[:2]):
            rows = by_group(query, key)[..., :1].to(dtype)
            columns = rows.new_zeros(*rows.shape[:3], key.shape[2], 1)
            return torch.zeros_like(rows), columns, rows.flatten(1, 2).squeeze(-1), None
        with without_autocast(query):
            query, (key,) = query.to(dtype), select_keys(call.key_mask, key.to(dtype))
            near, near_used = segment_means(query, m, call.key_mask if query.shape[2] == key.shape[2] else None)
            far, far_used = segment_means(key, m, call.key_mask)
            grouped, near, far = by_group(query, key) * call.scale, by_group(near, key) * call.scale, far.unsqueeze(2)
            far_scores = _hide(grouped @ far.mT, far_used, 1)  # (B, Hkv, G, Nq, m)
            middle = _hide(near @ far.mT, far_used, 1)
            near_scores = near @ key.unsqueeze(2).mT  # (B, Hkv, G, m, Nk)
            if call.key_mask is not None:
                near_scores = near_scores.masked_fill(~call.key_mask[:, None, None, None, :], -torch.inf)
            row, top = largest(far_scores), largest(near_scores)
            softmax = torch.softmax(middle, -1)
            if far_used is not None:
                softmax = torch.where(far_used.any(-1)[:, None, None, None, None], softmax, 0.0)
            inverse = iterative_pinv(_hide(softmax, near_used, 2, 0.0), self.pinv_iterations)
            lift = top.squeeze(-1) - torch.logsumexp(middle, -1)  # (B, Hkv, G, m)
            lift = _hide(lift.masked_fill(lift == torch.inf, -torch.inf), near_used, 1)
            highest = largest(lift)
            a = torch.exp(far_scores - row) @ inverse * torch.exp(lift - highest).unsqueeze(-2)
            b = torch.exp(near_scores - top).mT
            return a, b, (row.squeeze(-1) + highest).flatten(1, 2), None


def _hide(scores: Tensor, used: Tensor | None, dim: int, fill: float = -torch.inf) -> Tensor:
    """Fill the landmarks that do not exist, used (B, m) along dimension -dim."""
    if used is None:
        return scores
    shape = [used.shape[0], *([1] * (scores.dim() - 1))]
    shape[-dim] = used.shape[1]
    return scores.masked_fill(~used.view(shape), fill)
