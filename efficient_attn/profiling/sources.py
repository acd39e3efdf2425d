"""Models that a text names, with a sample of any length: for the command line, whose workers make them anew.

encoder, decoder, bert      small built-in models with random weights: a TextClassifier, a CausalLM, transformers' BERT
folder                      a checkpoint of transformers: its config.json, and its weights where there are some; or a
                            model of this package that reads tokens, as save_pretrained and `train` write it
file.py:function            your own; also package.module:function
                            function(length) returns (model, sample) for a sequence of that length
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..errors import EfficientAttnError, InputError, UnsupportedError
from ..integrations import convert
from ..models import checkpoints

VOCABULARY = 1000
WIDTH, HEADS, LAYERS = 256, 4, 2

OF_TOKENS = ("TextClassifier", "CausalLM")

Source = Callable[[Mapping[str, Any]], tuple[nn.Module, Any]]


def load(config: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """The model of `config["model"]`, with `config["attention"]` put into it, and a sample of batch x seqlen.

    Raises:
        InputError: no such model, or a function that returns something else. UnsupportedError: transformers is missing.
        CheckpointError: a folder whose config.json or weights cannot be read.
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
    if (Path(source) / checkpoints.CONFIG).is_file():
        text = checkpoints.read_config(Path(source))
        if "efficient_attn" not in text:
            return lambda config: _checkpoint(source, config)
        if text.get("model") in OF_TOKENS:
            return lambda config: _own(source, config)
        raise InputError(
            f"{source} holds a {text.get('model')!r}, whose input has no free length; give one of "
            f"{', '.join(OF_TOKENS)}, or file.py:function, where function(length) returns (model, sample)"
        )
    place, colon, function = source.rpartition(":")
    if colon and function.isidentifier():
        return _from_function(_module(place, source), function, source)
    raise InputError(
        f"there is no model {source!r}; give one of {', '.join(BUILT_IN)}, a folder with transformers' config.json, or "
        "file.py:function, where function(length) returns (model, sample)"
    )


@contextlib.contextmanager
def named_failure(source: str) -> Iterator[None]:
    """Whatever a user's file raises as InputError, with its place; what this package raises, and a lack of memory,
    stays what it is."""
    try:
        yield
    except (EfficientAttnError, MemoryError):
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"the model {source!r} fails with {type(error).__name__}: {error} (line {last.lineno} of {last.filename})"
        ) from error


def _module(place: str, source: str) -> Any:
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location("efficient_attn_profiled", place)
        if spec is None or spec.loader is None or not Path(place).is_file():
            raise InputError(f"the model {source!r} names the file {place}, which does not exist")
        module = importlib.util.module_from_spec(spec)
        with named_failure(source):
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


def _own(folder: str, config: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """A model of `save_pretrained`, on random tokens."""
    model: Any = models.Model.from_pretrained(folder)
    settings, length = model.config, config["seqlen"]
    if model.embeddings.positions is not None and length > settings.max_len:
        raise UnsupportedError(f"{folder} has positions for {settings.max_len} tokens, not {length}")
    return model, torch.randint(settings.vocab_size, (config["batch"], length))


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


# --- built in ---


def _layers(**options: Any) -> models.TransformerConfig:
    return models.TransformerConfig(hidden_dim=WIDTH, num_layers=LAYERS, num_heads=HEADS, **options)


def _tokens(config: Mapping[str, Any]) -> Tensor:
    return torch.randint(VOCABULARY, (config["batch"], config["seqlen"]))


def _encoder(config: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    settings = models.TextClassifierConfig(VOCABULARY, config["seqlen"], _layers(), num_labels=2)
    return models.TextClassifier(settings), _tokens(config)


def _decoder(config: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    settings = models.CausalLMConfig(VOCABULARY, config["seqlen"], _layers(causal=True))
    return models.CausalLM(settings), _tokens(config)


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
    return transformers.BertModel(settings), {"input_ids": _tokens(config)}


BUILT_IN: dict[str, Source] = {"encoder": _encoder, "decoder": _decoder, "bert": _bert}
