"""What the conformance cases do not ask of the CUDA kernels, run by test_cuda_host.py in the host twin."""

from __future__ import annotations

import pytest
import torch

from efficient_attn import BlockMask, SlidingWindow, UnsupportedError, attention
from efficient_attn.backends import cuda

pytestmark = pytest.mark.interpreter
N = 140


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def results(name: str, tensors: list[torch.Tensor], grad_out: torch.Tensor, **arguments) -> list[torch.Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    out, lse = attention(*leaves, return_lse=True, backend=name, **arguments)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def results_in_place(name: str, tensors: list[torch.Tensor], grad_out: torch.Tensor) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = attention(*leaves, is_causal=True, backend=name)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


MASKS = {
    "causal": {"is_causal": True},
    "window": {"mask": SlidingWindow(left=9, right=3)},
    "blocks": {
        "mask": BlockMask.from_dense(
            torch.rand(1, 1, N, N, generator=torch.Generator().manual_seed(8)) < 0.5, block_size=(48, 32)
        )
    },
    "bias": {"bias": torch.zeros(1, 1, 1, N).index_fill(3, torch.tensor([77]), -torch.inf)},
}


@pytest.mark.parametrize("mask", MASKS)
def test_nan_stays_with_those_who_see_it(mask: str) -> None:
    tensors, grad_out = [draw(1, 2, N, 16, seed=s) for s in range(3)], draw(1, 2, N, 16, seed=3)
    tensors[2][:, :, 77] = torch.nan
    tensors[2][:, :, 30, 5] = torch.inf
    grad_out[:, :, 60, 2] = torch.nan
    ours = results("cuda", tensors, grad_out, **MASKS[mask])
    for mine, expected in zip(ours, results("reference", tensors, grad_out, **MASKS[mask]), strict=True):
        torch.testing.assert_close(mine, expected, rtol=3e-2, atol=3e-2, equal_nan=True)


@pytest.mark.parametrize("mask", ["causal", "window", "blocks"])
def test_nan_in_a_hidden_key_changes_no_bit(mask: str) -> None:
    tensors, grad_out = [draw(1, 2, N, 16, seed=s) for s in range(3)], draw(1, 2, N, 16, seed=3)
    visible = torch.ones(N, N, dtype=torch.bool)
    visible[:, 77] = False
    hiding = BlockMask.from_dense(visible, block_size=(32, 48))
    other = MASKS[mask].get("mask")
    if isinstance(other, SlidingWindow):
        other = other.block_mask(N, N)
    arguments = {"mask": hiding if other is None else hiding & other, "is_causal": mask == "causal"}
    clean = results("cuda", tensors, grad_out, **arguments)
    for poisoned in tensors[1:]:
        poisoned[:, :, 77] = torch.nan
    for a, b in zip(clean, results("cuda", tensors, grad_out, **arguments), strict=True):
        assert torch.equal(a, b)


def test_the_same_bits_under_every_schedule() -> None:
    tensors, grad_out = [draw(1, h, N, 40, seed=h) for h in (4, 2, 2)], draw(1, 4, N, 40, seed=3)
    arguments = {"mask": MASKS["blocks"]["mask"], "bias": draw(1, 1, 1, N, seed=5), "dropout_p": 0.3, "dropout_seed": 7}
    found = []
    for schedule in range(4):
        cuda.kernels().set_schedule(schedule)
        found.append(results("cuda", tensors, grad_out, **arguments))
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_no_bank_conflict() -> None:
    cuda.kernels().reset_counters()
    for D, Dv in ((64, 64), (128, 100), (200, 256)):
        tensors = [draw(1, 1, 70, D), draw(1, 1, 70, D, seed=1), draw(1, 1, 70, Dv, seed=2)]
        results("cuda", tensors, draw(1, 1, 70, Dv, seed=3), bias=draw(1, 70, seed=4))
    counted = {name: c for name, c in cuda.kernels().counters().items() if isinstance(c, dict)}
    assert not any(c["conflicts"] for c in counted.values()), counted
    for name in ("ldmatrix", "ldmatrix.trans", "cp.async", "cp.async.32", "mma.bf16", "st.shared.32", "ld.shared.128"):
        assert counted[name]["calls"] > 0, name


def test_dropout_is_that_of_the_definition() -> None:
    """With values that name the key, the kept pairs can be read off the output: the same ones, bit for bit."""
    q, k = torch.zeros(1, 2, 70, 16).bfloat16(), torch.zeros(1, 2, 64, 16).bfloat16()
    v = torch.eye(64).expand(1, 2, 64, 64).bfloat16()
    for seed in (3, -5, 2**62 + 12345):
        ours, theirs = (
            attention(q, k, v, backend=name, dropout_p=0.4, dropout_seed=seed) != 0 for name in ("cuda", "reference")
        )
        assert torch.equal(ours, theirs) and 0.5 < ours.float().mean() < 0.7


@pytest.mark.parametrize("block_size", [(16, 240), (144, 16), (256, 48)])
def test_blocks_that_are_no_powers_of_two(block_size: tuple[int, int]) -> None:
    visible = torch.rand(1, 1, N, N, generator=torch.Generator().manual_seed(5)) < 0.5
    mask = BlockMask.from_dense(visible, block_size=block_size)
    tensors, grad_out = [draw(1, 1, N, 16, seed=s) for s in range(3)], draw(1, 1, N, 16, seed=3)
    ours = results("cuda", tensors, grad_out, mask=mask)
    for mine, expected in zip(ours, results("reference", tensors, grad_out, mask=mask), strict=True):
        torch.testing.assert_close(mine, expected, rtol=3e-2, atol=3e-2)


def test_aligned_rows_whose_last_chunk_is_ragged() -> None:
    wide = [draw(1, 2, N, 24, seed=s) for s in range(3)]
    for tensor in wide:
        tensor[..., 20:] = torch.nan
    tensors, grad_out = [t[..., :20] for t in wide], draw(1, 2, N, 20, seed=3)
    ours = results_in_place("cuda", tensors, grad_out)
    for mine, expected in zip(ours, results_in_place("reference", tensors, grad_out), strict=True):
        torch.testing.assert_close(mine, expected, rtol=3e-2, atol=3e-2)


def test_a_list_without_entries_gives_empty_rows() -> None:
    q = draw(1, 1, 40, 16)
    ours = results("cuda", [q, q, q], q, mask=BlockMask.from_dense(torch.zeros(40, 40, dtype=torch.bool)))
    assert (ours[1] == -torch.inf).all() and all((t == 0).all() for i, t in enumerate(ours) if i != 1)


def test_float32_is_refused_with_a_reason() -> None:
    q = torch.zeros(1, 1, 8, 8)
    with pytest.raises(UnsupportedError, match="these tensors are float32"):
        attention(q, q, q, backend="cuda")
