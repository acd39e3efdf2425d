"""The one mask object, and what stands behind it.

block_mask.py  `BlockMask`, what a user sees
parts.py       `PartedMask`, a union of parts in orders of their own
lists.py       block-compressed lists, and how they are built
algebra.py     & | ~, windows written out, counts
rules.py       what makes a mask valid
flex.py        FlexAttention's BlockMask, from and to
packed.py      sequences one behind the other, of different lengths
picture.py     drawings
"""

from .block_mask import BlockMask, BlockSize, Integers, MaskArrays, trainable
from .parts import Part, PartedMask

__all__ = ["BlockMask", "BlockSize", "Integers", "MaskArrays", "Part", "PartedMask", "trainable"]
