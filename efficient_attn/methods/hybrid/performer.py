"""The tail by positive random features: Scatterbrain.

Chen et al., "Scatterbrain: Unifying Sparse and Low-rank Attention", NeurIPS 2021, section 4, estimate the kernel by
S + phi(Q) phi(K)^T, whose S removes the features' part in its support and puts the exact one in its place; here the
features' part of the support is never added at all. The kernel estimate is FAVOR+'s, with its true scale:
phi(q) . phi(k) has the expectation e^{scale q . k}.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backends.call import accumulation_dtype
from ...errors import InputError
from ...inputs import select_keys
from ...options import register
from ...tracing import without_autocast
from ..lowrank import by_group
from ..performer import Performer, PerformerState
from .tail import FeatureTail, TailCall, largest


@register
@dataclass(frozen=True)
class PerformerTail(FeatureTail):
    """Positive random features: with a sparse part, this is Scatterbrain.

    Fields:
        features, orthogonal, seed, redraw_interval: as in `Performer`.
        block: queries and keys are exact or in the tail by whole blocks of this size.
    """

    name = "performer"
    formula = "phi(Q) phi(K)^T outside the window"
    paper = "Chen et al. 2021 (Scatterbrain)"
    complexity = "n (w + m) d + n^2 m d / block^2"
    accepts_causal = True

    features: int = 256
    orthogonal: bool = True
    seed: int = 0
    redraw_interval: int = 0
    block: int = 64

    def check(self) -> None:
        self._performer()
        self._check_block()

    def _performer(self) -> Performer:
        return Performer(self.features, "softmax", self.orthogonal, self.seed, self.redraw_interval)

    def build(self, head_dim: int, *, device: Any = None, dtype: torch.dtype | None = None) -> nn.Module:
        return PerformerState(self._performer(), head_dim, device=device, dtype=dtype)

    def factors(self, query: Tensor, key: Tensor, call: TailCall) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Stabilised: each feature against its largest key, or with causality, where no factor may depend on keys to
        come, the keys of each block against the largest exponent of the block.
        """
        if not 0.0 < call.scale < math.inf:
            raise InputError(f"a performer tail needs a positive scale, for features take its root; got {call.scale}")
        state: Any = call.state
        if state is None:
            raise InputError(f"{self} needs state: pass what build(embed_dim, num_heads, head_dim) returned")
        projection = state.current() if call.counted else state.projection
        dtype, root = accumulation_dtype(query.dtype), call.scale**0.5
        (key,) = select_keys(call.key_mask, key)
        with without_autocast(query):
            query, key, projection = query.to(dtype) * root, key.to(dtype) * root, projection.to(dtype)
            a = by_group(query, key) @ projection.mT
            b = key @ projection.mT - key.square().sum(-1, keepdim=True) / 2
            if call.key_mask is not None:
                b = b.masked_fill(~call.key_mask[:, None, :, None], -torch.inf)
            # A key that is not finite is for those who see it, in its block; the others keep their scale.
            finite = b.detach().masked_fill(~b.isfinite(), -torch.inf)
            shift = None
            if call.is_causal and key.shape[2]:
                missing = -key.shape[2] % self.block
                blocks = F.pad(finite.amax(-1), (0, missing), value=-torch.inf).unflatten(-1, (-1, self.block))
                shift = largest(blocks).squeeze(-1)  # (B, Hkv, C)
                b = b - shift.repeat_interleave(self.block, -1)[..., : key.shape[2], None]
                shift = shift.unsqueeze(2)
            elif key.shape[2]:
                highest = largest(finite.mT).mT  # (B, Hkv, 1, m)
                a, b = a + highest.unsqueeze(2), b - highest
            top = a.detach().amax(-1, keepdim=True)
            log_scale = top.squeeze(-1).flatten(1, 2) - query.square().sum(-1) / 2 - math.log(projection.shape[0])
            return (a - top).exp(), b.exp().unsqueeze(2), log_scale, shift
