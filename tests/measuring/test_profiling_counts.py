"""What a profile counts: growth on known curves, operations and bytes of counted masks, rooflines, phases."""

from __future__ import annotations

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("sklearn")


from efficient_attn import (
    BlockMask,
    InputError,
    attention,
    parse,
)
from efficient_attn.measuring import fit
from efficient_attn.profiling import (
    Ceilings,
    counts,
    phases,
    roofline,
)

LENGTHS = (256, 512, 1024, 2048, 4096)
CEILINGS = Ceilings(gflops=100.0, gbytes=10.0)


# --- growth ---


def test_a_power_law_is_found_exactly_and_extrapolated() -> None:
    law = fit.fit(LENGTHS, [3e-6 * n**2 for n in LENGTHS])
    assert law.exponent == pytest.approx(2) and law.high - law.low < 1e-6
    assert law.at(8192) == pytest.approx(3e-6 * 8192**2)
    assert law.length_for(3e-6 * 10_000**2) == pytest.approx(10_000)
    assert str(law) == "n^2.00 ± 0.00"


def test_the_confidence_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    draw, held = random.Random(0), 0
    for _ in range(400):
        law = fit.fit(LENGTHS, [n * math.exp(draw.gauss(0, 0.2)) for n in LENGTHS])
        held += law.low <= 1 <= law.high
    assert 0.92 <= held / 400 <= 0.98


def test_only_the_longer_half_is_fitted_for_short_calls_are_overhead() -> None:
    law = fit.fit_tail(LENGTHS, [max(5.0, n / 512) for n in LENGTHS])
    assert law is not None and law.points == 3
    assert fit.fit_tail([512], [1.0]) is None and fit.fit_tail([], []) is None
    two = fit.fit_tail([512, 1024], [1.0, 2.0])
    assert two is not None and two.exponent == pytest.approx(1) and two.high == math.inf


def test_a_flat_curve_never_reaches_a_value() -> None:
    for slope in (0.0, 1e-6):
        assert fit.fit(LENGTHS, [7.0 * n**slope for n in LENGTHS]).length_for(1e9) == math.inf
    assert fit.fit(LENGTHS, list(LENGTHS)).length_for(0) == 0
    dense = [float(n**2) for n in LENGTHS]
    assert fit.crossing(LENGTHS, [9 * v ** (1 - 1e-6) for v in dense], dense) is None  # in about e^(10^6)


@pytest.mark.parametrize("values", [[1.0, 0.0], [1.0, -2.0]])
def test_what_has_no_logarithm_is_an_error(values: list[float]) -> None:
    with pytest.raises(InputError, match="positive"):
        fit.fit([1, 2], values)
    with pytest.raises(InputError, match="two lengths"):
        fit.fit([2, 2], [1.0, 1.0])


def test_a_crossing_is_measured_where_it_was_and_predicted_where_it_will_be() -> None:
    linear, quadratic = [float(n) for n in LENGTHS], [n**2 / 1500 for n in LENGTHS]
    found = fit.crossing(LENGTHS, linear, quadratic)
    assert found is not None and found.measured and found.length == pytest.approx(1500, rel=1e-6)
    found = fit.crossing(LENGTHS, linear, [n**2 / 9000 for n in LENGTHS])
    assert found is not None and not found.measured and found.length == pytest.approx(9000, rel=1e-6)
    assert fit.crossing(LENGTHS, [v / 1e6 for v in linear], linear) == fit.Crossing(256, True)
    assert fit.crossing(LENGTHS, quadratic, [v / 1e6 for v in linear]) is None
    assert fit.crossing([], [], []) is None and fit.crossing([512], [2.0], [1.0]) is None


# --- operations and bytes ---


def drawn_keys(mask: BlockMask, batch: int, heads: int, kv_heads: int) -> int:
    """Rows (b, kv head, key) in a block with a visible pair of the group, on a drawing; every listed block has one."""
    seen = mask.to_dense().expand(batch, heads, -1, -1)
    (block_q, block_k), total = mask.block_size, 0
    for b in range(batch):
        for group in seen[b].view(kv_heads, -1, mask.q_len, mask.kv_len):
            for j in range(0, mask.kv_len, block_k):
                blocks = [group[:, i : i + block_q, j : j + block_k] for i in range(0, mask.q_len, block_q)]
                total += blocks[0].shape[-1] if any(bool(block.any()) for block in blocks) else 0
    return total


B, H, N, D = 2, 4, 300, 16
MASKS = {
    "dense": BlockMask(N, N),
    "window": BlockMask(N, N, (32, 16), window=(5, 3), window_offset=150),
    "lengths": BlockMask.from_lengths([300, 130], q_len=N, kv_len=N),
    "blocks": parse("bigbird:block=16").pattern.block_mask(N, N),
    "per_head": BlockMask.from_dense(
        torch.rand(1, H, N, N, generator=torch.Generator().manual_seed(0)) > 0.9999, block_size=(16, 16)
    ),
    "per_batch": BlockMask.from_dense(
        torch.rand(B, 1, N, N, generator=torch.Generator().manual_seed(1)) > 0.9998, block_size=(16, 32)
    ),
}


@pytest.mark.parametrize("kv_heads", [H, 2, 1])
@pytest.mark.parametrize("name", MASKS)
def test_visited_keys_are_those_of_a_drawing(name: str, kv_heads: int) -> None:
    mask = MASKS[name]
    assert counts.visited_keys(mask.arrays(), B, H, kv_heads, N, N) == drawn_keys(mask, B, H, kv_heads)


def test_a_call_is_counted_as_by_hand() -> None:
    query, key, value = torch.randn(B, H, N, D), torch.randn(B, 2, N, D), torch.randn(B, 2, N, D)
    mask = MASKS["window"]
    found = counts.count(lambda: attention(query, key, value, mask=mask))
    rows = drawn_keys(mask, B, H, 2)
    out_and_lse = query.numel() + B * H * N
    assert found.bytes == found.attention_bytes == 4 * (query.numel() + 2 * rows * D + out_and_lse)
    assert found.flops == found.attention_flops == found.by_operator["efficient_attn::attention_forward"] > 0
    whole = counts.count(lambda: attention(query, query, query))
    assert whole.bytes == 4 * (query.numel() + out_and_lse)  # one tensor is read once


def test_matrix_products_are_counted_with_their_bytes_and_batched_ones_are_attention() -> None:
    a, b = torch.randn(8, 16), torch.randn(16, 4)
    found = counts.count(lambda: nn.functional.linear(a, b.mT.contiguous()))
    assert (found.flops, found.bytes, found.attention_flops) == (2 * 8 * 16 * 4, 4 * (8 * 16 + 16 * 4 + 8 * 4), 0)
    found = counts.count(lambda: torch.bmm(a[None], b[None]))
    assert found.attention_flops == found.flops == 2 * 8 * 16 * 4


def test_pytorchs_attention_on_the_cpu_counts_as_ours() -> None:
    tensors = [torch.randn(1, 2, 64, 16, requires_grad=True) for _ in range(3)]

    def theirs() -> None:
        nn.functional.scaled_dot_product_attention(*tensors).sum().backward()

    assert counts.count(theirs).attention_flops == counts.count(lambda: attention(*tensors).sum().backward()).flops


def test_roofline_names_the_ceiling_that_binds() -> None:
    found = roofline.roofline(flops=2e9, moved=1e7, ms=40.0, ceilings=CEILINGS)
    assert (found.intensity, found.attained, found.limit, found.bound) == (200.0, 50.0, 100.0, "compute")
    assert found.share == pytest.approx(0.5)
    found = roofline.roofline(flops=2e7, moved=1e7, ms=2.0, ceilings=CEILINGS)
    assert (found.limit, found.bound, found.share) == (20.0, "memory", 0.5)
    assert roofline.roofline(2e9, 1e7, 40.0, CEILINGS, "float64").limit == 50.0
    assert Ceilings(100.0, 10.0, bfloat16_rate=2.0).flops_for("bfloat16") == 200.0
    assert Ceilings(100.0, 10.0, bfloat16_rate=2.0).flops_for("float16") == 100.0


def test_the_ceilings_of_this_machine_are_measured() -> None:
    found = roofline.run_cell({"budget_s": 0.01})
    assert found["gflops"] > 0 and found["gbytes"] > 0 and found["threads"] == torch.get_num_threads()


# --- phases ---


def event(name, start, stop, *children, number=-1):
    span = SimpleNamespace(start=start, elapsed_us=lambda: stop - start)
    return SimpleNamespace(name=name, time_range=span, cpu_children=children, sequence_nr=number)


def test_time_goes_to_phases_and_backwards_to_those_of_their_forward() -> None:
    module = event(
        phases.MODULE + "layer.attention",
        0,
        60,
        event("aten::linear", 0, 10, event("aten::addmm", 1, 9, number=8), number=7),
        event("efficient_attn::plan", 10, 15, event("aten::bmm", 11, 14)),
        event("efficient_attn::attention_forward", 15, 45, number=9),
        event("aten::layer_norm", 45, 50, number=10),
        event("aten::copy_", 50, 55, number=11),
    )
    backward = "autograd::engine::evaluate_function: "
    call = event(
        phases.CALL,
        0,
        100,
        module,
        event("aten::gelu", 60, 70, number=12),
        event(backward + "AddmmBackward0", 70, 80, event("aten::mm", 71, 79), number=8),
        event(backward + "Generated", 80, 95, event("efficient_attn::attention_backward", 81, 95), number=9),
    )
    shares, modules = phases.split([call, event("aten::outside", 0, 500)])
    assert shares == {"plan": 0.05, "kernel": 0.45, "projections": 0.2, "other": 0.1, "rest": pytest.approx(0.2)}
    assert modules == {"layer.attention": pytest.approx(0.85)}


def test_a_real_profile_adds_up_and_names_what_ran(tmp_path) -> None:
    query = torch.randn(1, 2, 256, 16)
    method = parse("topk_blocks:block=16,blocks=4")
    shares, _ = phases.profiled(
        lambda: method.attend(query, query, query), 2, tmp_path / "deep" / "trace.json", inside="other"
    )
    assert sum(shares.values()) == pytest.approx(1) and shares["plan"] > 0 and shares["kernel"] > 0
    names = {e.get("name") for e in json.loads((tmp_path / "deep" / "trace.json").read_text())["traceEvents"]}
    assert {"efficient_attn::attention_forward", "efficient_attn::plan"} <= names
