"""Programs as they are written for transformers, with nothing changed but the import: a text classifier, a ViT, a time
series and CLIP. Checkpoints, tokenizers and processors are made here and saved by transformers itself."""

import numpy as np
import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "what", "terrible", "great"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A BertForSequenceClassification's folder with its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(0)
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1},
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8,
        id2label={0: "cat", 1: "dog", 2: "bird"}, label2id={"cat": 0, "dog": 1, "bird": 2},
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    letters = [*map(chr, range(ord("a"), ord("z") + 1))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[])
    sizes = {"crop_size": {"height": 16, "width": 16}, "size": {"shortest_edge": 16}}
    transformers.CLIPProcessor(transformers.CLIPImageProcessor(**sizes), tokenizer).save_pretrained(folder)
    layers = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    end = vocabulary["<|endoftext|>"]
    config = transformers.CLIPConfig(
        text_config={**layers, "vocab_size": len(tokens), "eos_token_id": end, "bos_token_id": end - 1},
        vision_config={**layers, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


def pictures(count):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (20, 24, 3), dtype=np.uint8) for _ in range(count)]


def ours(name):
    import efficient_attn.models as models

    return getattr(models, name)


def classify_texts(AutoModelForSequenceClassification, folder):
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    texts = ["a good film", "what a terrible film", "great", "bad film"]
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    labels = torch.tensor([1, 0, 1, 0])
    losses = []
    for _ in range(5):
        outputs = model(**inputs, labels=labels)
        loss = outputs.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        logits = model(**inputs).logits
    names = [model.config.id2label[number] for number in logits.argmax(dim=-1).tolist()]
    return losses, names


def classify_images(ViTForImageClassification, folder):
    processor = transformers.ViTImageProcessor.from_pretrained(folder)
    model = ViTForImageClassification.from_pretrained(folder)
    inputs = processor(images=pictures(2), return_tensors="pt")
    outputs = model(**inputs, labels=torch.tensor([2, 0]))
    outputs.loss.backward()
    predicted = model(**inputs).logits.argmax(-1)[0].item()
    return [outputs.loss.item(), *outputs.logits.flatten().tolist()], [model.config.id2label[predicted]]


def match(CLIPModel, folder):
    model = CLIPModel.from_pretrained(folder)
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=["cat", "a long dog"], images=pictures(2), return_tensors="pt", padding=True)
    outputs = model(**inputs)
    probs = outputs.logits_per_image.softmax(dim=1)
    loss = model(**inputs, return_loss=True).loss
    loss.backward()
    vectors = [outputs.text_embeds, outputs.image_embeds, outputs.logits_per_text]
    return [loss.item(), *probs.flatten().tolist(), *(v for each in vectors for v in each.flatten().tolist())], []


@pytest.mark.parametrize(
    ("program", "name", "theirs", "checkpoint"),
    [
        (classify_texts, "TextClassifier", "AutoModelForSequenceClassification", "bert"),
        (classify_images, "ViT", "ViTForImageClassification", "vit"),
        (match, "CLIP", "CLIPModel", "clip"),
    ],
)
def test_a_program_for_transformers_gives_the_same_with_our_model(program, name, theirs, checkpoint, request):
    folder = request.getfixturevalue(checkpoint)
    numbers, words = program(ours(name), folder)
    expected, expected_words = program(getattr(transformers, theirs), folder)
    np.testing.assert_allclose(numbers, expected, atol=1e-4, rtol=1e-4)
    assert words == expected_words


def forecast(model):
    """PatchTSTForPrediction's program."""
    torch.manual_seed(0)
    series = torch.randn(4, 40, 2).cumsum(1)
    past, future, mask = series[:, :32], series[:, 32:], torch.rand(4, 32, 2) > 0.1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        outputs = model(past_values=past, past_observed_mask=mask, future_values=future)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs.loss.item())
    with torch.no_grad():
        prediction = model.eval()(past_values=past, past_observed_mask=mask).prediction_outputs
    return losses, prediction.shape


def test_a_program_for_patchtst_runs_with_our_forecaster():
    from efficient_attn.models import ForecasterConfig, PatchForecaster, TransformerConfig

    theirs = transformers.PatchTSTConfig(
        num_input_channels=2, context_length=32, prediction_length=8, patch_length=8, patch_stride=4, d_model=16,
        num_attention_heads=2, num_hidden_layers=1, ffn_dim=32,
    )  # fmt: skip
    ours = PatchForecaster(ForecasterConfig(32, 8, 8, 4, encoder=TransformerConfig(16, 1, 2)))
    for model in (transformers.PatchTSTForPrediction(theirs), ours):
        losses, shape = forecast(model)
        assert losses[-1] < losses[0] and shape == (4, 8, 2)


def test_the_time_series_program_of_plain_pytorch():
    """A model of (time, batch, features), a criterion of its own, and classes by cross entropy."""
    from efficient_attn.models import TimeSeriesTransformer

    torch.manual_seed(0)
    model = TimeSeriesTransformer(input_dim=3, hidden_dim=16, nhead=2, num_layers=1)
    series, target = torch.randn(20, 4, 3), torch.randn(4, 1)
    nn.MSELoss()(model(series), target).backward()
    classifier = TimeSeriesTransformer(input_dim=3, hidden_dim=16, nhead=2, num_layers=1, output_dim=5)
    outputs = classifier(series, labels=torch.tensor([0, 4, 2, 1]))
    outputs.loss.backward()
    assert outputs.logits.argmax(dim=1).shape == (4,)


def test_transformers_trainer_takes_our_models(bert, tmp_path):
    pytest.importorskip("accelerate")
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    model = ours("TextClassifier").from_pretrained(bert)
    rows = [{**tokenizer(text), "labels": label} for text, label in (("good", 1), ("bad", 0)) * 4]
    arguments = transformers.TrainingArguments(tmp_path, max_steps=2, report_to=[], save_strategy="no", use_cpu=True)
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0 and trainer.predict(rows).predictions.shape == (8, 2)
