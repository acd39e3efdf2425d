"""Reference models on one shared Transformer, each with any attention: `model.set_attention("bigbird:block=64")`."""

from . import huggingface_text, huggingface_vision
from .augment import Augmentation
from .base import Model
from .cache import Cache
from .causal_lm import CausalLM, CausalLMConfig
from .clip import CLIP, CLIPConfig, TextTowerConfig
from .forecaster import ForecasterConfig, PatchForecaster
from .labels import LabelConfig
from .outputs import (
    ClassifierOutput,
    CLIPOutput,
    ForecastOutput,
    LMOutput,
    ModelOutput,
    ReconstructionOutput,
)
from .self_supervised import MAE, MAEConfig, SimCLR, SimCLRConfig
from .seq2seq import Seq2Seq, Seq2SeqConfig
from .text_classifier import TextClassifier, TextClassifierConfig
from .time_series import TimeSeriesConfig, TimeSeriesTransformer
from .transformer import Transformer, TransformerConfig
from .vision import ImageConfig, ViT, ViTConfig

__all__ = [
    "CLIP",
    "MAE",
    "Augmentation",
    "CLIPConfig",
    "CLIPOutput",
    "Cache",
    "CausalLM",
    "CausalLMConfig",
    "ClassifierOutput",
    "ForecastOutput",
    "ForecasterConfig",
    "ImageConfig",
    "LMOutput",
    "LabelConfig",
    "MAEConfig",
    "Model",
    "ModelOutput",
    "PatchForecaster",
    "ReconstructionOutput",
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
