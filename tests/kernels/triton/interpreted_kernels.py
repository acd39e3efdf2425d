"""Paths of the Triton kernels that no conformance case takes, run by test_triton.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from support.kernel_checks import KernelChecks, draw, masked, results

from efficient_attn import BlockMask, UnsupportedError, attention
from efficient_attn.backends.triton import shared

pytestmark = pytest.mark.interpreter
N = 90


class TestKernels(KernelChecks):
    backend, n, dtype = "triton", N, torch.float32
    rtol, atol = 1e-4, 1e-5

    def assert_same(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """The same up to numpy, whose products may differ in a last bit with the place of their operands in memory."""
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


CHECKS = TestKernels()


def test_packed_heads_and_splits_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    constants = shared.constants_of
    monkeypatch.setattr(shared, "constants_of", lambda *a: (seen.append(constants(*a)), seen[-1])[1])
    q, k, v = draw(1, 8, 3, 16), draw(1, 2, 700, 16, seed=1), draw(1, 2, 700, 16, seed=2)
    out = attention(q, k, v, backend="triton", is_causal=True, causal_alignment="bottom_right")
    assert (seen[0].GROUP, seen[0].PACK, seen[0].SPLIT) == (4, 4, True)
    expected = attention(q, k, v, backend="reference", is_causal=True, causal_alignment="bottom_right")
    torch.testing.assert_close(out, expected)


def test_a_split_without_a_visible_key_adds_nothing() -> None:
    q, k, v = draw(1, 1, 2, 16), draw(1, 1, 700, 16, seed=1), draw(1, 1, 700, 16, seed=2)
    mask = BlockMask.from_lengths([100], q_len=2, kv_len=700)
    v[:, :, 100:] = torch.nan
    out = attention(q, k, v, mask=mask, backend="triton")
    torch.testing.assert_close(out, attention(q, k, v, mask=mask, backend="reference"))


def test_the_same_whatever_lay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and workspaces filled with NaN before they are written (conftest.py), and left as they are found."""
    tensors, grad_out = [draw(1, 1, N, 16, seed=s) for s in range(3)], draw(1, 1, N, 16, seed=3)
    for arguments in ({"bias": draw(1, 1, N, N, seed=4), "is_causal": True}, masked("blocks", N)):
        assert torch.empty(4).isnan().all()
        first = results("triton", tensors, grad_out, **arguments)
        with monkeypatch.context() as patch:
            patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
            second = results("triton", tensors, grad_out, **arguments)
        for a, b in zip(first, second, strict=True):
            CHECKS.assert_same(a, b)  # a value read before it was written is NaN in the first


@pytest.mark.parametrize("mask", ["causal", "blocks"])
def test_tiles_by_descriptor_are_the_same(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where TMA can read keys and values; rows that do not start at 16 bytes are loaded as ever."""
    from efficient_attn.kernels import configs

    made, described = [], shared.described
    monkeypatch.setattr(shared, "described", lambda *a: (made.append(described(*a)), made[-1])[1])
    # 48 wide: the interpreter of Triton 3.5 counts what is between rows in elements, not bytes.
    q, k, v = (draw(2, heads, N, 48, seed=s).half() for s, heads in enumerate((4, 2, 2)))
    v = v[..., :24]
    expected = attention(q, k, v, backend="triton", **masked(mask, N))
    monkeypatch.setattr(configs, "DESCRIPTORS", True)
    for keys in (k, torch.cat([k, k[..., :1]], 3)[..., :48]):
        out = attention(q, keys, v, backend="triton", **masked(mask, N))
        assert torch.equal(out, expected)
    assert [pair[0] is not None for pair in made] == [False, True, False]


def test_float64_is_refused_with_a_reason() -> None:
    q = draw(1, 1, 8, 8).double()
    with pytest.raises(UnsupportedError, match="float64"):
        attention(q, q, q, backend="triton")
