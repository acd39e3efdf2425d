"""Models that are made on the meta device: a method's state has its values however the model gets its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from efficient_attn import MultiheadAttention
from efficient_attn.errors import InputError
from efficient_attn.methods import METHODS, parse
from efficient_attn.models import TextClassifier, TextClassifierConfig, TransformerConfig

STATEFUL = [
    "linformer:rank=4,max_len=16",
    "linformer:rank=4,max_len=16,share=kv",
    "linformer:rank=4,max_len=16,share=layerwise",
    "linformer:rank=4,max_len=16,share=none,init=normal",
    "nystrom:landmarks=4,conv=3",
    "performer:features=16",
    "sliding_window:left=2,right=2+performer:features=16,block=16",
]
X = torch.randn(2, 12, 16)
IDS = torch.randint(5, 60, (2, 12))


def make(kind: str, spec: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "module":
        return nn.Sequential(MultiheadAttention(16, 4, batch_first=True, attention=spec)).eval()
    encoder = TransformerConfig(hidden_dim=16, num_layers=2, num_heads=4, mlp_dim=16, attention=spec)
    return TextClassifier(TextClassifierConfig(64, 16, encoder, num_labels=2)).eval()


def run(model: nn.Module) -> Tensor:
    out: Any = model[0](X, X, X)[0] if isinstance(model, nn.Sequential) else model(IDS)
    return getattr(out, "logits", out)


def assigned(meta: nn.Module, plain: dict[str, Tensor]) -> None:
    meta.load_state_dict(plain, strict=True, assign=True)


def emptied_then_loaded(meta: nn.Module, plain: dict[str, Tensor]) -> None:
    meta.to_empty(device="cpu").load_state_dict(plain, strict=True)


def assigned_then_emptied(meta: nn.Module, plain: dict[str, Tensor]) -> None:
    """A checkpoint that is itself on meta gives no values; the device comes later."""
    assigned(meta, {name: value.to("meta") for name, value in plain.items()})
    emptied_then_loaded(meta, plain)


def as_fsdp_does(meta: nn.Module, plain: dict[str, Tensor]) -> None:
    """Module by module, to_empty and reset_parameters, then the checkpoint."""
    for module in meta.modules():
        module.to_empty(device="cpu", recurse=False)
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    meta.load_state_dict(plain, strict=True)


WAYS = [assigned, emptied_then_loaded, assigned_then_emptied, as_fsdp_does]


def test_every_method_with_a_state_is_here() -> None:
    stateful = {name for name in METHODS if name != "hybrid" and parse(name).build(16, 4, 4) is not None}
    assert stateful <= {spec.partition(":")[0] for spec in STATEFUL}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["module", "classifier"])
@pytest.mark.parametrize("spec", STATEFUL)
def test_a_plain_checkpoint_into_a_model_made_on_meta(spec: str, kind: str, way: Any) -> None:
    wanted = make(kind, spec)
    with torch.device("meta"):
        meta = make(kind, spec)
    assert all(tensor.is_meta for tensor in meta.state_dict().values())
    way(meta, {name: value.clone() for name, value in wanted.state_dict().items() if "method_state" not in name})
    assert not any(tensor.is_meta for tensor in meta.state_dict().values())
    assert torch.equal(run(meta), run(wanted))
    if "layerwise" in spec and kind == "classifier":
        states = [m.method_state for m in meta.modules() if getattr(m, "method_state", None) is not None]
        assert all(state is states[0] for state in states)


@pytest.mark.parametrize("spec", STATEFUL)
def test_what_was_learned_survives_both_ways(spec: str) -> None:
    trained = make("module", spec)
    with torch.no_grad():
        for tensor in trained.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1)
    full = trained.state_dict()
    with torch.device("meta"):
        meta = make("module", spec)
    twin = copy.deepcopy(meta)
    meta.load_state_dict(full, assign=True)
    twin.to_empty(device="cpu").load_state_dict(full)
    again = copy.deepcopy(trained)  # a checkpoint of the model without the method keeps what it has, wherever it is
    again.load_state_dict({k: v for k, v in full.items() if "method_state" not in k}, assign=True)
    for model in (meta, twin, again, copy.deepcopy(trained).to("cpu", torch.float64).to(torch.float32)):
        assert torch.equal(run(model), run(trained))


@pytest.mark.parametrize("spec", STATEFUL)
def test_assigning_a_checkpoint_of_another_dtype_takes_the_state_along(spec: str) -> None:
    model = make("module", spec)
    plain = {k: v.double() for k, v in model.state_dict().items() if "method_state" not in k}
    model.load_state_dict(plain, assign=True)
    assert {v.dtype for v in model.state_dict().values() if v.is_floating_point()} == {torch.float64}
    assert model[0](X.double(), X.double(), X.double())[0].dtype == torch.float64


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_fully_sharded_parameters_are_filled_too(one_process: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for spec in STATEFUL:
        with torch.device("meta"):
            model = make("module", spec)
        fully_shard(model, mesh=one_process)
        model.to_empty(device="cpu")
        wanted = make("module", spec).state_dict()
        for name, value in model.state_dict().items():
            if "method_state" in name:
                assert torch.equal(getattr(value, "full_tensor", lambda value=value: value)(), wanted[name]), name


def offload(module: nn.Module, tensors: str) -> None:
    """What accelerate does to a module with tensors of its own: on meta between calls, brought by its `forward`."""
    owned = getattr(module, tensors)
    kept, forward = dict(owned), module.forward

    def bring_and_take(*args: Any, **options: Any) -> Any:
        owned.update(kept)
        try:
            return forward(*args, **options)
        finally:
            take()

    def take() -> None:
        owned.update({k: nn.Parameter(v.to("meta")) if tensors == "_parameters" else v.to("meta")
                      for k, v in kept.items() if v is not None})  # fmt: skip

    module.forward = bring_and_take  # type: ignore[method-assign]
    take()


@pytest.mark.parametrize("kind", ["module", "model"])
@pytest.mark.parametrize("spec", ["dense", *STATEFUL])
def test_a_model_whose_tensors_are_brought_at_each_call(spec: str, kind: str) -> None:
    model = make(kind, spec)
    plain = run(model).detach()
    for module in list(getattr(model, "encoder", model).modules()):
        for tensors in ("_parameters", "_buffers"):
            if any(value is not None for value in getattr(module, tensors).values()):
                offload(module, tensors)
    assert torch.equal(run(model), plain)


@pytest.mark.parametrize("spec", STATEFUL)
def test_a_state_without_values_is_refused(spec: str) -> None:
    model = make("module", spec)
    model[0].method_state.to("meta")
    with pytest.raises(InputError, match=r"meta device and has no values.*to_empty"):
        run(model)
