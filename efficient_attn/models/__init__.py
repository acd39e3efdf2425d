"""Reference models on one shared Transformer, each with any attention: `model.set_attention("bigbird:block=64")`."""

from . import vision_checkpoints as vision_checkpoints
from .augment import Augmentation
from .base import Model
from .cache import Cache
from .clip import CLIP, CLIPConfig, TextTowerConfig
from .self_supervised import MAE, MAEConfig, SimCLR, SimCLRConfig
from .time_series import ForecasterConfig, PatchForecaster, TimeSeriesConfig, TimeSeriesTransformer
from .transformer import Transformer, TransformerConfig
from .vision import ImageConfig, ViT, ViTConfig

__all__ = [
    "CLIP",
    "MAE",
    "Augmentation",
    "CLIPConfig",
    "Cache",
    "ForecasterConfig",
    "ImageConfig",
    "MAEConfig",
    "Model",
    "PatchForecaster",
    "SimCLR",
    "SimCLRConfig",
    "TextTowerConfig",
    "TimeSeriesConfig",
    "TimeSeriesTransformer",
    "Transformer",
    "TransformerConfig",
    "ViT",
    "ViTConfig",
]
