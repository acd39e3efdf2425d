"""`context_parallel` in two processes: the conformance cases, random calls, what is refused, bits, bytes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from support import rank_calls, rank_errors
from support.accuracy import Problem, assert_conforms
from support.cases import CASES, MODIFIED, Case, draw
from support.random_calls import KINDS, random_call

from efficient_attn import SlidingWindow
from efficient_attn.backends.reference.attention import dropout_keep
from efficient_attn.distributed import Shape, Shards, context_parallel, make_plan
from efficient_attn.errors import InputError
from efficient_attn.measuring.ranks import RankError, Ranks, started

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 4e-2}
LAID_OUT = [case for case in CASES if case.layout == "contiguous" and case.grid == (0, 0)]  # images are refused
SAMPLE = [case for number, case in enumerate(LAID_OUT) if number % 2 == 0 or case in MODIFIED]


def conforms(ranks: Ranks, count: int, case: Case, dtype: torch.dtype, transport: str, layout: object) -> None:
    drawn = draw(case, dtype)
    found = rank_calls.joined(ranks.run(rank_calls.run_case, case.name, dtype, transport, layout, ranks=count), drawn)
    shape, seed = torch.Size((case.B, case.Hq, case.Nq, case.Nk)), torch.tensor(rank_calls.SEED)
    kept = dropout_keep(shape, case.dropout_p, seed, torch.device("cpu")) if case.dropout_p else None
    scale = case.D**-0.5 if case.scale is None else case.scale
    problem = Problem(
        *(drawn[name] for name in ("query", "key", "value", "bias", "visible")),
        scale, drawn["grad_out"], drawn["grad_lse"], kept, case.dropout_p, None, case.softcap or 0.0,
        *(drawn[n] for n in ("sinks", "slopes", "table")), case.Nk - case.Nq if case.causal == "bottom_right" else 0,
    )  # fmt: skip
    assert_conforms(problem, found, joined=dtype == torch.float32 and count > 2)


def equals_one_process(ranks: Ranks, seed: int, count: int, kind: str | None = None) -> None:
    call = random_call(seed, count, kind)
    one = rank_calls.whole_call(call)
    many = rank_calls.joined_call(ranks.run(rank_calls.run_call, call, ranks=count), call)
    assert one.keys() == many.keys()
    for name, x in one.items():
        y = many[name]
        assert x.shape == y.shape and x.dtype == y.dtype, (seed, count, name)
        assert torch.equal(x.isfinite(), y.isfinite()), (seed, count, name)
        size = max(1.0, float(x.abs().max())) if x.numel() else 1.0
        error = float((x.double() - y.double()).abs().max()) if x.numel() else 0.0
        assert error <= TOLERANCE[call.tensors["query"].dtype] * size, (seed, count, call.transport, name, error)


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_conformance_cases_through_two_ranks(pair, case):
    transport = ("gather", "ring", "all_to_all")[CASES.index(case) // 2 % 3]
    conforms(pair, 2, case, torch.float32, transport, "zigzag")


def test_half_precision_conforms(pair):
    for name in ("causal_long", "blocks_grouped", "dropout_grouped_causal_bias", "window_causal"):
        for transport in ("gather", "ring"):
            case = next(case for case in CASES if case.name == name)
            conforms(pair, 2, case, torch.bfloat16, transport, "zigzag")


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["gather", "ring", "all_to_all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_conformance_cases_through_four_ranks(four, dtype, transport):
    for case in LAID_OUT:
        for count, layout in ((2, "contiguous"), (3, "zigzag"), (4, "zigzag")):
            conforms(four, count, case, dtype, transport, layout)


def test_random_calls_equal_one_process(pair):
    for seed in range(90):
        equals_one_process(pair, seed, 1 if seed % 8 == 7 else 2)


@pytest.mark.slow
def test_300_random_calls_through_1_2_3_4_and_8_ranks_equal_one_process():
    found: Counter[tuple[int, str]] = Counter()
    with started(8) as ranks:
        for seed in range(300):
            count, kind = (1, 2, 3, 4, 8)[seed % 5], KINDS[seed // 5 % len(KINDS)]
            equals_one_process(ranks, 1000 + seed, count, kind)
            found[count, kind] += 1
    print(f"{found.total()} calls equal one process, of {len(found)} pairs of ranks and kinds, at least "
          f"{min(found.values())} each")  # fmt: skip
    assert found.total() == 300 and len(found) == 5 * len(KINDS)


# --- what a user relies on ---


@pytest.mark.parametrize("transport", ["gather", "ring", "all_to_all"])
def test_the_same_bits_each_time(pair, transport):
    for first, second in pair.run(rank_calls.repeated, transport):
        assert first == second


REFUSED = {
    "lengths": "InputError: the ranks have [32, 29] queries",
    "masks": "MaskError: ranks [1] call attention with another mask",
    "bits": "MaskError: ranks [1] call attention with another mask",
    "heads": "InputError: ranks [1] call attention with another heads than rank 0: [1, 2]",
    "scale": "InputError: ranks [1] call attention with another scale",
    "gradient": "InputError: ranks [1] call attention with another options",
    "local mask": "InputError: mask (32, 32) does not broadcast",
    "bias": "InputError: inside context_parallel a bias has the rows of this rank's 32 queries",
    "image": "UnsupportedError: RelativeBias2D goes by places in an image",
    "image rows": "UnsupportedError: DecomposedBias2D goes by places in an image",
    "weights": "UnsupportedError: what was called is not defined inside context_parallel",
    "sinks": "InputError: ranks [1] call attention with another options",
    "softcap": "InputError: ranks [1] call attention with another options",
    "biases": "InputError: ranks [1] call attention with another options",
    "whole u": "InputError: u of LowRankBias, (1, 1, 64, 2), does not fit (1, 2, 32, 4)",
    "low-rank sinks": "UnsupportedError: sinks cannot be served by linear",
    "content": "UnsupportedError: topk_blocks",
    "cache": "UnsupportedError: attention over a cache is not defined inside context_parallel",
    "hybrid": "UnsupportedError: sliding_window",
}


@pytest.mark.parametrize("name", REFUSED)
def test_all_ranks_refuse_before_anything_travels(pair, name):
    for answer in pair.run(rank_errors.refused, name):
        assert answer.startswith(REFUSED[name]) and not answer.endswith("}"), answer


def test_a_rank_that_refuses_tells_the_others(pair):
    first, second = pair.run(rank_errors.refused, "one rank")
    assert first.startswith("CommunicationError: rank 1 refused this call") and second.startswith("InputError: head")


def test_wrong_groups_and_options_are_refused():
    with pytest.raises(InputError, match="torchrun"), context_parallel(None):  # type: ignore[arg-type]
        pass
    with pytest.raises(InputError, match="transport"), context_parallel(None, transport="telepathy"):  # type: ignore[arg-type]
        pass


def test_window_of_512_over_two_ranks_sends_512_keys(pair):
    sent = pair.run(rank_calls.sent_by_window, 8192, "auto")
    everything = pair.run(rank_calls.sent_by_window, 8192, "ring")
    assert sent == [512 * 2 * 16 * 4, 0] and everything == [4096 * 2 * 16 * 4] * 2


@pytest.mark.slow
def test_bytes_of_a_window_of_512_at_64k_over_8_ranks():
    mask, shards = SlidingWindow(left=512, right=0).block_mask(65536, 65536), Shards.contiguous(65536, 8)
    least = make_plan(mask, shards, shards).least_sent(Shape(1, 1, 1, 16, 16, 4))
    with started(8) as ranks:
        sent = {way: sum(ranks.run(rank_calls.sent_by_window, 65536, way)) for way in ("gather", "ring")}
    print(f"minimum {least:,}, gather {sent['gather']:,}, ring {sent['ring']:,} bytes")
    assert least <= sent["gather"] <= 1.1 * least and sent["ring"] > 50 * least


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["gather", "ring"])
def test_memory_falls_with_the_number_of_ranks(transport):
    length, mask, found = 32768, SlidingWindow(left=64, right=0), {}
    with started(1) as ranks:
        [found[1]] = ranks.run(rank_calls.peak_memory, length, "", mask)
    for count in (2, 4):
        with started(count) as ranks:
            found[count] = max(ranks.run(rank_calls.peak_memory, length, transport, mask))
    print(transport, {count: f"{size / 2**20:.0f} MiB" for count, size in found.items()})
    # Beside its part of the tensors, a rank has the keys of one of eight heads on their way.
    assert found[2] < 1.15 * found[1] / 2 and found[4] < 1.15 * found[1] / 4


def test_wrong_meshes_are_refused_by_each_rank_alone(pair):
    for answers in pair.run(rank_errors.wrong_meshes):
        starts = ("InputError: context_parallel takes a mesh of one dimension, got 2", "InputTypeError: mesh must be a",
                  "InputTypeError: mesh must be a|InputError: rank", "InputError: timeout must be positive",
                  "InputError: shards must be", "InputError: shards of 3 ranks in a group of 2")  # fmt: skip
        for answer, start in zip(answers, starts, strict=True):
            assert answer.startswith(tuple(start.split("|"))), answer


# --- what else a user may do ---


def test_a_context_leaves_nothing_behind(pair):
    for found in pair.run(rank_errors.left_open):
        assert "cannot stand inside context_parallel" in found[0] and found[1:] == [True, True, True]


def test_one_rank_is_attention_as_it_is(pair):
    pair.run(rank_calls.one_rank, ranks=1)


def test_few_tokens_autocast_and_no_gradients(pair):
    pair.run(rank_calls.short_and_cast)


@pytest.mark.parametrize("transport", ["gather", "ring", "all_to_all"])
def test_gradients_are_those_of_differences(pair, transport):
    pair.run(rank_calls.gradients_of_differences, transport)


def test_what_a_rank_raises_is_seen(pair):
    with pytest.raises(RankError, match="nothing here"):
        pair.run(rank_errors.refused_by_python)
