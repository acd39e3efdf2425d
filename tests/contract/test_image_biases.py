"""Biases of images: Swin, BEiT and SAM as transformers computes them, and calls made of some queries at a time."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_attn import (
    ALiBi,
    BlockMask,
    DecomposedBias2D,
    MultiheadAttention,
    RelativeBias2D,
    SlidingWindow,
    attention,
    attention_weights,
    parse,
    strips,
)
from efficient_attn.errors import InputError, UnsupportedError
from efficient_attn.functional import padded_attention

H, D = 2, 4


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tokens(N: int, B: int = 1, heads: int = H) -> list[Tensor]:
    return [drawn(B, heads, N, D, seed=s) for s in range(3)]


def table_of(grid: tuple[int, int], class_token: bool = False, heads: int = H) -> RelativeBias2D:
    rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3 * class_token
    return RelativeBias2D(drawn(rows, heads, seed=5), grid, class_token)


def decomposed(grid: tuple[int, int]) -> DecomposedBias2D:
    h, w = grid
    return DecomposedBias2D(drawn(2 * h - 1, D, seed=6), drawn(2 * w - 1, D, seed=7), grid)


# --- as others define them ---


def test_swins_index() -> None:
    swin = pytest.importorskip("transformers.models.swin.modeling_swin")
    if not hasattr(swin, "SwinRelativePositionBias"):
        pytest.skip("these transformers have it elsewhere")
    theirs = swin.SwinRelativePositionBias(H, (3, 4)).relative_position_index
    assert torch.equal(table_of((3, 4)).index(0, 12), theirs.view(12, 12))


@pytest.mark.parametrize("grid", [(3, 4), (5, 2)])
def test_beits_bias(grid: tuple[int, int]) -> None:
    beit = pytest.importorskip("transformers.models.beit.modeling_beit")
    N = grid[0] * grid[1] + 1
    theirs = beit.BeitRelativePositionBias
    if not hasattr(theirs, "generate_relative_position_index"):
        pytest.skip("these transformers have it elsewhere")
    index = theirs.generate_relative_position_index(grid)
    bias, (q, k, _) = table_of(grid, class_token=True), tokens(N)
    expected = bias.table[index.view(-1)].view(N, N, H).permute(2, 0, 1)[None]
    torch.testing.assert_close(bias.rows(0, N, q, k, torch.float64), expected)
    assert torch.equal(bias.index(2, 4), index[2:4])


def test_sams_decomposed_positions() -> None:
    sam = pytest.importorskip("transformers.models.sam.modeling_sam")
    grid, (q, k, v) = (3, 5), tokens(15)
    bias = decomposed(grid)
    theirs = sam.SamVisionAttention.get_decomposed_rel_pos(
        object.__new__(_Sam), q.flatten(0, 1), bias.rel_h, bias.rel_w, grid, grid
    ).reshape(1, H, 15, 15)
    torch.testing.assert_close(attention(q, k, v, bias=bias), attention(q, k, v, bias=theirs))


class _Sam:
    """What SAM's function asks of its module."""

    def get_rel_pos(self, q_size: int, k_size: int, rel_pos: Tensor) -> Tensor:
        return rel_pos[torch.arange(q_size)[:, None] - torch.arange(k_size) + k_size - 1]


# --- some queries at a time ---


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of two or three queries."""
    monkeypatch.setattr(strips, "PAIRS", 2 * 3 * 20)


SHOWN: dict[str, dict[str, Any]] = {
    "all": {},
    "causal": {"is_causal": True},
    "window": {"mask": SlidingWindow(left=7, right=3)},
    "window causal": {"mask": SlidingWindow(left=7, right=3), "is_causal": True},
    "bool": {"mask": drawn(1, H, 20, 20, seed=9) > 0},
    "bool causal": {"mask": drawn(20, seed=9) > 0, "is_causal": True},
    "lengths": {"mask": BlockMask.from_lengths([13, 0], q_len=20, kv_len=20)},
    "softcap and sinks": {"softcap": 1.5, "sinks": drawn(H, seed=8)},
    "a bias more": {"more": drawn(2, 1, 20, 20, seed=4)},
    "a bias by key": {"more": drawn(20, seed=4)},
}


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.usefixtures("few")
def test_strips_give_what_one_call_gives(name: str) -> None:
    given = dict(SHOWN[name])
    more, (q, k, v) = given.pop("more", None), tokens(20, B=2)
    leaves = [x.requires_grad_() for x in (q, k, v, table_of((4, 5)).table)]
    leaves += [] if more is None else [more.clone().requires_grad_()]

    def call(whole: bool) -> Any:
        bias: Any = RelativeBias2D(leaves[3], (4, 5))
        bias = bias.rows(0, 20, q, k, torch.float64) if whole else bias
        return attention(q, k, v, bias=bias if more is None else [bias, leaves[4]], return_lse=True, **given)

    expected, found = call(True), call(False)
    torch.testing.assert_close(found, expected)
    grads = [drawn(*x.shape, seed=11).masked_fill(~x.isfinite(), 0.0) for x in expected]
    for a, b in zip(*(torch.autograd.grad(x, leaves, grads) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(call(False), expected)


@pytest.mark.usefixtures("few")
def test_padding_weights_and_second_derivatives() -> None:
    (q, k, v), bias = tokens(20, B=2), table_of((4, 5))
    whole = bias.rows(0, 20, q, k, torch.float64)
    for padding in (torch.arange(20) < torch.tensor([[20], [13]]), drawn(2, 20) > 0):
        found = padded_attention(q, k, v, padding, bias=bias)
        torch.testing.assert_close(found, padded_attention(q, k, v, padding, bias=whole))
    torch.testing.assert_close(attention_weights(q, k, bias=bias), attention_weights(q, k, bias=whole))
    q, k, v = (x[:1, :, :6].detach().requires_grad_() for x in (q, k, v))
    table = table_of((2, 3)).table.requires_grad_()
    call = lambda *x: attention(*x[:3], bias=RelativeBias2D(x[3], (2, 3)))  # noqa: E731
    assert torch.autograd.gradcheck(call, (q, k, v, table))


@pytest.mark.usefixtures("few")
def test_what_does_not_go_with_strips() -> None:
    (q, k, v), bias = tokens(20), table_of((4, 5))
    for given in (
        {"dropout_p": 0.1},
        {"mask": BlockMask.from_dense(torch.eye(20, dtype=torch.bool)[None, None])},
        {"mask": parse("longformer:window=2")},
        {"bias": [bias, ALiBi(torch.ones(H))]},
        {"bias": [bias, decomposed((4, 5))]},
    ):
        with pytest.raises(UnsupportedError, match="some queries at a time"):
            attention(q, k, v, **{"bias": bias, **given})


def test_what_goes_together_within_one_strip() -> None:
    (q, k, v), bias = tokens(20), table_of((4, 5))
    whole = bias.rows(0, 20, q, k, torch.float64)
    other = [ALiBi(torch.ones(H, dtype=torch.float64)), decomposed((4, 5))]
    for given in ({"dropout_p": 0.4, "dropout_seed": 3}, {"mask": parse("longformer:window=2")}):
        found, expected = (attention(q, k, v, bias=[x, *other], **given) for x in (bias, whole))
        torch.testing.assert_close(found, expected)


# --- in the module, in methods, compiled, refused ---


IN_MODULES = {"table": table_of((3, 4)), "class token": table_of((1, 11), class_token=True), "rows": decomposed((3, 4))}


@pytest.mark.parametrize("bias", IN_MODULES.values(), ids=IN_MODULES)
def test_in_the_module(bias: Any) -> None:
    module = MultiheadAttention(H * D, H, batch_first=True, position_bias=bias, dtype=torch.float64)
    x = drawn(2, 12, H * D, seed=3)
    module(x, x, x, need_weights=False)[0].sum().backward()
    assert all(bool(p.grad.any()) for p in module.position_bias.parameters())
    compiled = torch.compile(lambda x: module(x, x, x, need_weights=False)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x, x, x)[0])
    with pytest.raises(InputError, match="12 queries and keys"):
        module(x[:, :6], x, x)


@pytest.mark.parametrize("bias", [table_of((3, 4)), decomposed((3, 4))], ids=["table", "decomposed"])
@pytest.mark.parametrize("spec", ["linformer", "nystrom", "performer", "linear", "sliding_window+nystrom"])
def test_other_methods_refuse(spec: str, bias: Any) -> None:
    with pytest.raises(UnsupportedError, match="cannot be served by"):
        parse(spec).attend(*tokens(12), bias=bias)


def test_wrong_input() -> None:
    (q, k, v), zeros = tokens(12), torch.zeros
    for make, named in (
        (lambda: RelativeBias2D(zeros(34, H), (3, 4)), "35 rows"),
        (lambda: RelativeBias2D(zeros(35, H), (3, 4), class_token=True), "38 rows"),
        (lambda: RelativeBias2D(zeros(35, H), (3, 0)), "grid must be"),
        (lambda: RelativeBias2D(zeros(35), (3, 4)), "dimensions"),
        (lambda: DecomposedBias2D(zeros(5, D), zeros(5, D), (3, 4)), "rel_w must have 7"),
        (lambda: attention(q, k, v, bias=RelativeBias2D(zeros(35, H + 1), (3, 4))), "heads"),
        (lambda: attention(q, k, v, bias=DecomposedBias2D(zeros(5, D + 1), zeros(7, D + 1), (3, 4))), "other heads"),
        (lambda: attention(q[:, :, :6], k, v, bias=table_of((3, 4))), "12 queries and keys"),
        (lambda: attention(q, k, v, bias=decomposed((3, 4)), scale=0.0), "scale=0"),
        (lambda: attention(*(x[:, :, :1].expand(-1, -1, 600, -1) for x in (q, k, v)),
                           bias=DecomposedBias2D(zeros(1, D), zeros(1199, D), (1, 600))), "at most 576 together"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=named):
            make()
    with pytest.raises(UnsupportedError, match="DecomposedBias2D is a part of the dot products"):
        attention(q, k, v, bias=decomposed((3, 4)), softcap=1.0)


# --- memory ---

PEAK = """
import resource, sys, torch
from efficient_attn import DecomposedBias2D, RelativeBias2D, attention
side, kind = int(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
def tensors(side):
    q, k, v = (torch.randn(1, 4, side * side, 64, requires_grad=True) for _ in range(3))
    table = torch.randn((2 * side - 1) ** 2, 4, requires_grad=True)
    rel = [torch.randn(2 * side - 1, 64, requires_grad=True) for _ in range(2)]
    return q, k, v, RelativeBias2D(table, (side, side)) if kind == "table" else DecomposedBias2D(*rel, (side, side))
def run(q, k, v, bias):
    attention(q, k, v, bias=bias).sum().backward()
run(*tensors(8))
given = tensors(side)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(*given)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB here")
@pytest.mark.parametrize("kind", ["table", "decomposed"])
def test_memory_is_no_matrix(kind: str) -> None:
    """64 x 64 tokens and 4 heads: a bias of pairs is 256 MiB, and eager attention has three such."""
    command = [sys.executable, "-c", PEAK, "64", kind]
    extra = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024
    assert extra < 160, f"{extra:.0f} MiB"
