"""Operations and bytes of what a call does, counted operator by operator while it runs.

Operations are those of `torch.utils.flop_counter`, ours by visited blocks (see `ops.flops`). Bytes are what an operator
with a formula there must at least read and write: its tensors once, and of keys and values only the rows in a block
that some query of the head's group visits. What lies between these operators (elementwise work, copies) counts for
neither.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..masks import BlockMask, MaskArrays, algebra
from ..masks.lists import Grid, entry_rows
from ..ops.attention import MASK_OPERANDS, mask_arrays

OURS = "efficient_attn::"
_ATTENTION = {  # where query, key and value begin, and where the operands of the mask
    torch.ops.efficient_attn.attention_forward: (0, 4),
    torch.ops.efficient_attn.attention_with_weights: (0, 4),
    torch.ops.efficient_attn.attention_backward: (3, 9),
}


def _cpu_sdpa(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    B, H, Nq, D = query.shape
    return 2 * B * H * Nq * key.shape[2] * (D + value.shape[3])


def _cpu_sdpa_backward(_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    B, H, Nq, D = query.shape
    return 2 * B * H * Nq * key.shape[2] * (3 * D + 2 * value.shape[3])  # as in ops.flops


# PyTorch has formulas for SDPA on GPUs, and none for the one that its CPUs run.
FORMULAS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_sdpa,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_sdpa_backward,
}
_BATCHED = ("aten::bmm", "aten::baddbmm")  # linear layers come as mm and addmm


@dataclass
class Count:
    """What was counted: operations and bytes in all, and those of attention: our operators, PyTorch's SDPA, and batched
    products, of which eager attention is made."""

    flops: int = 0
    bytes: int = 0
    attention_flops: int = 0
    attention_bytes: int = 0
    by_operator: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("flops", "bytes", "attention_flops", "attention_bytes")}


class _Counter(TorchDispatchMode):
    def __init__(self, count: Count) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = count

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        packet, kwargs = func._overloadpacket, dict(kwargs or {})
        if packet not in FORMULAS:
            with self:  # as PyTorch's counter: what is made of other operators is counted by these
                made = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if made is NotImplemented else made
        out = func(*args, **kwargs)
        flops = FORMULAS[packet](*args, **kwargs, out_val=out)
        name = func.name().rpartition(".")[0] or func.name()
        moved = _moved(packet, args, kwargs, out)
        self.count.flops += flops
        self.count.bytes += moved
        self.count.by_operator[name] += flops
        if name.startswith(OURS) or "scaled_dot_product" in name or name in _BATCHED:
            self.count.attention_flops += flops
            self.count.attention_bytes += moved
        return out


def count(call: Callable[[], object]) -> Count:
    """Run a call once and count it."""
    found = Count()
    with _Counter(found):
        call()
    return found


def _moved(packet: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
    total = sum(_nbytes(t) for t in {id(t): t for t in tensors}.values())
    if packet not in _ATTENTION:
        return total
    first, mask = _ATTENTION[packet]
    query, key, value = args[first : first + 3]
    arrays = mask_arrays(*args[mask : mask + MASK_OPERANDS])
    rows = visited_keys(arrays, query.shape[0], query.shape[1], key.shape[1], query.shape[2], key.shape[2])
    hidden = key.shape[0] * key.shape[1] * key.shape[2] - rows  # rows of keys and values that nobody reads
    apart = {id(t): t for t in (key, value) if t is not query}
    return total - int(sum(hidden * t.shape[3] * t.element_size() for t in apart.values()))


def _nbytes(tensor: Tensor) -> int:
    """Bytes of the distinct elements: an expanded dimension is stored once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or not size else 1
    return int(elements * tensor.element_size())


def visited_keys(arrays: MaskArrays, batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int) -> int:
    """How many rows (batch, kv_head, key) lie in a block that a query of the group visits."""
    grid = Grid(q_len, kv_len, arrays.block_q, arrays.block_k)
    if 0 in (batch, heads, kv_heads, q_len, kv_len):
        return 0
    mask = BlockMask.from_arrays(arrays, q_len=q_len, kv_len=kv_len)
    _, lists, window, lengths = mask.parts
    width = torch.arange(grid.n_k, device=lengths.device) * grid.block_k
    width = (kv_len - width).clamp(max=grid.block_k)
    group = heads // kv_heads
    total = 0
    for b in range(max(lengths.numel(), arrays.batch)):
        end = lengths[b : b + 1] if lengths.numel() > 1 else lengths
        if lists is None:
            first, counts = (x[0] for x in algebra.reach(grid, window, end))
            steps = torch.zeros(grid.n_k + 1, dtype=torch.int64, device=end.device)
            steps.index_add_(0, first[counts > 0], torch.ones_like(first[counts > 0]))
            steps.index_add_(0, (first + counts)[counts > 0], -torch.ones_like(first[counts > 0]))
            table = steps.cumsum(0)[None, :-1] > 0
        else:
            rows, cols = entry_rows(lists), lists.indices.long()
            touched, _, _ = algebra.how_cut(grid, window, end, rows, cols)
            if lists.batch > 1:
                touched &= rows // (lists.heads * grid.n_q) == b
            table = torch.zeros(lists.heads, grid.n_k, dtype=torch.bool, device=end.device)
            table[rows[touched] // grid.n_q % lists.heads, cols[touched]] = True
        if table.shape[0] > 1:
            table = table.view(kv_heads, group, -1).any(1)
        total += int((table * width).sum()) * (kv_heads // table.shape[0])
    return total * (batch // max(lengths.numel(), arrays.batch))
