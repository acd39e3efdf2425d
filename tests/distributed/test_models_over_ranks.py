"""Models, the drop-in module, checkpointing, torch.compile, DDP and FSDP inside `context_parallel`."""

from __future__ import annotations

import pytest
import torch
from support import rank_models

from efficient_attn import MultiheadAttention
from efficient_attn.measuring.ranks import started

IDS = torch.randint(0, 11, (2, 45), generator=torch.Generator().manual_seed(1))
MASK = torch.arange(45) < torch.tensor([[45], [30]])


def expected(attention: str, ids: torch.Tensor = IDS, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    model = rank_models.language_model(attention)
    loss = rank_models.language_loss(model, ids, mask)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("how", ["plain", "checkpoint", "ddp", pytest.param("compile", marks=pytest.mark.slow)])
def test_a_language_model_learns_as_in_one_process(pair, how):
    found = pair.run(rank_models.train_model, "dense", IDS, None, how)
    close(found[0], expected("dense"))
    close(found[1], found[0])


@pytest.mark.parametrize("attention", ["sliding_window:left=9,right=0", "linear", "performer:features=16"])
def test_methods_and_padding(pair, attention):
    found = pair.run(rank_models.train_model, attention, IDS, MASK, "plain")
    close(found[0], expected(attention, mask=MASK))


@pytest.mark.parametrize("attention", ["dense", "nystrom:landmarks=8", "bigbird:block=16"])
def test_the_module_takes_a_part_of_the_sequence(pair, attention):
    x = torch.randn(2, 45, 16, generator=torch.Generator().manual_seed(0))
    found = pair.run(rank_models.module_output, x, ~MASK, attention)
    torch.manual_seed(0)
    module = MultiheadAttention(16, 4, batch_first=True, attention=attention).eval()
    wanted, _ = module(x, x, x, key_padding_mask=~MASK, need_weights=False)
    shards = found[0][1]
    torch.testing.assert_close(shards.whole([part for part, _ in found], 1), wanted.detach(), rtol=1e-4, atol=1e-5)


def test_masks_of_the_module_are_those_of_the_whole_sequence(pair):
    x = torch.randn(1, 45, 16, generator=torch.Generator().manual_seed(0))
    found = pair.run(rank_models.module_masks, x)
    torch.manual_seed(0)
    module = MultiheadAttention(16, 4, batch_first=True).eval()
    hidden = torch.ones(45, 45, dtype=torch.bool).triu(1)
    wanted, _ = module(x, x, x, attn_mask=hidden, need_weights=False)
    for answers in found:
        for kind in ("mask", "promise", "scores"):
            torch.testing.assert_close(answers["plain", kind], wanted.detach(), rtol=1e-4, atol=1e-5, msg=kind)
        assert "a mask being that of the whole sequence" in answers["plain", "local"]  # rows of each rank: they differ
        for name in ("zero", "learned"):
            assert "add_bias_kv, add_zero_attn" in answers[name, "mask"], answers[name, "mask"]


@pytest.mark.slow
def test_fsdp_on_the_other_dimension_of_the_mesh(four):
    ids = torch.randint(0, 11, (4, 45), generator=torch.Generator().manual_seed(2))
    found = four.run(rank_models.train_on_mesh, ids)
    wanted = expected("dense", ids)
    wanted.pop("loss")
    close(found[0], wanted)


@pytest.mark.slow
def test_two_processes_train_on_what_one_has_no_memory_for():
    length = 16384

    def found(count: int, limit: int | None) -> list[tuple[str, int]]:
        # In new processes each time: what malloc has kept of a step before would count for this one.
        with started(count) as ranks:
            return ranks.run(rank_models.train_long, length, limit)

    [(_, alone)] = found(1, None)
    each = max(most for _, most in found(2, None))
    limit = (alone + each) // 2
    print(f"a step of {length} tokens: {alone / 2**20:.0f} MiB in one process, {each / 2**20:.0f} in each of two")
    assert each < 0.75 * alone
    [(answer, _)] = found(1, limit)
    assert answer.startswith("refused") and "memory" in answer, (answer, limit)
    assert [answer for answer, _ in found(2, limit)] == ["trained"] * 2
