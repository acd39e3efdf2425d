"""Reference models on one shared Transformer, each with any attention: `model.set_attention("bigbird:block=64")`."""

from .base import Model
from .cache import Cache
from .transformer import Transformer, TransformerConfig

__all__ = ["Cache", "Model", "Transformer", "TransformerConfig"]
