"""CLIP: its loss against the definition, outputs against transformers', zero-shot classification and retrieval."""

import dataclasses
import math

import pytest
import torch
from support.model_checks import check_compiles, check_half_precision, check_round_trip, check_trains

from efficient_attn.errors import CheckpointError, InputError, InputTypeError, UnsupportedError
from efficient_attn.models import CLIP, CLIPConfig, ImageConfig, TextTowerConfig, TransformerConfig, ViT
from efficient_attn.models.clip import recall_at, retrieve
from efficient_attn.models.contrastive import contrastive_loss

EOS = 98


def clip(image="dense", text="dense", **options):
    sizes = {"hidden_dim": 32, "num_layers": 2, "num_heads": 4, "mlp_dim": 48}
    pictures = ImageConfig(16, 4, 1, encoder=TransformerConfig(**sizes, attention=image))
    texts = TextTowerConfig(99, 20, EOS, encoder=TransformerConfig(**sizes, causal=True, attention=text))
    return CLIP(CLIPConfig(pictures, texts, projection_dim=16, **options))


def texts(count=5, length=12):
    """Ids with their end token at different places, padded with 0, and the mask."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 90, (count, length), generator=generator)
    ends = torch.randint(2, length, (count, 1), generator=generator)
    steps = torch.arange(length)
    ids = torch.where(steps == ends, EOS, torch.where(steps > ends, 0, ids))
    return ids, (steps <= ends).long()


def theirs(tmp_path, *, eos=EOS, dicts=False):
    """A tiny CLIP of transformers with weights that matter everywhere, saved."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    text = {**sizes, "vocab_size": 99, "max_position_embeddings": 20, "eos_token_id": eos, "bos_token_id": 97}
    vision = {**sizes, "hidden_size": 48, "image_size": 16, "patch_size": 4}
    torch.manual_seed(1)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(tmp_path)
    return model


@pytest.mark.parametrize("eos", [EOS, 2])
def test_clip_equals_transformers(eos, tmp_path):
    """Padded texts; with the end token's id, and with the 2 of old files, which stands for the largest id."""
    model, ours = theirs(tmp_path, eos=eos), CLIP.from_pretrained(tmp_path)
    assert ours.config.text.eos_token_id == (EOS if eos == EOS else None)
    assert ours.config.image.encoder.activation == "quick_gelu" and ours.config.text.encoder.causal
    images, (ids, mask) = torch.randn(4, 3, 16, 16), texts()
    with torch.no_grad():
        for attention_mask in (None, mask):
            expected = model(input_ids=ids, pixel_values=images, attention_mask=attention_mask)
            close = {"atol": 1e-4, "rtol": 1e-4}
            torch.testing.assert_close(ours(images, ids, attention_mask), expected.logits_per_image, **close)
            torch.testing.assert_close(ours.encode_image(images), expected.image_embeds, **close)
            torch.testing.assert_close(ours.encode_text(ids, attention_mask), expected.text_embeds, **close)
        expected = model(input_ids=ids[:4], pixel_values=images, return_loss=True)
        torch.testing.assert_close(ours.loss(images, ids[:4]), expected.loss, atol=1e-4, rtol=1e-4)
        wide = torch.randn(2, 3, 24, 32)
        expected = model.get_image_features(wide, interpolate_pos_encoding=True).pooler_output
        torch.testing.assert_close(ours.image_projection(ours.image.pooled(wide)), expected, atol=1e-4, rtol=1e-4)


def test_clip_reads_old_files_and_refuses_others(tmp_path):
    import json

    theirs(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    old = {**config, "text_config_dict": config["text_config"], "text_config": {"hidden_size": 1}}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert CLIP.from_pretrained(tmp_path).config.text.encoder.hidden_dim == 32
    config["text_config"]["eos_token_id"] = [1, 2]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="one token"):
        CLIP.from_pretrained(tmp_path)


@pytest.mark.parametrize("eos", [EOS, None])
def test_a_text_without_its_end_token_is_refused(eos):
    """As a tokenizer leaves it that cuts: all such texts had the vector of their first token."""
    torch.manual_seed(0)
    model = clip().eval()
    object.__setattr__(model.config.text, "eos_token_id", eos)
    ids, mask = texts()
    whole = model.encode_text(ids)
    assert torch.pdist(whole).min() > 1e-3
    for cut in (1, 3):
        broken = torch.where((ids == EOS) & (torch.arange(5)[:, None] >= 5 - cut), 7, ids)
        for attention_mask in (None, mask):
            with pytest.raises(InputError, match=rf"{cut} of 5 texts \(row {5 - cut} first\) lack the end token 98"):
                model.encode_text(broken, attention_mask=attention_mask)
    torch.testing.assert_close(model.encode_text(ids[:1]), whole[:1])


def test_a_single_pair_teaches_nothing_and_is_refused():
    with pytest.raises(InputError, match="this one has 1"):
        clip().loss(torch.randn(1, 1, 16, 16), texts(1)[0])


def test_contrastive_loss_equals_its_definition():
    torch.manual_seed(0)
    image, text, scale = torch.randn(4, 6), torch.randn(4, 6), 7.0
    image, text = image / image.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True)
    total = 0.0
    for i in range(4):
        row = [math.exp(scale * image[i] @ text[j]) for j in range(4)]
        column = [math.exp(scale * image[j] @ text[i]) for j in range(4)]
        total -= math.log(row[i] / sum(row)) + math.log(column[i] / sum(column))
    assert contrastive_loss(image, text, scale).item() == pytest.approx(total / 8, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert contrastive_loss(image, text, scale).item() == pytest.approx(total / 8, rel=1e-5)
    with pytest.raises(InputError, match="one shape"):
        contrastive_loss(image, text[:3], scale)


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("dense", "dense"),
        ("neighborhood:kernel=3,prefix=1", "sliding_window:left=4,right=0"),
        ("nystrom:landmarks=4", "performer:features=16"),
    ],
)
def test_clip_trains_and_comes_back(image, text, tmp_path):
    torch.manual_seed(0)
    model, images, (ids, mask) = clip(image, text), torch.rand(5, 1, 16, 16), texts()
    check_trains(model, lambda m: m.loss(images, ids, mask))
    check_round_trip(model, lambda m: m(images, ids, mask), tmp_path)


def test_half_precision_and_compilation():
    torch.manual_seed(0)
    images, (ids, mask) = torch.rand(5, 1, 16, 16), texts()
    check_compiles(clip().loss, images, ids, mask)
    check_half_precision(clip(), lambda m, dtype: m.loss(images.to(dtype), ids, mask))


def test_set_attention_of_one_tower_or_both():
    model = clip()
    model.set_attention({"image.encoder": "nystrom:landmarks=4"})
    assert model.config.image.encoder.attention == "nystrom:landmarks=4"
    assert model.config.text.encoder.attention == "dense"
    model.set_attention("longformer:window=4")
    assert {model.config.image.encoder.attention, model.config.text.encoder.attention} == {"longformer:window=4"}
    with pytest.raises(UnsupportedError, match="cannot be causal"):
        model.set_attention("linformer")
    assert model.config.image.encoder.attention == "longformer:window=4"


def test_a_text_is_read_at_its_end_and_not_beyond():
    torch.manual_seed(0)
    model, (ids, mask) = clip().eval(), texts()
    expected = model.encode_text(ids)
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(model.encode_text(ids, mask.bool()), expected)
    torch.testing.assert_close(model.encode_text(torch.where(mask == 0, 55, ids)), expected)
    before = ids.clone()
    before[:, 0] += 1
    assert ((model.encode_text(before) - expected).abs().amax(dim=1) > 1e-5).all()


def test_the_temperature_is_clamped_in_training():
    model, images, (ids, _) = clip(logit_scale=9.0, max_scale=50.0), torch.rand(5, 1, 16, 16), texts()
    model.eval()
    before = model.loss(images, ids)
    assert model.logit_scale.item() == 9.0
    model.train()
    torch.testing.assert_close(model.loss(images, ids), before)  # in eval mode it was clamped on the way
    assert model.logit_scale.exp().item() == pytest.approx(50.0, rel=1e-5) and model.logit_scale.requires_grad
    assert CLIP(CLIPConfig(model.config.image, model.config.text)).logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_zero_shot_classification():
    torch.manual_seed(0)
    model, images, (ids, mask) = clip().eval(), torch.rand(3, 1, 16, 16), texts()
    labels = torch.tensor([0, 1, 0, 2, 1])
    classes = model.class_embeddings(ids, labels, mask)
    text = model.encode_text(ids, mask)
    means = torch.stack([text[labels == c].mean(dim=0) for c in range(3)])
    expected = model.encode_image(images) @ (means / means.norm(dim=1, keepdim=True)).T * model.logit_scale.exp()
    torch.testing.assert_close(model.classify(images, classes), expected)
    single = model.class_embeddings(ids, torch.arange(5))
    torch.testing.assert_close(model.classify(images, single), model(images, ids))
    with pytest.raises(InputError, match=r"classes \[1\] have no prompt"):
        model.class_embeddings(ids[:2], torch.tensor([0, 2]))
    with pytest.raises(InputError, match="labels must be int64"):
        model.class_embeddings(ids, labels[:3])
    with pytest.raises(InputError, match="from 0 on"):
        model.class_embeddings(ids, labels - 1)


def test_a_classifier_starts_from_the_image_tower():
    torch.manual_seed(0)
    model, images = clip("axial:prefix=1"), torch.rand(3, 1, 16, 16)
    classifier = ViT.from_backbone(model.image, num_labels=4)
    assert torch.equal(classifier.features(images), model.image.pooled(images))
    assert classifier(images).shape == (3, 4)


def test_retrieval():
    torch.manual_seed(0)
    gallery = torch.nn.functional.normalize(torch.randn(6, 4), dim=1)
    queries = gallery[:4] + 0.01
    scores, found = retrieve(queries, gallery, 3)
    cosines = queries @ gallery.T
    for q in range(4):
        order = sorted(range(6), key=lambda g, q=q: -cosines[q, g].item())
        assert found[q].tolist() == order[:3] and scores[q].tolist() == [cosines[q, g].item() for g in order[:3]]
    assert recall_at(1, queries, gallery) == 1.0
    assert recall_at(1, queries.roll(1, 0), gallery) == 0.0 and recall_at(6, queries.roll(1, 0), gallery) == 1.0
    for k in (0, 7):
        with pytest.raises(InputError, match="k must be from 1 to the 6"):
            retrieve(queries, gallery, k)
    with pytest.raises(InputError, match="no own thing"):
        recall_at(1, gallery, queries)


def test_clip_names_wrong_input():
    model, images = clip(), torch.rand(2, 1, 16, 16)
    for ids, error, message in (
        (torch.zeros(2, 21, dtype=torch.int64), InputError, "positions for 20 tokens"),
        (torch.full((2, 5), 99), InputError, "from 0 to 98"),
        (torch.zeros(2, 5), InputTypeError, "int64"),
        (torch.zeros(5, dtype=torch.int64), InputError, r"\(batch, tokens\)"),
        (torch.full((3, 5), EOS), InputError, "one shape"),
    ):
        with pytest.raises(error, match=message):
            model.loss(images, ids)
    with pytest.raises(InputError, match="no whole number"):
        model.encode_image(torch.rand(2, 1, 16, 15))
    with pytest.raises(InputError, match="max_scale"):
        dataclasses.replace(model.config, max_scale=0.5)
