"""How `Sparse` attends by a pattern of buckets: on tokens sorted by their bucket.

For each round of bucketing, queries and keys are put in the order of its buckets, where the pairs to look at lie close
to a diagonal; the pairs that an earlier round has put together are left out; the rounds are joined by their lse:

    o_i = sum_r exp(lse_r(i) - lse(i)) o_r(i),   lse(i) = log sum_r exp(lse_r(i))

which is one softmax over the union of the rounds, exactly. The rounds are the parts of a `PartedMask`, where kernels
follow an order as they load; with backend="cuda" tokens are sorted before each round. (With a mask of pairs or a bias
`Sparse` leaves tokens in order instead, which takes n^2 / 8 bytes a head.)
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.cpu import selection
from ..defaults import alignment_offset
from ..functional import attention, attention_weights, attention_with_weights, merge_attention
from ..inputs import prepare_inputs, resolve_seed, select_keys
from ..masks import Part, PartedMask
from ..patterns import BucketPattern
from ..patterns.buckets import Buckets
from ..patterns.sorted_tokens import sorted_lists
from ..tracing import PLAN, span


def bucketed_inputs(
    pattern: BucketPattern, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as they are attended to: with shared_qk the keys are the queries, of length one."""
    pattern._check_tracing(query)
    query, key, value = prepare_inputs(query, key, value)
    if pattern.shared_qk:
        pattern.buckets(query, key, key_mask)  # says what does not fit before the keys are replaced
        key = F.normalize(query, dim=-1)
    return query, key, value


def bucketed_attention(
    pattern: BucketPattern, query: Tensor, key: Tensor, value: Tensor, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """`Method.attend` of a pattern of buckets, round by round, for what `bucketed_inputs` returned."""
    if torch.compiler.is_compiling():  # no graph knows what a bucket holds
        from ..untraced import untraced

        found: tuple[Tensor, Tensor | None] = untraced(_attention, pattern, query, key, value, **options)
        return found
    return _attention(pattern, query, key, value, **options)


def _attention(
    pattern: BucketPattern,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None,
    is_causal: bool,
    causal_alignment: str | None,
    scale: float | None,
    dropout_p: float,
    dropout_seed: int | Tensor | None,
    backend: str,
    need_weights: bool | Literal["mean"],
) -> tuple[Tensor, Tensor | None]:
    Nq, Nk = query.shape[2], key.shape[2]
    options: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p}
    offset = alignment_offset(causal_alignment, Nq, Nk) if is_causal else None
    with torch.no_grad(), span(PLAN):
        found = pattern.buckets(query.detach(), key.detach(), key_mask)
    key, value = select_keys(key_mask, key, value)
    in_parts = query.device.type == "cpu" or backend in ("auto", "triton")
    if in_parts and query.numel() > 0 and key.numel() > 0:
        with torch.no_grad(), span(PLAN):
            options["mask"] = sorted_mask(found, rounds=pattern.rounds, offset=offset, others=pattern.shared_qk)
        options |= {"dropout_seed": dropout_seed, "backend": backend}
        P = None
        if need_weights:
            out, lse, P = attention_with_weights(query, key, value, **options)
        else:
            out, lse = attention(query, key, value, **options, return_lse=True)
        return _with_oneself(_alone(pattern, lse, key_mask), out, value, P)
    seed = resolve_seed(dropout_seed) if dropout_p > 0.0 else None
    outs, lses, weights = [], [], []
    for r in range(pattern.rounds):
        by_query, by_key = found.orders(r)
        back = by_query.argsort(-1)
        sorted_qkv = [_taken(t, order) for t, order in ((query, by_query), (key, by_key), (value, by_key))]
        with span(PLAN):
            options["mask"] = sorted_lists(found, r, by_query, by_key, offset=offset, others=pattern.shared_qk)
        options["dropout_seed"] = None if seed is None else seed + r
        out, lse = attention(*sorted_qkv, **options, return_lse=True, backend=backend)
        outs.append(_taken(out, back))
        lses.append(lse.gather(-1, back))
        if need_weights:
            columns = by_key.argsort(-1).repeat_interleave(query.shape[1] // max(key.shape[1], 1), 1)
            part = _taken(attention_weights(*sorted_qkv[:2], **options), back)
            weights.append(part.gather(-1, columns[:, :, None].expand_as(part)))
    out, lse = merge_attention(outs, lses)
    P = None
    if need_weights:
        shares = (torch.stack(lses) - lse.masked_fill(lse == -torch.inf, 0.0)).exp()[..., None]
        P = (shares * torch.stack(weights)).sum(0).to(out.dtype)
    return _with_oneself(_alone(pattern, lse, key_mask), out, value, P)


def sorted_mask(found: Buckets, *, rounds: int, offset: int | None, others: bool) -> PartedMask:
    """The mask of buckets, each round a part in the order of its buckets; arguments as `sorted_lists` has them."""
    parts = []
    for r in range(rounds):
        if selection.serves(found):
            parts.append(selection.sorted_part(found, r, offset=offset, others=others))
            continue
        by_query, by_key = found.orders(r)
        lists = sorted_lists(found, r, by_query, by_key, offset=offset, others=others)
        parts.append(Part(lists, *(order.flatten(0, 1).int() for order in (by_query, by_key))))
    return PartedMask.trusted(parts, q_len=found.query.shape[-1], kv_len=found.key.shape[-1])


def _with_oneself(alone: Tensor | None, out: Tensor, value: Tensor, P: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Out and weights, in which the tokens that are `alone` see themselves."""
    if alone is not None:
        out = torch.where(alone[..., None], value, out)
        if P is not None:
            P = torch.where(alone[..., None], torch.eye(P.shape[-1], dtype=P.dtype, device=P.device), P)
    return out, P


def _alone(pattern: BucketPattern, lse: Tensor, key_mask: Tensor | None) -> Tensor | None:
    """With shared queries and keys: the tokens that see no other, and so themselves."""
    if not pattern.shared_qk:
        return None
    alone = lse == -torch.inf
    return alone if key_mask is None else alone & key_mask[:, None]


def _taken(x: Tensor, order: Tensor) -> Tensor:
    """x (B, H, N, D) with its tokens in an order (B, H, N)."""
    return x.gather(2, order[..., None].expand(*order.shape, x.shape[-1]))
