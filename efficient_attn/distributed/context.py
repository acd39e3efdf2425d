"""`context_parallel`: inside, attention takes and returns this rank's part of a sequence.

A call goes three steps: the ranks agree that they mean the same (one small all-gather, so that what does not fit is
refused by all of them before anything travels), the mask of the whole sequence becomes a plan, and a transport runs it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import biases, sharding
from ..backends import check_name
from ..biases import Bias, BiasLike, LowRankBias, RelativePosition
from ..defaults import default_scale
from ..errors import InputError, UnsupportedError
from ..inputs import (
    add_to_bias,
    as_block_mask,
    causal_mask,
    check_alignment,
    check_bias,
    check_dropout,
    check_key_mask,
    check_sinks,
    check_softcap,
    prepare_inputs,
    select_keys,
    settle_structured,
    tensors_of,
)
from ..masks import BlockMask
from ..methods import Method, Sparse
from ..patterns import BucketPattern
from ..untraced import untraced
from . import states
from .agreement import agree, as_number, combined, mask_digest, shape_facts, text_digest, wanted
from .attention import Added, Settled, exact_attention
from .exchange import Exchange, gathered, moved
from .heads import HeadsApart, head_lists
from .links import H200, Link
from .plan import Explanation, Plan, Shape, check_transport, head_ranks, make_plan
from .shards import Shards

LAYOUTS: Mapping[str, Callable[[int, int], Shards]] = {
    "zigzag": functools.lru_cache(Shards.zigzag),
    "contiguous": functools.lru_cache(Shards.contiguous),
}


@contextmanager
def context_parallel(
    mesh: DeviceMesh | dist.ProcessGroup,
    *,
    shards: str | Shards | Sequence[Shards] = "zigzag",
    transport: str = "auto",
    link: Link | None = None,
    timeout: float = 300.0,
) -> Iterator[ContextParallel]:
    """A block in which `attention`, methods, modules and models work on sequences that are spread over ranks.

    query, key and value are this rank's tokens, in ascending order; masks and patterns are those of the whole sequence,
    as are causality, sinks and biases by relative position; a bias has this rank's rows and all columns; a key mask is
    this rank's part, as are u and w of a `LowRankBias`. Outputs and gradients are this rank's. Our models take the
    whole input and spread it themselves.

    Gradients are those of the sum of every rank's loss: what DistributedDataParallel or FSDP averages is right when
    each rank's loss is the mean over its tokens, or over all of them. The backward, with activation checkpointing too,
    belongs inside the block.

    Args:
        mesh: one dimension of a DeviceMesh, or a process group, whose ranks share each sequence.
        shards: which tokens a rank has: "zigzag" (even under a causal mask), "contiguous" (least to send for windows),
            or `Shards`, such as `Shards.balanced(mask, ranks)`; several, where sequences of several lengths meet.
        transport: "gather", "ring", "all_to_all", or "auto", the one that `link` predicts to be fastest.
        link: speeds, for that prediction; default: those of an H200 on NCCL, else of CPU cores.
        timeout: seconds to wait for another rank.

    Raises:
        InputError, InputTypeError: a mesh of several dimensions or without this rank, shards of other ranks, options
            that do not exist.
        CommunicationError, in calls inside: a rank that died, hangs or called something else.
    """
    context = ContextParallel(mesh, shards, transport, link, timeout)
    if sharding.active is not None:
        raise InputError("context_parallel cannot stand inside context_parallel")
    with sharding.entered(context):
        yield context


class ContextParallel:
    """What `context_parallel` yields.

    Attributes:
        rank, ranks: this one among those that share a sequence.
        exchange: its `sent` counts bytes by purpose.
        transport, link: as given.
    """

    def __init__(
        self,
        mesh: DeviceMesh | dist.ProcessGroup,
        shards: str | Shards | Sequence[Shards],
        transport: str,
        link: Link | None,
        timeout: float,
    ) -> None:
        check_transport(transport)
        self.exchange = Exchange(mesh, timeout)
        self.rank, self.ranks = self.exchange.rank, self.exchange.ranks
        nccl = dist.get_backend(self.exchange.group) == "nccl"
        self.transport, self.link = transport, link or (H200 if nccl else Link())
        given = (shards,) if isinstance(shards, (str, Shards)) else tuple(shards)
        self._layout = next((s for s in given if isinstance(s, str)), "zigzag")
        if self._layout not in LAYOUTS:
            raise InputError(f"shards must be Shards or one of {tuple(LAYOUTS)}, got {self._layout!r}")
        self._given = {s.length: s for s in given if isinstance(s, Shards)}
        for known in self._given.values():
            if known.ranks != self.ranks:
                raise InputError(f"shards of {known.ranks} ranks in a group of {self.ranks}")

    # --- sequences ---

    def shards(self, length: int) -> Shards:
        """Which tokens each rank has of a sequence of this length."""
        known = self._given.get(length)
        return LAYOUTS[self._layout](length, self.ranks) if known is None else known

    def split(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of a whole sequence along `dim`; differentiable."""
        return self.shards(x.shape[dim]).part(x, self.rank, dim)

    def join(self, x: Tensor, dim: int, length: int) -> Tensor:
        """The whole sequence of `length` tokens of every rank's part, on every rank; differentiable.

        Its gradient is the sum of those that the ranks have: with the same loss on each, so many times one's.
        """
        shards = self.shards(length)
        longest = max(shards.counts)
        if x.shape[dim] != shards.counts[self.rank]:
            raise InputError(f"rank {self.rank} has {shards.counts[self.rank]} of {length} tokens, got {x.shape[dim]}")
        padded = torch.cat([x, x.new_zeros(*x.shape[:dim], longest - x.shape[dim], *x.shape[dim + 1 :])], dim)
        parts = gathered(padded, self.exchange, "outputs").unbind(0)
        return shards.whole([part.narrow(dim, 0, n) for part, n in zip(parts, shards.counts, strict=True)], dim)

    def positions(self, count: int, device: torch.device) -> Tensor:
        """The places of this rank's `count` tokens in the sequence, for learned or rotary positions; asks all ranks."""
        counts = [row[0] for row in self.exchange.gather_numbers([count])]
        return self._matching(counts, "tokens").positions(self.rank, device)

    def _matching(self, counts: Sequence[int], what: str) -> Shards:
        shards = self.shards(sum(counts))
        if shards.counts != tuple(counts):
            raise InputError(
                f"the ranks have {list(counts)} {what}; of {sum(counts)} they must have {list(shards.counts)}. "
                "Spread with ContextParallel.split, or pass shards="
            )
        return shards

    # --- exact attention ---

    def attention(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Any:
        """`efficient_attn.attention` over the whole sequence; `key_mask` (B, n) as in `padded_attention`."""
        # exchanges are steered by sizes that only Python knows
        return untraced(self._attention, query, key, value, arguments)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> Any:
        return_lse = arguments.pop("return_lse", False)
        masks = [m for m in (arguments.pop("mask", None), *arguments.pop("masks", ())) if m is not None]
        with sharding.entered(None):
            out, lse = self._exact(query, key, value, masks, **arguments)
        return (out, lse) if return_lse else out

    def _exact(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        masks: list[Any],
        *,
        key_mask: Tensor | None = None,
        bias: BiasLike = None,
        is_causal: bool = False,
        causal_alignment: str | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        dropout_p: float = 0.0,
        dropout_seed: int | Tensor | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        tensors: list[Tensor] = []
        added: list[Added] = []
        by_place: list[Bias] = []
        factors: list[float] = []

        def facts() -> dict[str, int]:
            tensors[:] = prepare_inputs(query, key, value)
            cap = check_softcap(softcap)
            factor = default_scale(scale, query.shape[3])
            factors[:] = factor, cap
            self._check(tensors, key_mask, dropout_p, backend)
            for mask in masks:
                if getattr(mask, "by_content", False):
                    raise UnsupportedError(
                        f"{mask} chooses by what all queries and keys hold, which no rank knows inside "
                        "context_parallel; make its mask before, in one process, or take a pattern of positions"
                    )
            dense, structured = biases.split(bias)
            if dense is not None and dense.dim() > 1 and dense.shape[-2] not in (1, query.shape[2]):
                raise InputError(
                    f"inside context_parallel a bias has the rows of this rank's {query.shape[2]} queries, or one for "
                    f"all, and every column; got {tuple(dense.shape)}"
                )
            for part in structured:
                if not isinstance(part, (LowRankBias, RelativePosition)):
                    raise UnsupportedError(
                        f"{type(part).__name__} goes by places in an image, of which a rank in context_parallel has "
                        "a part; pass it as a tensor of this rank's rows"
                    )
            # u and w of a low-rank bias are of this rank's tokens, and travel beside its keys.
            low_rank: list[Bias] = [part for part in structured if isinstance(part, LowRankBias)]
            tensors[:2] = settle_structured(low_rank, tensors[0], tensors[1], factor, cap, causal_alignment)[:2]
            by_place[:] = [part for part in structured if part not in low_rank]
            added.append(Added(dense, None if sinks is None else check_sinks(sinks, tensors[0])))
            found = shape_facts(tensors) | {"scale": as_number(factor)}
            found |= {"dropout_p": as_number(dropout_p), "mask": combined(map(mask_digest, masks))}
            shape = () if dense is None else (*dense.shape[:-2], dense.dim(), dense.shape[-1:], dense.dtype)
            modifiers = (cap, sinks is not None, [(type(part).__name__, vars_of(part)) for part in by_place])
            leaves = wanted(*tensors, sinks, *tensors_of(bias))
            options = (shape, modifiers, is_causal, causal_alignment, backend, self.transport, leaves)
            found["options"] = text_digest(options)
            return found | {"key_mask": int(key_mask is not None)}

        bias_rows = rows_of(bias)
        seed_given = dropout_seed if dropout_p > 0.0 else 0
        q_counts, k_counts, seed, bias_rows = agree(self.exchange, query, key, facts, seed_given, bias_rows)
        (query, key, value), (bias, sinks, _), (factor, cap) = tensors, added[0], factors
        queries, keys = self._matching(q_counts, "queries"), self._matching(k_counts, "keys")
        Nq, Nk = queries.length, keys.length
        check_alignment(is_causal, causal_alignment, Nq, Nk)
        # Of queries and keys a mask asks the sizes alone.
        whole_query = query.new_empty(()).expand(*query.shape[:2], Nq, query.shape[3])
        whole_key = key.new_empty(()).expand(*key.shape[:2], Nk, key.shape[3])
        block_mask = causal_mask(Nq, Nk, is_causal, causal_alignment)
        for mask in masks:
            part = as_block_mask(mask, whole_query, whole_key, alignment=causal_alignment)
            block_mask = part if block_mask is None else part & block_mask
        block_mask = BlockMask(Nq, Nk) if block_mask is None else block_mask
        if bias is not None:
            bias = check_bias(bias, query, whole_key)
        diagonals = settle_structured(by_place, whole_query, whole_key, factor, cap, causal_alignment)[2]
        if key_mask is not None:
            block_mask, bias = self._padding(key_mask, keys, block_mask, bias, query)
            key, value = select_keys(key_mask, key, value)
        plan = make_plan(block_mask, queries, keys)
        transport = self._transport(plan, shape_of(query, key, value), bias_rows > 1, self.link)
        everyone = tuple(range(self.ranks))
        call = Settled(self.exchange, plan, everyone, factor, dropout_p, seed, backend, cap)
        joined = Added(bias, sinks, diagonals)
        if transport != "all_to_all":
            return exact_attention(query, key, value, joined, call, transport)
        return self._by_heads(query, key, value, joined, call, bias_rows > 1)

    def _check(self, tensors: Sequence[Tensor], key_mask: Tensor | None, dropout_p: float, backend: str) -> None:
        check_dropout(dropout_p)
        check_name(backend)
        check_key_mask(key_mask, tensors[1])
        reason = self.exchange.device_reason(tensors[0].device)
        if reason is not None:
            raise InputError(f"context_parallel: {reason}; move them, or make the group with an engine for them")
        if torch._C._are_functorch_transforms_active():
            raise UnsupportedError("torch.func transforms do not reach over ranks; use torch.autograd there")

    def _padding(
        self, key_mask: Tensor, keys: Shards, mask: BlockMask, bias: Tensor | None, query: Tensor
    ) -> tuple[BlockMask, Tensor | None]:
        """Padding of all ranks as lengths where it is at the end, else as a bias."""
        whole = self.whole_key_mask(key_mask, keys)
        lengths = whole.sum(-1)
        if bool((whole == (torch.arange(whole.shape[1], device=whole.device) < lengths[:, None])).all()):
            return mask & BlockMask.from_lengths(lengths, q_len=mask.q_len, kv_len=mask.kv_len), bias
        return mask, add_to_bias(bias, whole, query)

    def whole_key_mask(self, key_mask: Tensor, keys: Shards) -> Tensor:
        """(B, n) of this rank -> (B, Nk)."""
        short = max(keys.counts) - key_mask.shape[1]
        padded = torch.cat([key_mask, key_mask.new_zeros(key_mask.shape[0], short)], 1)
        parts = self.exchange.all_gather(padded, what="key mask")
        return keys.whole([part[:, :count] for part, count in zip(parts, keys.counts, strict=True)], 1)

    def _transport(self, plan: Plan, shape: Shape, rows: bool, link: Link) -> str:
        degree = head_ranks(shape.Hq, self.ranks)
        if self.transport != "auto":
            return "gather" if self.transport == "all_to_all" and degree == 1 else self.transport
        # The rows of a bias would travel too, which no plan counts: only where that is asked for.
        allowed = ("gather", "ring") if rows else ("gather", "ring", "all_to_all")
        return "gather" if self.ranks == 1 else plan.choose(shape, link, allowed=allowed)

    def _by_heads(
        self, query: Tensor, key: Tensor, value: Tensor, added: Added, call: Settled, bias_has_rows: bool
    ) -> tuple[Tensor, Tensor]:
        """Heads apart within groups of ranks; between groups, with fewer heads than ranks, a ring."""
        degree = head_ranks(query.shape[1], self.ranks)
        first, place = self.rank - self.rank % degree, self.rank % degree
        group = tuple(range(first, first + degree))
        q_heads, k_heads = head_lists(query.shape[1], key.shape[1], degree)
        mine, plan, exchange = q_heads[place], call.plan, self.exchange
        of_queries = HeadsApart(exchange, group, q_heads, plan.queries)
        of_keys = HeadsApart(exchange, group, k_heads, plan.keys)
        routes = [of_queries.spread(query), of_keys.spread(key), of_keys.spread(value)]
        bias = added.bias
        if bias is not None and bias_has_rows:
            of_each = q_heads if bias.shape[1] > 1 else [[0]] * degree
            routes.append(HeadsApart(exchange, group, of_each, plan.queries).spread(bias))
        q, k, v, *moved_bias = moved(routes, exchange, "heads")
        added = added.of_heads(slice(mine[0], mine[-1] + 1))
        if moved_bias:
            added = added._replace(bias=moved_bias[0])
        inner = plan.of_heads(mine[0], mine[-1] + 1).grouped(degree)
        ranks = tuple(start + place for start in range(0, self.ranks, degree))
        part = replace(call, plan=inner, ranks=ranks, first_head=mine[0])
        out, lse = exact_attention(q, k, v, added, part, "ring" if len(ranks) > 1 else "gather")
        out, lse = moved([of_queries.gather(out), of_queries.gather(lse[..., None])], exchange, "outputs")
        return out, lse.squeeze(3)

    def explain(
        self, query: Tensor, key: Tensor, value: Tensor, *, mask: Any = None, is_causal: bool = False,
        causal_alignment: str | None = None,
    ) -> Explanation:  # fmt: skip
        """What `attention` would do with these parts of a sequence: pairs, bytes and predicted time of each rank."""
        with sharding.entered(None):
            rows = self.exchange.gather_numbers([query.shape[2], key.shape[2]])
            queries, keys = (self._matching([row[n] for row in rows], "tokens") for n in (0, 1))
            block_mask = causal_mask(queries.length, keys.length, is_causal, causal_alignment)
            if mask is not None:
                sizes = [t.new_empty(()).expand(*t.shape[:2], n, t.shape[3])
                         for t, n in ((query, queries.length), (key, keys.length))]  # fmt: skip
                part = as_block_mask(mask, sizes[0], sizes[1], alignment=causal_alignment)
                block_mask = part if block_mask is None else part & block_mask
            plan = make_plan(block_mask or BlockMask(queries.length, keys.length), queries, keys)
            return plan.explain(shape_of(query, key, value), self.link, self.transport)

    # --- methods ---

    def attend(
        self, method: Method, query: Tensor, key: Tensor, value: Tensor, **arguments: Any
    ) -> tuple[Tensor, Tensor | None]:
        """`Method.attend` over the whole sequence.

        Raises:
            UnsupportedError: a method that looks at all tokens in a way that has no distributed form, weights.
        """
        found: tuple[Tensor, Tensor | None] = untraced(self._attend, method, query, key, value, arguments)
        return found

    def _attend(
        self, method: Method, query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        if arguments.pop("need_weights", False):
            raise UnsupportedError(
                "weights are queries x keys, of which each rank has a part alone; ask for them outside context_parallel"
            )
        state = arguments.pop("state", None)
        if not isinstance(method, Sparse):
            return states.attend(self, method, query, key, value, state, arguments), None
        if arguments.get("is_causal") and not method.accepts_causal:
            raise UnsupportedError(f"{method} cannot be causal; use lsh, topk_blocks or another pattern")
        if isinstance(method.pattern, BucketPattern) or method.pattern.by_content:
            raise UnsupportedError(
                f"{method} compares all tokens before it attends, which no rank knows inside context_parallel; use a "
                "pattern of positions, linear, performer, linformer or nystrom"
            )
        if not method.is_dense:
            arguments["masks"] = (method.pattern,)
        return self._attention(query, key, value, arguments), None


def shape_of(query: Tensor, key: Tensor, value: Tensor) -> Shape:
    """The sizes that a plan is priced by."""
    (B, Hq, _, D), Hkv, Dv = query.shape, key.shape[1], value.shape[3]
    return Shape(B, Hq, Hkv, D, Dv, query.element_size())


def rows_of(bias: BiasLike) -> int:
    """The most rows that a tensor among what is passed as a bias has; what is no bias is refused later."""
    parts = bias if isinstance(bias, (list, tuple)) else [bias]
    return max((t.shape[-2] for t in parts if isinstance(t, Tensor) and t.dim() > 1), default=1)


def vars_of(bias: Bias) -> dict[str, Any]:
    """What a bias by relative position is but for the numbers that it has learned."""
    return {name: tuple(x.shape) if isinstance(x, Tensor) else x for name, x in vars(bias).items()}
