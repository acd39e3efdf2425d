"""This package inside other libraries: `convert` for any model, huggingface.py for transformers. Imports none of them."""

from .convert import Conversion, convert

__all__ = ["Conversion", "convert"]
