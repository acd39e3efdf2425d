"""What people do around a model, as a table of actions: each gives what the plain call gives, or one of our errors.

An action takes a `Subject` and returns its output by that way, or gradients where it is about training.
`make works-with` writes docs/works-with.md from it.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from efficient_attn import MultiheadAttention
from efficient_attn.errors import EfficientAttnError
from efficient_attn.methods import parse

METHODS = [
    "dense", "sliding_window:left=4,right=4", "bigbird:block=16,window=1,global_blocks=1,random_blocks=1",
    "topk_blocks:block=16,blocks=2", "lsh:n_buckets=4", "linear", "performer:features=16", "nystrom:landmarks=8,conv=3",
    "linformer:rank=8,max_len=64", "bigbird:block=16,window=1,global_blocks=1,random_blocks=0+centroid:block=16",
]  # fmt: skip
MODELS = ["MultiheadAttention", "TextClassifier", "BERT"]
N, E = 40, 32
NEEDS = {  # packages that no other test needs: `make works-with` brings them
    "torch.onnx.export(dynamo=True)": ("onnxruntime", "onnxscript"),
    "torch.onnx.export(dynamo=False)": ("onnxruntime", "onnx"),
    "accelerate.disk_offload": ("accelerate",),
    "PEFT (LoRA)": ("peft",),
}


class Module(nn.Module):
    """A MultiheadAttention as a layer of one input; its hooks count."""

    def __init__(self, spec: str) -> None:
        super().__init__()
        self.attention = MultiheadAttention(E, 4, batch_first=True, attention=spec)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Wrapped(nn.Module):
    """A model of token ids, as one of embeddings: so every model has one differentiable input."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "BERT":
            return self.model(inputs_embeds=x)[0]
        return self.model.encoder(x)


@dataclass
class Subject:
    """A model, its input, and what the plain call gives."""

    kind: str
    spec: str
    model: nn.Module
    x: Tensor
    plain: Tensor


def build(kind: str, spec: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "MultiheadAttention":
        return Module(spec).eval()
    if kind == "TextClassifier":
        from efficient_attn.models import TextClassifier, TextClassifierConfig, TransformerConfig

        encoder = TransformerConfig(hidden_dim=E, num_layers=1, num_heads=4, mlp_dim=E, attention=spec)
        return Wrapped(TextClassifier(TextClassifierConfig(64, 64, encoder)), kind).eval()
    import transformers

    from efficient_attn.integrations.huggingface import implementation_name, register

    register()
    config = transformers.BertConfig(
        hidden_size=E, num_hidden_layers=1, num_attention_heads=4, intermediate_size=E, vocab_size=64
    )
    model: Any = transformers.BertModel
    return Wrapped(model._from_config(config, attn_implementation=implementation_name(spec)), kind).eval()


def subject(kind: str, spec: str) -> Subject:
    model = build(kind, spec)
    x = torch.randn(2, N, E, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return Subject(kind, spec, model, x, model(x).clone())


# --- the actions ---

ACTIONS: dict[str, Callable[[Subject], Any]] = {}


def action(name: str) -> Callable[[Callable[[Subject], Any]], Callable[[Subject], Any]]:
    def add(function: Callable[[Subject], Any]) -> Callable[[Subject], Any]:
        ACTIONS[name] = function
        return function

    return add


@action("copy.deepcopy")
def _deepcopy(s: Subject) -> Tensor:
    return copy.deepcopy(s.model)(s.x)


@action("pickle")
def _pickle(s: Subject) -> Tensor:
    return pickle.loads(pickle.dumps(s.model))(s.x)


@action("torch.save, torch.load in another process")
def _other_process(s: Subject) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        torch.save((s.model, s.x), f"{folder}/model")
        code = "import sys, torch; m, x = torch.load(sys.argv[1], weights_only=False); torch.save(m(x), sys.argv[2])"
        paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
        subprocess.run(
            [sys.executable, "-c", code, f"{folder}/model", f"{folder}/out"],
            check=True, capture_output=True, env={**os.environ, "PYTHONPATH": paths},
        )  # fmt: skip
        return torch.load(f"{folder}/out")


@action("state_dict into a new model")
def _state_dict(s: Subject) -> Tensor:
    file = io.BytesIO()
    torch.save(s.model.state_dict(), file)
    file.seek(0)
    other = build(s.kind, s.spec)
    if s.kind == "BERT":  # whose layers get a method's state at their first call
        other(s.x)
    other.load_state_dict(torch.load(file))
    return other(s.x)


def _compiled(s: Subject, **options: Any) -> Tensor:
    torch._dynamo.reset()
    compiled = torch.compile(s.model, backend="eager", **options)
    if options.get("dynamic"):
        compiled(torch.randn(2, N + 8, E))
    return compiled(s.x)


@action("torch.compile")
def _compile(s: Subject) -> Tensor:
    return _compiled(s)


@action("torch.compile(fullgraph=True)")
def _compile_full(s: Subject) -> Tensor:
    return _compiled(s, fullgraph=True)


@action("torch.compile(dynamic=True)")
def _compile_dynamic(s: Subject) -> Tensor:
    return _compiled(s, dynamic=True)


@action("torch.export")
def _export(s: Subject) -> Tensor:
    return torch.export.export(s.model, (s.x,)).module()(s.x)


@action("torch.jit.trace")
def _trace(s: Subject) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(s.model, (torch.randn_like(s.x),), check_trace=False)(s.x)


def _in_onnx(s: Subject, **options: Any) -> Tensor:
    """Exported with one input, run by ONNX Runtime with another."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        path = f"{folder}/model.onnx"
        torch.onnx.export(s.model, (torch.randn_like(s.x),), path, input_names=["x"], **options)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {"x": s.x.numpy()})[0])


@action("torch.onnx.export(dynamo=True)")
def _onnx(s: Subject) -> Tensor:
    return _in_onnx(s, dynamo=True, verbose=False)


@action("torch.onnx.export(dynamo=False)")
def _onnx_traced(s: Subject) -> Tensor:
    return _in_onnx(s, dynamo=False)


@action("torch.func.vmap")
def _vmap(s: Subject) -> Tensor:
    return torch.func.vmap(lambda x: s.model(x[None])[0])(s.x)


@action("torch.func.functional_call")
def _functional_call(s: Subject) -> Tensor:
    parameters = {name: value.detach().clone() for name, value in s.model.state_dict().items()}
    return torch.func.functional_call(s.model, parameters, (s.x,))


def _score(out: Tensor) -> Tensor:
    """A number that moves with every output; a plain sum, or one of squares, a last LayerNorm would keep constant."""
    return (out * torch.randn(out.shape[1:], generator=torch.Generator().manual_seed(2))).sum()


def _gradient(s: Subject, run: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The gradient of another way, and the plain one."""
    x, y = (s.x.clone().requires_grad_() for _ in range(2))
    found = torch.autograd.grad(_score(run(x)), x)[0]
    return found, torch.autograd.grad(_score(s.model(y)), y)[0]


@action("torch.func.grad")
def _grad(s: Subject) -> Any:
    found = torch.func.grad(lambda x: _score(s.model(x)))(s.x)
    return found, _gradient(s, s.model)[1]


@action("torch.func.jacrev")
def _jacrev(s: Subject) -> Any:
    found = torch.func.jacrev(lambda x: _score(s.model(x)))(s.x)
    return found, _gradient(s, s.model)[1]


@action("torch.func.jvp")
def _jvp(s: Subject) -> Any:
    """Forward mode, along x: the same number as by reverse mode."""
    found = torch.func.jvp(lambda x: _score(s.model(x)), (s.x,), (s.x,))[1]
    return found, (_gradient(s, s.model)[1] * s.x).sum()


@action("checkpoint(use_reentrant=False)")
def _checkpoint(s: Subject) -> Any:
    return _gradient(s, lambda x: checkpoint(s.model, x, use_reentrant=False))


@action("checkpoint(use_reentrant=True)")
def _checkpoint_reentrant(s: Subject) -> Any:
    x = s.x.clone().requires_grad_()
    _score(checkpoint(s.model, x, use_reentrant=True)).backward()
    return x.grad, _gradient(s, s.model)[1]


def _on_meta(s: Subject) -> nn.Module:
    with torch.device("meta"):
        meta = build(s.kind, s.spec)
        if s.kind == "BERT":
            meta(torch.empty(2, N, E))
    return meta


@action("meta, load_state_dict(assign=True)")
def _meta_assign(s: Subject) -> Tensor:
    meta = _on_meta(s)
    meta.load_state_dict(s.model.state_dict(), assign=True, strict=False)
    _move_buffers(meta, s.model)
    return meta(s.x)


@action("meta, to_empty, load_state_dict")
def _meta_empty(s: Subject) -> Tensor:
    meta = _on_meta(s).to_empty(device="cpu")
    meta.load_state_dict(s.model.state_dict(), strict=False)
    _move_buffers(meta, s.model)
    return meta(s.x)


def _move_buffers(meta: nn.Module, real: nn.Module) -> None:
    """What no checkpoint holds, such as BERT's position ids."""
    for name, buffer in real.named_buffers():
        path, _, last = name.rpartition(".")
        meta.get_submodule(path)._buffers[last] = buffer


@action("meta tensors (shapes)")
def _meta(s: Subject) -> Any:
    out = copy.deepcopy(s.model).to("meta")(s.x.to("meta"))
    return torch.tensor(out.shape), torch.tensor(s.plain.shape)


@action("FakeTensorMode (shapes)")
def _fake(s: Subject) -> Any:
    with FakeTensorMode() as mode, torch.no_grad():
        model = build(s.kind, s.spec)
        shape = model(torch.randn(2, N, E)).shape
    del mode
    return torch.tensor(shape), torch.tensor(s.plain.shape)


@action("inference_mode, then training")
def _inference_then_training(s: Subject) -> Any:
    fresh = build(s.kind, s.spec)
    with torch.inference_mode():
        fresh(s.x)
    x = s.x.clone().requires_grad_()
    _score(fresh(x)).backward()
    return x.grad, _gradient(s, s.model)[1]


@action("autocast (bfloat16)")
def _autocast(s: Subject) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        out = s.model(s.x)
    return out.float() if s.spec.partition(":")[0] not in ("topk_blocks", "lsh") else (out.isfinite().all(), True)


@action("parametrize, prune")
def _parametrized(s: Subject) -> Tensor:
    model = copy.deepcopy(s.model)
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            prune.identity(module, "weight")
        elif isinstance(module, nn.MultiheadAttention):
            parametrize.register_parametrization(module, "in_proj_weight", nn.Identity())
    return model(s.x)


@action("hooks, wrapped forward")
def _hooks(s: Subject) -> Tensor:
    model = copy.deepcopy(s.model)
    for module in list(model.modules()):
        module.register_forward_hook(lambda module, inputs, out: out)
        module.register_full_backward_hook(lambda module, inputs, out: None)
        module.forward = (lambda forward: lambda *a, **k: forward(*a, **k))(module.forward)  # type: ignore[method-assign]
    return model(s.x)


def _in_a_group(s: Subject, wrap: Callable[[nn.Module], nn.Module]) -> Any:
    """The gradients of a model wrapped for several processes, in a group of one."""
    from torch import distributed

    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
        try:
            x, model = s.x.clone().requires_grad_(), wrap(copy.deepcopy(s.model))
            _score(model(x)).backward()
        finally:
            distributed.destroy_process_group()
    return x.grad, _gradient(s, s.model)[1]


@action("DistributedDataParallel")
def _ddp(s: Subject) -> Any:
    return _in_a_group(s, lambda model: nn.parallel.DistributedDataParallel(model, find_unused_parameters=True))


@action("fully_shard (FSDP2)")
def _fsdp(s: Subject) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def wrap(model: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", (1,))
        for module in list(model.modules()):
            if isinstance(module, nn.MultiheadAttention):
                fully_shard(module, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    return _in_a_group(s, wrap)


@action("accelerate.disk_offload")
def _dispatched(s: Subject) -> Tensor:
    import accelerate

    model = copy.deepcopy(s.model)
    with tempfile.TemporaryDirectory() as folder:
        accelerate.disk_offload(model, folder, execution_device="cpu", offload_buffers=False)
        return model(s.x)


@action("PEFT (LoRA)")
def _lora(s: Subject) -> Any:
    """New adapters add nothing, adapters with weights do, and merged they stay."""
    import peft

    model = copy.deepcopy(s.model)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=linear)).eval()
    fresh = adapted(s.x)
    torch.testing.assert_close(fresh, s.plain)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    out = adapted(s.x)
    assert not torch.allclose(out, s.plain, atol=1e-3), "the adapters are not reached"
    return adapted.merge_and_unload()(s.x), out


@action("dynamic quantisation")
def _quantised(s: Subject) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(copy.deepcopy(s.model), {nn.Linear}, dtype=torch.qint8)
    out = model(s.x)
    return (out - s.plain).norm() < 0.2 * s.plain.norm() if "b" not in s.spec[:2] else out.isfinite().all(), True


LOOSE = {"autocast (bfloat16)": 5e-2}


def outcome(kind: str, spec: str, name: str) -> str:
    """ "yes", "refused: ..." with one of our errors; raises what anything else raises."""
    s = subject(kind, spec)
    try:
        found = ACTIONS[name](s)
    except EfficientAttnError as error:
        return f"refused: {error}"
    except Exception as error:  # torch.compile and export put ours into their own
        ours = _ours(error)
        if ours is None:
            raise
        return f"refused: {ours}"
    found, wanted = found if isinstance(found, tuple) else (found, s.plain)
    found, wanted = torch.as_tensor(found).double(), torch.as_tensor(wanted).double()
    tolerance = LOOSE.get(name, 1e-4)
    torch.testing.assert_close(found, wanted, atol=tolerance * max(float(wanted.abs().max()), 1e-6), rtol=tolerance)
    return "yes"


def _ours(error: BaseException | None) -> BaseException | None:
    while error is not None and not isinstance(error, EfficientAttnError):
        # As a traceback or dynamo writes it; PyTorch has errors of the same names, which these do not match.
        if any(f"{x.__name__}{end}" in str(error) for x in EfficientAttnError.__subclasses__() for end in (": ", "('")):
            return error
        error = error.__cause__ or error.__context__
    return error


def main(*kinds: str) -> None:
    """Write the table of docs/works-with.md."""
    warnings.simplefilter("ignore")
    print(
        "# What works with what\n\nMade by `make works-with`; each cell is a test (tests/integrations/test_matrix.py)."
    )
    print("A dash is one of this package's errors, which says what to do instead.\n")
    for kind in kinds or MODELS:
        names = [parse(spec).name if "+" not in spec else "a hybrid" for spec in METHODS]
        print(f"## {kind}\n\n| | {' | '.join(names)} |\n|{' --- |' * (len(names) + 1)}")
        for name in ACTIONS:
            cells = []
            for spec in METHODS:
                try:
                    cells.append("yes" if outcome(kind, spec, name) == "yes" else "-")
                except Exception as error:
                    print(f"{kind} {spec} {name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
                    cells.append("no")
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
        print()
