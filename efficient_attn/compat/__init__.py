"""Other libraries' interfaces on this package's attention: code that is written for them runs on any backend of ours.

flash_attn.py      flash-attn's functions, (B, N, H, D), dense, packed, and with a cache
xformers.py        xformers' memory_efficient_attention and its masks
flex_attention.py  PyTorch's flex_attention, for block masks
natten.py          NATTEN's na1d, na2d and na3d, in neighbourhoods of a grid
scores.py          what is done to scores besides a mask: ALiBi and soft caps
packed.py          sequences one behind the other, as one mask
"""
