"""What is around every Triton kernel: whether it can run, its arguments made of tensors, the sizes of its grid."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...masks import MaskArrays
from ..call import (
    order_steps,
)
from . import autotune
from . import plan as triton_plan

LOG2E = math.log2(math.e)
L2_BYTES = 32 * 2**20  # keys and values that are worked off together
INTERPRETER_PROCESSORS = 8
HALF = (torch.bfloat16, torch.float16)


# --- kernels and devices ---


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter; Triton reads the variable when the kernels are imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def kernels() -> Any:
    """The kernels, imported at first use: importing Triton takes a while and needs no GPU to succeed."""
    import triton
    from triton.tools.tensor_descriptor import TensorDescriptor

    from ...kernels import (
        attention,
        attention_backward,
        attention_statistics,
        attention_weights,
        configs,
        linear_attention,
        plan,
        tiles,
        walk,
    )

    exact = (attention, attention_backward, attention_weights, attention_statistics)
    modules = (tiles, walk, configs, plan, *exact, linear_attention)
    names = {k: v for module in modules for k, v in vars(module).items() if not k.startswith("_")}
    return type("Kernels", (), names | {"triton": triton, "TensorDescriptor": TensorDescriptor})


@lru_cache(maxsize=64)
def capability(device: torch.device) -> int:
    """80 for compute capability 8.0, and so on; 0 in the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETER_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def device_reasons(device: torch.device) -> list[str]:
    """Why the kernels cannot run on tensors of this device."""
    reasons = []
    if not installed():
        reasons.append("Triton is not installed; pip install triton (Linux, NVIDIA GPU)")
    if device.type == "cpu" and not interpreted():
        reasons.append("it runs on CUDA tensors; these are on cpu (TRITON_INTERPRET=1 runs it there, for tests)")
    elif device.type not in ("cpu", "cuda"):
        reasons.append(f"it runs on CUDA tensors; these are on {device}")
    elif device.type == "cuda" and interpreted():
        reasons.append("TRITON_INTERPRET=1 is set, under which Triton runs on CPU tensors only")
    elif device.type == "cuda" and torch.version.hip is None and capability(device) < 80:
        reasons.append(f"it needs compute capability 8.0 or newer; this GPU has {capability(device) / 10}")
    return reasons


class Problem(NamedTuple):
    """What forward and backward derive from their arguments alike."""

    sizes: tuple[int, ...]  # B, Hq, Hkv, Nq, Nk, D, Dv; Nq rows and Nk columns where these have an order
    tokens: tuple[int, int]  # queries and keys of the tensors
    order_steps: tuple[int, ...]  # from a batch element and from a head to the next, in the orders of both
    scale: float  # positive, in log2
    sign: int
    dropout: Any  # tiles.Dropout
    low: int | None
    high: int | None
    precision: str


# --- from tensors to what the kernels read ---


def problem_of(
    query: Tensor, key: Tensor, value: Tensor, mask: MaskArrays, scale: float, dropout_p: float, seed: Tensor | None
) -> Problem:
    B, Hq, _, D = query.shape
    Hkv, Dv = key.shape[1], value.shape[3]
    Nq, *query_steps = order_steps(mask.query_order, "query_order", query)
    Nk, *key_steps = order_steps(mask.key_order, "key_order", key)
    origin = None
    if seed is not None and seed.numel() > 1:
        seed, *origin = seed.reshape(-1).to(query.device).split((1, 3))
    if dropout_p > 0.0 and seed is not None:
        # A seed on the CPU is a number that is known here; one on the GPU is read there, for no call may wait for it.
        seed = seed.reshape(1) if seed.device == query.device else torch.full((1,), int(seed), device=query.device)
    low = None if mask.window_left < 0 else mask.window_offset - mask.window_left
    high = None if mask.window_right < 0 else mask.window_offset + mask.window_right
    return Problem(
        (B, Hq, Hkv, Nq, Nk, D, Dv),
        (query.shape[2], key.shape[2]),
        (*query_steps, *key_steps),
        abs(scale) * LOG2E if scale != 0.0 else 1.0,
        (scale > 0.0) - (scale < 0.0),
        kernels().Dropout(
            seed if dropout_p > 0.0 else None,
            origin[0] if origin else None,
            int(dropout_p * 2.0**32),
            1.0 / (1.0 - dropout_p),
        ),
        None if low is None else min(max(low, -Nq), Nk),  # beyond these bounds nothing changes
        None if high is None else min(max(high, -Nq), Nk),
        "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
    )


def constants_of(
    config: Any, mask: MaskArrays, problem: Problem, pack: int = 1, split: bool = False, safe: bool = False
) -> Any:
    """What an attention kernel is compiled for."""
    k = kernels()
    _B, Hq, Hkv, _Nq, _Nk, D, Dv = problem.sizes
    tile = (config.block_q, config.block_k)
    block = (mask.block_q, mask.block_k) if mask.indptr is not None else tile
    head_dims = (D, Dv, k.padded(D), k.padded(Dv))
    return k.Constants(*head_dims, *tile, *block, Hq // Hkv, problem.sign, problem.precision, pack, split, safe)


def inputs_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    problem: Problem,
    softcap: float,
    sinks: Tensor | None,
    diagonals: Tensor | None,
) -> Any:
    """What every attention kernel reads, but for the mask: each kernel has its own view of it."""
    _B, Hq, _Hkv, Nq, Nk = problem.sizes[:5]
    k, sizes = kernels(), (Hq, Nq, Nk, problem.scale)
    cap = (softcap * LOG2E, 1.0 / (softcap * LOG2E)) if softcap > 0.0 else (None, None)
    sinks = None if sinks is None else sinks.float().contiguous()
    strides: tuple[int, ...] = (0, 0)
    if diagonals is not None:
        diagonals = diagonals if diagonals.stride(2) == 1 else diagonals.contiguous()
        lines = zip(diagonals.shape[:2], diagonals.stride()[:2], strict=True)
        strides = tuple(0 if size == 1 else step for size, step in lines)
    modifiers = k.Modifiers(*cap, sinks, diagonals, *strides)
    rows = map(rows_of, (query, key, value))
    return k.Inputs(*rows, bias_of(bias), None, problem.dropout, k.Sizes(*sizes), modifiers)


def upstream_of(
    grad_out: Tensor, lse: Tensor, delta: Tensor, scale: float, grad_weights: Tensor | None, heads: int
) -> Any:
    """What the passes of the backward read besides the inputs."""
    strides: tuple[int, ...] = (0, 0, 0, 0)
    share = 1.0
    if grad_weights is not None:
        steps = zip(grad_weights.shape, grad_weights.stride(), strict=True)
        strides = tuple(0 if size == 1 else step for size, step in steps)
        share = grad_weights.shape[1] / heads
    return kernels().Upstream(*rows_of(grad_out), lse, delta, scale, grad_weights, *strides, share)


def rows_of(tensor: Tensor) -> Any:
    return kernels().Rows(tensor, *tensor.stride()[:3])


def described(k: Any, config: Any, key: Tensor, value: Tensor, mask: MaskArrays) -> tuple[Any, Any]:
    """Descriptors of keys and values where the configuration asks for them and TMA can read both, else None twice."""
    if not config.descriptors or mask.key_order is not None or not all(map(_describable, (key, value))):
        return None, None
    block = lambda tensor: [1, 1, config.block_k, k.padded(tensor.shape[3])]  # noqa: E731
    key_tiles, value_tiles = (k.TensorDescriptor(t, list(t.shape), list(t.stride()), block(t)) for t in (key, value))
    return key_tiles, value_tiles


def _describable(tensor: Tensor) -> bool:
    """Whether TMA can read (B, H, N, D): addresses in steps of 16 bytes, none of them 0."""
    steps = [step * tensor.element_size() for step in tensor.stride()[:3]]
    return tensor.data_ptr() % 16 == 0 and tensor.stride(3) == 1 and all(s > 0 and s % 16 == 0 for s in steps)


def bias_of(bias: Tensor | None) -> Any:
    if bias is None:
        return kernels().Bias(None, 0, 0, 0, 0)
    steps = (0 if size == 1 else step for size, step in zip(bias.shape, bias.stride(), strict=True))
    return kernels().Bias(bias, *steps)


def mask_of(
    mask: MaskArrays, batch: int, transposed: bool, problem: Problem, heads: int = 0, long: bool = False
) -> Any:
    """The mask as a kernel reads it that walks whole rows of the list for `heads` lines of a batch element, the longest
    rows first if they are many (`long`); heads=0: as one that looks up single blocks."""
    lengths = None if mask.kv_lengths is None else mask.kv_lengths.expand(batch).contiguous()
    orders: tuple[Any, ...] = ()
    if mask.query_order is not None or mask.key_order is not None:
        cut = lengths if mask.key_order is not None else None
        orders = (mask.query_order, mask.key_order, *problem.order_steps, *problem.tokens, cut)
        lengths = lengths if cut is None else None
    if mask.indptr is None:
        return kernels().Mask(*(None,) * 7, lengths, 1, 1, 0, 0, 0, problem.low, problem.high, *orders)
    indptr, indices, tile_ids = mask[8:11] if transposed else mask[4:7]
    assert mask.tiles is not None and indptr is not None and indices is not None
    entries, clean, live, order = (indices, tile_ids), None, None, None
    if heads:
        Nq, Nk = problem.sizes[3:5]
        plan = triton_plan.plan(kernels(), mask, transposed, Nq, Nk, problem.low, problem.high)
        entries, clean, live = plan[:2], plan.clean, plan.live
        order = triton_plan.order(plan, mask, heads) if long else None
    tiles = mask.tiles
    tiles = tiles if tiles.data_ptr() % 16 == 0 else tiles.clone()  # bits are read in words
    blocks = (indptr.numel() - 1) // (mask.batch * mask.heads)
    numbers = (mask.batch, mask.heads, blocks, indices.numel(), tiles.shape[0], problem.low, problem.high)
    return kernels().Mask(indptr, *entries, clean, live, order, tiles, lengths, *numbers, *orders)


def contiguous(mask: MaskArrays) -> MaskArrays:
    """The mask with contiguous arrays: itself, unless it was made of slices."""
    return MaskArrays._make(x.contiguous() if isinstance(x, Tensor) else x for x in mask)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# --- sizes of the grids ---


def config_of(
    kernel: str,
    query: Tensor,
    Dv: int,
    mask: MaskArrays,
    problem: Problem,
    biased: bool,
    run: Callable[[Any], None] | None = None,
) -> Any:
    """The kernel's configuration: the table's, or where autotuning is on the one with which `run` is fastest."""
    k, listed, chip = kernels(), mask.indptr is not None, capability(query.device)
    head_dim, half = max(query.shape[3], Dv), query.dtype in HALF
    ordered = mask.query_order is not None or mask.key_order is not None
    extras = biased or problem.dropout.seed is not None
    blocks = (mask.block_q, mask.block_k) if listed else (None, None)
    default = k.default_config(kernel, head_dim, half, chip, listed, extras, ordered)
    if ordered and problem.dropout.seed is not None:
        default = k.for_single_pairs(default, kernel, head_dim)
    default = k.fit(default, *blocks)
    if run is None or chip == 0 or not autotune.enabled() or torch.cuda.is_current_stream_capturing():
        return default
    B, Hq, Hkv, Nq, Nk = problem.sizes[:5]
    case = (kernel, query.dtype, query.shape[3], Dv, biased, problem.dropout.seed is None, blocks, problem.low is None)
    size = (problem.high is None, Hq // Hkv, *(n.bit_length() for n in (B * Hq, Nq, Nk)))
    key = "/".join(map(str, (torch.cuda.get_device_name(query.device), k.triton.__version__, *case, ordered, *size)))
    candidates = k.candidates(kernel, default, head_dim, query.element_size(), chip)
    return k.Config(*autotune.best(key, [k.fit(c, *blocks) for c in candidates], lambda c: _time(run, k.Config(*c))))


def _time(run: Callable[[Any], None], config: Any) -> float:
    """Median milliseconds of a launch; infinity where this GPU has not the resources for the configuration."""
    k = kernels()
    try:
        return float(k.triton.testing.do_bench(lambda: run(config), warmup=10, rep=50, return_mode="median"))
    except (k.triton.runtime.errors.OutOfResources, k.triton.runtime.errors.PTXASError):
        return math.inf


def hides_pairs(mask: MaskArrays, bias: Tensor | None) -> bool:
    """Whether a key may be visible to one query of a tile and not to another, so that a NaN in it must be kept away."""
    return mask.indptr is not None or mask.window_left >= 0 or mask.window_right >= 0 or bias is not None


def sees_nothing(mask: MaskArrays, key: Tensor) -> bool:
    """Whether the shapes of a mask say that it shows no pair."""
    orders = (order for order in (mask.query_order, mask.key_order) if order is not None)
    return key.shape[2] == 0 or lists_nothing(mask) or any(order.shape[1] == 0 for order in orders)


def lists_nothing(mask: MaskArrays) -> bool:
    return mask.indices is not None and mask.indices.numel() == 0


def tile_count(length: int, tile: int, mask: MaskArrays, axis: int) -> int:
    """Tiles of `tile` rows that cover the queries (axis 0) or keys (axis 1); a list's blocks are covered whole."""
    if mask.indptr is None:
        return -(-length // tile)
    block = (mask.block_q, mask.block_k)[axis]
    return -(-length // block) * (block // tile)


def key_tile_count(kv_len: int, tile: int, mask: MaskArrays) -> int:
    """Key tiles that a program walks, on average under a list."""
    if mask.indptr is None or mask.indices is None:
        return -(-kv_len // tile)
    return mask.indices.numel() * mask.block_k // tile // max(mask.indptr.numel() - 1, 1)


def split_count(programs: int, key_tiles: int, processors: int) -> int:
    """How many programs share the keys of one query tile: enough to fill the GPU, with at least two key tiles each."""
    if programs >= 0.8 * processors or key_tiles < 4:
        return 1
    return max(1, min(-(-2 * processors // programs), key_tiles // 2, 128))


def section_of(lines: int, length: int, first: Tensor, second: Tensor, sharing: int) -> int:
    """Lines whose `length` rows of two tensors fit the L2 cache together; `sharing` lines read the same rows."""
    line = max(1, length * (first.shape[3] + second.shape[3]) * first.element_size())
    return max(1, min(lines, L2_BYTES // line * sharing))
