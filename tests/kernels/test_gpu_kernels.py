"""What only a GPU can show of the Triton and the CUDA kernels: streams, graphs, no waiting, addresses beyond 2^31, the
same bits always. `make gpu-check`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract.test_conformance import check
from support.cases import CASES

from efficient_attn import BlockMask, CudaError, attention, explain, linear_attention
from efficient_attn.backends.cuda import attention as cuda
from efficient_attn.backends.cuda import linear_attention as cuda_linear
from efficient_attn.backends.reference import linear_attention as reference_linear
from efficient_attn.backends.triton import linear_attention as triton_linear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.fixture(params=["triton", "cuda"])
def kernels(request: pytest.FixtureRequest) -> str:
    """Each backend whose kernels run on a GPU."""
    if request.param == "cuda" and cuda.missing():
        pytest.skip(cuda.missing())
    return request.param


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


def test_cuda_serves_by_name_and_is_said_to_be_experimental() -> None:
    if cuda.missing():
        pytest.skip(cuda.missing())
    said = explain(*qkv(1, 2, 64, 64), backend="cuda")
    assert said.backend == "cuda", said.reasons["cuda"]
    assert "backend: cuda (EXPERIMENTAL: " in str(said)


def test_no_call_waits_for_the_gpu(kernels: str) -> None:
    """Forward and backward with every option that reads something: lists, lengths, bias, a seed on either device. Each
    time under a mask that was not met before, whose plan is yet to be made."""
    q, k, v = qkv(2, 40, 300, 64)
    lengths = BlockMask.from_lengths(torch.tensor([300, 17]), q_len=300, kv_len=300).to("cuda")
    masks = [mask_for(300) & lengths for _ in range(4)]
    bias = draw(1, 40, 300, 300).requires_grad_()
    for seed in (7, torch.tensor(7, device="cuda")):
        call = {"bias": bias, "dropout_p": 0.1, "dropout_seed": seed, "backend": kernels}
        attention(q, k, v, mask=masks.pop(), **call).sum().backward()  # compiles
        fresh = masks.pop()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            attention(q, k, v, mask=fresh, **call).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_graph_replays_with_new_inputs_and_seed(kernels: str) -> None:
    q, k, v = qkv(1, 4, 256, 64)
    mask, seed = mask_for(256), torch.tensor(1, device="cuda")
    grad_out = draw(1, 4, 256, 64, seed=9)

    def step() -> list[torch.Tensor]:
        out = attention(q, k, v, mask=mask, dropout_p=0.2, dropout_seed=seed, backend=kernels)
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


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_same_bits_a_hundred_times(kernels: str, head_dim: int) -> None:
    """Every run beside copies of other sizes, so that blocks of threads meet the processors in another order."""
    q, k, v = qkv(2, 8, 777, head_dim)
    grad_out, busy = draw(2, 8, 777, head_dim, seed=9), torch.cuda.Stream()
    first: list[torch.Tensor] = []
    changed = torch.zeros((), dtype=torch.int64, device="cuda")
    for run in range(100):
        with torch.cuda.stream(busy):
            torch.empty(1 + run * 4096, device="cuda").fill_(run)
        out = attention(q, k, v, is_causal=True, backend=kernels)
        results = [out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)]
        first = first or results
        for ours, before in zip(results, first, strict=True):
            changed += (ours.view(torch.int16) != before.view(torch.int16)).sum()
    assert changed.item() == 0


def test_another_stream_and_its_order(kernels: str) -> None:
    """A call waits for what its own stream computes before, and for nothing of another one."""
    q, k, v = (t.detach() for t in qkv(1, 4, 500, 64))
    expected = attention(q, k, v, backend=kernels)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.empty_like(v)
        torch.cuda._sleep(20_000_000)
        late.copy_(v)
        out = attention(q, k, late, backend=kernels)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors_serves_and_the_current_one_stays(kernels: str) -> None:
    tensors = [t.detach() for t in qkv(1, 4, 300, 64)]
    there = attention(*(t.to("cuda:1") for t in tensors), backend=kernels)
    assert there.device.index == 1 and torch.cuda.current_device() == 0
    assert torch.equal(there.to("cuda:0"), attention(*tensors, backend=kernels))


def test_an_error_of_the_launcher_is_named() -> None:
    if cuda.missing():
        pytest.skip(cuda.missing())
    with pytest.raises(CudaError, match="cudaDeviceGetAttribute failed: cudaErrorInvalidDevice"):
        cuda.kernels().most_shared_bytes(torch.cuda.device_count())
    test_cuda_serves_by_name_and_is_said_to_be_experimental()  # nothing sticks


def test_many_tiles_within_the_error_of_the_formula(kernels: str) -> None:
    """Long rows and lists in half precision: at most twice the error of the same formula in plain PyTorch."""
    length = 2500
    visible = torch.rand(1, 1, length, length, generator=torch.Generator().manual_seed(3)) < 0.4
    visible[..., 200:330, 100:1500] = False
    mask = BlockMask.from_dense(visible).to("cuda")
    q, k, v = (draw(1, n, length, 128, seed=n).requires_grad_() for n in (4, 2, 2))
    grad_out = draw(1, 4, length, 128, seed=9)
    for arguments in ({"mask": mask}, {"is_causal": True}, {}):
        results = []
        for backend, dtype in ((kernels, None), ("reference", torch.float64), ("reference", None)):
            tensors = [t if dtype is None else t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
            out = attention(*tensors, backend=backend, **arguments)
            results.append([out, *torch.autograd.grad(out, tensors, grad_out.to(out.dtype))])
        for mine, gold, plain in zip(*results, strict=True):
            budget = 2 * (plain.double() - gold).abs().max() + torch.finfo(mine.dtype).eps * gold.abs().max()
            assert (mine.double() - gold).abs().max() <= budget


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["long_head_dim_128", "head_dim_80", "blocks_128", "bits_sparse", "lengths"])
def test_cuda_backward_in_one_pass(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conformance cases on the backward that adds up in any order, with heads that it serves."""
    if cuda.missing():
        pytest.skip(cuda.missing())
    monkeypatch.setenv("EFFICIENT_ATTN_CUDA_ANY_ORDER", "1")
    case = next(case for case in CASES if case.name == name)
    check(replace(case, D=max(case.D, 72), Dv=max(case.Dv, 72)), dtype, "cuda", torch.device("cuda"))


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


def test_addresses_beyond_two_to_the_31(kernels: str) -> None:
    """Keys whose rows lie far apart: 40 rows 2^26 elements from each other, in half precision 5 GiB."""
    wide = torch.zeros(40, 2**26, dtype=torch.float16, device="cuda")
    k = wide[:, :64][None, None]
    k.copy_(draw(1, 1, 40, 64, dtype=torch.float16))
    q, v = draw(1, 1, 8, 64, dtype=torch.float16, seed=1), draw(1, 1, 40, 64, dtype=torch.float16, seed=2)
    out = attention(q, k, v, backend=kernels)
    torch.testing.assert_close(out, attention(q, k.contiguous(), v, backend=kernels), rtol=0, atol=0)


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
def test_linear_attention(
    kernels: str, dtype: torch.dtype, heads: int, length: int, features: int, causal: bool
) -> None:
    if kernels == "cuda" and dtype == torch.float32:
        pytest.skip("tensor cores multiply halves")
    ours = {"triton": triton_linear, "cuda": cuda_linear}[kernels]
    a, b = (draw(2, heads, length, features, dtype=dtype, seed=s).abs() + 0.1 for s in (0, 1))
    v, grad_out = (draw(2, heads, length, 64, dtype=dtype, seed=s) for s in (2, 3))
    results = []
    for module, cast in ((ours, None), (reference_linear, torch.float64), (reference_linear, None)):
        x, y, z, g = (t if cast is None else t.to(cast) for t in (a, b, v, grad_out))
        how = (causal, 0, "identity", 1.0)
        out, n, shift = module.linear_attention_forward(x, y, z, None, None, *how)
        gradients = module.linear_attention_backward(g, None, x, y, z, None, None, out, n, shift, *how)
        results.append([out, n, *gradients])
    for mine, gold, plain in zip(*results, strict=True):
        error = (mine.double() - gold).abs().max()
        budget = 2 * (plain.double() - gold).abs().max() + 4 * torch.finfo(mine.dtype).eps * gold.abs().max()
        assert error <= budget


def test_compile(kernels: str) -> None:
    q, k, v = qkv(1, 4, 256, 64)
    compiled = torch.compile(lambda *t: attention(*t, is_causal=True, backend=kernels), fullgraph=True)
    assert torch.equal(compiled(q, k, v), attention(q, k, v, is_causal=True, backend=kernels))


@pytest.mark.parametrize("how", ["auto", "cuda"])
def test_the_public_function_of_linear_attention(how: str) -> None:
    if how == "cuda" and cuda.missing():
        pytest.skip(cuda.missing())
    q, k, v = qkv(1, 4, 256, 64)
    a, b = q.abs() + 0.1, k.abs() + 0.1
    ours, theirs = (linear_attention(a, b, v, is_causal=True, backend=n).float() for n in (how, "reference"))
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
