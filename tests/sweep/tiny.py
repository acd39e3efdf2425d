"""A tiny model of any type that transformers knows, from its own configuration shrunk by the names of its numbers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

VOCABULARY, POSITIONS, IMAGE, PATCH = 100, 128, 32, 8
SIZES = [
    (
        32,
        "hidden_size d_model n_embd dim embed_dim hidden_dim embedding_size projection_dim out_hidden_size emb_dim "
        "text_hidden_size encoder_hidden_size decoder_hidden_size word_embed_proj_dim mlp_hidden_size "
        "vision_hidden_size projector_hidden_size output_hidden_size pooler_output_size attention_hidden_size "
        "cross_attention_dim decoder_hidden_dim encoder_hidden_dim lm_head_hidden_size embedding_dim "
        "feature_size query_hidden_size",
    ),
    (
        64,
        "intermediate_size ffn_dim d_ff mlp_dim n_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size "
        "shared_expert_intermediate_size dim_feedforward d_inner inner_dim decoder_intermediate_size",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
        "num_local_experts num_experts n_routed_experts moe_num_experts decoder_num_attention_heads "
        "num_encoder_attention_heads num_decoder_attention_heads encoder_num_attention_heads index_n_heads num_queries "
        "swa_num_attention_heads",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads n_head_kv multi_query_group_num num_hidden_layers num_layers n_layer "
        "n_layers encoder_layers decoder_layers num_decoder_layers num_encoder_layers depth num_experts_per_tok "
        "encoder_num_layers decoder_num_layers encoder_num_hidden_layers decoder_num_hidden_layers moe_top_k moe_k "
        "top_k_experts swa_num_key_value_heads linear_num_key_heads linear_num_value_heads "
        "num_global_key_value_heads num_memory_blocks",
    ),
    (
        8,
        "head_dim d_kv qk_nope_head_dim qk_rope_head_dim v_head_dim attention_head_dim kv_channels "
        "linear_key_head_dim linear_value_head_dim swa_head_dim swa_v_head_dim global_head_dim query_pre_attn_scalar "
        "local_attention num_frames",
    ),
    (
        16,
        "index_head_dim moe_intermediate_size kv_lora_rank q_lora_rank qk_head_dim num_mel_bins feat_size "
        "hidden_size_per_layer_input",
    ),
    (1, "n_group topk_group num_expert_groups first_k_dense_replace n_shared_experts decoder_sparse_step"),
    (5, "sliding_window"),
    (
        POSITIONS,
        "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length max_target_positions seq_length",
    ),
    (
        VOCABULARY,
        "vocab_size decoder_vocab_size text_vocab_size encoder_vocab_size vocab_size_per_layer_input "
        "src_vocab_size tgt_vocab_size",
    ),
    (IMAGE, "image_size img_size pretrain_image_size"),
    (PATCH, "patch_size"),
    (20, "max_source_positions"),
]
BY_NAME = {name: size for size, names in SIZES for name in names.split()}
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
# What a configuration makes by itself from the numbers.
DROPPED = (
    "transformers_version", "_name_or_path", "id2label", "label2id", "torch_dtype", "dtype", "out_features",
    "out_indices", "stage_names", "qk_head_dim",
)  # fmt: skip
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def shrunk(config: Any) -> Any:
    """A configuration of the same class with small numbers, and as many layers as it has kinds of them, at least 2."""
    numbers = _shrunk(config.to_dict())
    numbers.pop("model_type", None)
    return type(config)(**numbers)


def _shrunk(given: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    before = next((given[name] for name in LAYER_COUNTS if isinstance(given.get(name), int)), None)
    kinds = given.get("layer_types")
    kept = list(dict.fromkeys(kinds)) if isinstance(kinds, list) and kinds else []
    layers = max(2, len(kept))
    special = iter(range(VOCABULARY - 1, 2, -1))
    for name, value in given.items():
        if name in DROPPED:
            continue
        if name == "per_layer_config":
            value = {}
        elif isinstance(value, dict) and all(isinstance(key, str) for key in value):
            value = _rope(value, "qk_rope_head_dim" in given) if name.startswith("rope_") else _shrunk(value)
        elif name == "layer_types" and kept:
            value = (kept * layers)[:layers]
        elif isinstance(value, list) and before is not None and len(value) == before and before > 4:
            value = value[:layers]
        elif name in IDS or ((name.endswith(("_token_id", "_token_index"))) and isinstance(value, int)):
            value = IDS.get(name) if name in IDS else next(special)
            value = None if given[name] is None else value
        elif name in LAYER_COUNTS and isinstance(value, int):
            value = layers
        elif name in BY_NAME and isinstance(value, int) and not isinstance(value, bool) and value > BY_NAME[name]:
            value = BY_NAME[name]
        elif name in BY_NAME and isinstance(value, list) and all(isinstance(x, int) for x in value):
            value = [min(x, BY_NAME[name]) for x in value]
        elif value is None and name == "vocab_size":
            value = VOCABULARY
        elif name in ("mamba_n_heads", "mamba_num_heads", "mamba_d_head", "mamba_head_dim"):
            value = 8
        elif name == "depths":
            value = [1 for _ in value]
        found[name] = value
    return found


def _rope(given: dict[str, Any], latent: bool) -> dict[str, Any]:
    """Rotary options for a head_dim of 8, all of which is turned where the head has a part of its own for that."""
    found = {name: _rope(value, latent) if isinstance(value, dict) else value for name, value in given.items()}
    if latent and "partial_rotary_factor" in found:
        found["partial_rotary_factor"] = 1.0
    if isinstance(found.get("mrope_section"), list):
        found["mrope_section"] = [2, 1, 1]
    return found


# --- inputs ---


def inputs(model: Any, config: Any) -> Iterator[dict[str, Tensor]]:
    """Arguments that a model may take, the least first: text that is padded, an image, sound, both."""
    generator = torch.Generator().manual_seed(1)
    names = inspect.signature(model.forward).parameters
    ids = torch.randint(3, 60, (2, 12), generator=generator)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 8:] = 0
    text: dict[str, Tensor] = {"input_ids": ids.where(mask.bool(), torch.tensor(0)), "attention_mask": mask}
    text = {name: value for name, value in text.items() if name in names}
    if "decoder_input_ids" in names:
        text["decoder_input_ids"] = ids[:, :9]
    main = getattr(model, "main_input_name", "input_ids")
    sub = next((getattr(config, n) for n in ("vision_config", "audio_config") if hasattr(config, n)), config)
    sizes = [getattr(c, "image_size", None) for c in (config, sub)]
    size = next((x for x in sizes if isinstance(x, int) and x), IMAGE)
    channels = getattr(config, "num_channels", getattr(sub, "num_channels", 3))
    pixels = torch.randn(2, channels, size, size, generator=generator)
    frames = torch.randn(2, getattr(config, "num_mel_bins", 16), 40, generator=generator)
    others = {
        "pixel_values": (pixels, pixels[:, None].expand(-1, 8, -1, -1, -1)),
        "pixel_values_videos": (pixels[:, None].expand(-1, 8, -1, -1, -1),),
        "input_features": (frames, frames.transpose(1, 2)),
        "input_values": (torch.randn(2, 3200, generator=generator), frames.transpose(1, 2)),
    }
    if main in text and "input_ids" in text:
        yield text
    for name, shapes in others.items():
        if name in names:
            for given in shapes:
                decoder = {n: text[n] for n in ("decoder_input_ids",) if n in text}
                yield {name: given, **decoder}
                yield {**text, name: given}
