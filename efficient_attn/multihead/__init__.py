"""`torch.nn.MultiheadAttention` with a choice of attention, and the tool that puts it into a model.

module.py: the module; projections.py: to heads and back; masks.py: what its masks become; nested.py: nested tensors;
foreign.py: what PyTorch's own module must serve; replacement.py: `replace_attention`.
"""

from .module import MultiheadAttention, check_replaceable, keep_own_forward
from .replacement import replace_attention

__all__ = ["MultiheadAttention", "check_replaceable", "keep_own_forward", "replace_attention"]
