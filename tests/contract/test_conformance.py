"""One suite for every backend: forward and backward of every case against float64, within the budget of rule 8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.accuracy import Problem, assert_conforms, gradients
from support.cases import CASES, MODIFIED, Case, bias_of, draw

from efficient_attn import BlockMask, attention, backends
from efficient_attn.backends.reference.attention import dropout_keep
from efficient_attn.errors import UnsupportedError
from efficient_attn.functional import attention_with_weights
from efficient_attn.masks import MaskArrays

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SEED = 0x1234_5678_9ABC
WEIGHTED = (
    "dense one_query_grouped four_queries_causal few_queries_blocks_of_each_head one_key no_keys no_queries no_heads "
    "head_dim_3 value_dim_3 causal_bottom_right_empty_rows window lengths bits_sparse blocks_128 blocks_window_lengths "
    "blocks_grouped bias_full bias_per_key bias_float32 multi_query dropout dropout_blocks dropout_grouped_causal_bias "
    "strided_head_dim expanded_grad_out grad_lse negative_scale softcap sinks_window_dropout table_grouped_blocks "
    "softcap_sinks_table grid decomposed"
)
UNMODIFIED = ("cuda",)  # knows no softcap, sinks or bias by relative position
NARROW = ("triton", "cuda")  # know no heads wider than 256


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case: Case, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton computes in float32")
    if backend == "cuda" and dtype in (torch.float32, torch.float64):
        pytest.skip("tensor cores multiply halves")
    if (backend in UNMODIFIED and case in MODIFIED) or (backend in NARROW and max(case.D, case.Dv) > 256):
        with pytest.raises(UnsupportedError, match=r"it knows no|head dimensions up to 256"):
            check(case, dtype, backend, device)
        return
    check(case, dtype, backend, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", [case for case in CASES if case.name in WEIGHTED.split()], ids=str)
@pytest.mark.parametrize("weights", ["heads", "mean"])
def test_returned_weights(weights: str, case: Case, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton computes in float32")
    if backend == "cuda":
        pytest.skip("it returns no weights")
    if backend in UNMODIFIED and case in MODIFIED:
        pytest.skip("it refuses the call, see above")
    if weights == "mean" and case.Hq == 0:
        pytest.skip("there is nothing to average")
    check(case, dtype, backend, device, weights)


def check(case: Case, dtype: torch.dtype, backend: str, device: torch.device, weights: str = "") -> None:
    """Forward and backward of one case, with the `weights` of the "heads" or their "mean" as an output too;
    benchmarks/gpu_sanitize.py calls it as well."""
    drawn = draw(case, dtype)
    structured = ("slopes", "table", "grid_table", "rel_h", "rel_w")
    named = ("query", "key", "value", "bias", "sinks", *structured)
    names = [n for n in named if drawn[n] is not None]
    leaves = {n: _on(device, drawn[n].detach()).requires_grad_() for n in names}
    given = {n: leaves[n] for n in names if n not in ("bias", *structured)}
    parts = bias_of(case, leaves)
    given["bias"] = (parts[0] if len(parts) == 1 else parts) if parts else None
    mask = drawn["mask"]
    arguments: dict[str, Any] = {
        "mask": mask.to(device) if isinstance(mask, BlockMask | torch.Tensor) else mask,
        "is_causal": case.causal is not None,
        "causal_alignment": case.causal,
        "scale": case.scale,
        "softcap": case.softcap,
        "dropout_p": case.dropout_p,
        "dropout_seed": SEED,
        "backend": backend,
    }
    grad_weights = None
    if weights:
        out, lse, returned = attention_with_weights(**given, **arguments, average=weights == "mean")
        returned = returned.unsqueeze(1) if weights == "mean" else returned
        grad_weights = torch.randn(returned.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    else:
        out, lse = attention(**given, **arguments, return_lse=True)
    outputs, cotangents = (out,), (_on(device, drawn["grad_out"]),)
    if case.grad_lse:
        outputs, cotangents = (out, lse), (*cotangents, drawn["grad_lse"].to(device))
    if grad_weights is not None:
        outputs, cotangents = (*outputs, returned), (*cotangents, grad_weights.to(device))
    found = [gradient.cpu() for gradient in gradients(outputs, list(leaves.values()), cotangents)]
    out, lse = out.cpu(), lse.cpu()

    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(gradient.dtype == drawn[n].dtype for n, gradient in zip(names, found, strict=True))
    shape = torch.Size((case.B, case.Hq, case.Nq, case.Nk))
    kept = dropout_keep(shape, case.dropout_p, torch.tensor(SEED), out.device) if case.dropout_p else None
    scale = case.D**-0.5 if case.scale is None else case.scale
    problem = Problem(
        *(drawn[n] for n in ("query", "key", "value", "bias", "visible")),
        scale, drawn["grad_out"], drawn["grad_lse"], kept, case.dropout_p, grad_weights, case.softcap or 0.0,
        *(drawn[n] for n in ("sinks", "slopes", "table")), case.Nk - case.Nq if case.causal == "bottom_right" else 0,
        case.grid, *(drawn[n] for n in ("grid_table", "rel_h", "rel_w")),
    )  # fmt: skip
    ours = {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, found, strict=True))}
    if "rel_h" in names and dtype in (torch.bfloat16, torch.float16):
        del ours["lse"]  # its bias is rounded as queries and keys are: eager's rounding, not float32's
    if weights:
        assert returned.dtype == dtype
        ours["weights"] = returned.detach().cpu()
    union = mask.union if isinstance(mask, BlockMask) else None
    assert_conforms(problem, ours, joined=dtype == torch.float32 and union is not None and len(union) > 2)


def _on(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the device, laid out in memory as it was: strides and the offset of its first element."""
    if device.type == "cpu":
        return tensor
    whole = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    return whole.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def test_a_part_of_a_problem_drops_what_the_whole_drops(backend: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if backend == "cuda" else torch.float32
    query, key, value, grad = (torch.randn(2, 2, n, 16, generator=generator).to(dtype) for n in (40, 50, 50, 40))
    seed = torch.tensor((SEED, 3, 32, 48))  # this is heads 3 and 4, queries from 32 on, keys from 48 on
    kept = dropout_keep((2, 5, 72, 98), 0.4, torch.tensor(SEED), torch.device("cpu"))[:, 3:, 32:, 48:]
    given = [_on(device, tensor) for tensor in (query, key, value)]
    module, mask = backends.BACKENDS[backend].attention, MaskArrays()
    if backend == "cuda":
        with pytest.raises(UnsupportedError, match="part of a longer sequence"):
            module.attention_forward(*given, None, mask, 0.25, 0.4, seed)
        return
    out, lse = module.attention_forward(*given, None, mask, 0.25, 0.4, seed)
    back = module.attention_backward(
        _on(device, grad), None, None, *given, None, out, lse, mask, 0.25, 0.4, seed, False,
    )[:3]  # fmt: skip
    everything = torch.ones(1, 1, 40, 50, dtype=torch.bool)
    problem = Problem(query, key, value, None, everything, 0.25, grad, None, kept, 0.4)
    found = dict(zip(("query", "key", "value"), (gradient.cpu() for gradient in back), strict=True))
    assert_conforms(problem, {"out": out.cpu(), "lse": lse.cpu(), **found})
