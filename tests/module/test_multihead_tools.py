"""MultiheadAttention in other people's tools, and the tools that put it into a model."""

from __future__ import annotations

import copy
import functools
import pickle
import types
from typing import Any

import pytest
import torch
from support.multihead import LAYOUTS, SPARSE, E, H, causal_mask
from torch import Tensor, nn
from torch.testing import assert_close

from efficient_attn import convert
from efficient_attn.errors import InputError, UnsupportedError
from efficient_attn.multihead import MultiheadAttention, replace_attention

LINFORMER = "linformer:rank=4,max_len=16"
X = torch.randn(4, 3, E)


def pair(attention: str = "dense", **options: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """The parent and ours on the same parameters."""
    torch.manual_seed(7)
    theirs = nn.MultiheadAttention(E, H, **options)
    return theirs, MultiheadAttention.from_torch(theirs, attention)


@pytest.mark.parametrize("attention", ["dense", SPARSE])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile_without_graph_breaks(attention: str, training: bool) -> None:
    torch._dynamo.reset()
    _, ours = pair(attention, batch_first=True)
    ours.train(training)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, E)
    mask, padding = torch.rand(9, 9) < 0.3, torch.zeros(2, 9, dtype=torch.bool)
    mask.fill_diagonal_(False)
    for call in (
        {"need_weights": False},
        {"need_weights": False, "attn_mask": causal_mask(9), "is_causal": True},
        {"attn_mask": mask, "key_padding_mask": padding},
    ):
        results = []
        for module in (ours, compiled):
            leaf = x.clone().requires_grad_()
            output = module(leaf, leaf, leaf, **call)[0]
            results.append((output, *torch.autograd.grad(output.square().sum(), [leaf, ours.in_proj_weight])))
        for found, wanted in zip(results[1], results[0], strict=True):
            assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_autocast() -> None:
    for options in ({}, {"add_bias_kv": True, "add_zero_attn": True}):
        theirs, ours = pair(batch_first=True, **options)
        x = torch.randn(2, 6, E)
        for call in ({}, {"need_weights": False}, {"attn_mask": causal_mask(6)}):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                expected, found = (module(x, x, x, **call) for module in (theirs, ours))
            assert found[0].dtype == expected[0].dtype == torch.bfloat16
            assert_close(found[0], expected[0], rtol=5e-2, atol=5e-2)
            if found[1] is not None:
                assert found[1].dtype == expected[1].dtype
                assert_close(found[1], expected[1], rtol=5e-2, atol=5e-2)


def test_vmap_over_models_inputs() -> None:
    theirs, ours = pair(batch_first=True)
    x = torch.randn(4, 2, 6, E)
    found, expected = (
        torch.vmap(lambda x, module=module: module(x, x, x, need_weights=False)[0])(x) for module in (ours, theirs)
    )
    assert_close(found, expected, rtol=1e-5, atol=1e-6)


class Net(nn.Module):
    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(E), attention

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        output, _ = self.attention(y, y, y, need_weights=False)
        return x + output


class Overriding(torch.Tensor):
    """A tensor class that watches every torch function."""

    calls: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class Bare(torch.Tensor):
    """A tensor class that overrides nothing."""


def test_tensor_classes() -> None:
    theirs, ours = pair(batch_first=True)
    sparse = MultiheadAttention.from_torch(theirs, SPARSE)
    x = torch.randn(2, 6, E)
    watched = x.as_subclass(Overriding)
    Overriding.calls.clear()
    output = ours(watched, watched, watched)[0]
    assert torch.nn.functional.multi_head_attention_forward in Overriding.calls
    assert_close(output.as_subclass(Tensor), theirs(x, x, x)[0])
    with pytest.raises(UnsupportedError, match="Overriding"):
        sparse(watched, watched, watched)
    bare = x.as_subclass(Bare)
    assert_close(sparse(bare, bare, bare)[0].as_subclass(Tensor), sparse(x, x, x)[0])
    with torch.device("cpu"):  # a mode is no override
        assert torch.equal(sparse(x, x, x)[0], sparse(x, x, x)[0])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_what_only_the_parent_can_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = pair(batch_first=True)
    sparse = MultiheadAttention.from_torch(theirs, SPARSE)
    x = torch.randn(2, 6, E)
    traced = torch.jit.trace(Net(ours), x)
    assert_close(traced(x), Net(theirs)(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(UnsupportedError, match="trace"):
        torch.jit.trace(Net(sparse), x)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert torch.equal(ours(x, x, x)[0], theirs(x, x, x)[0])
    with pytest.raises(UnsupportedError, match="ONNX"):
        sparse(x, x, x)
    monkeypatch.undo()
    wide = MultiheadAttention(300, 1)
    y = torch.randn(3, 2, 300)
    assert torch.equal(wide(y, y, y)[0], wide.to_torch()(y, y, y)[0])
    with pytest.raises(UnsupportedError, match="head_dim=300"):
        MultiheadAttention(300, 1, attention=SPARSE)(y, y, y)
    everything = MultiheadAttention(E, H, dropout=1.0)
    assert_close(everything(X, X, X, need_weights=False)[0], everything.out_proj.bias.expand_as(X))


def test_fx_records_one_call_as_for_modules_of_torch_nn() -> None:
    model = Net(MultiheadAttention(E, H, batch_first=True, attention=SPARSE))
    graph = torch.fx.symbolic_trace(model)
    calls = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert calls == ["norm", "attention"] and isinstance(graph.get_submodule("attention"), nn.MultiheadAttention)
    x = torch.randn(2, 6, E)
    assert torch.equal(graph(x), model(x))
    with pytest.raises(UnsupportedError, match="contains it"):
        torch.fx.symbolic_trace(model.attention)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript() -> None:
    model = Net(MultiheadAttention(E, H, batch_first=True))
    x = torch.randn(2, 6, E)
    assert_close(torch.jit.script(model)(x), model(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(UnsupportedError, match="TorchScript"):
        torch.jit.script(Net(MultiheadAttention(E, H, attention=SPARSE)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantisation_leaves_out_proj_alone() -> None:
    model = nn.Sequential(nn.Linear(E, E), MultiheadAttention(E, H))
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert type(quantised[0]) is not nn.Linear
    assert type(quantised[1].out_proj) is type(nn.MultiheadAttention(E, H).out_proj)
    x = torch.randn(4, 2, E)
    assert torch.equal(quantised[1](x, x, x)[0], model[1](x, x, x)[0])


def test_wrapping_policies_know_us() -> None:
    wrap = pytest.importorskip("torch.distributed.fsdp.wrap")
    leaves = tuple(wrap.size_based_auto_wrap_policy.FORCE_LEAF_MODULES)
    assert isinstance(MultiheadAttention(E, H), leaves)


def test_lora_merges_into_the_weights_we_read() -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Identity(), MultiheadAttention(E, H, batch_first=True))
    x = torch.randn(2, 5, E)
    before = model[1](x, x, x)[0]
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["1"], init_lora_weights=False))
    assert not torch.allclose(tuned.base_model.model[1](x, x, x)[0], before)


@pytest.mark.parametrize("attention", ["dense", "sliding_window:left=2,right=2"])
def test_what_stands_in_the_place_of_out_proj_is_called(attention: str) -> None:
    """An adapter or a hook there does something, which plain PyTorch passes by."""

    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base

        @property
        def weight(self) -> Tensor:
            return self.base.weight

        @property
        def bias(self) -> Tensor:
            return self.base.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + x

    module = MultiheadAttention(E, H, attention=attention).eval()
    x = torch.randn(7, 2, E)
    plain = module(x, x, x)[0]
    handle = module.out_proj.register_forward_hook(lambda module, inputs, out: 2 * out)
    assert_close(module(x, x, x)[0], 2 * plain)
    handle.remove()
    module.out_proj = Adapter(module.out_proj)
    heads = torch.linalg.solve(module.out_proj.weight, (plain - module.out_proj.bias).mT).mT
    assert_close(module(x, x, x)[0], plain + heads, atol=1e-3, rtol=1e-3)


def test_parameters_are_read_at_every_call() -> None:
    theirs, ours = pair(batch_first=True)
    x = torch.randn(2, 5, E)
    ours(x, x, x)
    for module in (theirs, ours):
        delattr(module, "in_proj_weight")  # what LoRA does: a merged tensor in the parameter's place
        module.in_proj_weight = torch.full((3 * E, E), 0.1)
    assert_close(ours(x, x, x)[0], theirs(x, x, x)[0], rtol=1e-5, atol=1e-6)


def test_forward_hooks_fire() -> None:
    _, ours = pair()
    seen: list[str] = []
    ours.register_forward_pre_hook(lambda *_: seen.append("before"))
    handle = ours.register_forward_hook(lambda *_: seen.append("after"))
    ours.register_full_backward_hook(lambda *_: seen.append("backward"))
    x = X.clone().requires_grad_()
    ours(x, x, x)[0].sum().backward()
    handle.remove()
    ours(X, X, X)
    assert seen == ["before", "after", "backward", "before"]


def test_double_backward() -> None:
    for need_weights in (True, False):
        _, ours = pair(dtype=torch.float64)
        x = torch.randn(3, 2, E, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(
            lambda x, ours=ours, need=need_weights: ours(x, x, x, need_weights=need)[0], x, atol=1e-4
        )


# --- from_torch, to_torch, replace_attention ---


@pytest.mark.parametrize("options", [*LAYOUTS, {"batch_first": True, "dropout": 0.1, "dtype": torch.float64}], ids=str)
def test_from_torch_and_back(options: dict[str, Any]) -> None:
    theirs, _ = pair(**options)
    theirs.eval().note = "kept"
    ours = MultiheadAttention.from_torch(theirs, "dense" if "add_bias_kv" in options else SPARSE)
    back = ours.to_torch()
    assert type(back) is nn.MultiheadAttention and repr(back) == repr(theirs)
    for module in (ours, back):
        assert (
            not module.training and module.note == "kept" and module.state_dict().keys() == theirs.state_dict().keys()
        )
        for (name, a), (other, b) in zip(module.named_parameters(), theirs.named_parameters(), strict=True):
            assert name == other and a is b
    assert not back._forward_pre_hooks and not theirs._forward_pre_hooks and "attention" not in vars(back)
    assert vars(back).keys() == vars(theirs).keys()


def test_to_torch_leaves_method_parameters_behind() -> None:
    ours = MultiheadAttention(E, H, attention=LINFORMER)
    back = ours.to_torch()
    assert back.state_dict().keys() == nn.MultiheadAttention(E, H).state_dict().keys()
    assert ours.method_state is not None


def make_model() -> nn.Module:
    model = nn.Transformer(E, H, 2, 2, 16, dropout=0.0, batch_first=True)
    model.extra = nn.ModuleDict({"a": nn.MultiheadAttention(E, H, kdim=5, dtype=torch.float64).eval()})
    model.shared = model.decoder.layers[0].multihead_attn
    return model


def test_replace_attention_swaps_in_place_and_keeps_what_is_there() -> None:
    model = make_model()
    attentions = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.MultiheadAttention)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    order = list(dict(model.named_modules()))
    calls: list[str] = []
    handle = model.extra["a"].register_forward_hook(lambda *_: calls.append("a"))
    replaced = replace_attention(model, SPARSE, predicate=lambda name, module: True)
    assert replaced == attentions and len(replaced) == 8
    for name, old in replaced.items():
        new = model.get_submodule(name)
        assert type(new) is MultiheadAttention and str(new.attention) == str(
            MultiheadAttention(E, H, attention=SPARSE).attention
        )
        assert new.training == old.training and type(old) is nn.MultiheadAttention
    assert model.shared is model.decoder.layers[0].multihead_attn
    assert list(dict(model.named_modules())) == order
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == parameters.keys() and all(after[name] is parameters[name] for name in parameters)
    new, old = model.extra["a"], replaced["extra.a"]
    x, y = torch.randn(4, 2, E, dtype=torch.float64), torch.randn(4, 2, 5, dtype=torch.float64)
    z = torch.randn(4, 2, E, dtype=torch.float64)
    new(x, y, z)
    assert calls == ["a"]
    handle.remove()
    new(x, y, z)
    assert calls == ["a"], "the handle acts on the module that is in the model now"
    assert not old._forward_pre_hooks and len(old._forward_hooks) == 1


def test_replace_attention_again_and_back() -> None:
    model = make_model()
    x = torch.randn(2, 9, E)
    before = model(x, x)
    replace_attention(model, SPARSE)
    assert replace_attention(model, SPARSE) == {}, "nothing left to replace"
    sparse = model(x, x)
    assert not torch.allclose(before, sparse, atol=1e-4)
    swapped = replace_attention(model, "dense")
    across = {name for name in swapped if name.endswith(".multihead_attn")}
    assert all((type(m) is nn.MultiheadAttention) == (name in across) for name, m in swapped.items())
    assert_close(model(x, x), before, rtol=1e-5, atol=1e-5)
    for name, module in swapped.items():
        model.set_submodule(name, module)
    assert_close(model(x, x), sparse, rtol=1e-5, atol=1e-5)


def test_replace_attention_with_parameters_of_a_method() -> None:
    model = make_model().eval()
    replace_attention(model, LINFORMER, predicate=lambda name, module: name.startswith("encoder"))
    new = model.encoder.layers[0].self_attn
    assert new.method_state is not None and not any(m.training for m in new.modules())
    assert type(model.decoder.layers[0].self_attn) is nn.MultiheadAttention
    double = nn.Sequential(nn.MultiheadAttention(E, H, dtype=torch.float64))
    replace_attention(double, LINFORMER)
    assert {p.dtype for p in double.parameters()} == {torch.float64}


class Subclass(nn.MultiheadAttention):
    pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_replace_attention_refuses_what_would_lose_something() -> None:
    for stranger in (Subclass(E, H), torch.ao.nn.quantizable.MultiheadAttention(E, H)):
        model = nn.Sequential(nn.MultiheadAttention(E, H), stranger)
        with pytest.raises(UnsupportedError, match=type(stranger).__name__):
            replace_attention(model, SPARSE)
        assert type(model[0]) is nn.MultiheadAttention, "all or nothing"
        assert list(replace_attention(model, SPARSE, predicate=lambda name, module: name == "0")) == ["0"]
        with pytest.raises(UnsupportedError, match="plain"):
            MultiheadAttention.from_torch(stranger)
    with pytest.raises(InputError, match="from_torch"):
        replace_attention(nn.MultiheadAttention(E, H), SPARSE)


def test_quantizable_takes_to_torch() -> None:
    ours = MultiheadAttention(E, H)
    plain = ours.to_torch()
    plain.qconfig = torch.ao.quantization.default_qconfig
    quantizable = torch.ao.nn.quantizable.MultiheadAttention.from_float(plain)
    assert_close(quantizable(X, X, X)[0], ours(X, X, X)[0], rtol=1e-5, atol=1e-6)


LAYERWISE = "linformer:rank=4,max_len=16,share=layerwise"


def encoder(layers: int = 3) -> nn.TransformerEncoder:
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def projections(model: nn.Module) -> list[nn.Parameter]:
    return [m.method_state.key_projection for m in model.modules() if isinstance(m, MultiheadAttention)]


def test_layerwise_linformer_has_one_projection_for_the_model() -> None:
    model, plain = encoder(), encoder()
    before = sum(p.numel() for p in model.parameters())
    replace_attention(model, LAYERWISE)
    replace_attention(plain, LAYERWISE.replace("layerwise", "kv"))
    assert len({id(p) for p in projections(model)}) == 1 and len(projections(model)) == 3
    assert sum(p.numel() for p in model.parameters()) == before + 4 * 16
    x = torch.randn(2, 9, E)
    assert_close(model(x), plain(x))  # the same function, whose three equal matrices are one
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert_close(projections(model)[0].grad, sum(p.grad for p in projections(plain)))


def test_layerwise_linformer_stays_one_in_checkpoints_and_copies() -> None:
    model = encoder()
    replace_attention(model, LAYERWISE)
    with torch.no_grad():
        projections(model)[0].normal_()
    x = torch.randn(2, 9, E)
    expected = model(x)
    other = encoder()
    replace_attention(other, LAYERWISE)
    assert other.load_state_dict(model.state_dict()).missing_keys == []
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double().float()):
        assert_close(twin(x), expected)
        assert len({id(p) for p in projections(twin)}) == 1
    plain = encoder().state_dict()
    assert other.load_state_dict(plain, strict=True).missing_keys == []  # a checkpoint without it keeps the projection
    assert_close(projections(other)[0], projections(model)[0])


def test_layerwise_linformer_joins_layers_that_have_it() -> None:
    model = encoder()
    replace_attention(model, LAYERWISE, predicate=lambda name, _: name.startswith("layers.1"))
    first = model.layers[1].self_attn.method_state
    assert sorted(replace_attention(model, LAYERWISE)) == ["layers.0.self_attn", "layers.2.self_attn"]
    assert all(layer.self_attn.method_state is first for layer in model.layers)
    assert replace_attention(model, LAYERWISE) == {}
    copied = nn.ModuleList(copy.deepcopy(model.layers[0]) for _ in range(2))  # as nn.TransformerEncoder copies a layer
    assert len({id(p) for p in projections(copied)}) == 2
    replace_attention(copied, LAYERWISE)
    assert len({id(p) for p in projections(copied)}) == 1
    one = MultiheadAttention(E, H, attention=LAYERWISE)
    two = MultiheadAttention(E, H, attention=LAYERWISE, method_state=one.method_state)
    assert two.method_state is one.method_state


def test_a_state_that_does_not_fit_is_refused() -> None:
    one = MultiheadAttention(E, H, attention=LAYERWISE)
    for attention in (
        "linformer:rank=5,max_len=16,share=layerwise",
        "linformer:rank=4,max_len=16",
        "dense",
        "performer",
    ):
        with pytest.raises(InputError, match="does not belong to attention="):
            MultiheadAttention(E, H, attention=attention, method_state=one.method_state)
    with pytest.raises(InputError, match="cannot serve a module on meta"):
        MultiheadAttention(E, H, attention=LAYERWISE, method_state=one.method_state, device="meta")
    model = encoder()
    model.layers[2].to("meta")
    before = [layer.self_attn for layer in model.layers]
    with pytest.raises(InputError, match="cannot serve a module on meta"):
        replace_attention(model, LAYERWISE)
    assert [layer.self_attn for layer in model.layers] == before


# --- forwards that other code put on the instance ---

FAR = (torch.arange(9)[:, None] - torch.arange(9)).abs() > 2  # what SPARSE hides


def in_a_closure(module: nn.Module) -> list[Any]:
    calls, own = [], module.forward

    @functools.wraps(own)
    def timed(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(args))
        return own(*args, **kwargs)

    module.forward = timed
    return calls


def twice(module: nn.Module) -> list[Any]:
    in_a_closure(module)
    return in_a_closure(module)


def in_a_partial(module: nn.Module) -> list[Any]:
    """As accelerate's hooks do: the old forward stands in another attribute, the new one is given the module."""
    calls: list[Any] = []

    def hooked(module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(args))
        return module._old_forward(*args, **kwargs)

    module._old_forward = module.forward
    module.forward = functools.update_wrapper(functools.partial(hooked, module), module.forward)
    return calls


def as_a_method(module: nn.Module) -> list[Any]:
    calls, own = [], module.forward

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return own(*args, **kwargs)

    module.forward = types.MethodType(recorded, module)
    return calls


@pytest.mark.parametrize("wrap", [in_a_closure, twice, in_a_partial, as_a_method])
@pytest.mark.parametrize("way", ["replace_attention", "from_torch", "to_torch"])
def test_a_wrapped_forward_runs_the_replacement(wrap: Any, way: str) -> None:
    model = nn.Sequential()
    model.attn = nn.MultiheadAttention(E, H, batch_first=True).eval()
    x = torch.randn(2, 9, E)
    expected = model.attn(x, x, x, attn_mask=FAR)[0]
    dense = model.attn(x, x, x)[0]
    calls = wrap(model.attn)
    old = model.attn
    if way == "replace_attention":
        replace_attention(model, SPARSE)
    else:
        model.attn = MultiheadAttention.from_torch(model.attn, SPARSE)
    assert_close(model.attn(x, x, x)[0], expected)
    assert len(calls) == 1 and (wrap is not as_a_method or calls == [model.attn])
    assert_close(old(x, x, x)[0], dense)  # the old module is as it was
    if way == "to_torch":
        assert_close(model.attn.to_torch()(x, x, x)[0], dense)
        assert len(calls) == 3


def test_a_compiled_child_is_compiled_again() -> None:
    model = nn.Sequential()
    model.attn = torch.compile(nn.MultiheadAttention(E, H, batch_first=True).eval(), backend="eager")
    x = torch.randn(2, 9, E)
    dense, expected = model.attn(x, x, x)[0], model.attn(x, x, x, attn_mask=FAR)[0]
    replaced = replace_attention(model, SPARSE)
    assert list(replaced) == ["attn"]
    assert_close(model.attn(x, x, x)[0], expected)
    model.set_submodule("attn", replaced["attn"])
    assert_close(model.attn(x, x, x)[0], dense)
    report = convert(model, SPARSE)
    assert_close(model.attn(x, x, x)[0], expected)
    report.undo()
    assert_close(model.attn(x, x, x)[0], dense)


def test_a_child_that_compiles_itself_runs_the_replacement() -> None:
    model = nn.Sequential()
    model.attn = nn.MultiheadAttention(E, H, batch_first=True).eval()
    model.attn.compile(backend="eager")
    x = torch.randn(2, 9, E)
    expected = model.attn(x, x, x, attn_mask=FAR)[0]
    replace_attention(model, SPARSE)
    assert_close(model.attn(x, x, x)[0], expected)


def test_a_forward_without_a_way_to_the_old_one_is_refused() -> None:
    """It could call anything: then the replacement would never run, and nobody would know."""
    model = nn.Sequential()
    model.attn = nn.MultiheadAttention(E, H)
    model.attn.forward = lambda *args: args
    with pytest.raises(UnsupportedError, match="'attn' has a forward of its own on the instance"):
        replace_attention(model, SPARSE)
    with pytest.raises(UnsupportedError, match="forward of its own"):
        MultiheadAttention.from_torch(model.attn)
    model.other = nn.MultiheadAttention(E, H)
    report = convert(model, SPARSE)
    assert list(report.converted) == ["other"] and "forward of its own" in report.skipped["attn"]
