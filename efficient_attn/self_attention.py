"""Dense self-attention with its projections as one step: no Python between short kernels, no copies between long ones.

    packed (N, L, 3, H, D) = x W_in^T + b_in;  heads = softmax(q k^T / sqrt(D)) v;  out = heads W_out^T + b_out

The kernel reads the heads where the first projection has put them and writes them where the second one reads them; its
backward writes the gradients of q, k and v where the gradient of the first projection reads them. So nothing is taken
apart, copied or put together, and autograd has one node to pass instead of nine. Whatever more is asked for (a second
derivative, vmap, a profiler that looks on) is served by the steps one by one, `by_steps`, which say what is meant.

Letters: N batch, L length, E embed_dim, H heads, D head_dim. N and L stand in the order of the input.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, sharding
from .backends.call import accumulation_dtype
from .defaults import default_scale
from .functional import DENSE, attention, attention_with_weights, describe
from .masks import MaskArrays
from .ops import attention as ops
from .tracing import OBSERVERS

LONG = 1024  # tokens from which on weights are so large that a call keeps little beside them

Weights = Literal["mean", "each"] | None  # those wanted: averaged over the heads, of each head, none


class Kind(NamedTuple):
    """What calls have in common that one plan serves."""

    sizes: tuple[int, int]  # N and L, or L and N
    heads: int
    head_dim: int
    batch_first: bool
    dtype: torch.dtype
    weights: Weights
    is_causal: bool
    in_place: bool = False  # queries have a tensor of their own, in which the kernel leaves its output

    def heads_of(self, packed: Tensor) -> tuple[Tensor, ...]:
        """q, k and v (N, H, L, D), views of (., ., 3 E); or fewer of them, of fewer E."""
        parts = packed.view(*self.sizes, -1, self.heads, self.head_dim)
        return parts.permute((2, 0, 3, 1, 4) if self.batch_first else (2, 1, 3, 0, 4)).unbind(0)

    def heads_in(self, merged: Tensor) -> Tensor:
        """(., ., E) as heads (N, H, L, D)."""
        parts = merged.view(*self.sizes, self.heads, self.head_dim)
        return parts.permute((0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3))


def self_attention(
    x: Tensor,  # (N, L, E), or (L, N, E)
    in_weight: Tensor,  # (3 E, E)
    in_bias: Tensor | None,  # (3 E)
    out_weight: Tensor,  # (E, E)
    out_bias: Tensor | None,  # (E)
    heads: int,
    *,
    batch_first: bool,
    weights: Weights = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None] | None:
    """out like x, and weights (N, L, L), (N, H, L, L) or None; None where the call has to go step by step."""
    tensors = (x, in_weight, in_bias, out_weight, out_bias)
    if (
        not ops.is_plain(*tensors)
        or torch.is_autocast_enabled("cpu")
        or sharding.active is not None
        or OBSERVERS
        or x.dim() != 3
        or x.is_nested
        or any(t is not None and (t.dtype != x.dtype or not t.is_cpu or t.layout != torch.strided) for t in tensors)
    ):
        return None
    first, second, width = x.shape
    if in_weight.shape != (3 * width, width) or out_weight.shape != (width, width):
        return None
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    length = second if batch_first else first
    in_place = not recorded and weights is not None and length >= LONG
    plan = plan_of(Kind((first, second), heads, width // heads, batch_first, x.dtype, weights, is_causal, in_place))
    if plan is None:
        return None
    if in_place:
        biases = (None, None) if in_bias is None else in_bias.split((width, 2 * width))
        query = F.linear(x, in_weight[:width], biases[0])
        found = plan.forward_in_place(query, F.linear(x, in_weight[width:], biases[1]))
        return F.linear(query, out_weight, out_bias), found
    if not recorded:
        packed = F.linear(x, in_weight, in_bias)
        merged, _, found = plan.forward(packed, with_lse=False)
        del packed
        return F.linear(merged, out_weight, out_bias), found
    if weights == "each":  # the gradient of the output goes through them: see Method.attend
        return None
    return _SelfAttention.apply(*tensors, plan)  # type: ignore[no-untyped-call, no-any-return]


def by_steps(
    x: Tensor, in_weight: Tensor, in_bias: Tensor | None, out_weight: Tensor, out_bias: Tensor | None, kind: Kind
) -> tuple[Tensor, Tensor | None]:
    """What `self_attention` computes, of operations with derivatives of their own."""
    q, k, v = kind.heads_of(F.linear(x, in_weight, in_bias))
    weights = None
    if kind.weights is None:
        out = attention(q, k, v, is_causal=kind.is_causal)
    else:
        average = kind.weights == "mean"
        out, _, weights = attention_with_weights(q, k, v, average=average, is_causal=kind.is_causal)
    merged = out.permute((0, 2, 1, 3) if kind.batch_first else (2, 0, 1, 3)).flatten(2)
    return F.linear(merged, out_weight, out_bias), weights


@lru_cache(maxsize=1024)
def plan_of(kind: Kind) -> Plan | None:
    """The plan of such calls; None where the CPU kernels are not what serves them."""
    if 0 in (*kind.sizes, kind.heads, kind.head_dim) or not kind.dtype.is_floating_point:
        return None
    plan = Plan(kind)
    q, k, v = plan.operands
    call = describe(q, k, v, None, DENSE, 0.0, kind.weights is not None)._replace(device=torch.device("cpu"))
    cpu_serves = not backends.cpu.attention.not_supported_reasons(call) and backends.select("auto", call) == "cpu"
    return plan if cpu_serves else None


class Plan:
    """The kernels of one kind of call, of which only addresses are still to come."""

    def __init__(self, kind: Kind) -> None:
        first, second = kind.sizes
        N, L = (first, second) if kind.batch_first else (second, first)
        self.kind = kind
        self.merged_shape = (first, second, kind.heads * kind.head_dim)
        self.lse_shape = (N, kind.heads, L)
        self.weights_shape = (N, L, L) if kind.weights == "mean" else (N, kind.heads, L, L)
        self.part = kind.heads * kind.head_dim * kind.dtype.itemsize  # from q to k, and from k to v
        self._out = kind.heads_in(torch.empty(self.merged_shape, dtype=kind.dtype, device="meta"))
        parts = (first, second, (2 if kind.in_place else 3) * kind.heads * kind.head_dim)
        together = kind.heads_of(torch.empty(parts, dtype=kind.dtype, device="meta"))
        q, k, v = (self._out, *together) if kind.in_place else together
        self.operands = q, k, v
        self._weights = None
        if kind.weights is not None:
            averaged_or_not = (N, 1 if kind.weights == "mean" else kind.heads, L, L)
            self._weights = torch.empty(averaged_or_not, dtype=kind.dtype, device="meta")
        self._mask = MaskArrays(window_right=0) if kind.is_causal else DENSE
        self._scale = default_scale(None, kind.head_dim)
        self._forward: Any = None
        self._backward: dict[bool, Any] = {}  # by whether the weights have a gradient

    def forward(self, packed: Tensor, with_lse: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """merged (., ., E), lse (N, H, L) and weights."""
        at, merged = packed.data_ptr(), packed.new_empty(self.merged_shape)
        lse, weights = self._run(at, at + self.part, at + 2 * self.part, merged.data_ptr(), with_lse)
        return merged, lse, weights

    def forward_in_place(self, query: Tensor, key_value: Tensor) -> Tensor | None:
        """weights, of (., ., E) and (., ., 2 E); `query` becomes merged. A tile of queries is read before any of it is
        written, by the only task that reads it."""
        q, k = query.data_ptr(), key_value.data_ptr()
        return self._run(q, k, k + self.part, q, with_lse=False)[1]

    def _run(self, q: int, k: int, v: int, out: int, with_lse: bool) -> tuple[Tensor | None, Tensor | None]:
        """lse and weights, of addresses."""
        kind = self.kind
        if self._forward is None:
            operands = (*self.operands, self._out, self._mask, self._scale, self._weights)
            self._forward = backends.cpu.attention.forward_of_pointers(*operands)
        lse = weights = None
        if with_lse or kind.weights is not None:
            lse = torch.empty(self.lse_shape, dtype=accumulation_dtype(kind.dtype), device="cpu")
        if kind.weights is not None:
            weights = backends.cpu.attention.empty(self.weights_shape, kind.dtype)
        addresses = (0 if tensor is None else tensor.data_ptr() for tensor in (lse, weights))
        self._forward(q, k, v, out, *addresses, torch.get_num_threads())
        return lse, weights

    def backward(
        self, packed: Tensor, merged: Tensor, lse: Tensor, grad_merged: Tensor, grad_weights: Tensor | None
    ) -> Tensor:
        """The gradient of `packed`, of contiguous tensors."""
        gradient, weighted = torch.empty_like(packed), grad_weights is not None
        if weighted not in self._backward:
            operands = (self._out, *self.operands, self._out, self.operands, self._mask, self._scale)
            given = self._weights if weighted else None
            self._backward[weighted] = backends.cpu.attention.backward_of_pointers(*operands, given)
        at, to = packed.data_ptr(), gradient.data_ptr()
        self._backward[weighted](
            at,
            at + self.part,
            at + 2 * self.part,
            merged.data_ptr(),
            lse.data_ptr(),
            grad_merged.data_ptr(),
            0 if grad_weights is None else grad_weights.data_ptr(),
            to,
            to + self.part,
            to + 2 * self.part,
            torch.get_num_threads(),
        )
        return gradient


class _SelfAttention(torch.autograd.Function):
    """The step with its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, in_weight: Tensor, in_bias: Tensor | None, out_weight: Tensor, out_bias: Tensor | None,
        plan: Plan,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        packed = F.linear(x, in_weight, in_bias)
        merged, lse, weights = plan.forward(packed, with_lse=True)
        ctx.save_for_backward(x, in_weight, in_bias, out_weight, out_bias, packed, merged, lse)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return F.linear(merged, out_weight, out_bias), weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_weights: Tensor | None) -> tuple[Tensor | None, ...]:
        *given, packed, merged, lse = saved = ctx.saved_tensors
        x, in_weight, in_bias, out_weight, _ = given
        plan, needs = ctx.plan, ctx.needs_input_grad
        if grad is None or not ops.goes_back_plainly(grad, grad_weights, *saved):
            return (*_gradients_by_steps(given, (grad, grad_weights), plan.kind, needs), None)
        width = x.shape[2]
        rows, heads = grad.reshape(-1, width), merged.reshape(-1, width)
        grad_out_weight = rows.t() @ heads if needs[3] else None
        grad_out_bias = rows.sum(0) if needs[4] else None
        if not (needs[0] or needs[1] or needs[2]):
            return None, None, None, grad_out_weight, grad_out_bias, None
        grad_weights = None if grad_weights is None else grad_weights.contiguous()
        operands = (packed.contiguous(), merged.contiguous(), lse.contiguous())
        grad_packed = plan.backward(*operands, rows @ out_weight, grad_weights).view(-1, 3 * width)
        grad_in_weight = grad_packed.t() @ x.reshape(-1, width) if needs[1] else None
        grad_in_bias = grad_packed.sum(0) if needs[2] and in_bias is not None else None
        grad_x = (grad_packed @ in_weight).view(x.shape) if needs[0] else None
        return grad_x, grad_in_weight, grad_in_bias, grad_out_weight, grad_out_bias, None


def _gradients_by_steps(
    given: list[Tensor | None], gradients: tuple[Tensor | None, Tensor | None], kind: Kind, needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients of the inputs, from the steps made anew; differentiable where gradients are recorded."""
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        if not twice:
            given = [
                None if t is None else t.detach().requires_grad_(need) for t, need in zip(given, needs, strict=False)
            ]
        x, in_weight, in_bias, out_weight, out_bias = given
        assert x is not None and in_weight is not None and out_weight is not None
        results = by_steps(x, in_weight, in_bias, out_weight, out_bias, kind)
        pairs = [(r, g) for r, g in zip(results, gradients, strict=True) if r is not None and g is not None]
        wanted = [t for t, need in zip(given, needs, strict=False) if need and t is not None]
        found = iter(
            torch.autograd.grad(
                [r for r, _ in pairs], wanted, [g for _, g in pairs], create_graph=twice, allow_unused=True
            )
        )
    return [next(found) if need and t is not None else None for t, need in zip(given, needs, strict=False)]
