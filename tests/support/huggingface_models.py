"""Small models of transformers, one of each family, with inputs that are padded and what of their outputs counts."""

from __future__ import annotations

import copy
import os

import pytest
import torch

from efficient_attn import explain

transformers = pytest.importorskip("transformers")

B, N = 3, 20
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
TEXT = {**SIZES, "vocab_size": 50, "max_position_embeddings": 64}
IMAGE = {**SIZES, "image_size": 32, "patch_size": 8}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
WIDTHS = {"d_model": 32, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "vocab_size": 50}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}

# name -> (model, configuration, its arguments)
FAMILIES = {
    "bert": ("BertModel", "BertConfig", TEXT),
    "roberta": ("RobertaModel", "RobertaConfig", {**TEXT, "pad_token_id": 1}),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, **TOKENS}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**TEXT, "num_key_value_heads": 2}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**TEXT, "num_key_value_heads": 2, "sliding_window": 6}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**TEXT, "num_key_value_heads": 1, **TOKENS}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 37}
        | {"word_embed_proj_dim": 32, "max_position_embeddings": 64, **TOKENS},
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, "decoder_start_token_id": 0}),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {**WIDTHS, **LAYERS, **TOKENS, "max_position_embeddings": 64, "decoder_start_token_id": 2}
        | {"forced_eos_token_id": None},
    ),
    "marian": (
        "MarianMTModel",
        "MarianConfig",
        {**WIDTHS, **LAYERS, **TOKENS, "max_position_embeddings": 64, "decoder_start_token_id": 0}
        | {"forced_eos_token_id": None},
    ),
    "modernbert": (
        "ModernBertModel",
        "ModernBertConfig",
        {**TEXT, "num_hidden_layers": 3, "local_attention": 8, **TOKENS, "sep_token_id": 2, "cls_token_id": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**TEXT, "num_key_value_heads": 2, "head_dim": 16, **TOKENS}),
    "vit": ("ViTModel", "ViTConfig", IMAGE),
    "dinov2": ("Dinov2Model", "Dinov2Config", IMAGE),
    "siglip": (
        "SiglipModel",
        "SiglipConfig",
        {"text_config": {**TEXT, **TOKENS, "max_position_embeddings": 20}, "vision_config": IMAGE},
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {**TEXT, **TOKENS, "model_type": "llama", "num_key_value_heads": 2},
            "vision_config": {**IMAGE, "model_type": "clip_vision_model"},
            "image_token_index": 49,
        },
    ),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": {**TEXT, **TOKENS}, "vision_config": IMAGE, "projection_dim": 16},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**WIDTHS, **LAYERS, **TOKENS, "num_mel_bins": 8, "max_source_positions": 30, "max_target_positions": 32}
        | {"decoder_start_token_id": 3},
    ),
}
CAUSAL = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "opt", "llava")
KINDS = {
    "encoder": ("bert", "roberta", "distilbert", "modernbert"),
    "decoder": ("gpt2", "llama", "mistral", "qwen2", "qwen3", "opt"),
    "encoder-decoder": ("t5", "bart", "marian", "whisper"),
    "vision": ("vit", "dinov2"),
    "multimodal": ("clip", "siglip", "llava"),
}

torch.manual_seed(1)
IDS = torch.randint(3, 49, (B, N))
RIGHT = (torch.arange(N) < torch.tensor([N, 13, 5])[:, None]).long()
PADDING = {"none": None, "right": RIGHT, "left": RIGHT.flip(1)}


def make(family, implementation="efficient_attn", **changes):
    """A model with large random weights: with transformers' own the attention would be nearly uniform."""
    model, config, sizes = FAMILIES[family]
    config = getattr(transformers, config)(**copy.deepcopy({**sizes, **changes}))
    torch.manual_seed(0)
    made = getattr(transformers, model)._from_config(config, attn_implementation=implementation).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3, generator=generator)
    return made


def inputs(family, padding):
    pixels = torch.randn(B, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    decoder = {"decoder_input_ids": IDS[:, :9]}
    if family in ("vit", "dinov2"):
        return {"pixel_values": pixels}
    if family == "whisper":
        return {"input_features": torch.randn(B, 8, 60, generator=torch.Generator().manual_seed(2)), **decoder}
    found = {"input_ids": IDS, "attention_mask": PADDING[padding]}
    if family in ("clip", "siglip"):
        return {**found, "pixel_values": pixels}
    if family == "llava":
        image = torch.full((B, 16), 49)  # in the middle of the text, where padding on neither side reaches
        ids = torch.cat([IDS[:, :10], image, IDS[:, 10:]], dim=1)
        mask = found["attention_mask"]
        mask = mask if mask is None else torch.cat([mask[:, :10], torch.ones_like(image), mask[:, 10:]], dim=1)
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    if family in ("t5", "bart", "marian"):
        mask = None if PADDING[padding] is None else PADDING["right"][:, :9]
        return {**found, **decoder, "decoder_attention_mask": mask}
    return found


def outputs(model, family, padding):
    """What is compared: outputs of real tokens; a layer may give anything for those of padding."""
    arguments = inputs(family, padding)
    found = model(**arguments)
    if family in ("clip", "siglip"):
        return torch.cat([found.logits_per_image.flatten(), found.image_embeds.flatten()])
    out = found[0]
    mask = arguments.get("decoder_attention_mask", arguments.get("attention_mask"))
    return out if mask is None else out[mask.bool()]


def assert_close(actual, expected, what="output"):
    limit = 2e-5 * expected.abs().max().item() + 1e-7
    assert (actual - expected).abs().max().item() <= limit, what


@pytest.fixture(autouse=True)
def native_backend():
    """The reference repeats eager's operations bit by bit: equality with it would say nothing of the kernels."""
    query = torch.randn(1, 2, 8, 8)
    chosen = str(explain(query, query, query))
    assert "backend: cpu" in chosen or os.environ.get("EFFICIENT_ATTN_CPU") == "0", chosen
