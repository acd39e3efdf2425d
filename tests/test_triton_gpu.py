"""What only a GPU can show of the Triton kernels: streams, graphs, no waiting, addresses beyond 2^31. `make
gpu-check`."""

from __future__ import annotations

import pytest
import torch

from efficient_attn import BlockMask, attention, explain, linear_attention
from efficient_attn.backends import reference_linear, triton_linear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def qkv(*shape: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [draw(*shape, dtype=dtype, seed=s).requires_grad_() for s in range(3)]


def mask_for(length: int) -> BlockMask:
    visible = torch.rand(length, length, generator=torch.Generator().manual_seed(5)) < 0.3
    mask = BlockMask.from_dense(visible).to("cuda")
    mask.transposed()
    return mask


def test_auto_takes_triton() -> None:
    q, k, v = qkv(1, 2, 64, 64)
    assert explain(q, k, v).backend == "triton"


def test_no_call_waits_for_the_gpu() -> None:
    """Forward and backward with every option that reads something: lists, lengths, bias, a seed on either device. Each
    time under a mask that was not met before, whose plan is yet to be made."""
    q, k, v = qkv(2, 40, 300, 64)
    lengths = BlockMask.from_lengths(torch.tensor([300, 17]), q_len=300, kv_len=300).to("cuda")
    masks = [mask_for(300) & lengths for _ in range(4)]
    bias = draw(1, 40, 300, 300).requires_grad_()
    for seed in (7, torch.tensor(7, device="cuda")):
        call = {"bias": bias, "dropout_p": 0.1, "dropout_seed": seed, "backend": "triton"}
        attention(q, k, v, mask=masks.pop(), **call).sum().backward()  # compiles
        fresh = masks.pop()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            attention(q, k, v, mask=fresh, **call).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_graph_replays_with_new_inputs_and_seed() -> None:
    q, k, v = qkv(1, 4, 256, 64)
    mask, seed = mask_for(256), torch.tensor(1, device="cuda")
    grad_out = draw(1, 4, 256, 64, seed=9)

    def step() -> list[torch.Tensor]:
        out = attention(q, k, v, mask=mask, dropout_p=0.2, dropout_seed=seed, backend="triton")
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        q.copy_(draw(1, 4, 256, 64, seed=20))
        seed.fill_(2)
    graph.replay()
    replayed = [t.clone() for t in captured]
    assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))


def test_the_same_bits_a_hundred_times() -> None:
    q, k, v = qkv(2, 8, 777, 128)
    grad_out = draw(2, 8, 777, 128, seed=9)
    seen = set()
    for _ in range(100):
        out = attention(q, k, v, is_causal=True, backend="triton")
        gradients = torch.autograd.grad(out, (q, k, v), grad_out)
        seen.add(tuple(float(t.double().sum()) for t in (out, *gradients)))
    assert len(seen) == 1


def test_more_programs_than_processors_under_a_list() -> None:
    """Then the longest rows start first: forward and backward, with lists of each head, a window and lengths."""
    heads, length = 8, 2500
    generator = torch.Generator().manual_seed(3)
    rows = -(-length // 128)
    density = torch.linspace(0.1, 0.9, rows)[:, None]
    visible = (torch.rand(1, heads, rows, rows, generator=generator) < density).repeat_interleave(128, 2)
    visible = visible.repeat_interleave(128, 3)[..., :length, :length]
    visible[..., 200:230, 100:150] = False
    mask = (BlockMask.from_dense(visible).with_causal().with_lengths([length, 777])).to("cuda")
    q, k, v = (draw(2, n, length, 64, dtype=torch.float32, seed=n).requires_grad_() for n in (heads, 2, 2))
    grad_out = draw(2, heads, length, 64, dtype=torch.float32, seed=9)
    results = []
    for backend in ("triton", "reference"):
        out = attention(q, k, v, mask=mask, backend=backend)
        results.append([out, *torch.autograd.grad(out, (q, k, v), grad_out)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="has no TMA")
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_by_tma(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from efficient_attn.kernels import configs

    q, k, v = (t.detach() for t in qkv(2, 4, 1000, 128))
    expected = attention(q, k, v, is_causal=causal, backend="triton")
    monkeypatch.setattr(configs, "DESCRIPTORS", True)
    torch.testing.assert_close(attention(q, k, v, is_causal=causal, backend="triton"), expected)


def test_addresses_beyond_two_to_the_31() -> None:
    """Keys whose rows lie far apart: 40 rows 2^26 elements from each other, in half precision 5 GiB."""
    wide = torch.zeros(40, 2**26, dtype=torch.float16, device="cuda")
    k = wide[:, :64][None, None]
    k.copy_(draw(1, 1, 40, 64, dtype=torch.float16))
    q, v = draw(1, 1, 8, 64, dtype=torch.float16, seed=1), draw(1, 1, 40, 64, dtype=torch.float16, seed=2)
    out = attention(q, k, v, backend="triton")
    torch.testing.assert_close(out, attention(q, k.contiguous(), v, backend="triton"), rtol=0, atol=0)


def test_float32_is_exact_unless_asked_otherwise() -> None:
    q, k, v = (t.detach() for t in qkv(1, 2, 500, 64, dtype=torch.float32))
    gold = attention(q.cpu().double(), k.cpu().double(), v.cpu().double(), backend="reference")
    exact = (attention(q, k, v, backend="triton").cpu().double() - gold).abs().max()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        fast = (attention(q, k, v, backend="triton").cpu().double() - gold).abs().max()
    finally:
        torch.set_float32_matmul_precision(before)
    assert exact < 2e-6 < fast < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "length", "features", "causal"), [(4, 1000, 64, True), (2, 300, 200, True), (4, 1000, 64, False)]
)
def test_linear_attention(dtype: torch.dtype, heads: int, length: int, features: int, causal: bool) -> None:
    a, b = (draw(2, heads, length, features, dtype=dtype, seed=s).abs() + 0.1 for s in (0, 1))
    v, grad_out = (draw(2, heads, length, 64, dtype=dtype, seed=s) for s in (2, 3))
    results = []
    for module, cast in ((triton_linear, None), (reference_linear, torch.float64), (reference_linear, None)):
        x, y, z, g = (t if cast is None else t.to(cast) for t in (a, b, v, grad_out))
        how = (causal, 0, "identity", 1.0)
        out, n, shift = module.linear_attention_forward(x, y, z, None, None, *how)
        gradients = module.linear_attention_backward(g, None, x, y, z, None, None, out, n, shift, *how)
        results.append([out, n, *gradients])
    for mine, gold, plain in zip(*results, strict=True):
        error = (mine.double() - gold).abs().max()
        budget = 2 * (plain.double() - gold).abs().max() + 4 * torch.finfo(mine.dtype).eps * gold.abs().max()
        assert error <= budget


def test_compile_and_the_public_function() -> None:
    q, k, v = qkv(1, 4, 256, 64)
    compiled = torch.compile(lambda *t: attention(*t, is_causal=True), fullgraph=True)
    assert torch.equal(compiled(q, k, v), attention(q, k, v, is_causal=True, backend="triton"))
    a, b = q.abs() + 0.1, k.abs() + 0.1
    ours, theirs = (linear_attention(a, b, v, is_causal=True, backend=n).float() for n in ("auto", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
