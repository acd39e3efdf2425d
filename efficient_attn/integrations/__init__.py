"""This package inside other libraries, none of which is imported here: `convert` any model; huggingface.py."""

from .convert import Conversion, convert

__all__ = ["Conversion", "convert"]
