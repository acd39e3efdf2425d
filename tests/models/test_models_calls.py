"""The models called as those of transformers are: `model(**inputs, labels=labels)`, with their tokenizers, processors
and checkpoints; and what their labels may be."""

import pytest
import torch
import torch.nn.functional as F

from efficient_attn.errors import InputError, InputTypeError
from efficient_attn.models import (
    CLIP,
    MAE,
    CausalLM,
    CausalLMConfig,
    ClassifierOutput,
    CLIPConfig,
    ForecasterConfig,
    ImageConfig,
    LabelConfig,
    MAEConfig,
    PatchForecaster,
    Seq2Seq,
    Seq2SeqConfig,
    TextClassifier,
    TextClassifierConfig,
    TextTowerConfig,
    TimeSeriesConfig,
    TimeSeriesTransformer,
    TransformerConfig,
    ViT,
    ViTConfig,
)

SMALL = TransformerConfig(16, 1, 2)
CAUSAL = TransformerConfig(16, 1, 2, causal=True)
IMAGES = ImageConfig(image_size=8, patch_size=4, channels=1, encoder=SMALL)


def text(num_labels=3, **labels):
    return TextClassifier(TextClassifierConfig(30, 12, SMALL, num_labels, labels=LabelConfig(**labels))).eval()


def inputs_of():
    torch.manual_seed(0)
    ids = torch.randint(2, 30, (4, 10))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


# Every model: what it is made of, its inputs by transformers' names, what makes a loss, and the order by position.
def models():
    torch.manual_seed(0)
    ids, pixels = torch.randint(2, 30, (4, 10)), torch.rand(4, 1, 8, 8)
    ends = torch.cat([ids, torch.full((4, 1), 1)], 1)
    writer = TransformerConfig(16, 1, 2, causal=True, cross_attention=True)
    series = torch.randn(4, 20, 2).cumsum(1)
    return {
        "text": (text(), {"input_ids": ids}, {"labels": torch.tensor([0, 1, 2, -100])}),
        "image": (ViT(ViTConfig(IMAGES, 3)), {"pixel_values": pixels}, {"labels": torch.tensor([0, 1, 2, 0])}),
        "clip": (
            CLIP(CLIPConfig(IMAGES, TextTowerConfig(30, 12, 1, CAUSAL), 8)),
            {"pixel_values": pixels, "input_ids": ends},
            {"return_loss": True},
        ),
        "lm": (CausalLM(CausalLMConfig(30, 12, CAUSAL)), {"input_ids": ids}, {"labels": ids}),
        "seq2seq": (
            Seq2Seq(Seq2SeqConfig(30, 12, SMALL, writer)),
            {"input_ids": ids, "decoder_input_ids": ids[:, :5]},
            {"labels": ids[:, 1:6]},
        ),
        "mae": (MAE(MAEConfig(IMAGES, SMALL)), {"pixel_values": pixels}, {}),
        "forecast": (
            PatchForecaster(ForecasterConfig(16, 4, 4, 2, encoder=SMALL)),
            {"past_values": series[:, :16]},
            {"future_values": series[:, 16:]},
        ),
    }


@pytest.mark.parametrize("name", sorted(models()))
def test_by_name_or_with_labels_there_is_an_output_and_by_position_the_tensor(name):
    model, inputs, labels = models()[name]
    model.eval()

    def call(*args, **options):
        torch.manual_seed(0)  # of MAE's masks
        return model(*args, **options)

    named, learned = call(**inputs), call(**inputs, **labels)
    plain = call(*inputs.values())
    logits = [key for key, _ in named.items() if key != "loss"]
    assert "loss" in learned and learned.loss.dim() == 0 and (("loss" in named) == (name == "mae"))
    assert learned.keys() == ("loss", *logits) and len(learned) == 1 + len(logits)
    main = {"mae": "logits", "forecast": "quantile_outputs"}.get(name, logits[0])
    assert torch.equal(plain.patches if name == "mae" else plain, named[main])
    for key in logits:
        assert torch.equal(named[key], learned[key]) and named[key] is getattr(named, key)
    assert learned[0] is learned.loss and learned[1:] == learned.to_tuple()[1:]
    loss, *rest = learned
    assert loss is learned["loss"] and len(rest) == len(logits)
    assert dict(learned.items())[logits[0]] is learned.get(logits[0]) and learned.get("other", 5) == 5
    with pytest.raises(KeyError, match="it has loss"):
        learned["other"]
    assert isinstance(call(**inputs, **labels, return_dict=False), tuple)
    assert type(call(*inputs.values(), return_dict=True)) is type(named)
    model.train()
    call(**inputs, **labels).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    first = next(iter(inputs))
    with pytest.raises(InputError, match=f"{first} is missing"):
        model(**{key: value for key, value in inputs.items() if key != first})
    with pytest.raises(InputError, match=f"give {first} once"):
        model(inputs[first], **inputs)


def test_outputs_are_trees_of_tensors_and_compile():
    output = ClassifierOutput(None, torch.ones(2, 3))
    doubled = torch.utils._pytree.tree_map(lambda x: 2 * x, output)
    assert type(doubled) is ClassifierOutput and doubled.loss is None and (doubled.logits == 2).all()
    inputs, labels = inputs_of(), torch.tensor([0, 1, 2, 0])
    model = text()
    expected = model(**inputs, labels=labels)
    found = torch.compile(model, fullgraph=True, backend="eager")(**inputs, labels=labels)
    torch.testing.assert_close(found.to_tuple(), expected.to_tuple())


# --- labels ---


def test_each_kind_of_labels_has_its_loss():
    inputs = inputs_of()
    logits = text()(**inputs).logits.detach()

    def loss(labels, **options):
        torch.manual_seed(0)
        model = TextClassifier(TextClassifierConfig(30, 12, SMALL, 3, labels=LabelConfig(**options)))
        model.load_state_dict(reference)
        return model.eval()(**inputs, labels=labels).loss

    reference = text().state_dict()
    torch.manual_seed(0)
    found = TextClassifier(TextClassifierConfig(30, 12, SMALL, 3))
    found.load_state_dict(reference)
    logits = found.eval()(**inputs).logits.detach()
    classes = torch.tensor([0, 2, 1, -100])
    close = torch.testing.assert_close
    weights = torch.tensor([1.0, 2.0, 5.0])
    close(loss(classes), F.cross_entropy(logits, classes))
    close(loss(classes, class_weights=(1, 2, 5)), F.cross_entropy(logits, classes, weights))
    close(loss(classes, label_smoothing=0.1), F.cross_entropy(logits, classes, label_smoothing=0.1))
    several = torch.tensor([[0.0, 1, 1], [0, 0, 0], [1, 1, 1], [1, 0, 0]])
    close(loss(several), F.binary_cross_entropy_with_logits(logits, several))
    for of_type in (torch.int64, torch.uint8, torch.bool):
        close(loss(several.to(of_type)), loss(several))
        close(loss(several.to(of_type), problem_type="multi_label_classification"), loss(several))
    close(
        loss(several, class_weights=(1, 2, 5), label_smoothing=0.2),
        F.binary_cross_entropy_with_logits(logits, several * 0.8 + 0.1, pos_weight=weights),
    )
    soft = torch.tensor([[0.2, 0.8, 0.0], [1.0, 0, 0], [0.3, 0.3, 0.4], [0, 0, 1.0]])
    close(loss(soft, problem_type="single_label_classification"), -(soft * logits.log_softmax(-1)).sum(-1).mean())
    close(loss(soft, problem_type="regression"), F.mse_loss(logits, soft))
    with pytest.raises(InputError, match=r"labels hold 0\.2.*problem_type"):
        loss(soft)
    one = text(1)
    close(one(**inputs, labels=soft[:, 0]).loss, F.mse_loss(one(**inputs).logits[:, 0], soft[:, 0]))
    close(one(**inputs, labels=soft[:, :1]).loss, one(**inputs, labels=soft[:, 0]).loss)


@pytest.mark.parametrize(
    ("labels", "error", "says"),
    [
        (torch.tensor([0, 1, 2, 3]), InputError, "from 0 to 2, the model's classes; got 3"),
        (torch.tensor([0, 1]), InputError, r"labels must be \(4,\)"),
        (torch.tensor([0, 1, 2, 2], dtype=torch.int32), InputTypeError, "int64"),
        (torch.zeros(4), InputTypeError, "int64"),
        (torch.zeros(4, 2), InputError, r"multi_label_classification must be \(4, 3\)"),
        ([0, 1, 2, 0], InputTypeError, "must be a tensor, got list"),
        (torch.full((4, 3), 2.0), InputError, "labels hold 2"),
        (torch.full((4, 3), 2), InputError, "labels hold 2"),
    ],
)
def test_labels_that_do_not_fit_are_named(labels, error, says):
    with pytest.raises(error, match=says):
        text()(**inputs_of(), labels=labels)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"problem_type": "ranking"}, "problem_type must be one of"),
        ({"class_weights": (1.0, 2.0)}, "2 class_weights for num_labels=3"),
        ({"class_weights": (0.0, 0.0, 0.0)}, "not all 0"),
        ({"names": ("a",)}, "1 names for num_labels=3"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in"),
        ({"problem_type": "regression", "label_smoothing": 0.1}, "this is a regression"),
    ],
)
def test_label_configs_that_cannot_be_are_named(options, says):
    with pytest.raises(InputError, match=says):
        text(3, **options)


def test_a_series_has_numbers_or_classes():
    torch.manual_seed(0)
    series = torch.randn(7, 4, 2)
    model = TimeSeriesTransformer(2, 16, 2, 1, output_dim=3).eval()
    numbers, classes = torch.rand(4, 3), torch.tensor([0, 1, 2, 0])
    output = model(series, labels=numbers)
    torch.testing.assert_close(output.loss, F.mse_loss(output.logits, numbers))
    torch.testing.assert_close(model.loss(series, numbers), output.loss)
    torch.testing.assert_close(model(series, labels=classes).loss, F.cross_entropy(output.logits, classes))
    assert isinstance(model(series), torch.Tensor)
    several = TimeSeriesConfig(2, 3, encoder=SMALL, labels=LabelConfig("multi_label_classification"))
    assert TimeSeriesTransformer(several)(series, labels=(numbers > 0.5).float()).loss > 0


def test_names_weights_and_kind_are_saved_and_forgotten_with_their_head(tmp_path):
    model = text(3, names=("bad", "fair", "good"), class_weights=(1, 2, 3))
    model.save_pretrained(tmp_path)
    again = TextClassifier.from_pretrained(tmp_path)
    assert again.config == model.config and again.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    other = TextClassifier.from_pretrained(tmp_path, num_labels=2)
    assert other.config.labels == LabelConfig() and other.config.id2label[1] == "LABEL_1"
    named = TextClassifier.from_pretrained(
        tmp_path, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}, problem_type="single_label_classification"
    )
    assert named.config.num_labels == 2 and named.config.id2label[1] == "yes"
    assert named.config.label2id == {"no": 0, "yes": 1}
    assert named.config.labels.problem_type == "single_label_classification"
    changed = TextClassifier.from_pretrained(tmp_path, labels=LabelConfig(label_smoothing=0.1))
    assert changed.config.labels.label_smoothing == 0.1 and changed.config.labels.names is None


# --- the loss of texts ---


def test_what_transformers_says_otherwise_is_understood_or_explained(tmp_path):
    text(3).save_pretrained(tmp_path)
    half = TextClassifier.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.device == torch.device("cpu")
    for name, instead in (("attn_implementation", "attention="), ("device_map", "device="), ("dim", "no field 'dim'")):
        with pytest.raises(InputError, match=instead):
            TextClassifier.from_pretrained(tmp_path, **{name: "auto"})


def test_a_language_model_compares_labels_with_the_predictions_before_them():
    torch.manual_seed(0)
    model, inputs, _ = models()["lm"]
    ids = inputs["input_ids"]
    labels = ids.clone()
    labels[0, 4:] = -100
    output = model.eval()(ids, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    with pytest.raises(InputError, match="of the ids' shape"):
        model(ids, labels=labels[:, 1:])
    with pytest.raises(InputTypeError, match="int64"):
        model(ids, labels=labels.float())
    with pytest.raises(InputError, match="the model's classes; got 99"):
        model(ids, labels=labels.masked_fill(labels == labels[0, 0], 99))


def test_a_translation_reads_its_labels_behind_the_start_token():
    model, inputs, _ = models()["seq2seq"]
    model.eval()
    ids, labels = inputs["input_ids"], torch.tensor([[5, 6, 7, 1], [5, 1, -100, -100]] * 2)
    output = model(input_ids=ids, labels=labels)
    assert torch.equal(output.logits, model(ids, model.shift_right(labels)))
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits.flatten(0, 1), labels.flatten()))
    assert torch.equal(model.generate(ids, max_length=5), model.generate(ids, max_new_tokens=4))
    with pytest.raises(InputError, match="must be at least 1, got 1 and 0"):
        model.generate(ids, max_length=1)


def test_the_temperature_is_clamped_wherever_it_is_used():
    model, inputs, _ = models()["clip"]
    with torch.no_grad():
        model.logit_scale.fill_(50.0)
    model.eval()
    output = model(**inputs, return_loss=True)
    assert output.logits_per_image.abs().max() <= 100.01 and model.logit_scale == 50.0
    assert torch.equal(output.logits_per_text, output.logits_per_image.T)
    torch.testing.assert_close(output.logits_per_image, 100 * output.image_embeds @ output.text_embeds.T)
    assert torch.equal(model.classify(inputs["pixel_values"], output.text_embeds), output.logits_per_image)
    model.train()
    model(**inputs, return_loss=True).loss.backward()
    assert model.logit_scale < 5 and model.logit_scale.grad != 0, "it can come back"


def test_token_types_of_zeros_say_nothing():
    inputs = inputs_of()
    model = text()
    without = {key: value for key, value in inputs.items() if key != "token_type_ids"}
    assert torch.equal(model(**inputs).logits, model(**without).logits)
    with pytest.raises(InputError, match="no token types"):
        model(**without, token_type_ids=torch.ones_like(inputs["input_ids"]))
