"""This package inside other libraries, none of which is imported here: `convert` any model; huggingface.py."""

from .convert import Conversion, convert
from .torch_sdpa import use_for_sdpa

__all__ = ["Conversion", "convert", "use_for_sdpa"]
