"""The calls that users make, each beside every other way to make it: what suite `calls` times.

A builder takes a cell and returns calls of no arguments by name, of which "ours" is one; all compute the same.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from efficient_attn import MultiheadAttention, SlidingWindow, attention, replace_attention
from efficient_attn.integrations import huggingface
from efficient_attn.measuring import inputs
from efficient_attn.measuring.calls import Call, binder

from . import engines, peers

Config = Mapping[str, Any]
ENGINES = {False: ("onnxruntime_mha", "openvino"), True: ("openvino_causal",)}


def operator(config: Config) -> dict[str, Call]:
    """attention() beside SDPA and, forward, the engines that are installed, in processes apart."""
    causal, dtype = config["causal"], getattr(torch, config["dtype"])
    shape = peers.Shape(
        config["seqlen"], batch=config["batch"], heads=config["heads"], head_dim=config["head_dim"], dtype=dtype
    )
    bound = binder(config["mode"], shape.qkv())
    calls = {
        "ours": bound(lambda q, k, v: attention(q, k, v, is_causal=causal)),
        "sdpa": bound(lambda q, k, v: peers.sdpa(q, k, v, is_causal=causal)),
    }
    for name in ENGINES[causal] if config["mode"] == "fwd" and config["engines"] else ():
        peer = peers.get(name)
        if peer.absent() is None and not (name.startswith("onnx") and dtype != torch.float32):
            calls[name] = engines.Engine(name, shape)
    return calls


def decode(config: Config) -> dict[str, Call]:
    """The last queries on a cache; with a window, SDPA on the slice of the cache that the window shows."""
    q_len, kv_len, window = config["q_len"], config["seqlen"], config["window"]
    query, key, value = inputs.photograph_qkv(
        kv_len, batch=config["batch"], heads=config["heads"], kv_heads=config["kv_heads"],
        head_dim=config["head_dim"], dtype=getattr(torch, config["dtype"]),
    )  # fmt: skip
    query = query[:, :, -q_len:].contiguous()
    bound = binder("decode", (query, key, value))
    if window:
        shown = SlidingWindow(left=window, right=0, alignment="bottom_right")
        return {
            "ours": bound(lambda q, k, v: attention(q, k, v, mask=shown)),
            "sdpa": bound(lambda q, k, v: peers.sdpa(q, k[:, :, -window - 1 :], v[:, :, -window - 1 :])),
        }
    return {"ours": bound(attention), "sdpa": bound(peers.sdpa)}


def module(config: Config) -> dict[str, Call]:
    """MultiheadAttention beside torch.nn's with the same weights; `weights`: with need_weights=True, the default."""
    x = _tokens(config)
    theirs = peers.torch_module(x.shape[2], config["heads"], dtype=x.dtype)
    ours = MultiheadAttention(x.shape[2], config["heads"], batch_first=True, dtype=x.dtype)
    ours.load_state_dict(theirs.state_dict())
    options = {} if config["weights"] else {"need_weights": False}
    return {name: _pass(m, config["mode"], x, x, x, **options) for name, m in (("ours", ours), ("torch", theirs))}


def encoder(config: Config) -> dict[str, Call]:
    """Two layers of torch.nn.TransformerEncoder as they are, and with our attention in them."""
    x = _tokens(config)
    layer = nn.TransformerEncoderLayer(
        x.shape[2], config["heads"], 4 * x.shape[2], dropout=0.0, batch_first=True, dtype=x.dtype
    )
    theirs = nn.TransformerEncoder(layer, 2)
    ours = copy.deepcopy(theirs)
    replace_attention(ours, "dense")
    options = {}
    if config["padded"]:  # a quarter of the tokens of every second sequence
        lengths = torch.full((x.shape[0],), x.shape[1])
        lengths[::2] -= x.shape[1] // 4
        options["src_key_padding_mask"] = torch.arange(x.shape[1]) >= lengths[:, None]
    return {name: _pass(m, config["mode"], x, **options) for name, m in (("ours", ours), ("torch", theirs))}


def transformers_model(config: Config) -> dict[str, Call]:
    """A model of transformers with every attention that it can run with, and compiled; each has a config of its own."""
    library: Any = importlib.import_module("transformers")
    huggingface.register()
    family, dtype = config["model"], getattr(torch, config["dtype"])
    make, arguments = FAMILIES[family](library, config)
    torch.manual_seed(config["seed"])
    first = make("eager").to(dtype)
    calls = {}
    for name, implementation in (
        ("ours", "efficient_attn"),
        ("eager", "eager"),
        ("sdpa", "sdpa"),
        ("compiled", "sdpa"),
    ):
        model = make(implementation).to(dtype)
        model.load_state_dict(first.state_dict())
        if name == "compiled":
            if not config["compiled"]:
                continue
            model.forward = torch.compile(model.forward)
        calls[name] = _pass(model, config["mode"], **arguments)
    return calls


# --- parts ---


def _tokens(config: Config) -> Tensor:
    """(B, N, H * D)."""
    shape = peers.Shape(
        config["seqlen"], batch=config["batch"], heads=config["heads"], head_dim=config["head_dim"],
        dtype=getattr(torch, config["dtype"]),
    )  # fmt: skip
    return shape.tokens()


def _pass(model: nn.Module, mode: str, *args: Any, **kwargs: Any) -> Call:
    """One forward in evaluation, or one training step without the optimizer."""
    if mode in ("fwd", "decode"):
        model.eval()
        return torch.no_grad()(lambda: model(*args, **kwargs))
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> object:
        out = model(*args, **kwargs)
        out = out[0] if isinstance(out, tuple) or hasattr(out, "to_tuple") else out
        return torch.autograd.grad(out.float().square().mean(), parameters, allow_unused=True)

    return step


Make = Callable[[str], nn.Module]


def _bert(library: Any, config: Config) -> tuple[Make, dict[str, Any]]:
    def make(implementation: str) -> nn.Module:
        found: nn.Module = library.BertModel(
            library.BertConfig(
                **_sizes(config), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                max_position_embeddings=config["seqlen"], attn_implementation=implementation,
            )
        )  # fmt: skip
        return found

    lengths = torch.full((config["batch"],), config["seqlen"])
    lengths[::2] -= config["seqlen"] // 4
    return make, {**_ids(config), "attention_mask": (torch.arange(config["seqlen"]) < lengths[:, None]).long()}


def _vit(library: Any, config: Config) -> tuple[Make, dict[str, Any]]:
    side = round(config["seqlen"] ** 0.5) * 16  # patches of 16, and the class token

    def make(implementation: str) -> nn.Module:
        sizes = {name: size for name, size in _sizes(config).items() if name != "vocab_size"}
        found: nn.Module = library.ViTModel(
            library.ViTConfig(**sizes, image_size=side, attn_implementation=implementation)
        )
        return found

    return make, {"pixel_values": torch.randn(config["batch"], 3, side, side, dtype=getattr(torch, config["dtype"]))}


def _gpt2(library: Any, config: Config) -> tuple[Make, dict[str, Any]]:
    def make(implementation: str) -> nn.Module:
        sizes = _sizes(config)
        found: nn.Module = library.GPT2Model(
            library.GPT2Config(
                n_embd=sizes["hidden_size"], n_layer=sizes["num_hidden_layers"], n_head=sizes["num_attention_heads"],
                n_positions=config["seqlen"] + 1, vocab_size=sizes["vocab_size"], bos_token_id=0,
                eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation=implementation,
            )
        )  # fmt: skip
        return found

    return make, {**_ids(config), "use_cache": False}


def _llama(library: Any, config: Config) -> tuple[Make, dict[str, Any]]:
    def make(implementation: str) -> nn.Module:
        found: nn.Module = library.LlamaModel(
            library.LlamaConfig(
                **_sizes(config), num_key_value_heads=max(1, config["heads"] // 4),
                max_position_embeddings=config["seqlen"] + 1, attn_implementation=implementation,
            )
        )  # fmt: skip
        return found

    if config["mode"] != "decode":
        return make, {**_ids(config), "use_cache": False}
    heads = max(1, config["heads"] // 4)
    shape = (config["batch"], heads, config["seqlen"], config["head_dim"])
    dtype = getattr(torch, config["dtype"])
    layers = [(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)) for _ in range(config["layers"])]
    cache = library.DynamicCache()
    for number, (key, value) in enumerate(layers):
        cache.update(key, value, number)
    return make, {"input_ids": torch.ones(config["batch"], 1, dtype=torch.long), "past_key_values": _rewinding(cache)}


def _rewinding(cache: Any) -> Any:
    """The cache, which every call finds as long as the first did."""
    update = cache.update

    def update_and_rewind(key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        result = update(key, value, layer, *args, **kwargs)
        cache.layers[layer].crop(-key.shape[2])
        return result

    cache.update = update_and_rewind
    return cache


def _sizes(config: Config) -> dict[str, int]:
    width = config["heads"] * config["head_dim"]
    return {
        "hidden_size": width, "num_hidden_layers": config["layers"], "num_attention_heads": config["heads"],
        "intermediate_size": 4 * width, "vocab_size": 1000,
    }  # fmt: skip


def _ids(config: Config) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(config["seed"])
    return {"input_ids": torch.randint(0, 1000, (config["batch"], config["seqlen"]), generator=generator)}


FAMILIES: Mapping[str, Callable[[Any, Config], tuple[Make, dict[str, Any]]]] = {
    "bert": _bert, "vit": _vit, "gpt2": _gpt2, "llama": _llama,
}  # fmt: skip
BUILDERS: Mapping[str, Callable[[Config], dict[str, Call]]] = {
    "operator": operator, "decode": decode, "module": module, "encoder": encoder, "transformers": transformers_model,
}  # fmt: skip
