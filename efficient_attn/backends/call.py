"""What a backend is asked about before it is chosen, and the few things that every backend does alike."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import InputError, UnsupportedError
from ..masks import MaskArrays


class Call(NamedTuple):
    """The facts of one attention call on which a backend may decide; hashable, so that the choice is cached."""

    device: torch.device
    dtype: torch.dtype
    bias_dtype: torch.dtype | None
    B: int
    Hq: int
    Hkv: int
    Nq: int
    Nk: int
    D: int
    Dv: int
    has_lists: bool
    dropout_p: float
    returns_weights: bool = False
    modifiers: tuple[str, ...] = ()  # of "softcap", "sinks" and "a bias by relative position": those it has


class LinearCall(NamedTuple):
    """The same for linear attention."""

    device: torch.device
    dtype: torch.dtype
    width: int = 0  # the larger one of the number of features and Dv; 0 leaves it open


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What values of this dtype are summed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dropout_origin(seed: Tensor) -> tuple[int, int, int, int]:
    """(seed, head, query, key) of a seed with one element or with those four: where, at multiples of 16, pair (0, 0)
    of head 0 stands in a larger problem, whose pairs the call then drops."""
    if seed.numel() == 1:
        return int(seed), 0, 0, 0
    first, head, query, key = seed.tolist()
    return first, head, query, key


def readable(tensor: Tensor) -> Tensor:
    """(B, H, N, D) itself if its last dimension has stride 1, else a contiguous copy."""
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] == 1 else tensor.contiguous()


def order_steps(order: Tensor | None, name: str, tensor: Tensor) -> tuple[int, int, int]:
    """How many rows of a (B, H, N, D) tensor a call has whose tokens have an order, and how far it is in the order from
    a batch element and from a head to the next, 0 where one serves all.

    Raises:
        InputError: an order that is not contiguous int32 of the tensor's device with a line for all, each head or each
            head of each batch element.
    """
    B, H, N, _ = tensor.shape
    if order is None:
        return N, 0, 0
    if order.dim() != 2 or order.shape[0] not in (1, H, B * H):
        raise InputError(
            f"{name} is {tuple(order.shape)}; it is (1, rows), (heads, rows) or (batch * heads, rows) of a tensor with "
            f"batch {B} and {H} heads: give an order per key/value head, not per query head, or repeat the key's heads"
        )
    if order.dtype != torch.int32 or not order.is_contiguous() or order.device != tensor.device:
        raise InputError(f"{name} is {order.dtype} on {order.device}; it is contiguous int32 on {tensor.device}")
    of_head = 0 if order.shape[0] == 1 else order.shape[1]
    return order.shape[1], of_head * H if order.shape[0] == B * H else 0, of_head


def leaves_rows(order: Tensor | None, tensor: Tensor) -> bool:
    """Whether a call leaves rows of a result (B, H, N, D) untouched, since its order does not name them."""
    return order is not None and order.shape[1] < tensor.shape[2]


_runs: Any = WeakTensorKeyDictionary()  # order -> its version and `run_start`


def run_start(order: Tensor | None) -> int | None:
    """The first token of an order that names a run of tokens one by one, the same in every head; 0 for no order, None
    for any other. The order is looked at once."""
    if order is None:
        return 0
    kept = _runs.get(order)
    if kept is None or kept[0] != order._version:
        start = None
        if order.shape[0] == 1 and order.shape[1] > 0 and bool((order.diff() == 1).all()):
            start = int(order[0, 0])
        kept = _runs[order] = (order._version, start)
    found: int | None = kept[1]
    return found


def refuse_orders(mask: MaskArrays, what: str) -> None:
    """Raise for a call that no kernel serves where its tokens have an order."""
    if mask.query_order is not None or mask.key_order is not None:
        raise UnsupportedError(f"{what}: not of a mask with query_order or key_order; give the mask without an order")


def check_gradients_in_order(
    mask: MaskArrays, grad_weights: Tensor | None, sinks: Tensor | None, bias: Tensor | None, query: Tensor
) -> None:
    """Raise for gradients that no kernel makes where tokens have an order; `bias`: one that has a gradient."""
    if grad_weights is not None:
        refuse_orders(mask, "a gradient of the weights")
    if sinks is not None:
        refuse_orders(mask, "a gradient of sinks")
    if bias is not None:
        _check_bias_order(mask.query_order, bias, 2, query)
        _check_bias_order(mask.key_order, bias, 3, query)


def _check_bias_order(order: Tensor | None, bias: Tensor, dim: int, query: Tensor) -> None:
    """Raise where pairs that share an element of the bias lie in different tiles."""
    if order is None or order.shape[0] == 1 or bias.shape[dim] == 1:
        return
    per_batch = order.shape[0] > query.shape[1]
    if (bias.shape[1] == 1 and query.shape[1] > 1) or (bias.shape[0] == 1 and query.shape[0] > 1 and per_batch):
        raise UnsupportedError(
            f"the gradient of a bias {tuple(bias.shape)} that is one for all heads or batch elements, whose tokens "
            f"have {order.shape[0]} orders of their own: expand the bias over them, or use one order for all"
        )


def lse_without_keys(lse: Tensor, sinks: Tensor | None) -> Tensor:
    """lse (B, Hq, Nq), filled with what it is where there are no keys: -inf, or the sink of the head."""
    return lse.fill_(-torch.inf) if sinks is None else lse.copy_(sinks[:, None].expand(lse.shape))


def sink_gradient(sinks: Tensor | None, lse: Tensor, delta: Tensor) -> Tensor | None:
    """dsinks (Hq) = -sum exp(sink - lse) delta over batch and queries, of lse and delta (B, Hq, Nq)."""
    if sinks is None:
        return None
    share = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
    return -(share * delta).sum((0, 2)).to(sinks.dtype)


def modifier_gradients_without_keys(
    grad_lse: Tensor | None, sinks: Tensor | None, diagonals: Tensor | None, diagonals_require_grad: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dsinks and ddiagonals of a call without a pair: lse is the sink itself."""
    dsinks = None
    if sinks is not None:
        dsinks = torch.zeros_like(sinks) if grad_lse is None else grad_lse.sum((0, 2)).to(sinks.dtype)
    wanted = diagonals is not None and diagonals_require_grad
    return dsinks, torch.zeros_like(diagonals) if wanted and diagonals is not None else None


Gradients = TypeVar("Gradients", bound="tuple[Tensor | None, ...]")


def zeroed(gradients: Gradients) -> Gradients:
    """The gradients of a call without a visible key, as they are returned."""
    for gradient in gradients:
        if gradient is not None:
            gradient.zero_()
    return gradients
