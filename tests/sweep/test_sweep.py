"""The sweep over transformers' model types tells outcomes apart; `make sweep-transformers` runs it on all of them."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from sweep.run import OUTCOMES, _first_line, outcome, page


@pytest.mark.parametrize(
    ("kind", "expected", "why"),
    [
        ("llama", "agree", ""),
        ("mistral", "agree", ""),
        ("bert", "agree", ""),
        ("vit", "agree", ""),
        ("t5", "agree", ""),
        ("whisper", "agree", ""),
        ("doge", "agree", ""),
        ("deepseek_v32", "agree", ""),
        ("qwen2_5_vl_vision", "agree", ""),
        ("lightglue", "agree", ""),
        ("musicgen", "agree", ""),
        ("time_series_transformer", "agree", ""),
        ("phi4_multimodal_vision", "agree", ""),
        ("bridgetower_vision_model", "agree by convert", ""),
        ("gemma3n_audio", "not on the interface", "has a pattern of its own"),
        ("bloom", "agree by convert", ""),
        ("wavlm", "agree by convert", ""),
        ("longformer", "agree by convert", ""),
        ("sam_vision_model", "agree by convert", ""),
        ("groupvit", "agree by convert, in part", "assigns tokens to groups"),
        ("nystromformer", "not on the interface", "approximates attention in a way of its own"),
        ("resnet", "no attention", ""),
    ],
)
def test_outcomes(kind: str, expected: str, why: str) -> None:
    found, reason = outcome(kind)
    assert found == expected and why in reason, reason


def test_a_lost_mask_is_a_disagreement(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the sweep is for: a layer that takes no notice of its mask."""
    from transformers import AttentionInterface

    from efficient_attn.integrations import huggingface

    huggingface.register()
    served = AttentionInterface._global_mapping["efficient_attn"]
    monkeypatch.setitem(
        AttentionInterface._global_mapping, "efficient_attn",
        lambda module, q, k, v, mask, **named: served(module, q, k, v, None, **{**named, "is_causal": False}),
    )  # fmt: skip
    assert outcome("bert")[0] == outcome("llama")[0] == "disagree"


def test_a_mask_made_up_where_none_is_given_is_a_disagreement(monkeypatch: pytest.MonkeyPatch) -> None:
    from efficient_attn.integrations import huggingface

    monkeypatch.setattr(huggingface, "_says_causal", lambda module: True)
    found, why = outcome("splinter")
    assert found == "disagree" and "without attention_mask" in why


def test_the_page_counts_and_names_every_type() -> None:
    text = page({"a": ("agree", ""), "b": ("crash", "IndexError: x | y"), "c": ("agree", "")})
    assert "| agree | 2 |" in text and "`a`, `c`" in text and "| `b` | IndexError: x \\| y |" in text
    assert all(f"| {name} |" in text for name in OUTCOMES)


def test_a_reason_names_no_place_of_one_machine() -> None:
    reason = _first_line(ValueError("no Model in <module 'x' from '/home/me/.venv/lib/site-packages/x/y.py'>"))
    assert reason == "ValueError: no Model in <module 'x' from 'x/y.py'>"
