"""Masks with tokens in an order of their own, and what they equal: the same pairs written out without an order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from efficient_attn import BlockMask
from efficient_attn.backends.reference import attention as reference
from efficient_attn.masks import MaskArrays

B, HQ, HKV, NQ, NK, D, DV = 2, 4, 2, 90, 150, 40, 24
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SEED = torch.tensor(77)


def tensors(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = ((B, HQ, NQ, D), (B, HKV, NK, D), (B, HKV, NK, DV), (B, HQ, NQ, DV))
    return [torch.randn(size).to(dtype) for size in sizes]


def order(rows: int, count: int, tokens: int) -> Tensor:
    return torch.stack([torch.randperm(tokens)[:count] for _ in range(rows)]).int()


def run(first: int, count: int) -> Tensor:
    return torch.arange(first, first + count, dtype=torch.int32)[None]


def spread(order: Tensor | None, heads: int, tokens: int) -> Tensor:
    """(B, HQ, rows) tokens of an order with any number of rows."""
    if order is None:
        return torch.arange(tokens).expand(B, HQ, tokens)
    by_head = order.expand(heads, -1)[None] if order.shape[0] <= heads else order.unflatten(0, (B, heads))
    return by_head.repeat_interleave(HQ // heads, 1).expand(B, -1, -1).long()


def written_out(part: MaskArrays) -> MaskArrays:
    """The same pairs as a mask without an order."""
    rows, columns = spread(part.query_order, HQ, NQ), spread(part.key_order, HKV, NK)
    plain = part._replace(query_order=None, key_order=None, kv_lengths=None)
    seen = reference.visible_pairs(plain, rows.shape[2], columns.shape[2], torch.device("cpu"))
    pairs = torch.zeros(B, HQ, NQ, NK, dtype=torch.bool)
    b, h = torch.arange(B)[:, None, None, None], torch.arange(HQ)[:, None, None]
    pairs[b, h, rows[..., None], columns[..., None, :]] = seen.expand(B, HQ, -1, -1)
    if part.kv_lengths is not None:
        pairs &= torch.arange(NK) < part.kv_lengths[:, None, None, None]
    return BlockMask.from_dense(pairs, block_size=32).arrays()


def lists(rows: int, columns: int, block: int = 32) -> MaskArrays:
    pairs = torch.rand(1, HQ, rows, columns) < torch.rand(1, HQ, rows, 1)
    pairs[:, :, : rows // 2] |= torch.rand(columns) < 0.9
    return BlockMask.from_dense(pairs, block_size=block).arrays(transposed=True)


def cases() -> dict[str, tuple[MaskArrays, dict[str, Any]]]:
    torch.manual_seed(1)
    window = MaskArrays(window_left=20, window_right=7, window_offset=3)
    lengths = torch.tensor([100, 150], dtype=torch.int32)
    bias = torch.randn(B, HQ, NQ, NK)
    bias[0, 1, 5, ::3] = -torch.inf
    permuted = {"query_order": order(1, NQ, NQ), "key_order": order(1, NK, NK)}
    return {
        "permutation": (MaskArrays(**permuted), {}),
        "window": (window._replace(**permuted), {}),
        "queries": (window._replace(query_order=order(1, 70, NQ)), {}),
        "few_queries": (MaskArrays(query_order=order(HQ, 3, NQ), kv_lengths=lengths), {"dropout_p": 0.5, "bias": bias}),
        "runs": (window._replace(query_order=run(11, 70), key_order=run(40, 110)), {}),
        "run_of_keys": (MaskArrays(key_order=run(30, 64)), {}),
        "run_with_lists": (lists(NQ, 99)._replace(key_order=run(51, 99)), {}),
        "run_with_lengths": (MaskArrays(key_order=run(30, 100), kv_lengths=lengths), {"bias": bias}),
        "few_of_both": (MaskArrays(query_order=order(1, 5, NQ), key_order=order(1, 7, NK)), {}),
        "keys": (MaskArrays(key_order=order(HKV, 41, NK)), {}),
        "heads": (window._replace(query_order=order(HQ, 80, NQ), key_order=order(HKV, 130, NK)), {}),
        "batch": (
            window._replace(query_order=order(B * HQ, 80, NQ), key_order=order(B * HKV, 130, NK)),
            {"bias": bias},
        ),
        "lists": (lists(NQ, NK)._replace(**permuted), {}),
        "lists_subset": (lists(66, 99)._replace(query_order=order(HQ, 66, NQ), key_order=order(HKV, 99, NK)), {}),
        "lengths": (lists(NQ, NK)._replace(**permuted, kv_lengths=lengths), {}),
        "bias": (window._replace(**permuted), {"bias": bias}),
        "bias_rows": (window._replace(**permuted), {"bias": bias[:1, :1, :, :1] * 0 + torch.randn(1, 1, NQ, 1)}),
        "bias_keys": (lists(NQ, NK)._replace(**permuted), {"bias": torch.randn(1, HQ, 1, NK)}),
        "dropout": (window._replace(query_order=order(HQ, 80, NQ), key_order=order(HKV, 130, NK)), {"dropout_p": 0.4}),
    }


def results_of(module: Any, part: MaskArrays, given: list[Tensor], bias: Tensor | None, dropout_p: float) -> list[Any]:
    query, key, value, grad_out = given
    bias = None if bias is None else bias.to(query.dtype)
    seed = SEED if dropout_p else None
    out, lse = module.attention_forward(query, key, value, bias, part, 0.2, dropout_p, seed)
    grad_lse = torch.linspace(-1, 1, lse.numel(), dtype=lse.dtype).view_as(lse)
    gradients = module.attention_backward(
        grad_out, grad_lse, None, query, key, value, bias, out, lse, part, 0.2, dropout_p, seed, bias is not None
    )
    return [out, lse, *gradients[:4]]


def check(module: Any, name: str, dtype: torch.dtype) -> None:
    """A backend's results of a case are those of the mask written out, as exact as the definition is in the dtype."""
    part, extra = cases()[name]
    extra = {"bias": None, "dropout_p": 0.0, **extra}
    extra["bias"] = None if extra["bias"] is None else extra["bias"].to(dtype)
    given = tensors(dtype)
    want = results_of(reference, written_out(part), [t.double() for t in given], **extra)
    plain = results_of(reference, written_out(part), given, **extra)  # what the dtype itself costs
    for ours, exact, same in zip(results_of(module, part, given, **extra), want, plain, strict=True):
        if exact is None:
            assert ours is None
            continue
        finite = exact.isfinite()
        assert torch.equal(ours.isfinite(), finite)
        error = (ours.double() - exact)[finite].abs().max()
        allowed = (same.double() - exact)[finite].abs().max()
        units = 32 if dtype == torch.float64 else 4  # there the definition is no better than a kernel
        assert error <= 2 * allowed + units * torch.finfo(ours.dtype).eps * exact[finite].abs().max()
