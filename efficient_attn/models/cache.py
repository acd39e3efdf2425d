"""The keys and values of tokens that a decoder has seen, for generation token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UnsupportedError

FIRST_CAPACITY = 64


class LayerCache:
    """One layer's keys and values (B, Hkv, capacity, D), of which `length` are in use; and those of the memory."""

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self.length = 0
        self.store: tuple[Tensor, Tensor] | None = None
        self.memory: tuple[Tensor, Tensor] | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, Hkv, N, D); returns all of them, as views. The space doubles when it is full.

        Raises:
            UnsupportedError: keys that take part in autograd, which the space shared by later steps would break.
        """
        if key.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError("a cache is for generation; call the model under torch.no_grad(), or without cache=")
        end = self.length + key.shape[2]
        if self.store is None or end > self.store[0].shape[2]:
            self._grow(end, key, value)
        assert self.store is not None
        for kept, new in zip(self.store, (key, value), strict=True):
            kept[:, :, self.length : end] = new
        self.length = end
        return self.store[0][:, :, :end], self.store[1][:, :, :end]

    def _grow(self, end: int, key: Tensor, value: Tensor) -> None:
        capacity = self.capacity if self.store is None else 2 * self.store[0].shape[2]
        capacity = max(capacity, end, FIRST_CAPACITY)
        old, self.store = self.store, (self._space(key, capacity), self._space(value, capacity))
        if old is not None:
            for kept, before in zip(self.store, old, strict=True):
                kept[:, :, : self.length] = before[:, :, : self.length]

    @staticmethod
    def _space(like: Tensor, capacity: int) -> Tensor:
        return like.new_zeros(*like.shape[:2], capacity, like.shape[3])

    def select(self, rows: Tensor, *, memory: bool = True) -> None:
        """Make row b of the batch what row `rows[b]` was; without `memory`, in the tokens alone."""
        if self.store is not None:
            self.store = (self.store[0].index_select(0, rows), self.store[1].index_select(0, rows))
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
