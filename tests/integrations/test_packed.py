"""Documents in one row, as DataCollatorWithFlattening makes it: each comes out as it does alone, with eager."""

from __future__ import annotations

import pytest
import torch
from support.huggingface_models import IDS, N, assert_close, make

from efficient_attn import InputError, UnsupportedError
from efficient_attn.integrations import huggingface

transformers = pytest.importorskip("transformers")

huggingface.register()

LENGTHS = (1, 7, 12)
DOCUMENTS = [row[:n].tolist() for row, n in zip(IDS, LENGTHS, strict=True)]


def flattened(**options):
    """What the collator makes of the documents, without labels."""
    collator = transformers.DataCollatorWithFlattening(return_tensors="pt", **options)
    batch = collator([{"input_ids": ids} for ids in DOCUMENTS])
    return {name: value for name, value in batch.items() if name != "labels"}


def alone(family):
    model = make(family, "eager")
    return torch.cat([model(input_ids=torch.tensor([ids]))[0] for ids in DOCUMENTS], 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_flash_attn_kwargs": True},
        {"return_seq_idx": True},
        {"return_flash_attn_kwargs": True, "return_seq_idx": True},
    ],
    ids=lambda options: " ".join(options) or "position_ids",
)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_each_document_is_as_alone(family, options):
    batch = flattened(**options)
    model = make(family)
    out = model(**batch, use_cache=False)[0]
    assert_close(out, alone(family))
    out.square().sum().backward()
    expected = make(family, "eager")
    for ids in DOCUMENTS:
        expected(input_ids=torch.tensor([ids]))[0].square().sum().backward()
    largest = max(float(p.grad.abs().max()) for p in expected.parameters())
    for (name, found), right in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (found.grad - right.grad).abs().max() <= 2e-5 * largest, name


@pytest.mark.parametrize("options", [{"return_flash_attn_kwargs": True}, {"return_seq_idx": True}], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_keywords_say_it_without_positions(family, options):
    """Rotary positions are relative, so that those of the row serve."""
    batch = flattened(return_position_ids=False, **options)
    assert_close(make(family)(**batch, use_cache=False)[0], alone(family))


def test_a_method_within_documents():
    """A window of the row is a window of each document."""
    batch = flattened(return_flash_attn_kwargs=True)
    model = make("llama", "efficient_attn:sliding_window:left=3,right=0")
    out = model(**batch, use_cache=False)[0]
    each = torch.cat([model(input_ids=torch.tensor([ids]), use_cache=False)[0] for ids in DOCUMENTS], 1)
    assert_close(out, each)
    model = make("llama", "efficient_attn:linear")
    with pytest.raises(UnsupportedError, match="mask"):
        model(**batch, use_cache=False)


def test_compiled():
    torch._dynamo.reset()
    batch = flattened(return_flash_attn_kwargs=True, return_seq_idx=True)
    model = make("llama")
    assert_close(torch.compile(model, backend="eager")(**batch, use_cache=False)[0], alone("llama"))


@pytest.mark.parametrize("ids", [[[0] * 4 + [1] * 16, [0] * 9 + [1] * 11], [[0] * 4 + [1] * 6 + [0] * 10]], ids=str)
def test_seq_idx_of_a_batch_and_in_any_order(ids):
    ids = torch.tensor(ids)
    tokens = IDS[: len(ids)]
    out = make("llama")(tokens, seq_idx=ids, use_cache=False)[0]
    seen = (ids[:, :, None] == ids[:, None]) & torch.ones(N, N).tril().bool()
    expected = make("llama", "eager")(tokens, attention_mask=torch.where(seen, 0.0, -torch.inf)[:, None])[0]
    assert_close(out, expected)


def test_what_does_not_fit_is_named():
    model, batch = make("llama"), flattened(return_flash_attn_kwargs=True)
    with pytest.raises(InputError, match="one row of packed tokens"):
        model(IDS, **{name: batch[name] for name in ("cu_seq_lens_q", "cu_seq_lens_k")})
    with pytest.raises(InputError, match="end at 9 queries"):
        model(IDS[:1], cu_seq_lens_q=torch.tensor([0, 4, 9]))
    with pytest.raises(InputError, match="seq_idx"):
        model(IDS[:1], seq_idx=torch.zeros(1, 4, dtype=torch.int32))
