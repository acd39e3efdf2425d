"""scaled_dot_product_attention served here, in a with block and through PyTorch's dispatcher, against PyTorch's own."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointError, checkpoint

from efficient_attn import InputError, UnsupportedError, attention, backends, functional
from efficient_attn.integrations import torch_dispatcher, torch_sdpa
from efficient_attn.integrations.torch_sdpa import activate, restore, use_for_sdpa

N, M, D = 10, 12, 16


@pytest.fixture(autouse=True)
def nothing_stays_active():
    yield
    restore()


@pytest.fixture
def native(monkeypatch):
    """Counts the calls of the CPU kernels, forward and backward."""
    if backends.cpu.attention.not_supported_reasons(
        functional.describe(*tensors(), None, functional.MaskArrays(), 0.0)
    ):
        pytest.skip("the native kernels are not built")
    calls = {"forward": 0, "backward": 0}
    for name in calls:
        kernel = getattr(backends.cpu.attention, f"attention_{name}")

        def counted(*args, kernel=kernel, name=name):
            calls[name] += 1
            return kernel(*args)

        monkeypatch.setattr(backends.cpu.attention, f"attention_{name}", counted)
    return calls


def tensors(dtype=torch.float32, shape=(2, 4), kv_heads=None, n=N, m=M, d=D, dv=None, layout="heads first"):
    generator = torch.Generator().manual_seed(0)

    def make(heads, length, width):
        lead = (*shape[:-1], heads)
        if layout == "tokens first":
            return torch.randn(*lead[:-1], length, heads, width, generator=generator).to(dtype).transpose(-2, -3)
        return torch.randn(*lead, length, width, generator=generator).to(dtype)

    kv_heads = shape[-1] if kv_heads is None else kv_heads
    return make(shape[-1], n, d), make(kv_heads, m, d), make(kv_heads, m, dv or d)


HOLES = torch.rand(N, M, generator=torch.Generator().manual_seed(1)) > 0.5
HOLES[3] = False  # a query that sees nothing
ADDED = torch.randn(2, 4, N, M, generator=torch.Generator().manual_seed(1))
PADDING = (torch.arange(M) < torch.tensor([M, 5])[:, None])[:, None, None]
# name -> (arguments of tensors(), arguments of the call)
CALLS = {
    "plain": ({}, {}),
    "causal": ({}, {"is_causal": True}),
    "scale": ({}, {"scale": 0.3}),
    "bool mask": ({}, {"attn_mask": HOLES}),
    "padding": ({}, {"attn_mask": PADDING}),
    "expanded padding": ({}, {"attn_mask": PADDING.expand(2, 4, N, M)}),
    "float mask": ({}, {"attn_mask": ADDED}),
    "float mask per key": ({}, {"attn_mask": ADDED[:, :1, :1]}),
    "float32 mask, half inputs": ({"dtype": torch.bfloat16}, {"attn_mask": ADDED}),
    "float64": ({"dtype": torch.float64}, {"is_causal": True}),
    "bfloat16": ({"dtype": torch.bfloat16}, {}),
    "float16": ({"dtype": torch.float16}, {}),
    "grouped queries": ({"kv_heads": 2}, {"enable_gqa": True}),
    "tokens first": ({"layout": "tokens first"}, {}),
    "one query": ({"n": 1}, {}),
}
BY_DISPATCHER = {"causal and a mask": ({}, {"attn_mask": HOLES, "is_causal": True})}
BY_MODE = {
    "3 dimensions": ({"shape": (4,)}, {"attn_mask": ADDED[0]}),
    "5 dimensions": ({"shape": (2, 3, 4)}, {"attn_mask": HOLES}),
    "another value head_dim": ({"dv": 24}, {}),
}


def run(made, arguments):
    """The output and the three gradients."""
    inputs = [t.detach().requires_grad_() for t in tensors(**made)]
    out = F.scaled_dot_product_attention(*inputs, **arguments)
    out.square().sum().backward()
    return [out.detach(), *(t.grad for t in inputs)]


def assert_agree(actual, expected, dtype):
    slack = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 8 * torch.finfo(dtype).eps)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= slack * theirs.abs().max()


@pytest.mark.parametrize("name", [*CALLS, *BY_MODE])
def test_block_computes_what_pytorch_does(name, native):
    made, arguments = {**CALLS, **BY_MODE}[name]
    expected = run(made, arguments)
    assert native == {"forward": 0, "backward": 0}
    with use_for_sdpa() as mode:
        actual = run(made, arguments)
    assert native == {"forward": 1, "backward": 1} and mode.served == 1 and not mode.left
    assert_agree(actual, expected, made.get("dtype", torch.float32))
    run(made, arguments)
    assert native["forward"] == 1  # over


@pytest.mark.parametrize("name", [*CALLS, *BY_DISPATCHER])
def test_dispatcher_computes_what_pytorch_does(name, native):
    made, arguments = {**CALLS, **BY_DISPATCHER}[name]
    expected = run(made, arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        activate()
        activate()  # again is nothing more
    actual = run(made, arguments)
    assert native == {"forward": 1, "backward": 1}
    assert_agree(actual, expected, made.get("dtype", torch.float32))
    assert [t.stride() for t in actual] == [t.stride() for t in expected]  # compiled graphs rely on it
    assert torch.nn.attention.current_flash_attention_impl() == "efficient_attn"
    restore()
    restore()
    run(made, arguments)
    assert native["forward"] == 1 and torch.nn.attention.current_flash_attention_impl() is None


# name -> (arguments of tensors(), of the call, why)
LEFT = {
    "wide heads": ({"d": 300}, {}, "head_dim above 256"),
    "dropout 1": ({}, {"dropout_p": 1.0}, "dropout_p=1.0"),
    "broadcast": ({"kv_heads": 1}, {}, "4 query heads and 1 key heads"),
    "empty": ({"m": 0}, {}, "empty"),
    "causal and a mask": ({}, {"attn_mask": HOLES, "is_causal": True}, "both is_causal and attn_mask"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_served_is_pytorchs(name, native):
    made, arguments, why = LEFT[name]
    expected = F.scaled_dot_product_attention(*tensors(**made), **arguments)
    with use_for_sdpa() as mode:
        actual = F.scaled_dot_product_attention(*tensors(**made), **arguments)
    assert torch.equal(actual, expected) and native["forward"] == 0
    assert mode.served == 0 and [why in reason for reason in mode.left] == [True] and why in str(mode)
    if name not in BY_DISPATCHER:
        activate()
        assert torch.equal(F.scaled_dot_product_attention(*tensors(**made), **arguments), expected)
        assert native["forward"] == 0


def test_the_errors_are_pytorchs():
    query, key, value = tensors()
    mask = torch.ones(N, M, dtype=torch.bool)
    for call in (
        {"attn_mask": mask.long()},
        {"attn_mask": mask[:3]},
        {"key": key[..., :3]},
    ):
        arguments = {"query": query, "key": key, "value": value, **call}
        with pytest.raises(RuntimeError) as theirs:
            F.scaled_dot_product_attention(**arguments)
        with use_for_sdpa(), pytest.raises(RuntimeError) as ours:
            F.scaled_dot_product_attention(**arguments)
        assert str(ours.value).splitlines()[0] == str(theirs.value).splitlines()[0]


def test_other_tensors_and_requests_are_left():
    class Own(torch.Tensor):
        pass

    query, key, value = tensors()
    with use_for_sdpa() as mode:
        F.scaled_dot_product_attention(query.as_subclass(Own), key, value)
        with sdpa_kernel(SDPBackend.MATH):
            F.scaled_dot_product_attention(query, key, value)
            torch.func.jvp(lambda q: F.scaled_dot_product_attention(q, key, value), (query,), (query,))
        nested = torch.nested.as_nested_tensor([query[0], query[1]])
        F.scaled_dot_product_attention(nested, nested, nested)
        meta = query.to("meta")
        assert F.scaled_dot_product_attention(meta, meta, meta).is_meta
    assert mode.served == 0
    assert sorted(mode.left) == [
        "Own, a subclass of Tensor",
        "flash attention is turned off (sdpa_kernel)",
        "forward-mode derivatives",
        "nested tensors",
        "tensors on meta",
    ]


def test_without_a_fast_backend_pytorch_is_faster(monkeypatch):
    monkeypatch.setattr(backends, "cached_select", lambda *_: "reference")
    with use_for_sdpa() as mode:
        F.scaled_dot_product_attention(*tensors())
    assert list(mode.left) == ["only the reference backend can serve it"]
    activate()
    F.scaled_dot_product_attention(*tensors())  # goes on to PyTorch's kernel


def test_dropout_is_ours_in_the_block_and_pytorchs_below(native):
    query, key, value = tensors()
    torch.manual_seed(3)
    with use_for_sdpa():
        dropped = F.scaled_dot_product_attention(query, key, value, dropout_p=0.4)
    torch.manual_seed(3)
    assert torch.equal(dropped, attention(query, key, value, dropout_p=0.4))
    activate()
    F.scaled_dot_product_attention(query, key, value, dropout_p=0.4)
    assert native["forward"] == 2  # the block and attention, not the dispatcher


def test_a_mask_gets_its_gradient():
    mask = ADDED.clone().requires_grad_()
    F.scaled_dot_product_attention(*tensors(), attn_mask=mask).square().sum().backward()
    expected, mask.grad = mask.grad, None
    with use_for_sdpa() as mode:
        F.scaled_dot_product_attention(*tensors(), attn_mask=mask).square().sum().backward()
    assert mode.served == 1
    assert_agree([mask.grad], [expected], torch.float32)
    activate()
    mask.grad = None
    F.scaled_dot_product_attention(*tensors(), attn_mask=mask).square().sum().backward()
    assert_agree([mask.grad], [expected], torch.float32)


def test_autocast(native):
    expected = F.scaled_dot_product_attention(*tensors(torch.bfloat16))
    for context in (use_for_sdpa, torch.no_grad):
        with torch.autocast("cpu", torch.bfloat16), context():
            if context is torch.no_grad:
                activate()
            actual = F.scaled_dot_product_attention(*tensors())
        assert actual.dtype == torch.bfloat16
        assert_agree([actual], [expected], torch.bfloat16)
    assert native["forward"] == 2


# --- models ---


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


X = torch.randn(2, N, 32, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("place", ["block", "process"])
def test_torch_compile_in_one_graph(place, native):
    torch.manual_seed(0)
    layer = Layer()
    expected = layer(X)
    mode = use_for_sdpa()
    if place == "process":
        activate()
        mode = torch.enable_grad()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with mode:
        actual = compiled(X)
        compiled(X)
    actual.square().sum().backward()
    assert native == {"forward": 2, "backward": 1}
    assert_agree([actual], [expected], torch.float32)


def test_checkpointed_layers_need_the_dispatcher(native):
    layer = Layer()
    activate()
    checkpoint(layer, X, use_reentrant=False).sum().backward()
    assert native == {"forward": 2, "backward": 1}
    restore()
    with use_for_sdpa(), pytest.raises(CheckpointError, match="different"):
        checkpoint(layer, X, use_reentrant=False).sum().backward()


def test_who_did_the_forward_does_not_matter_to_the_backward(native):
    made, arguments = CALLS["bool mask"]
    expected = run(made, arguments)
    for before, after in ((activate, restore), (restore, activate)):
        before()
        inputs = [t.requires_grad_() for t in tensors(**made)]
        out = F.scaled_dot_product_attention(*inputs, **arguments)
        after()
        out.square().sum().backward()
        assert_agree([out.detach(), *(t.grad for t in inputs)], expected, torch.float32)
    assert native == {"forward": 1, "backward": 1}


def test_the_block_is_this_threads_and_the_process_is_everyones(native):
    def elsewhere():
        thread = threading.Thread(target=lambda: F.scaled_dot_product_attention(*tensors()))
        thread.start()
        thread.join()

    with use_for_sdpa():
        elsewhere()
    assert native["forward"] == 0
    activate()
    elsewhere()
    assert native["forward"] == 1


def test_calls_from_torchscript_arrive_through_the_dispatcher(native):
    query, key, value = tensors(m=N)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(F.scaled_dot_product_attention, (query, key, value))
    activate()
    traced(query, key, value)
    assert native["forward"] == 1


def test_nn_multihead_attention_is_served(native):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(32, 4, batch_first=True)
    expected, _ = module(X, X, X, need_weights=False)
    with use_for_sdpa() as mode:
        actual, _ = module(X, X, X, need_weights=False)
    assert mode.served == native["forward"] == 1
    assert_agree([actual], [expected], torch.float32)
    compiled = torch.compile(lambda x: module(x, x, x, need_weights=False)[0], backend="eager", fullgraph=True)
    with use_for_sdpa():
        assert_agree([compiled(X)], [expected], torch.float32)
    assert native["forward"] == 2
    with use_for_sdpa("sliding_window:left=1,right=1"):
        window = module(X, X, X, need_weights=False)[0]
        assert_agree([compiled(X)], [window], torch.float32)
    assert (window - expected).abs().max() > 1e-2


# --- other methods ---


def test_another_method_in_every_call():
    query, key, value = tensors(m=N)
    window = "sliding_window:left=2,right=0"
    with use_for_sdpa(window) as mode:
        actual = F.scaled_dot_product_attention(query, key, value)
        causal = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        padded = F.scaled_dot_product_attention(query, key, value, attn_mask=PADDING[..., :N])
    from efficient_attn import SlidingWindow

    pattern = SlidingWindow(left=2, right=0)
    assert torch.equal(actual, attention(query, key, value, mask=pattern)) and torch.equal(actual, causal)
    visible = pattern.block_mask(N, N).to_dense() & PADDING[..., :N]
    assert_agree([padded], [attention(query, key, value, mask=visible)], torch.float32)
    assert "3 calls served by sliding_window" in str(mode)


def test_causal_masks_reach_methods_that_know_no_others():
    query, key, value = tensors(m=N)
    causal = torch.ones(N, N, dtype=torch.bool).tril()
    additive = torch.zeros(N, N).masked_fill(~causal, -torch.inf)
    with use_for_sdpa("linear"):
        expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        assert torch.equal(F.scaled_dot_product_attention(query, key, value, attn_mask=causal), expected)
        assert torch.equal(F.scaled_dot_product_attention(query, key, value, attn_mask=additive), expected)
        with pytest.raises(UnsupportedError, match="mask"):
            F.scaled_dot_product_attention(query, key, value, attn_mask=causal.flip(0))
        with pytest.raises(UnsupportedError, match="bias"):
            F.scaled_dot_product_attention(query, key, value, attn_mask=ADDED[..., :N])


def test_what_another_method_cannot_serve_raises():
    with use_for_sdpa("sliding_window"):
        with pytest.raises(UnsupportedError, match="10 queries stand among 12 keys"):
            F.scaled_dot_product_attention(*tensors())
        with pytest.raises(UnsupportedError, match="head_dim above 256"):
            F.scaled_dot_product_attention(*tensors(m=N, d=300))
    for spec in ("linformer", "performer"):
        with pytest.raises(UnsupportedError, match=r"use efficient_attn\.convert"):
            use_for_sdpa(spec)
    with pytest.raises(InputError, match="no method"):
        use_for_sdpa("flash")


# --- the registry, and the operators of CUDA ---


def test_a_pytorch_that_cannot_restore_is_named(monkeypatch):
    monkeypatch.delattr(torch.nn.attention, "restore_flash_attention_impl")
    for function in (activate, restore):
        with pytest.raises(UnsupportedError, match=r"has no restore_flash_attention_impl.*use_for_sdpa"):
            function()
    monkeypatch.undo()


def test_another_implementation_is_not_pushed_out(monkeypatch):
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA4")
    with pytest.raises(UnsupportedError, match="FA4 now"):
        activate()
    restore()
    monkeypatch.undo()


@pytest.mark.parametrize("causal", [False, True])
def test_cuda_operators_return_what_their_schemas_say(causal):
    """Their Python is of no device: here on CPU tensors, with the operators' own meta functions as the model."""
    query, key, value = tensors(m=N)
    grad = torch.randn_like(query)
    found = torch_dispatcher._cuda_forward(query, key, value, 0.0, causal, scale=0.3)
    meta = torch.ops.aten._scaled_dot_product_flash_attention(*(t.to("meta") for t in (query, key, value)), 0.0, causal)
    assert len(found) == len(meta) == len(torch.ops.aten._scaled_dot_product_flash_attention.default._schema.returns)
    for ours, theirs in zip(found, meta, strict=True):
        assert type(ours) is type(theirs)
        if isinstance(ours, torch.Tensor):
            assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())
    gradients = torch_dispatcher._cuda_backward(
        grad, query, key, value, *found[:2], *found[2:6], 0.0, causal, found[6], found[7], scale=0.3
    )
    inputs = [t.requires_grad_() for t in (query, key, value)]
    out = F.scaled_dot_product_attention(*inputs, is_causal=causal, scale=0.3)
    out.backward(grad)
    assert_agree([found[0], *gradients], [out.detach(), *(t.grad for t in inputs)], torch.float32)


def test_cuda_operators_leave_what_they_do_not_serve():
    query, key, value = tensors()
    wide = tensors(d=300)
    assert torch_dispatcher._cuda_forward(query, key, value, 0.5) is NotImplemented
    assert torch_dispatcher._cuda_forward(query, key, value, 0.0, False, True) is NotImplemented
    assert torch_dispatcher._cuda_forward(*wide) is NotImplemented
    kernel = torch_dispatcher._guarded(torch_dispatcher._cuda_forward, None)
    with pytest.raises(UnsupportedError, match="built without a kernel"):
        kernel(None, *wide)


def test_all_four_operators_are_registered_and_given_back():
    names = [torch_dispatcher._CPU, torch_dispatcher._CUDA]
    places = [
        (f"aten::{name}{end}", key)
        for name, key in zip(names, ("CPU", "CUDA"), strict=True)
        for end in ("", "_backward")
    ]
    before = [torch._C._dispatch_has_kernel_for_dispatch_key(*place) for place in places]
    activate()
    assert all(torch._C._dispatch_has_kernel_for_dispatch_key(*place) for place in places)
    restore()
    assert [torch._C._dispatch_has_kernel_for_dispatch_key(*place) for place in places] == before


def test_the_arguments_are_those_of_pytorch():
    names = list(torch_sdpa.bound(*tensors()))
    schema = torch.ops.aten.scaled_dot_product_attention.default._schema
    assert names == [argument.name for argument in schema.arguments]
