"""Reference models on one shared Transformer, each with any attention: `model.set_attention("bigbird:block=64")`."""

from . import huggingface_text
from .base import Model
from .cache import Cache
from .causal_lm import CausalLM, CausalLMConfig
from .seq2seq import Seq2Seq, Seq2SeqConfig
from .text_classifier import TextClassifier, TextClassifierConfig
from .transformer import Transformer, TransformerConfig

__all__ = [
    "Cache",
    "CausalLM",
    "CausalLMConfig",
    "Model",
    "Seq2Seq",
    "Seq2SeqConfig",
    "TextClassifier",
    "TextClassifierConfig",
    "Transformer",
    "TransformerConfig",
    "huggingface_text",
]
