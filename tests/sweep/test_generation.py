"""What decoders generate through transformers' caches, tokens and logits, against eager's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from sweep.run import _made
from sweep.tiny import shrunk
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from efficient_attn.integrations import huggingface

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(2))
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0
KINDS = ("gemma2", "gemma4_text", "gpt_oss", "deepseek_v32", "t5gemma", "llama", "mistral")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_generates_what_eager_does(kind: str, cache: str) -> None:
    huggingface.register()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"cache_implementation": cache, "disable_compile": True}
    factory = AutoModelForSeq2SeqLM if kind == "t5gemma" else AutoModelForCausalLM
    written = []
    for name in ("eager", huggingface.NAME):
        model = _made(factory, next(iter(shrunk(AutoConfig.for_model(kind)))), name)
        with torch.no_grad():
            found = model.generate(
                IDS, attention_mask=MASK, return_dict_in_generate=True, output_logits=True, **options
            )
        written.append(found)
    eager, ours = written
    assert torch.equal(eager.sequences, ours.sequences)
    for a, b in zip(ours.logits, eager.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_continuous_batching_refuses_the_name() -> None:
    """transformers' own pages take implementations of its own alone, and say so."""
    huggingface.register()
    model = _made(AutoModelForCausalLM, next(iter(shrunk(AutoConfig.for_model("llama")))), huggingface.NAME)
    with pytest.raises(ValueError, match="efficient_attn is not supported for continuous batching"):
        model.generate_batch([[5, 6, 7]])
