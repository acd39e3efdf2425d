"""Generation: a text of a batch goes on as alone under every causal method; beams, penalties and stop strings."""

import pytest
import torch

from efficient_attn.errors import InputError, UnsupportedError
from efficient_attn.models import CausalLM, CausalLMConfig, TransformerConfig

V, N = 60, 24
LENGTHS = (24, 15, 7, 15)
METHODS = (
    "dense",
    "sliding_window:left=3,right=0",
    "dilated",
    "strided:stride=4",
    "fixed",
    "longformer:window=4",
    "bigbird:block=16",
    "topk_blocks:block=16",
    "lsh",
    "linear",
    "performer:features=16",
    "prefix_lm:prefix=4",
    "deepspeed_fixed:block=16",
    "topp_blocks:block=16",
    "sliding_window:left=4,right=4 | strided:stride=4",
    "sliding_window:left=8,right=0+centroid",
    "per_head(dense; longformer:window=4; strided:stride=4; sliding_window:left=3,right=0)",
)


def model(attention="dense", modifiers=None, **options):
    torch.manual_seed(0)
    decoder = TransformerConfig(32, 2, 4, causal=True, attention=attention, **modifiers or {})
    made = CausalLM(CausalLMConfig(V, 80, decoder, **options)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3.0)  # so that texts differ
    return made


def prompts():
    torch.manual_seed(1)
    ids, mask = torch.randint(2, V, (4, N)), torch.zeros(4, N, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        mask[row, N - length :] = 1
    return ids * mask, mask


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("attention", METHODS)
def test_a_text_of_a_batch_goes_on_as_alone(attention, use_cache):
    made, (ids, mask) = model(attention), prompts()
    if use_cache and ("blocks" in attention or "+" in attention):
        with pytest.raises(UnsupportedError):
            made.generate(ids, mask, max_new_tokens=6)
        return
    found = made.generate(ids, mask, max_new_tokens=6, use_cache=use_cache)
    for row, length in enumerate(LENGTHS):
        alone = made.generate(ids[row : row + 1, N - length :], max_new_tokens=6, use_cache=use_cache)
        assert found[row, -6:].tolist() == alone[0, -6:].tolist()
    assert torch.equal(found[:, :N], ids)


@pytest.mark.parametrize("attention", METHODS)
def test_padding_on_the_left_changes_no_logits(attention):
    made, (ids, mask) = model(attention), prompts()
    logits = made(ids, mask)
    for row, length in enumerate(LENGTHS):
        alone = made(ids[row : row + 1, N - length :])
        torch.testing.assert_close(logits[row : row + 1, N - length :], alone, atol=1e-4, rtol=1e-4)


MODIFIERS = (
    {"softcap": 1.5},
    {"sinks": True},
    {"position_bias": "alibi"},
    {"position_bias": "t5"},
    {"softcap": 2.0, "sinks": True, "position_bias": "alibi", "num_kv_heads": 2, "rotary": True},
)


@pytest.mark.parametrize("attention", ["dense", "sliding_window:left=6,right=0", "longformer:window=4"])
@pytest.mark.parametrize("modifiers", MODIFIERS, ids=str)
def test_what_is_done_to_scores(attention, modifiers, tmp_path):
    """Prefill, cached steps, a batch padded on the left, checkpoints and gradients know softcap, sinks and biases."""
    made, (ids, mask) = model(attention, modifiers), prompts()
    for layer in made.decoder.layers:
        if layer.attention.sinks is not None:
            torch.nn.init.uniform_(layer.attention.sinks, 5.0, 20.0)
        if modifiers.get("position_bias") == "t5":
            torch.nn.init.normal_(layer.attention.position_bias.table)
    logits = made(ids, mask)
    plain = {name: value for name, value in modifiers.items() if name in ("num_kv_heads", "rotary")}
    other = model(attention, plain)
    other.load_state_dict(made.state_dict(), strict=False)
    assert not torch.allclose(other(ids, mask)[:, -1], logits[:, -1], atol=1e-2)
    for row, length in enumerate(LENGTHS):
        alone = made(ids[row : row + 1, N - length :])
        torch.testing.assert_close(logits[row : row + 1, N - length :], alone, atol=1e-4, rtol=1e-4)
    steps = [made.generate(ids, mask, max_new_tokens=6, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*steps)
    made.save_pretrained(tmp_path)
    again = CausalLM.from_pretrained(tmp_path)
    assert again.config == made.config and torch.equal(again(ids, mask), logits)
    logits.square().sum().backward()
    learned = [p for name, p in made.named_parameters() if name.endswith(("sinks", "position_bias.table"))]
    assert all(p.grad is not None and bool(p.grad.any()) for p in learned)
    assert bool(learned) == (modifiers.get("sinks", False) or modifiers.get("position_bias") == "t5")


def test_a_method_that_knows_no_modifier_is_refused():
    with pytest.raises(UnsupportedError, match="softcap and sinks cannot be served by linear"):
        TransformerConfig(32, 2, 4, causal=True, attention="linear", softcap=2.0, sinks=True)
    made = model("dense", {"position_bias": "t5"})
    with pytest.raises(UnsupportedError, match="position_bias cannot be served by performer"):
        made.set_attention("performer")
    assert str(made.config.decoder.attention) == "dense"
    with pytest.raises(InputError, match="position_bias must be one of none, alibi, t5"):
        TransformerConfig(32, 2, 4, position_bias="rope")
    with pytest.raises(InputError, match="softcap must be None or a positive"):
        TransformerConfig(32, 2, 4, softcap=0.0)


def test_groups_end_together():
    """A group whose texts have all ended goes on with padding until the others end."""
    made, (ids, mask) = model("longformer:window=4"), prompts()
    free = made.generate(ids, mask, max_new_tokens=8)[:, N:]
    eos = int(free[2, 1])
    found = made.generate(ids, mask, max_new_tokens=8, eos_token_id=eos, pad_token_id=1)[:, N:]
    for row in range(4):
        text = free[row].tolist()
        end = text.index(eos) + 1 if eos in text else 8
        wanted = text[:end] + [1] * (8 - end)
        assert found[row].tolist() == wanted[: found.shape[1]]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=80, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, pad_token_id=1,
        initializer_range=0.4,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(folder)
    return theirs, CausalLM.from_pretrained(folder)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "length_penalty": 0.3, "early_stopping": True},
        {"num_beams": 3, "repetition_penalty": 1.4, "min_new_tokens": 5},
        {"num_beams": 2, "no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 12},
    ],
    ids=str,
)
def test_it_generates_what_transformers_does(gpt2, options, use_cache):
    theirs, ours = gpt2
    ids = torch.randint(2, V, (4, 9), generator=torch.Generator().manual_seed(2))
    for eos in (0, int(ours.generate(ids, max_new_tokens=6)[0, -1])):
        common = {"max_new_tokens": 14, "eos_token_id": eos, "pad_token_id": 1, **options}
        wanted = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **common)
        assert torch.equal(ours.generate(ids, use_cache=use_cache, **common), wanted)


@pytest.mark.parametrize("attention", ["dense", "longformer:window=4"])
def test_beams_and_penalties_of_a_batch_are_those_of_each_alone(attention):
    made, (ids, mask) = model(attention), prompts()
    for options in ({"num_beams": 3}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}):
        found = made.generate(ids, mask, max_new_tokens=6, **options)
        for row, length in enumerate(LENGTHS):
            alone = made.generate(ids[row : row + 1, N - length :], max_new_tokens=6, **options)
            assert found[row, -6:].tolist() == alone[0, -6:].tolist()


class Letters:
    """A tokenizer whose token n is a letter."""

    def decode(self, ids):
        return "".join(chr(ord("0") + number) for number in ids)


def test_a_stop_string_ends_its_text_alone():
    made, (ids, _) = model(), prompts()
    letters = Letters()
    free = made.generate(ids, max_new_tokens=8)[:, N:]
    stop = letters.decode(free[1, 2:4].tolist())
    found = made.generate(ids, max_new_tokens=8, stop_strings=stop, tokenizer=letters, pad_token_id=1)[:, N:]
    for row in range(4):
        text = letters.decode(free[row].tolist())
        end = text.index(stop) + 2 if stop in text else 8
        assert found[row].tolist() == (free[row, :end].tolist() + [1] * 8)[: found.shape[1]]
    assert (found[1, 4:] == 1).all()
    everything = made.generate(ids, max_new_tokens=8, stop_strings=list(map(chr, range(48, 120))), tokenizer=letters)
    assert everything.shape == (4, N + 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"min_new_tokens": 30}, "min_new_tokens must be from 0 to max_new_tokens"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be"),
        ({"stop_strings": "a"}, "give the tokenizer"),
        ({"stop_strings": ["a", ""], "tokenizer": Letters()}, "at least one character"),
        ({"num_beams": 0}, "num_beams must be"),
        ({"num_beams": 2, "temperature": 1.0}, "leave temperature and stop_strings out"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping must be"),
        ({"max_length": 5}, "max_length 5 counts the prompt too"),
        ({"do_sample": True, "temperature": 0.0}, "contradict each other"),
        ({"num_return_sequences": 2}, "no option num_return_sequences; it has"),
    ],
)
def test_wrong_options_are_named(options, says):
    with pytest.raises(InputError, match=says):
        model().generate(prompts()[0], **options)


def test_lengths_may_count_the_prompt_and_sampling_may_be_asked_for_by_name():
    ids, made = prompts()[0], model()
    N = ids.shape[1]
    assert torch.equal(made.generate(ids, max_length=N + 5), made.generate(ids, max_new_tokens=5))
    assert torch.equal(made.generate(ids, do_sample=False, max_new_tokens=5), made.generate(ids, max_new_tokens=5))
    sampled = made.generate(ids, do_sample=True, seed=0, max_new_tokens=5)
    assert torch.equal(sampled, made.generate(ids, temperature=1.0, seed=0, max_new_tokens=5))
    first = int(made.generate(ids[:1], max_new_tokens=1)[0, -1])
    early = made.generate(ids[:1], max_new_tokens=4, eos_token_id=first)
    late = made.generate(ids[:1], max_new_tokens=4, min_length=N + 3, eos_token_id=first)
    assert early.shape[1] == N + 1 and first not in late[0, N : N + 3]


CHOICES = [f"{name},queries=first" for name in ("topk_blocks:block=16,blocks=2", "topp_blocks:block=16,mass=0.5")]


@pytest.mark.parametrize("attention", [*CHOICES, "lsh:n_buckets=4"])
def test_what_is_chosen_by_content_is_the_same_with_a_cache_or_refused(attention):
    """A step that begins a block of queries chooses as in the whole sequence; one inside a block would not."""
    made, (ids, _) = model(attention), prompts()
    ids = ids[:1].repeat(1, 3)
    with torch.no_grad():
        whole = made(ids)
        for first in (16, 32, 64, 1, 15, 33):
            cache = made.decoder.make_cache()
            torch.testing.assert_close(made(ids[:, :first], cache=cache), whole[:, :first], atol=1e-4, rtol=1e-4)
            if first % 16 and attention in CHOICES:
                with pytest.raises(
                    UnsupportedError, match=f"from position {first} of a cached sequence.*use_cache=False"
                ):
                    made(ids[:, first : first + 1], cache=cache)
            else:
                step = made(ids[:, first : first + 7], cache=cache)
                torch.testing.assert_close(step, whole[:, first : first + 7], atol=1e-4, rtol=1e-4)
