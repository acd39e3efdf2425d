"""Layers past transformers' interface that write their attention out, against eager: float64, padding, gradients."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from efficient_attn import convert
from efficient_attn.errors import InputError, InputTypeError, UnsupportedError
from efficient_attn.integrations import register_layer

transformers = pytest.importorskip("transformers")

GPT = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
BERT = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT |= {"intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0}
DISENTANGLED = {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
FALCON = {**BERT, "bos_token_id": 1, "eos_token_id": 2}
NEO = {"vocab_size": 50, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 4}
NEO |= {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64}
WRITERS = {
    "GPTJ": ("GPTJForCausalLM", {**GPT, "rotary_dim": 4}),
    "CodeGen": ("CodeGenForCausalLM", {**GPT, "rotary_dim": 4, "n_ctx": 64}),
    "GPTNeo": ("GPTNeoForCausalLM", NEO),
    "GPTNeoXJapanese": ("GPTNeoXJapaneseForCausalLM", {k: v for k, v in BERT.items() if k != "intermediate_size"}),
    "Bloom": ("BloomForCausalLM", {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "Falcon": ("FalconForCausalLM", FALCON),
    "Falcon, ALiBi": ("FalconForCausalLM", {**FALCON, "alibi": True, "multi_query": False}),
    "Falcon, ALiBi, sdpa": ("FalconForCausalLM", {**FALCON, "alibi": True, "multi_query": False}),  # added once there
    "Falcon, groups": ("FalconForCausalLM", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "Mpt": ("MptForCausalLM", {"vocab_size": 50, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "RemBert": ("RemBertForCausalLM", {**BERT, "input_embedding_size": 16, "is_decoder": True}),
}
PERCEIVER = {"d_model": 32, "d_latents": 32, "num_latents": 6, "num_self_attends_per_block": 1}
READERS = {
    "DebertaV2": ("DebertaV2Model", DISENTANGLED),
    "BigBird": ("BigBirdModel", {**BERT, "attention_type": "original_full"}),
    "LayoutLMv3": ("LayoutLMv3Model", {**BERT, "coordinate_size": 4, "shape_size": 8, "visual_embed": False}),
    "MPNet": ("MPNetModel", BERT),
    "BlipText": ("BlipTextModel", {**BERT, "encoder_hidden_size": 32, "is_decoder": False}),
    "Perceiver": ("PerceiverModel", {**PERCEIVER, "num_self_attention_heads": 4, "num_cross_attention_heads": 4}),
    "Longformer": ("LongformerModel", {**BERT, "attention_window": 4}),
}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SIGHT = {"image_size": 32, "patch_size": 8}
SEERS = {
    "Swinv2": ("Swinv2Model", {**SIGHT, "patch_size": 4, "embed_dim": 16, "depths": [2], "num_heads": [2]}),
    "BlipVision": ("BlipVisionModel", {**VIT, **SIGHT}),
    "Sam": ("SamVisionModel", {**VIT, **SIGHT, "window_size": 2, "global_attn_indexes": [1], "output_channels": 16}),
}
WAVES = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
HEARERS = {"WavLM": ("WavLMModel", {**VIT, **WAVES, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2})}
ALL = WRITERS | READERS | SEERS | HEARERS
IDS = torch.randint(3, 49, (2, 14), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0
RIGHT = MASK.flip(1)


def make(family: str, **options):
    model, numbers = ALL[family]
    torch.manual_seed(0)
    cls = getattr(transformers, model)
    ids = {} if family in SEERS or family in HEARERS else {"bos_token_id": 1, "eos_token_id": 2}
    config = cls.config_class(**{**ids, **numbers, **options})
    made = cls._from_config(config, attn_implementation="sdpa" if family.endswith("sdpa") else "eager")
    with torch.no_grad():
        for name, parameter in made.named_parameters():  # beyond 0.02, so that attention decides over what comes out
            parameter.mul_(1 if "norm" in name.lower() or "weight_" in name or "original" in name else 3)
    if family in ("Bloom", "Mpt", "Longformer"):  # in float64 eager's own padded rows are NaN
        return made.eval()
    return made.eval().double()


def given(family: str) -> dict[str, torch.Tensor]:
    if family in SEERS:
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()}
    if family in HEARERS:
        sound = torch.randn(2, 400, generator=torch.Generator().manual_seed(1)).double()
        heard = torch.ones(2, 400, dtype=torch.int64)
        heard[0, 300:] = 0
        return {"input_values": sound, "attention_mask": heard}
    if family == "Perceiver":
        hidden = torch.randn(2, 14, 32, generator=torch.Generator().manual_seed(1)).double()
        return {"inputs": hidden, "attention_mask": RIGHT}
    if family == "LayoutLMv3":
        boxes = (
            torch.randint(0, 60, (2, 14, 2, 2), generator=torch.Generator().manual_seed(1)).sort(2).values.flatten(2)
        )
        return {"input_ids": IDS, "attention_mask": RIGHT, "bbox": boxes}
    if family == "Longformer":
        glob = torch.zeros_like(IDS)
        glob[0, 0] = glob[1, 4] = glob[1, 6] = 1
        return {"input_ids": IDS, "attention_mask": RIGHT, "global_attention_mask": glob}
    return {"input_ids": IDS, "attention_mask": MASK if family in WRITERS else RIGHT}


def run(model, arguments):
    model.zero_grad()
    out = model(**arguments)[0]
    mask = arguments.get("attention_mask")
    if mask is not None and mask.shape == out.shape[:2]:
        out = out[mask.bool()]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)
    (out * weights).sum().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ALL)
def test_equal_to_eager_and_back(family: str) -> None:
    model, arguments = make(family), given(family)
    before = run(model, arguments)
    limit = 1e-5 if family in WRITERS or family == "Longformer" else 1e-9  # those calculate in float32 in places
    full = {n: x for n, x in arguments.items() if n != "attention_mask"}
    report = convert(model, sample=full, repeats=0, tolerance=limit)
    assert len(report.converted) >= 2 and report.dense_error is not None and not report.skipped and not report.unreached
    out, gradients = run(model, arguments)
    assert (out - before[0]).abs().max() <= limit * before[0].abs().max()
    assert gradients.keys() == before[1].keys()
    largest = max(float(g.abs().max()) for g in before[1].values())
    assert all((gradients[n] - g).abs().max() <= limit * largest for n, g in before[1].items())
    report.undo()
    again = run(model, arguments)
    assert torch.equal(again[0], before[0]) and all(torch.equal(again[1][n], g) for n, g in before[1].items())


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", WRITERS)
def test_generates_what_eager_does(family: str, cache: str) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"cache_implementation": cache, "disable_compile": True}
    model = make(family)
    try:
        before = model.generate(IDS, attention_mask=MASK, **options)
    except ValueError as error:
        pytest.skip(f"eager does not: {str(error)[:80]}")
    if (family, cache) == ("GPTNeo", "static"):  # eager's own local mask is misplaced among the keys of that cache
        before = model.generate(IDS, attention_mask=MASK, **{**options, "cache_implementation": "dynamic"})
    convert(model)
    assert torch.equal(model.generate(IDS, attention_mask=MASK, **options), before)


@pytest.mark.parametrize("family", WRITERS)
def test_a_window_is_one_in_the_prompt_and_in_what_is_generated(family: str) -> None:
    """Logits of one forward over all tokens are those of a prompt and single tokens through a cache."""
    model = make(family)
    before = model(IDS).logits
    sample = {"input_ids": IDS}
    report = convert(model, "sliding_window:left=2,right=0", sample=sample, repeats=0, tolerance=1e-5)
    assert report.error is not None and report.error > 1e-3
    after = model(IDS).logits
    torch.testing.assert_close(after[:, :3], before[:, :3], rtol=1e-5, atol=1e-5)  # what the window holds anyway
    assert not torch.allclose(after[:, 8:], before[:, 8:], rtol=1e-3, atol=1e-3)
    step = model(IDS[:, :9], use_cache=True)
    found = [step.logits]
    for i in range(9, IDS.shape[1]):
        step = model(IDS[:, i : i + 1], past_key_values=step.past_key_values, use_cache=True)
        found.append(step.logits)
    torch.testing.assert_close(torch.cat(found, 1), after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [name for name in ALL if name != "Longformer"])
def test_other_methods_fit_or_say_why_not(family: str) -> None:
    arguments = {n: x for n, x in given(family).items() if n != "attention_mask"}
    served = 0
    for spec in ("sliding_window:left=2,right=2", "bigbird:block=16", "linear", "nystrom:landmarks=4"):
        model = make(family)
        before = model(**arguments)[0]
        try:
            convert(model, spec, sample=arguments, repeats=0, tolerance=1e-5)
        except UnsupportedError as error:
            assert spec.partition(":")[0] in str(error).lower()
            continue
        out = model(**arguments)[0]
        assert out.isfinite().all() and out.shape == before.shape
        served += 1
    assert served >= 1


def test_weights_are_returned_where_they_are_asked_for() -> None:
    for family in ("GPTJ", "Bloom", "DebertaV2", "MPNet"):
        model, arguments = make(family), given(family)
        before = model(**arguments, output_attentions=True).attentions
        convert(model)
        after = model(**arguments, output_attentions=True).attentions
        assert len(after) == len(before) == 2
        seen = arguments["attention_mask"].bool()
        for a, b in zip(after, before, strict=True):
            torch.testing.assert_close(a.transpose(1, 2)[seen], b.transpose(1, 2)[seen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["Longformer", "WavLM"])
def test_weights_that_cannot_be_given_are_refused(family: str) -> None:
    model = make(family)
    convert(model)
    with pytest.raises(UnsupportedError, match="output_attentions"):
        model(**given(family), output_attentions=True)


def test_what_is_not_served_is_refused_by_name() -> None:
    own = transformers.NystromformerModel(
        transformers.NystromformerConfig(**BERT, num_landmarks=4, segment_means_seq_len=16)
    )
    with pytest.raises(InputError, match="approximates attention in a way of its own"):
        convert(own)
    with pytest.raises(InputError, match="has a pattern of its own, which 'dense' serves"):
        convert(make("Longformer"), "linear")
    with pytest.raises(InputError, match="has a pattern of its own, which 'dense' serves"):
        convert(make_blocks("BigBird", 4), "linear")


# --- BigBird's blocks ---


def make_blocks(kind: str, block: int) -> nn.Module:
    shared = {"attention_type": "block_sparse", "block_size": block, "num_random_blocks": 2, "vocab_size": 50}
    shared |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 3}
    if kind == "BigBird":
        numbers = {**BERT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    else:
        numbers = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "dropout": 0.0, "attention_dropout": 0.0}
        numbers |= {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
        numbers |= {f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")}
    cls = getattr(transformers, f"{kind}Model")
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**numbers, **shared, "max_position_embeddings": 512}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.double()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("block", "N"), [(4, 64), (16, 200)])
@pytest.mark.parametrize("kind", ["BigBird", "BigBirdPegasus"])
def test_blocks_of_bigbird(kind: str, block: int, N: int, training: bool) -> None:
    """Random blocks are those that the layer draws itself: none in eval mode, where it counts the first block again."""
    model = make_blocks(kind, block).train(training)
    ids = torch.randint(4, 49, (2, N), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, N - 10 :] = 0
    arguments = {"input_ids": ids, "attention_mask": mask}
    before = run(model, arguments)
    report = convert(model)
    assert sum("its own pattern" in how for how in report.converted.values()) == 2
    after = run(model, arguments)
    torch.testing.assert_close(after[0], before[0], rtol=1e-10, atol=1e-10)
    largest = max(float(g.abs().max()) for g in before[1].values())
    assert all((after[1][n] - g).abs().max() <= 1e-10 * largest for n, g in before[1].items())
    with pytest.raises(UnsupportedError, match="output_attentions"):
        model(**arguments, output_attentions=True)
    report.undo()
    again = run(model, arguments)
    assert torch.equal(again[0], before[0])


def test_a_short_sequence_makes_bigbird_dense_and_it_is_served_still() -> None:
    """The model then gives itself other layers, which are to be served as those were."""
    model, ids = make_blocks("BigBird", 16).eval(), torch.randint(4, 49, (2, 30))
    before = model(ids)[0]
    model.set_attention_type("block_sparse")
    report = convert(model)
    out = model(ids)[0]
    torch.testing.assert_close(out, before, rtol=1e-10, atol=1e-10)
    layers = [m for m in model.modules() if type(m).__name__ == "BigBirdSelfAttention"]
    assert len(layers) == 2 and all("efficient_attn_method" in vars(layer) for layer in layers)
    report.undo()
    assert not any("efficient_attn_method" in vars(m) or "set_attention_type" in vars(m) for m in model.modules())
    assert torch.equal(model(ids)[0], before)


class Largest(TorchDispatchMode):
    """The most numbers that a tensor had."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize(
    "family",
    ["GPTJ", "GPTNeoXJapanese", "Bloom", "Falcon", "Falcon, ALiBi", "Falcon, ALiBi, sdpa", "Mpt", "MPNet", "BigBird",
     "GPTNeo"],
)  # fmt: skip
def test_nothing_is_as_large_as_queries_times_keys(family: str) -> None:
    n = 512
    model = make(family, max_position_embeddings=n + 2, n_positions=n, max_seq_len=n, n_ctx=n).float()
    convert(model)
    ids = torch.randint(3, 49, (1, n))
    with torch.no_grad(), Largest() as largest:
        model(ids)
    assert largest.numbers < n * n


@pytest.mark.parametrize("family", ["Falcon, ALiBi", "Falcon, ALiBi, sdpa"])
def test_falcon_adds_its_bias_as_often_as_before_in_every_layer(family: str) -> None:
    model = make(family)
    before = model(IDS, attention_mask=MASK).logits
    first = convert(model, predicate=lambda name, module: ".h." not in name or ".h.0." in name)  # one of two layers
    torch.testing.assert_close(model(IDS, attention_mask=MASK).logits[MASK.bool()], before[MASK.bool()])
    second = convert(copy.deepcopy(model))  # from one method to another, in a copy
    assert len(second.converted) > len(first.converted)
    other = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(other(IDS, attention_mask=MASK).logits[MASK.bool()], before[MASK.bool()])
    first.undo()
    assert torch.equal(model(IDS, attention_mask=MASK).logits, before)


class Mine(nn.Module):
    """A layer as a user writes one."""

    num_heads = 4

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.reshape(*x.shape[:2], 4, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * 0.3
        weights = scores.masked_fill(hidden[:, None, None], float("-inf")).softmax(-1)
        return torch.einsum("bhij,bhjd->bihd", weights, v).flatten(2)


class Unlike(Mine):
    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return self.qkv(x)


class Twice(Mine):
    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        weights = (x @ x.transpose(1, 2)).softmax(-1)
        return (weights * 2) @ x


def test_a_layer_of_a_user_joins_by_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    from efficient_attn.integrations import eager_layers

    monkeypatch.setattr(eager_layers, "OF_USERS", set())
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": Mine()}).double()
    x, hidden = torch.randn(2, 9, 32).double(), RIGHT[:, :9] == 0
    before = model["a"](x, hidden)
    with pytest.raises(InputError, match="no attention that can be converted"):
        convert(model)
    register_layer(Mine)
    convert(model)
    torch.testing.assert_close(model["a"](x, hidden), before, rtol=1e-9, atol=1e-10)
    for other, what in ((Unlike, "made no product"), (Twice, "applies mul to its attention weights")):
        model = nn.ModuleDict({"a": other()}).double()
        convert(model)
        with pytest.raises(UnsupportedError, match=what):
            model["a"](x, hidden)
    with pytest.raises(InputTypeError, match="class"):
        register_layer("Mine")  # type: ignore[arg-type]
