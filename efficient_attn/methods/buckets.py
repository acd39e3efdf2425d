"""Bucket methods: the patterns of `efficient_attn.patterns.buckets`, run on tokens sorted by their bucket.

For each round of bucketing, queries and keys are put in the order of its buckets, where the pairs to look at lie close
to a diagonal; the pairs that an earlier round has put together are left out; the rounds are joined by their lse:

    o_i = sum_r exp(lse_r(i) - lse(i)) o_r(i),   lse(i) = log sum_r exp(lse_r(i))

which is one softmax over the union of the rounds, exactly.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import patterns
from ..defaults import alignment_offset
from ..errors import UnsupportedError
from ..functional import (
    attention,
    attention_weights,
    check_alignment,
    check_key_mask,
    merge_attention,
    prepare_inputs,
    resolve_seed,
    select_keys,
)
from ..masks import BlockMask
from ..patterns.buckets import sorted_lists
from ..tracing import PLAN, span
from .base import register
from .sparse import SparseMethod


class BucketMethod(SparseMethod, patterns.BucketPattern):
    """A pattern of buckets as a method. With a mask of pairs or a bias tokens stay in order: n^2 / 8 bytes a head."""

    sorted_block: ClassVar[int] = 64

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        state: nn.Module | None = None,
        key_mask: Tensor | None = None,
        mask: BlockMask | Tensor | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
        causal_alignment: str | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        dropout_seed: int | Tensor | None = None,
        backend: str = "auto",
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        self._check_tracing(query)
        if is_causal and not self.accepts_causal:
            raise UnsupportedError(
                f"{self} cannot be causal: where a token is put depends on the whole sequence. Use lsh, topk_blocks or "
                "another pattern"
            )
        query, key, value = prepare_inputs(query, key, value)
        check_key_mask(key_mask, key)
        Nq, Nk = query.shape[2], key.shape[2]
        check_alignment(is_causal, causal_alignment, Nq, Nk)
        if self.shared_qk:
            self.buckets(query, key, key_mask)  # says what does not fit before the keys are replaced
            key = F.normalize(query, dim=-1)
        options: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p}
        if mask is not None or bias is not None:
            options |= {"mask": mask, "bias": bias, "is_causal": is_causal, "causal_alignment": causal_alignment}
            options |= {"dropout_seed": dropout_seed, "backend": backend, "need_weights": need_weights}
            return super().attend(query, key, value, key_mask=key_mask, **options)
        offset = alignment_offset(causal_alignment, Nq, Nk) if is_causal else None
        with torch.no_grad(), span(PLAN):
            found = self.buckets(query.detach(), key.detach(), key_mask)
        key, value = select_keys(key_mask, key, value)
        seed = resolve_seed(dropout_seed) if dropout_p > 0.0 else None
        outs, lses, weights = [], [], []
        for r in range(self.rounds):
            by_query, by_key = (buckets[r].argsort(dim=-1, stable=True) for buckets in (found.query, found.key))
            back = by_query.argsort(-1)
            sorted_qkv = [_taken(t, order) for t, order in ((query, by_query), (key, by_key), (value, by_key))]
            with span(PLAN):
                options["mask"] = sorted_lists(
                    found, r, by_query, by_key, offset=offset, others=self.shared_qk, block=self.sorted_block
                )
            options["dropout_seed"] = None if seed is None else seed + r
            out, lse = attention(*sorted_qkv, **options, return_lse=True, backend=backend)
            outs.append(_taken(out, back))
            lses.append(lse.gather(-1, back))
            if need_weights:
                columns = by_key.argsort(-1).repeat_interleave(query.shape[1] // max(key.shape[1], 1), 1)
                part = _taken(attention_weights(*sorted_qkv[:2], **options), back)
                weights.append(part.gather(-1, columns[:, :, None].expand_as(part)))
        out, lse = merge_attention(outs, lses)
        alone = self._alone(lse, key_mask, offset)
        if alone is not None:
            out = torch.where(alone[..., None], value, out)
        if not need_weights:
            return out, None
        shares = (torch.stack(lses) - lse.masked_fill(lse == -torch.inf, 0.0)).exp()[..., None]
        P = (shares * torch.stack(weights)).sum(0).to(out.dtype)
        if alone is not None:
            P = torch.where(alone[..., None], torch.eye(Nk, dtype=P.dtype, device=P.device), P)
        return out, P

    def _alone(self, lse: Tensor, key_mask: Tensor | None, offset: int | None) -> Tensor | None:
        """With shared queries and keys: the tokens that see no other, and so themselves."""
        if not self.shared_qk:
            return None
        alone = lse == -torch.inf
        return alone if key_mask is None else alone & key_mask[:, None]


def _taken(x: Tensor, order: Tensor) -> Tensor:
    """x (B, H, N, D) with its tokens in an order (B, H, N)."""
    return x.gather(2, order[..., None].expand(*order.shape, x.shape[-1]))


@register
class LSH(BucketMethod, patterns.LSH):
    """Tokens that a random rotation sends to the same bucket."""

    name = "lsh"
    formula = "softmax(QK^T)V over h(q_i) = h(k_j), h(x) = argmax([xR; -xR]), any of r rounds"
    paper = "Kitaev et al. 2020"
    complexity = "r n^2 d / buckets"


@register
class SortedBuckets(BucketMethod, patterns.SortedBuckets):
    """Queries and keys sorted along a direction and cut into equal buckets."""

    name = "sorted_buckets"
    formula = "softmax(QK^T)V over equal pieces of Q and K sorted by xu, any of r rounds"
    paper = "Daras et al. 2020"
    complexity = "r n s d"
    accepts_causal = False
