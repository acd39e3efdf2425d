"""The CUDA C++ backend (csrc/cuda): the same functions as `reference`, on tensor cores of NVIDIA GPUs.

EXPERIMENTAL: compiled for sm_80 and sm_90a and tested in an emulator, never yet run on a GPU; taken only when asked for
by name, from the module `efficient_attn._cuda` (`make cuda`, or an installation where nvcc is found). For tests,
`EFFICIENT_ATTN_CUDA_EMULATOR=<path of the emulator's module>` runs the very same kernels on CPU tensors, one fiber a
thread (tests/kernels/cuda/emulator), Hopper's where `EFFICIENT_ATTN_CUDA_EMULATOR_CAPABILITY` is 90. Nothing here waits
for the GPU, and memory is allocated for results and O(n) workspace only.

The bits of a result are the same in every run. On Hopper, heads of 65 to 128 without a list of blocks, bias and dropout
get a backward in one pass, whose blocks of threads add up dq one after another. `EFFICIENT_ATTN_CUDA_ANY_ORDER=1`
gives the bits up for speed: they add in any order, for lists too. To compare, `EFFICIENT_ATTN_CUDA_TWO_PASSES=1` takes
the two kernels that serve all others.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ...masks import MaskArrays
from ..call import Call, readable, zeroed
from ..words import pack_attention, pack_attention_gradients, pointer
from . import schedule

MODULE = "efficient_attn._cuda"
NO_WEIGHTS = "it returns no attention weights, and takes no gradient of them"
WIDEST = 256  # head dimension
LONGEST = 2**30 - 256  # positions, in whole tiles, and their sums fit in 32 bits


def emulator_path() -> str:
    """Where the emulator's module lies, or an empty string."""
    return os.environ.get("EFFICIENT_ATTN_CUDA_EMULATOR", "")


@cache
def kernels() -> Any:
    """The module that launches kernels: the emulator if one is asked for, else the compiled one; None: see
    `missing`."""
    if emulator_path():
        spec = importlib.util.spec_from_file_location("_cuda_emulator", emulator_path())
        if spec is None or spec.loader is None:
            raise ImportError(f"EFFICIENT_ATTN_CUDA_EMULATOR={emulator_path()} is not a Python extension module")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return None if missing() else importlib.import_module(MODULE)


@cache
def missing() -> str:
    """Why the compiled module cannot be had, or an empty string."""
    try:
        importlib.import_module(MODULE)
    except ImportError as error:
        return (
            f"{MODULE} is not built or cannot be loaded ({error}); with nvcc, `make cuda` builds it in a checkout and "
            "EFFICIENT_ATTN_CUDA=1 pip install in an installation"
        )
    return ""


@cache
def processors(device: torch.device) -> int:
    """Processors to be filled with work; the emulator stands for a small GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def device_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why no kernel of this module can run on tensors of this device and dtype."""
    reasons = []
    if kernels() is None:
        reasons.append(missing())
    if device.type != "cpu" and emulator_path():
        reasons.append(
            f"EFFICIENT_ATTN_CUDA_EMULATOR is set, under which it runs on CPU tensors; these are on {device}"
        )
    elif device.type != "cuda" and not emulator_path():
        reasons.append(f"it runs on CUDA tensors; these are on {device}")
    elif device.type == "cuda":
        reasons += _gpu_reasons(device)
    if dtype not in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        reasons.append(f"it multiplies bfloat16 and float16 on tensor cores; these tensors are {name}")
    return reasons


def not_supported_reasons(call: Call) -> list[str]:
    """Why this backend cannot serve `call`."""
    reasons = device_reasons(call.device, call.dtype)
    if call.returns_weights:
        reasons.append(NO_WEIGHTS)
    if call.modifiers:
        reasons.append(f"it knows no {' and no '.join(call.modifiers)}")
    if max(call.D, call.Dv) > WIDEST:
        reasons.append(f"it serves head dimensions up to {WIDEST}; these are {call.D} and {call.Dv}")
    if not reasons and call.device.type == "cuda":
        reasons += _shared_memory_reasons(call)
    if max(call.Nq, call.Nk) > LONGEST:
        reasons.append(f"it serves up to {LONGEST} queries and keys; these are {call.Nq} and {call.Nk}")
    return reasons


def _gpu_reasons(device: torch.device) -> list[str]:
    """Why this GPU does not run the kernels of this build."""
    capability = torch.cuda.get_device_capability(device)
    said = f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
    if capability < (8, 0):
        return [f"it needs compute capability 8.0 or newer; {said}"]
    archs = "" if kernels() is None else kernels().architectures
    if archs and not has_code(archs, capability):
        return [f"it was built for {archs} and {said}; build it with EFFICIENT_ATTN_CUDA_ARCHS naming that one too"]
    return []


def _shared_memory_reasons(call: Call) -> list[str]:
    needed, offered = kernels().shared_bytes(max(call.D, call.Dv)), kernels().most_shared_bytes(number(call.device))
    if needed <= offered:
        return []
    return [
        f"head dimensions {call.D} and {call.Dv} take {needed / 1024:.0f} KiB of shared memory a block; this GPU "
        f"has {offered / 1024:.0f}"
    ]


def has_code(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a build for `architectures`, as in 80;90a, runs on a GPU: as machine code, which serves its own major
    version from its minor one on (with an a, only itself), or as what the driver compiles, kept of a plain first."""
    archs = architectures.split(";")
    if archs[0].isdecimal() and divmod(int(archs[0]), 10) <= capability:
        return True
    for arch in archs:
        major, minor = divmod(int(arch.rstrip("af")), 10)
        if (major, minor) == capability or (major == capability[0] and minor <= capability[1] and arch[-1] != "a"):
            return True
    return False


def attention_forward(
    query: Tensor,  # (B, Hq, Nq, D)
    key: Tensor,  # (B, Hkv, Nk, D)
    value: Tensor,  # (B, Hkv, Nk, Dv)
    bias: Tensor | None,
    mask: MaskArrays,
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    diagonals: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return out (B, Hq, Nq, Dv) in the query's dtype and lse (B, Hq, Nq) float32, as `reference.attention_forward`."""
    _refuse_modifiers(softcap, sinks, diagonals)
    query, key, value = map(readable, (query, key, value))
    out = query.new_empty(*query.shape[:3], value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if out.numel() == 0 or key.shape[2] == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    kept, words, seed = _pack(query, key, value, bias, out, lse, mask, scale, dropout_p, dropout_seed)
    splits = kernels().decode_splits(words, processors(query.device))
    if splits:  # few queries: several blocks of threads share the keys
        parts = (splits,) if splits > 1 else (0,)
        part_out = query.new_empty(*parts, *out.shape, dtype=torch.float32)
        part_lse = query.new_empty(*parts, *lse.shape, dtype=torch.float32)
        kernels().attention_decode(words, _workspace(part_out), _workspace(part_lse), splits, *place(query.device))
        del kept
        return out, lse
    flags = query.new_empty(kernels().flag_count(words, False), dtype=torch.int32)
    counters = _counters(words, False, query)
    order = schedule.query_order(mask, query.shape[1]) if counters.numel() else None
    kernels().attention_forward(
        words, pointer(seed), _workspace(flags), _workspace(counters), pointer(order), *place(query.device)
    )
    del kept
    return out, lse


def attention_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: MaskArrays,
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    average: bool,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    diagonals: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Raise UnsupportedError, as `not_supported_reasons` says before."""
    raise UnsupportedError(f"backend='cuda' cannot serve this call: {NO_WEIGHTS}. Use backend='triton' or 'reference'")


def attention_backward(
    grad_out: Tensor,  # (B, Hq, Nq, Dv)
    grad_lse: Tensor | None,  # (B, Hq, Nq)
    grad_weights: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    mask: MaskArrays,
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    bias_requires_grad: bool,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    diagonals: Tensor | None = None,
    diagonals_require_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None, None]:
    """Return dq, dk, dv and dbias (None unless wanted), as `reference.attention_backward`; without `grad_weights`, and
    None twice, for it takes no sinks and no diagonals."""
    _refuse_modifiers(softcap, sinks, diagonals)
    dq, dk, dv = (t.new_empty(t.shape) for t in (query, key, value))
    dbias = bias.new_empty(bias.shape) if bias is not None and bias_requires_grad else None
    if out.numel() == 0 or key.shape[2] == 0:
        return *zeroed((dq, dk, dv, dbias)), None, None
    query, key, value, out, grad_out = map(readable, (query, key, value, out, grad_out))
    grad_lse = None if grad_lse is None else grad_lse.to(torch.float32).contiguous()
    kept, words, seed = _pack(query, key, value, bias, out, lse.contiguous(), mask, scale, dropout_p, dropout_seed)
    target = _bias_target(dbias, query, key)
    words += pack_attention_gradients(grad_out, dq, dk, dv, grad_lse, target)
    flags = query.new_empty(kernels().flag_count(words, True), dtype=torch.int32)
    delta = torch.empty_like(lse)
    sums, counters = target is not dbias, _counters(words, True, query)
    query_sums, turns = _query_sums(words, query)
    drawn = counters.numel() > 0
    query_order = schedule.query_order(mask, query.shape[1]) if drawn else None
    key_order = schedule.key_order(mask, key.shape[1]) if drawn else None
    workspace = map(_workspace, (query_sums, turns, counters))
    orders = map(pointer, (query_order, key_order))
    kernels().attention_backward(
        words, pointer(seed), _workspace(flags), delta.data_ptr(), sums, *workspace, *orders, *place(query.device)
    )
    if dbias is not None and target is not None and target is not dbias:
        dbias.copy_(target.sum_to_size(dbias.shape))
    del kept
    return dq, dk, dv, dbias, None, None


def _refuse_modifiers(softcap: float, sinks: Tensor | None, diagonals: Tensor | None) -> None:
    if softcap > 0.0 or sinks is not None or diagonals is not None:
        raise UnsupportedError(
            "backend='cuda' knows no softcap, no sinks and no bias by relative position; use backend='triton' or "
            "'reference'"
        )


def _pack(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    mask: MaskArrays,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[tuple[Tensor | None, ...], bytes, Tensor | None]:
    """What must live until the call is done, the words that csrc/common/words.h reads, and a seed on the GPU."""
    if mask.indices is not None and mask.indices.numel() >= 2**31:
        raise UnsupportedError(
            f"backend='cuda' reads lists of fewer than 2^31 blocks, got {mask.indices.numel()}; use larger blocks"
        )
    if mask.tiles is not None:
        tiles = mask.tiles.contiguous()  # bits are read in words of 16
        mask = mask._replace(tiles=tiles if tiles.data_ptr() % 2 == 0 else tiles.clone())
    if seed is not None and seed.numel() > 1:
        raise UnsupportedError(
            "backend='cuda' drops by positions in the call, and this one is a part of a longer sequence "
            "(context_parallel with dropout); use backend='triton'"
        )
    on_gpu = seed.reshape(1) if seed is not None and seed.device.type == "cuda" else None
    kept, words = pack_attention(
        query, key, value, bias, out, lse, mask, scale, dropout_p, None if on_gpu is not None else seed
    )  # fmt: skip
    return (*kept, on_gpu), words, on_gpu


def _bias_target(dbias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """What the kernel writes: dbias itself, or where it is one for all queries or keys, a row of sums for each head."""
    if dbias is None:
        return None
    (B, Hq, Nq, _), Nk = query.shape, key.shape[2]
    if dbias.shape[3] == 1 and Nk > 1:
        return query.new_empty(B, Hq, Nq, 1, dtype=torch.float32)
    if dbias.shape[2] == 1 and Nq > 1:
        return query.new_empty(B, Hq, 1, Nk, dtype=torch.float32)
    return dbias


def _query_sums(words: bytes, query: Tensor) -> tuple[Tensor, Tensor]:
    """Where a backward in one pass adds up dq, empty unless it serves the call, and the turns that give its sums an
    order, empty where any order will do."""
    gpu = place(query.device)[0]
    any_order, two_passes = (
        os.environ.get(f"EFFICIENT_ATTN_CUDA_{name}") == "1" for name in ("ANY_ORDER", "TWO_PASSES")
    )
    turns = 0 if any_order or two_passes else kernels().turn_count(words, gpu)
    sums = kernels().query_sum_count(words, gpu) if any_order or turns else 0
    return query.new_zeros(sums, dtype=torch.float32), query.new_zeros(turns, dtype=torch.int32)


def _counters(words: bytes, backward: bool, query: Tensor) -> Tensor:
    """Zeros that Hopper's kernels draw the numbers of their tiles from; empty where every tile has its processor."""
    count = kernels().counter_count(words, backward, place(query.device)[0])
    return query.new_zeros(count, dtype=torch.int32)


def _workspace(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.numel() else 0


def number(device: torch.device) -> int:
    """The number of a GPU: of the current one where the device names none, as torch.device("cuda") does."""
    return torch.cuda.current_device() if device.index is None else device.index


def place(device: torch.device) -> tuple[int, int]:
    """The number of the GPU and its current stream."""
    return (number(device), torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else (0, 0)
