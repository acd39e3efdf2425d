"""Reference models on one shared Transformer, each with any attention: `model.set_attention("bigbird:block=64")`."""

from . import huggingface_text, huggingface_vision
from .augment import Augmentation
from .base import Model
from .cache import Cache
from .causal_lm import CausalLM, CausalLMConfig
from .clip import CLIP, CLIPConfig, TextTowerConfig
from .self_supervised import MAE, MAEConfig, SimCLR, SimCLRConfig
from .seq2seq import Seq2Seq, Seq2SeqConfig
from .text_classifier import TextClassifier, TextClassifierConfig
from .time_series import ForecasterConfig, PatchForecaster, TimeSeriesConfig, TimeSeriesTransformer
from .transformer import Transformer, TransformerConfig
from .vision import ImageConfig, ViT, ViTConfig

__all__ = [
    "CLIP",
    "MAE",
    "Augmentation",
    "CLIPConfig",
    "Cache",
    "CausalLM",
    "CausalLMConfig",
    "ForecasterConfig",
    "ImageConfig",
    "MAEConfig",
    "Model",
    "PatchForecaster",
    "Seq2Seq",
    "Seq2SeqConfig",
    "SimCLR",
    "SimCLRConfig",
    "TextClassifier",
    "TextClassifierConfig",
    "TextTowerConfig",
    "TimeSeriesConfig",
    "TimeSeriesTransformer",
    "Transformer",
    "TransformerConfig",
    "ViT",
    "ViTConfig",
    "huggingface_text",
    "huggingface_vision",
]
