"""`efficient-attn convert` and `inspect`: from a folder and a file to a plan and a page, and how the page behaves."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import types

import pytest
import torch

pytest.importorskip("typer")

from typer.testing import CliRunner

from efficient_attn import cli, convert, models
from efficient_attn.insight import attention_statistics, observe
from efficient_attn.inspecting import inputs, inspect

WORDS = "attention looks at what matters and leaves the rest alone. "


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a language model on bytes, a ViT, and what they read."""
    place = tmp_path_factory.mktemp("inspect")
    torch.manual_seed(0)
    tower = models.TransformerConfig(32, 2, 4, causal=True, rotary=True)
    models.CausalLM(models.CausalLMConfig(259, 512, tower, positions="none")).save_pretrained(place / "lm")
    image = models.ImageConfig(image_size=32, patch_size=4, encoder=models.TransformerConfig(32, 2, 4))
    models.ViT(models.ViTConfig(image, num_labels=3)).save_pretrained(place / "vit")
    (place / "text.txt").write_text(WORDS * 40)
    return place


def embedded(path):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(text)


def test_convert_writes_a_plan_that_applies_and_a_page(folder, tmp_path):
    out = tmp_path / "plan.json"
    given = ("--model", folder / "lm", "--data", folder / "text.txt", "--length", 128, "--batch", 4, "--out", out)
    result = run("convert", *given, "--budget", 0.3, "--candidate", "sliding_window:left=32,right=32")
    assert result.exit_code == 0, result.output
    assert "measured error" in result.output
    model = models.CausalLM.from_pretrained(folder / "lm")
    report = convert(model, plan=out)
    assert set(report.plan.layers) and report.plan.about["error"] <= 0.3
    assert "<table>" in (tmp_path / "plan.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "{}/nothing", "--data", "{}/text.txt"], "no folder"),
        (["--model", "{}/lm"], "--data"),
        (["--model", "{}/lm", "--data", "{}/none.txt"], "none.txt"),
        (["--model", "{}/lm", "--data", "{}/text.txt", "--length", "512", "--batch", "99"], "too few"),
        (["--model", "{}/lm", "--data", "{}/text.txt", "--per", "model"], "layer, head"),
        (["--model", "{}/lm", "--data", "{}/text.txt", "--budget", "-1"], "finite"),
        (["--model", "{}/lm", "--data", "{}/text.txt", "--out", "{}/no/plan.json"], "no folder"),
        (["--model", "{}/lm", "--data", "{}/text.txt", "--candidate", "nonsense"], "nonsense"),
    ],
)
def test_errors_of_convert_are_named(folder, arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("convert", *[a.replace("{}", str(folder)) for a in arguments])
    assert result.exit_code == 2 and says in " ".join(result.output.replace("│", " ").split()), result.output
    assert not list(tmp_path.iterdir()), "nothing is left of a command that was refused"


@pytest.fixture(scope="module")
def report(folder):
    out = folder / "page.html"
    given = ("--model", folder / "lm", "--text", folder / "text.txt", "--length", 200)
    result = run("inspect", *given, "--attention", "sliding_window:left=16,right=0", "--out", out)
    assert result.exit_code == 0, result.output
    return out


def test_the_page_has_the_statistics_of_the_kernels(folder, report):
    data = embedded(report)
    assert len(data["labels"]) == 200 and "".join(data["labels"][:9]) == "attention"
    model = models.CausalLM.from_pretrained(folder / "lm")
    tokens = inputs.read(inputs.load(str(folder / "lm"), None), folder / "text.txt", "text", 200, 1).sample
    with observe(model, keep=True) as seen, torch.no_grad():
        model(tokens)
    for run_, window in zip(data["runs"], (None, 16), strict=True):
        layer, call = run_["layers"][0], seen.layers[0].inputs
        pairs = torch.ones(200, 200, dtype=torch.bool).tril()
        pairs = pairs if window is None else pairs & ~torch.ones_like(pairs).tril(-window - 1)
        weights = (call["query"] @ call["key"].mT / 8**0.5).masked_fill(~pairs, -torch.inf).softmax(-1)[0]
        for number, head in enumerate(layer["heads"]):
            found = torch.tensor(list(base64.b64decode(head["received"]["bytes"]))) / 255
            received = weights[number].sum(0)
            torch.testing.assert_close(
                found.square() * head["received"]["of"], received, atol=0.02 * float(received.max()), rtol=0
            )
            query, keys = head["top"][-1]
            assert query == 199 and [k for k, _ in keys] == weights[number, 199].topk(4).indices.tolist()
            assert head["most"][0][0] == int(received.argmax()) and 0 <= head["entropy"] <= 1
            assert head["rows"] == head["columns"] == 50
    assert data["runs"][0]["error"] is None and data["runs"][1]["error"] > 0


def test_an_image_and_a_low_rank_method_have_their_page(folder, tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (40, 40), (200, 30, 30)).save(tmp_path / "red.png")
    out = tmp_path / "page.html"
    given = ("--model", folder / "vit", "--image", tmp_path / "red.png", "--attention", "nystrom:landmarks=8")
    result = run("inspect", *given, "--out", out)
    assert result.exit_code == 0, result.output
    data = embedded(out)
    assert data["kind"] == "image" and data["pixels"]["rgb"][:3] == [200, 30, 30]
    exact, low_rank = (run_["layers"][0]["heads"][0] for run_ in data["runs"])
    assert exact["rows"] == low_rank["rows"] and low_rank["map"]["of"] > 0
    assert "top" in exact and "top" not in low_rank  # of which single weights are not known


def test_an_image_of_a_model_of_images_and_texts(folder, tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (40, 40), (200, 30, 30)).save(tmp_path / "red.png")
    small = models.TransformerConfig(32, 2, 4)
    tower = models.ImageConfig(image_size=32, patch_size=8, encoder=small)
    text = models.TextTowerConfig(vocab_size=20, max_len=8, eos_token_id=7, encoder=small)
    models.CLIP(models.CLIPConfig(tower, text)).save_pretrained(tmp_path / "clip")
    result = run(
        "inspect", "--model", tmp_path / "clip", "--image", tmp_path / "red.png", "--out", tmp_path / "page.html"
    )
    assert result.exit_code == 0, result.output
    data = embedded(tmp_path / "page.html")
    assert data["kind"] == "image" and data["title"].endswith("clip")
    assert [len(layer["heads"]) for layer in data["runs"][0]["layers"]] == [4, 4]  # of the image's tower alone


def test_missing_values_of_a_series_stay_missing():
    values = torch.tensor([1.0, torch.nan, 3.0, torch.inf])
    data = inspect.describe(torch.nn.MultiheadAttention(8, 2), inputs.Read((torch.randn(4, 8),) * 3, values=values))
    assert data["values"] == [1.0, None, 3.0, None] and "null" in inspect.page(data)


def test_words_are_told_apart_whatever_marks_them(monkeypatch):
    class Tokenizer:
        cls_token_id = bos_token_id = None

        def __init__(self, tokens):
            self.tokens = tokens

        def __call__(self, text, **_):
            return {"input_ids": list(range(len(self.tokens))) if text else []}

        def get_vocab(self):
            return {token: n for n, token in enumerate(self.tokens)}

        def convert_ids_to_tokens(self, token):
            return self.tokens[token]

    for tokens in (
        ["un", "##known", "words"],
        ["\u2581un", "known", "\u2581words"],
        ["\u0120un", "known", "\u0120words"],
    ):
        library = types.SimpleNamespace(
            AutoTokenizer=types.SimpleNamespace(from_pretrained=lambda _, tokens=tokens: Tokenizer(tokens))
        )
        monkeypatch.setattr(inputs.sources, "_transformers", lambda library=library: library)
        monkeypatch.setattr(inputs.Path, "is_file", lambda _: True)
        ids, name_of, _ = inputs._tokens(inputs.Loaded(torch.nn.Identity(), inputs.Path("folder")), "text")
        assert [name_of(token) for token in ids] == [" un", "known", " words"]


def test_errors_of_inspect_are_named(folder, tmp_path):
    for arguments, says in (
        (("--model", folder / "lm"), "one of"),
        (("--model", folder / "lm", "--image", folder / "text.txt"), "reads no images"),
        (("--model", folder / "lm", "--series", folder / "text.txt"), "train forecast"),
        (("--model", folder / "vit", "--text", folder / "text.txt"), "no tokenizer"),
        (("--model", folder / "lm", "--text", folder / "text.txt", "--length", 10**6), "too few"),
    ):
        result = run("inspect", *arguments, "--out", tmp_path / "x.html")
        assert result.exit_code == 2 and says in " ".join(result.output.replace("│", " ").split()), result.output
    assert not (tmp_path / "x.html").exists()


def test_a_long_input_stays_small():
    class One(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    x = torch.randn(1, 2, 4096, 8)
    data = inspect.describe(One(), inputs.Read(x))
    head = data["runs"][0]["layers"][0]["heads"][1]
    assert head["rows"] == 64 and len(head["top"]) <= 192 and len(inspect.page(data)) < 200_000
    exact = attention_statistics(x, x, want=("received",)).received[0, 1]
    assert head["most"][0][0] == int(exact.argmax())


# --- in a browser ---

FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"


@pytest.fixture(scope="module")
def chromium():
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    return found


@pytest.mark.parametrize(
    ("address", "which"), [("", "Layer 1, head 1"), ("#2.3", "Layer 2, head 3"), ("#9.9", "1, head 1")]
)
def test_the_address_says_which_head_is_shown(report, chromium, tmp_path, address, which):
    command = [
        chromium,
        "--headless",
        *FLAGS.split(),
        f"--user-data-dir={tmp_path}",
        "--dump-dom",
        report.as_uri() + address,
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    (heading,) = re.findall(r'<h2 id="which"[^>]*>([^<]*)<', shown)
    assert which in heading
    assert shown.count('aria-pressed="true"') == 1 and shown.count("<circle") == 16
    received = re.findall(r'<table class="list most">.*?</table>', shown)
    assert len(received) == 2  # as it is, and beside it the window


@pytest.fixture
def browser_page(report, chromium):
    playwright = pytest.importorskip("playwright.sync_api", reason="the page is looked at with playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS.split())
        page = browser.new_context(viewport={"width": 1200, "height": 900}).new_page()
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: errors.append(request.url) if not request.url.startswith("file:") else None)
        page.goto(report.as_uri())
        yield page
        assert errors == []
        browser.close()


@pytest.mark.slow
def test_a_head_is_chosen_and_its_tokens_are_shown(report, browser_page):
    page, data = browser_page, embedded(report)
    assert page.locator("#grid button").count() == 8
    page.locator("#grid button[data-layer='1'][data-head='2']").click()
    assert "Layer 2, head 3" in page.locator("#which").inner_text()
    assert page.locator(".run").count() == 2
    place = data["runs"][0]["layers"][1]["heads"][2]["most"][0][0]
    assert page.locator(".run").first.locator("table.most td").first.inner_text() == str(place)
    assert page.locator(".run").first.locator(".tokens span").count() == 200
    page.locator(".run").first.locator(".tokens span").nth(199).click()
    key = data["runs"][0]["layers"][1]["heads"][2]["top"][-1][1][0][0]
    assert page.locator(".run").first.locator("table.keys td").first.inner_text() == str(key)
    assert page.locator("#entropy circle").count() == 16


def test_the_page_is_one_file_without_a_network(report):
    text = report.read_text()
    assert not re.search(
        r'(?:src|href)="(?!#)|url\(|@import|fetch\(|XMLHttpRequest|https?://(?!www\.w3\.org/2000/svg)', text
    )
    assert text.count("<script") == 2 and "/*data*/" not in text and 'id="grid"' in text and 'id="entropy"' in text
