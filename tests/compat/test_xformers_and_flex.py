"""xformers' memory_efficient_attention and FlexAttention's flex_attention against definitions in float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask

from efficient_attn import BlockMask, InputError, UnsupportedError
from efficient_attn.compat import flex_attention as flex
from efficient_attn.compat import xformers as xf


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def definition(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | bool, bias: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """Out (B, M, H, K) and lse (B, H, M) of (B, M, H, K) tensors with as many key heads; seen broadcasts to (M, Mk)."""
    s = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5 + bias
    s = s.masked_fill(~torch.as_tensor(seen).expand(s.shape), -torch.inf)
    lse = torch.logsumexp(s, -1)
    weights = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse


def same_with_gradients(found: Tensor, expected: Tensor, leaves: list[Tensor], gold: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    grad = draw(9, *found.shape)
    torch.autograd.backward(found, grad)
    torch.autograd.backward(expected, grad)
    for a, b in zip(leaves, gold, strict=True):
        torch.testing.assert_close(a.grad, b.grad.nan_to_num(), rtol=1e-9, atol=1e-9)


# --- xformers ---


def by_hand(mask: Any, M: int, Mk: int) -> Tensor:
    """Which pairs a mask shows, from its words, pair by pair."""
    seen = torch.zeros(M, Mk, dtype=torch.bool)
    if isinstance(mask, xf.BlockDiagonalMask):
        q_at, k_at = mask.q_seqinfo.seqstart_py, mask.k_seqinfo.seqstart_py
        for b in range(len(q_at) - 1):
            m, mk = q_at[b + 1] - q_at[b], k_at[b + 1] - k_at[b]
            for i in range(m):
                for j in range(mk):
                    allowed = {
                        "BlockDiagonalMask": True,
                        "BlockDiagonalCausalMask": j <= i,
                        "BlockDiagonalCausalFromBottomRightMask": j <= i + mk - m,
                        "BlockDiagonalCausalLocalAttentionMask": i - getattr(mask, "_window_size", 0) < j <= i,
                    }[type(mask).__name__]
                    seen[q_at[b] + i, k_at[b] + j] = allowed
        return seen
    i, j = torch.arange(M)[:, None], torch.arange(Mk)
    if isinstance(mask, xf.LowerTriangularMask):
        return j <= i
    i = i + Mk - M
    if isinstance(mask, xf.LocalAttentionFromBottomRightMask):
        return (j >= i - mask.window_left) & (j <= i + mask.window_right)
    return j <= i


def masks_of(M: int, Mk: int) -> list[Any]:
    dice = random.Random(M + 1000 * Mk)
    cut = lambda n: [a := dice.randint(0, n), b := dice.randint(0, n - a), n - a - b]  # noqa: E731
    blocks = xf.BlockDiagonalMask.from_seqlens(cut(M), cut(Mk))
    return [
        xf.LowerTriangularMask(), xf.LowerTriangularFromBottomRightMask(),
        xf.LocalAttentionFromBottomRightMask(window_left=5, window_right=2),
        blocks, blocks.make_causal(), blocks.make_causal_from_bottomright(), blocks.make_local_attention(4),
    ]  # fmt: skip


@pytest.mark.parametrize(("M", "Mk"), [(1, 1), (40, 40), (33, 70), (70, 33), (1, 50)])
@pytest.mark.parametrize("kind", range(7))
def test_masks_of_xformers(kind: int, M: int, Mk: int, backend: str) -> None:
    mask = masks_of(M, Mk)[kind]
    leaves, gold = ([draw(s, 1, n, 3, 8).requires_grad_() for s, n in enumerate((M, Mk, Mk))] for _ in range(2))
    out = xf.memory_efficient_attention(*leaves, attn_bias=mask, backend=backend)
    same_with_gradients(out, definition(*gold, by_hand(mask, M, Mk))[0], leaves, gold)


def test_biases_of_xformers(backend: str) -> None:
    """A tensor, and one beside a causal mask, get gradients; without heads it is one a batch element."""
    for causal in (False, True):
        leaves, gold = ([draw(s, 2, 20, 3, 8).requires_grad_() for s in range(3)] for _ in range(2))
        biases = [draw(5, 2, 3, 20, 20).requires_grad_() for _ in range(2)]
        given = xf.LowerTriangularMask().add_bias(biases[0]) if causal else biases[0]
        out = xf.memory_efficient_attention(*leaves, attn_bias=given, backend=backend)
        seen = torch.ones(20, 20, dtype=torch.bool).tril() if causal else True
        same_with_gradients(out, definition(*gold, seen, biases[1])[0], [*leaves, biases[0]], [*gold, biases[1]])
    q, bias = draw(0, 6, 20, 8), draw(1, 6, 20, 20)
    out = xf.memory_efficient_attention(q, q, q, attn_bias=bias, scale=8**-0.5, backend=backend)
    heads = q[:, :, None]
    torch.testing.assert_close(out, definition(heads, heads, heads, True, bias[:, None])[0][:, :, 0])


@pytest.mark.parametrize("expanded", [True, False])
def test_grouped_heads_of_xformers(expanded: bool, backend: str) -> None:
    q = draw(0, 2, 9, 2, 3, 8).requires_grad_()
    k, v = (draw(s, 2, 11, 2, 1, 8).requires_grad_() for s in (1, 2))
    wide = [x.expand(2, 11, 2, 3, 8) if expanded else x.repeat(1, 1, 1, 3, 1) for x in (k, v)]
    out = xf.memory_efficient_attention(q, *wide, backend=backend)
    assert out.shape == (2, 9, 2, 3, 8)
    gold = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    flat = [gold[0].flatten(2, 3), *(x.expand(2, 11, 2, 3, 8).flatten(2, 3) for x in gold[1:])]
    same_with_gradients(out, definition(*flat, True)[0].unflatten(2, (2, 3)), [q, k, v], gold)


def test_lists_of_tensors_and_back() -> None:
    tensors = [draw(0, 2, 5, 3, 8), draw(1, 1, 9, 3, 8)]
    mask, packed = xf.BlockDiagonalMask.from_tensor_list(tensors)
    out = mask.split(xf.memory_efficient_attention(packed, packed, packed, attn_bias=mask))
    for found, x in zip(out, tensors, strict=True):
        torch.testing.assert_close(found, xf.memory_efficient_attention(x, x, x))


def test_what_xformers_has_and_is_not_served_is_named() -> None:
    class PagedBlockDiagonalGappyKeysMask: ...

    q = draw(0, 2, 9, 3, 8)
    with pytest.raises(UnsupportedError, match="PagedBlockDiagonalGappyKeysMask, which is not served"):
        xf.memory_efficient_attention(q, q, q, attn_bias=PagedBlockDiagonalGappyKeysMask())
    with pytest.raises(InputError, match="a batch of one, got a batch of 2"):
        xf.memory_efficient_attention(q, q, q, attn_bias=xf.BlockDiagonalMask.from_seqlens([9]))
    with pytest.raises(InputError, match="of 12 queries"):
        xf.memory_efficient_attention(q[:1], q[:1], q[:1], attn_bias=xf.BlockDiagonalMask.from_seqlens([5, 7]))
    with pytest.raises(InputError, match="all alike"):
        xf.memory_efficient_attention(q, q[0], q[0])


# --- FlexAttention ---

MASK_MODS = {
    "causal": lambda b, h, i, j: i >= j,
    "window": lambda b, h, i, j: (i - j).abs() <= 20,
    "by head": lambda b, h, i, j: (i + j) % (h + 2) == 0,
    "by batch": lambda b, h, i, j: j < 40 + 30 * b,
}


@pytest.mark.parametrize("name", MASK_MODS)
@pytest.mark.parametrize(("N", "Nk", "Hkv"), [(130, 130, 4), (70, 200, 2)])
def test_flex_attention(name: str, N: int, Nk: int, Hkv: int, backend: str) -> None:
    mod = MASK_MODS[name]
    mask = create_block_mask(mod, 2 if "batch" in name else None, 4 if "head" in name else None, N, Nk, device="cpu")
    shapes = ((2, 4, N, 8), (2, Hkv, Nk, 8), (2, Hkv, Nk, 8))
    leaves, gold = ([draw(s, *shape).requires_grad_() for s, shape in enumerate(shapes)] for _ in range(2))
    out, lse = flex.flex_attention(
        *leaves, block_mask=mask, enable_gqa=Hkv != 4, return_lse=True, scale=8**-0.5, backend=backend
    )
    b, h, i, j = (
        torch.arange(n).view([-1 if d == axis else 1 for d in range(4)]) for axis, n in enumerate((2, 4, N, Nk))
    )
    wide = [gold[0], *(x.repeat_interleave(4 // Hkv, 1) for x in gold[1:])]
    expected, expected_lse = definition(*(x.transpose(1, 2) for x in wide), mod(b, h, i, j))
    torch.testing.assert_close(lse, expected_lse, rtol=1e-9, atol=1e-9)
    same_with_gradients(out, expected.transpose(1, 2), leaves, gold)


def test_a_block_mask_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read, real = [], BlockMask.from_flex
    monkeypatch.setattr(BlockMask, "from_flex", lambda mask: (read.append(1), real(mask))[1])
    q = draw(0, 1, 2, 40, 8)
    first, second = (create_block_mask(MASK_MODS[n], None, None, 40, 40, device="cpu") for n in ("causal", "window"))
    outs = [flex.flex_attention(q, q, q, block_mask=mask) for mask in (first, second, first, second)]
    assert len(read) == 2 and torch.equal(outs[0], outs[2]) and not torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], flex.flex_attention(q, q, q, block_mask=real(first)))


def test_what_flex_attention_is_asked_for_besides() -> None:
    q, one = draw(0, 2, 4, 10, 8), draw(1, 1, 4, 12, 8)
    out, aux = flex.flex_attention(q, one, one, return_aux=AuxRequest(lse=True))
    assert aux.lse.shape == (2, 4, 10)
    torch.testing.assert_close(out[1:], flex.flex_attention(q[1:], one, one))

    def alibi(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score

    with pytest.raises(UnsupportedError, match="score_mod=alibi changes scores"):
        flex.flex_attention(q, q, q, alibi)
    with pytest.raises(UnsupportedError, match="max_scores"):
        flex.flex_attention(q, q, q, return_aux=AuxRequest(max_scores=True))
    with pytest.raises(InputError, match="enable_gqa=True"):
        flex.flex_attention(q, q[:, :2], q[:, :2])
