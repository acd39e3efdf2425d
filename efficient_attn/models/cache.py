"""The keys and values of tokens that a decoder has seen, for generation token by token."""

from __future__ import annotations

from torch import Tensor

from ..cache import KVCache


class LayerCache(KVCache):
    """One layer's keys and values (B, Hkv, capacity, D); and those of the memory, for cross-attention."""

    def __init__(self, capacity: int = 0) -> None:
        super().__init__(capacity)
        self.memory: tuple[Tensor, Tensor] | None = None

    def select(self, rows: Tensor, *, memory: bool = True) -> None:
        """Make row b of the batch what row `rows[b]` was; without `memory`, in the tokens alone."""
        self.reorder(rows)
        if memory and self.memory is not None:
            self.memory = (self.memory[0].index_select(0, rows), self.memory[1].index_select(0, rows))


class Cache:
    """What `Transformer.forward(cache=...)` fills and reads: one `LayerCache` a layer.

    Args:
        num_layers: of the decoder.
        capacity: tokens to make room for at once; 0 starts small and doubles.
    """

    def __init__(self, num_layers: int, *, capacity: int = 0) -> None:
        self.layers = [LayerCache(capacity) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """How many tokens it holds."""
        return self.layers[0].length if self.layers else 0

    def select(self, rows: Tensor, *, memory: bool = True) -> None:
        """Make row b of the batch what row `rows[b]` was, as beam search does when it picks its best beams.

        Args:
            rows: int64 (B'), from 0 to B - 1.
            memory: also in the keys and values of the memory; not needed where rows of one memory change places.
        """
        for layer in self.layers:
            layer.select(rows, memory=memory)
