"""Paths of the Triton kernels that no conformance case takes, run by test_triton.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from efficient_attn import BlockMask, SlidingWindow, UnsupportedError, attention
from efficient_attn.backends import triton as backend

pytestmark = pytest.mark.interpreter


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def results(name: str, tensors: list[torch.Tensor], grad_out: torch.Tensor, **arguments) -> list[torch.Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    out, lse = attention(*leaves, return_lse=True, backend=name, **arguments)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def assert_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    """The same up to numpy, whose products may differ in a last bit with the place of their operands in memory."""
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


N = 90
MASKS = {
    "causal": {"is_causal": True},
    "window": {"mask": SlidingWindow(left=9, right=3)},
    "bits": {"mask": torch.rand(1, 2, N, N, generator=torch.Generator().manual_seed(7)) < 0.3},
    "blocks": {
        "mask": BlockMask.from_dense(
            torch.rand(1, 1, N, N, generator=torch.Generator().manual_seed(8)) < 0.5, block_size=(48, 32)
        )
    },
    "bias": {"bias": torch.zeros(1, 1, 1, N).index_fill(3, torch.tensor([77]), -torch.inf)},
}


@pytest.mark.parametrize("mask", MASKS)
def test_nan_in_value_or_cotangent_stays_with_those_who_see_it(mask: str) -> None:
    tensors, grad_out = [draw(1, 2, N, 16, seed=s) for s in range(3)], draw(1, 2, N, 16, seed=3)
    tensors[2][:, :, 77] = torch.nan
    tensors[2][:, :, 30, 5] = torch.inf
    grad_out[:, :, 60, 2] = torch.nan
    ours = results("triton", tensors, grad_out, **MASKS[mask])
    for mine, expected in zip(ours, results("reference", tensors, grad_out, **MASKS[mask]), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("mask", ["causal", "window", "blocks"])
def test_nan_in_a_hidden_key_changes_nothing(mask: str) -> None:
    """Keys that no query sees: the last one of a causal call with fewer queries, or one that the list leaves out."""
    tensors, grad_out = [draw(1, 1, N, 16, seed=s) for s in range(3)], draw(1, 1, N, 16, seed=3)
    visible = torch.ones(N, N, dtype=torch.bool)
    visible[:, 77] = False
    hiding = BlockMask.from_dense(visible, block_size=(32, 48))
    other = MASKS[mask].get("mask")
    if isinstance(other, SlidingWindow):
        other = other.block_mask(N, N)
    arguments = {"mask": hiding if other is None else hiding & other, "is_causal": mask == "causal"}
    clean = results("triton", tensors, grad_out, **arguments)
    for poisoned in tensors[1:]:
        poisoned[:, :, 77] = torch.nan
    dirty = results("triton", tensors, grad_out, **arguments)
    assert_equal(clean, dirty)


def test_packed_heads_and_splits_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    launch = backend._launch
    monkeypatch.setattr(backend, "_launch", lambda *a: (seen.append(a[6]), launch(*a)))
    q, k, v = draw(1, 8, 3, 16), draw(1, 2, 700, 16, seed=1), draw(1, 2, 700, 16, seed=2)
    out = attention(q, k, v, backend="triton", is_causal=True, causal_alignment="bottom_right")
    *_, splits, group, pack, _sign = seen[0]
    assert (group, pack) == (4, 4) and splits > 1
    expected = attention(q, k, v, backend="reference", is_causal=True, causal_alignment="bottom_right")
    torch.testing.assert_close(out, expected)


def test_a_split_without_a_visible_key_adds_nothing() -> None:
    q, k, v = draw(1, 1, 2, 16), draw(1, 1, 700, 16, seed=1), draw(1, 1, 700, 16, seed=2)
    mask = BlockMask.from_lengths([100], q_len=2, kv_len=700)
    v[:, :, 100:] = torch.nan
    out = attention(q, k, v, mask=mask, backend="triton")
    torch.testing.assert_close(out, attention(q, k, v, mask=mask, backend="reference"))


def test_the_same_bits_whatever_lay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and workspaces filled with NaN before they are written (conftest.py), and left as they are found."""
    tensors, grad_out = [draw(1, 1, N, 16, seed=s) for s in range(3)], draw(1, 1, N, 16, seed=3)
    for arguments in ({"bias": draw(1, 1, N, N, seed=4), "is_causal": True}, MASKS["blocks"]):
        assert torch.empty(4).isnan().all()
        first = results("triton", tensors, grad_out, **arguments)
        with monkeypatch.context() as patch:
            patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
            second = results("triton", tensors, grad_out, **arguments)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("block_size", [(16, 240), (144, 16), (256, 48)])
def test_blocks_that_are_no_powers_of_two(block_size: tuple[int, int]) -> None:
    visible = torch.rand(1, 1, N, N, generator=torch.Generator().manual_seed(5)) < 0.5
    mask = BlockMask.from_dense(visible, block_size=block_size)
    tensors, grad_out = [draw(1, 1, N, 16, seed=s) for s in range(3)], draw(1, 1, N, 16, seed=3)
    ours = results("triton", tensors, grad_out, mask=mask)
    for mine, expected in zip(ours, results("reference", tensors, grad_out, mask=mask), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_dropout_is_that_of_the_definition() -> None:
    """With values that name the key, the kept pairs can be read off the output: the same ones, bit for bit."""
    q, k = torch.zeros(1, 2, 70, 16), torch.zeros(1, 2, 64, 16)
    v = torch.eye(64).expand(1, 2, 64, 64)
    for seed in (3, -5, 2**62 + 12345, torch.tensor(99)):
        arguments = {"dropout_p": 0.4, "dropout_seed": seed}
        ours, theirs = (attention(q, k, v, backend=name, **arguments) != 0 for name in ("triton", "reference"))
        assert torch.equal(ours, theirs) and 0.5 < ours.float().mean() < 0.7


@pytest.mark.parametrize("mask", ["causal", "blocks"])
def test_tiles_by_descriptor_are_the_same(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where TMA can read keys and values; rows that do not start at 16 bytes are loaded as ever."""
    from efficient_attn.kernels import configs

    made, described = [], backend._described
    monkeypatch.setattr(backend, "_described", lambda *a: (made.append(described(*a)), made[-1])[1])
    q, k, v = (draw(2, heads, N, 40, seed=s).half() for s, heads in enumerate((4, 2, 2)))
    v = v[..., :24]
    expected = attention(q, k, v, backend="triton", **MASKS[mask])
    monkeypatch.setattr(configs, "DESCRIPTORS", True)
    for keys in (k, torch.cat([k, k[..., :1]], 3)[..., :40]):
        out = attention(q, keys, v, backend="triton", **MASKS[mask])
        assert torch.equal(out, expected)
    assert [pair[0] is not None for pair in made] == [False, True, False]


def test_a_list_without_entries_gives_empty_rows() -> None:
    mask = BlockMask.from_dense(torch.zeros(40, 40, dtype=torch.bool))
    q = draw(1, 1, 40, 16)
    ours = results("triton", [q, q, q], q, mask=mask)
    assert (ours[1] == -torch.inf).all() and all((t == 0).all() for i, t in enumerate(ours) if i != 1)


def test_float64_is_refused_with_a_reason() -> None:
    q = draw(1, 1, 8, 8).double()
    with pytest.raises(UnsupportedError, match="float64"):
        attention(q, q, q, backend="triton")
