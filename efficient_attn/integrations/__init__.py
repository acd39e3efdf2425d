"""This package inside other libraries, which are not imported here.

convert.py, fidelity.py     any model: every attention layer, in place, measured and reversible
budget/                     for convert: each layer its attention, the fastest within a measured error
torch_sdpa.py               calls of PyTorch's scaled_dot_product_attention; torch_dispatcher.py: in the whole process
routed.py                   layers of timm, open_clip and diffusers, which make such a call
eager_layers.py             layers that write their attention out, of transformers and users: score_mode.py, scores.py;
                            own_patterns.py: those with a pattern of their own
huggingface.py              transformers' attention and mask interfaces; huggingface_masks.py: the masks
diffusers.py                attention processors
"""

from typing import TYPE_CHECKING, Any

from .conversion import Conversion
from .convert import convert
from .eager_layers import register_layer
from .torch_sdpa import use_for_sdpa

if TYPE_CHECKING:
    from .budget import Budget, Plan

__all__ = ["Budget", "Conversion", "Plan", "convert", "register_layer", "use_for_sdpa"]


def __getattr__(name: str) -> Any:
    """`Budget` and `Plan`, which only those who search load."""
    if name not in ("Budget", "Plan"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import budget

    return getattr(budget, name)
