"""What chooses by content inside a program of torch.compile, with the compiler that users have."""

from __future__ import annotations

import torch

from efficient_attn.methods import parse


def test_buckets_in_a_program_are_those_outside_of_it():
    torch.manual_seed(0)
    x, method = torch.randn(1, 2, 1024, 16), parse("lsh:n_buckets=16,rounds=2")
    assert torch.equal(torch.compile(lambda y: method.attend(y, y, y)[0])(x), method.attend(x, x, x)[0])
