"""Models that a text names, with a sample of any length: for the command line, whose workers make them anew.

encoder, decoder, bert      small built-in models, with random weights (bert: transformers')
folder                      a transformers checkpoint: its config.json, and its weights where there are some
file.py:function            your own; also package.module:function
                            function(length) returns (model, sample) for a sequence of that length
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, UnsupportedError
from ..integrations import convert
from ..multihead import MultiheadAttention

VOCABULARY = 1000
WIDTH, HEADS, LAYERS = 256, 4, 2

Source = Callable[[Mapping[str, Any]], tuple[nn.Module, Any]]


def load(config: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """The model of ``config["model"]``, with ``config["attention"]`` put into it, and a sample of batch x seqlen.

    Raises:
        InputError: no such model, or a function that returns something else. UnsupportedError: transformers is missing.
    """
    torch.manual_seed(config["seed"])
    source = config["model"]
    model, sample = find(source)(config)
    model = model.to(getattr(torch, config["dtype"])).eval()
    if config["dtype"] != "float32":
        sample = _cast(sample, getattr(torch, config["dtype"]))
    if config.get("attention") is not None:
        convert(model, config["attention"], sample=sample if _is_transformers(model) else None)
    return model, sample


def find(source: str) -> Source:
    """What makes the model that a text names; raises InputError, with the ways to name one, if there is none."""
    if source in BUILT_IN:
        return BUILT_IN[source]
    if (Path(source) / "config.json").is_file():
        return lambda config: _checkpoint(source, config)
    place, colon, function = source.rpartition(":")
    if colon and function.isidentifier():
        return _from_function(_module(place, source), function, source)
    raise InputError(
        f"there is no model {source!r}; give one of {', '.join(BUILT_IN)}, a folder with transformers' config.json, or "
        "file.py:function, where function(length) returns (model, sample)"
    )


def _module(place: str, source: str) -> Any:
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location("efficient_attn_profiled", place)
        if spec is None or spec.loader is None or not Path(place).is_file():
            raise InputError(f"the model {source!r} names the file {place}, which does not exist")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise InputError(f"the model {source!r} names the module {place}, which cannot be imported: {error}") from error


def _from_function(module: Any, function: str, source: str) -> Source:
    make = getattr(module, function, None)
    if not callable(make):
        raise InputError(f"the model {source!r} names {function}, which is no function there")

    def source_of(config: Mapping[str, Any]) -> tuple[nn.Module, Any]:
        made = make(config["seqlen"])
        if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
            raise InputError(f"{source} returned {type(made).__name__}; it must return (model, sample)")
        return made

    return source_of


def _checkpoint(folder: str, config: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    transformers = _transformers()
    settings = transformers.AutoConfig.from_pretrained(folder)
    length = config["seqlen"]
    limit = getattr(settings, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise UnsupportedError(f"{folder} has positions for {limit} tokens, not {length}")
    weights = any(Path(folder).glob("*.safetensors"))
    model = transformers.AutoModel.from_pretrained(folder) if weights else transformers.AutoModel.from_config(settings)
    return model, {"input_ids": torch.randint(settings.vocab_size, (config["batch"], length))}


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise UnsupportedError("transformers is not installed; pip install 'efficient-attn[models]'") from error


def _is_transformers(model: nn.Module) -> bool:
    return any(hasattr(module, "set_attn_implementation") for module in model.modules())


def _cast(sample: Any, dtype: torch.dtype) -> Any:
    if isinstance(sample, Tensor):
        return sample.to(dtype) if sample.is_floating_point() else sample
    if isinstance(sample, Mapping):
        return {name: _cast(part, dtype) for name, part in sample.items()}
    return type(sample)(_cast(part, dtype) for part in sample) if isinstance(sample, (tuple, list)) else sample


# --- built in --------------------------------------------------------------------------------------------------------


class _Text(nn.Module):
    """Token embeddings, pre-norm layers on this package's attention, and a head over the vocabulary."""

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        layer.self_attn = MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, N) -> (B, N, VOCABULARY)
        x = self.embed(tokens)
        for layer in self.layers.layers:
            y = layer.norm1(x)
            x = x + self._attend(layer.self_attn, y)
            x = x + layer.linear2(layer.activation(layer.linear1(layer.norm2(x))))
        assert self.layers.norm is not None
        out: Tensor = self.head(self.layers.norm(x))
        return out

    def _attend(self, attention: Any, x: Tensor) -> Tensor:
        # The promise of causality needs a mask beside it, which is not looked at.
        mask = x.new_empty((1, 1), dtype=torch.bool).expand(x.shape[1], x.shape[1]) if self.causal else None
        out: Tensor = attention(x, x, x, need_weights=False, attn_mask=mask, is_causal=self.causal)[0]
        return out


def _text(causal: bool) -> Source:
    def make(config: Mapping[str, Any]) -> tuple[nn.Module, Any]:
        return _Text(causal=causal), torch.randint(VOCABULARY, (config["batch"], config["seqlen"]))

    return make


def _bert(config: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    transformers = _transformers()
    settings = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=max(512, config["seqlen"]),
    )
    return transformers.BertModel(settings), {
        "input_ids": torch.randint(VOCABULARY, (config["batch"], config["seqlen"]))
    }


BUILT_IN: dict[str, Source] = {"encoder": _text(False), "decoder": _text(True), "bert": _bert}
