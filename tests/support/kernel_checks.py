"""What kernels that run in a process of their own promise beyond the conformance cases: interpreted_kernels.py has
Triton's, emulated_kernels.py CUDA's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from efficient_attn import BlockMask, SlidingWindow, attention

POISONED = 77  # a key whose value is NaN
MASKS = ("causal", "window", "bits", "blocks", "bias")
BESIDE_A_LIST = ("causal", "window", "blocks")  # of these, what goes with a list that hides a key from everybody
ODD_BLOCKS = ((16, 240), (144, 16), (256, 48))  # no powers of two
SEEDS = (3, -5, 2**62 + 12345, torch.tensor(99))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def results(name: str, tensors: list[torch.Tensor], grad_out: torch.Tensor, **arguments: Any) -> list[torch.Tensor]:
    """out, lse and the gradients of the tensors."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    out, lse = attention(*leaves, return_lse=True, backend=name, **arguments)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def masked(kind: str, n: int) -> dict[str, Any]:
    """The arguments of one of `MASKS` for n queries and keys."""
    random = lambda seed, heads: torch.rand(1, heads, n, n, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    return {
        "causal": lambda: {"is_causal": True},
        "window": lambda: {"mask": SlidingWindow(left=9, right=3)},
        "bits": lambda: {"mask": random(7, 2) < 0.3},
        "blocks": lambda: {"mask": BlockMask.from_dense(random(8, 1) < 0.5, block_size=(48, 32))},
        "bias": lambda: {"bias": torch.zeros(1, 1, 1, n).index_fill(3, torch.tensor([POISONED]), -torch.inf)},
    }[kind]()


class KernelChecks:
    """The tests of one backend, on `n` queries and keys of `dtype`; a file of tests makes a class of its own of it.

    rtol, atol: the tolerance beside the reference.
    """

    backend: str
    n: int
    dtype: torch.dtype
    rtol: float
    atol: float

    def assert_same(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """That two results of the backend are the same."""
        assert torch.equal(a, b)

    def drawn(self, heads: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Query, key and value, and the gradient of the output."""
        *tensors, grad_out = (draw(1, heads, self.n, 16, seed=seed, dtype=self.dtype) for seed in range(4))
        return tensors, grad_out

    def against_the_reference(self, tensors: list[torch.Tensor], grad_out: torch.Tensor, **arguments: Any) -> None:
        ours = results(self.backend, tensors, grad_out, **arguments)
        for mine, expected in zip(ours, results("reference", tensors, grad_out, **arguments), strict=True):
            torch.testing.assert_close(mine, expected, rtol=self.rtol, atol=self.atol, equal_nan=True)

    @pytest.mark.parametrize("mask", MASKS)
    def test_nan_stays_with_those_who_see_it(self, mask: str) -> None:
        tensors, grad_out = self.drawn(2)
        tensors[2][:, :, POISONED] = torch.nan
        tensors[2][:, :, 30, 5] = torch.inf
        grad_out[:, :, 60, 2] = torch.nan
        self.against_the_reference(tensors, grad_out, **masked(mask, self.n))

    @pytest.mark.parametrize("mask", BESIDE_A_LIST)
    def test_nan_in_a_hidden_key_changes_nothing(self, mask: str) -> None:
        tensors, grad_out = self.drawn(2)
        visible = torch.ones(self.n, self.n, dtype=torch.bool)
        visible[:, POISONED] = False
        hiding = BlockMask.from_dense(visible, block_size=(32, 48))
        other = masked(mask, self.n).get("mask")
        if isinstance(other, SlidingWindow):
            other = other.block_mask(self.n, self.n)
        arguments = {"mask": hiding if other is None else hiding & other, "is_causal": mask == "causal"}
        clean = results(self.backend, tensors, grad_out, **arguments)
        for poisoned in tensors[1:]:
            poisoned[:, :, POISONED] = torch.nan
        for a, b in zip(clean, results(self.backend, tensors, grad_out, **arguments), strict=True):
            self.assert_same(a, b)

    @pytest.mark.parametrize("block_size", ODD_BLOCKS)
    def test_blocks_that_are_no_powers_of_two(self, block_size: tuple[int, int]) -> None:
        visible = torch.rand(1, 1, self.n, self.n, generator=torch.Generator().manual_seed(5)) < 0.5
        tensors, grad_out = self.drawn(1)
        self.against_the_reference(tensors, grad_out, mask=BlockMask.from_dense(visible, block_size=block_size))

    @pytest.mark.parametrize("seed", SEEDS, ids=str)
    def test_dropout_is_that_of_the_definition(self, seed: int | torch.Tensor) -> None:
        """With values that name the key, the kept pairs can be read off the output: the same ones, bit for bit."""
        q, k = torch.zeros(1, 2, 70, 16, dtype=self.dtype), torch.zeros(1, 2, 64, 16, dtype=self.dtype)
        v = torch.eye(64, dtype=self.dtype).expand(1, 2, 64, 64)
        arguments = {"dropout_p": 0.4, "dropout_seed": seed}
        ours, theirs = (attention(q, k, v, backend=name, **arguments) != 0 for name in (self.backend, "reference"))
        assert torch.equal(ours, theirs) and 0.5 < ours.float().mean() < 0.7

    def test_a_list_without_entries_gives_empty_rows(self) -> None:
        q = draw(1, 1, 40, 16, dtype=self.dtype)
        mask = BlockMask.from_dense(torch.zeros(40, 40, dtype=torch.bool))
        ours = results(self.backend, [q, q, q], q, mask=mask)
        assert (ours[1] == -torch.inf).all() and all((t == 0).all() for i, t in enumerate(ours) if i != 1)
