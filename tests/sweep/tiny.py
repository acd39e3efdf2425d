"""A tiny model of any type that transformers knows, from its own configuration shrunk by the names of its numbers."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any

VOCABULARY, POSITIONS, IMAGE, PATCH = 100, 128, 32, 8
SIZES = [
    (
        32,
        "hidden_size d_model n_embd dim embed_dim hidden_dim embedding_size projection_dim out_hidden_size emb_dim "
        "text_hidden_size encoder_hidden_size decoder_hidden_size word_embed_proj_dim mlp_hidden_size "
        "vision_hidden_size projector_hidden_size output_hidden_size pooler_output_size attention_hidden_size "
        "cross_attention_dim decoder_hidden_dim encoder_hidden_dim lm_head_hidden_size embedding_dim "
        "query_hidden_size projection_size text_hidden_dim vision_hidden_dim cross_hidden_size mask_feature_size "
        "cross_attention_hidden_size encoder_hidden_dims hidden_channels channels upsample_groups codebook_dim "
        "decoder_in_channels vector_quantization_hidden_dimension audio_hidden_size condition_dim mit_hidden_size "
        "output_channels fpn_hidden_size",
    ),
    (
        64,
        "intermediate_size ffn_dim d_ff mlp_dim n_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size "
        "shared_expert_intermediate_size mit_intermediate_size dim_feedforward d_inner inner_dim "
        "decoder_intermediate_size",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
        "num_local_experts num_experts n_routed_experts moe_num_experts decoder_num_attention_heads "
        "num_encoder_attention_heads num_decoder_attention_heads encoder_num_attention_heads index_n_heads num_queries "
        "index_topk swa_num_attention_heads num_text_heads num_heads_global mit_num_attention_heads",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads n_head_kv multi_query_group_num num_hidden_layers num_layers n_layer "
        "n_layers encoder_layers decoder_layers num_decoder_layers num_encoder_layers depth num_experts_per_tok "
        "encoder_num_layers decoder_num_layers encoder_num_hidden_layers decoder_num_hidden_layers moe_top_k moe_k "
        "top_k_experts swa_num_key_value_heads linear_num_key_heads linear_num_value_heads "
        "num_global_key_value_heads num_memory_blocks num_experts_per_token",
    ),
    (
        8,
        "head_dim d_kv qk_nope_head_dim qk_rope_head_dim v_head_dim attention_head_dim kv_channels "
        "linear_key_head_dim linear_value_head_dim swa_head_dim swa_v_head_dim global_head_dim query_pre_attn_scalar "
        "local_attention num_frames rotary_dim visual_feat_dim",
    ),
    (
        16,
        "index_head_dim moe_intermediate_size kv_lora_rank q_lora_rank qk_head_dim num_mel_bins feat_size "
        "hidden_size_per_layer_input num_pos_feats",
    ),
    (1, "n_group topk_group num_expert_groups first_k_dense_replace n_shared_experts decoder_sparse_step"),
    (5, "sliding_window"),
    (10, "n_window"),
    (
        POSITIONS,
        "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length max_target_positions seq_length",
    ),
    (
        VOCABULARY,
        "vocab_size decoder_vocab_size text_vocab_size encoder_vocab_size vocab_size_per_layer_input "
        "src_vocab_size tgt_vocab_size",
    ),
    (IMAGE, "image_size img_size pretrain_image_size visual_prompter_image_size max_img_size"),
    (PATCH, "patch_size"),
    (20, "max_source_positions"),
]
BY_NAME = {name: size for size, names in SIZES for name in names.split()}
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
# Numbers of classes of configurations that no rule gives, by model_type.
OF_TYPES: list[tuple[str, dict[str, Any]]] = [
    ("lilt", {"hidden_size": 48}),
    ("layoutlmv3", {"coordinate_size": 4, "shape_size": 8, "input_size": IMAGE}),
    ("layoutlmv2", {"coordinate_size": 4, "shape_size": 8}),
    ("xmod", {"default_language": "en_XX"}),
    ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "use_mamba_kernels": False}),
    ("bamba", {"attn_layer_indices": [1]}),
    ("granitemoehybrid", {"layer_types": ["mamba", "attention"]}),
    (
        "zamba",
        {
            "layers_block_type": ["mamba", "hybrid", "hybrid"],
            "num_hidden_layers": 3,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
        },
    ),
    ("zamba2", {"attention_hidden_size": 64, "attention_head_dim": 16, "layers_block_type": ["mamba", "hybrid"]}),
    ("recurrent_gemma", {"num_hidden_layers": 3}),
    ("time_series_transformer autoformer informer", {"prediction_length": 4, "context_length": 8}),
    ("patchtst", {"context_length": 16, "patch_length": 4, "patch_stride": 4}),
    ("patchtsmixer", {"self_attn": True, "context_length": 16, "patch_length": 4, "patch_stride": 4}),
    ("timesfm timesfm2_5", {"context_length": 16, "patch_length": 4, "horizon_length": 4}),
    ("swin donut-swin", {"image_size": 64, "window_size": 2}),
    ("bridgetower bridgetower_vision_model bridgetower_text_model bros", {"hidden_size": 64}),
    ("blip-2 instructblip", {"image_token_index": 98, "num_query_tokens": 4}),
    ("instructblipvideo", {"video_token_index": 98, "num_query_tokens": 4}),
    ("gemma3n_text", {"num_kv_shared_layers": 0}),
    ("falcon_h1", {"mamba_d_ssm": 64}),
    ("mamba2", {"num_heads": 8, "head_dim": 8}),
    ("funnel", {"architectures": ["FunnelModel"]}),
    ("xlnet", {"d_head": 8}),
    ("lfm2_moe", {"layer_types": ["full_attention", "conv"]}),
    ("lw_detr_vit", {"num_windows": 4, "window_block_indices": [0]}),
    ("reformer", {"axial_pos_embds_dim": [8, 24]}),
    ("sam2_vision_model", {"backbone_feature_sizes": [[8, 8], [4, 4], [2, 2]]}),
    ("tvp", {"visual_prompt_size": 8}),
    ("kosmos-2", {"latent_query_num": 4}),
    ("audio-spectrogram-transformer", {"max_length": 40}),
    ("chameleon", {"vocabulary_map": {"<image>": 98}}),
    ("emu3", {"vocabulary_map": {"<image>": 98, "<|extra_200|>": 97}}),
    ("align", {"projection_dim": 640}),
    ("esmc", {"num_key_value_heads": 4}),
    ("sam2_hiera_det_model", {"hidden_size": 96}),
    ("perceiver", {"num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 1, "num_self_attention_heads": 4}),
    ("dots3_note_text", {"swa_head_dim": 16, "swa_v_head_dim": 8}),
    ("dots3_note_audio_encoder", {"adapter_input_size": 32}),
    ("dots3_note_vision_encoder", {"adapter_in_dim": 32}),
    ("glm5_next_text", {"index_topk": 16, "index_kpool": 4}),
    ("swin2sr", {"embed_dim": 32, "depths": [1], "num_heads": [4], "window_size": 2}),
    (
        "depth_anything prompt_depth_anything",
        {"neck_hidden_sizes": [16], "reassemble_factors": [1], "reassemble_hidden_size": 32},
    ),
    ("zoedepth tipsv2_dpt chmv2", {"neck_hidden_sizes": [16], "reassemble_factors": [1]}),
    ("dbrx", {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}}),
    ("t5gemma2_text t5gemma2_encoder t5gemma2_decoder", {"dropout_rate": 0.0}),
    ("moonshine_streaming", {"num_key_value_heads": 4}),
    ("pix2struct_text_model", {"initializer_range": 0.02}),
    ("qwen3_omni_moe_talker_text", {"shared_expert_intermediate_size": 64}),
    ("blt", {"num_hidden_layers": 2}),
    ("hrm_text pop2piano", {"use_cache": False}),
    ("clap_audio_model", {"num_mel_bins": 64, "spec_size": 64, "window_size": 2}),
    ("llama4_vision_model", {"intermediate_size": 128, "projector_input_dim": 32, "projector_output_dim": 32}),
    ("shieldgemma2", {"mm_tokens_per_image": 4, "yes_token_index": 50, "no_token_index": 51}),
    ("qwen4_exp_text", {"token_budget": 8, "compress_ratio": 4}),
    ("grounding-dino mm-grounding-dino", {"d_model": 64}),
    ("mobilevit mobilevitv2", {"initializer_range": 0.3}),
]
OWN = {kind: numbers for kinds, numbers in OF_TYPES for kind in kinds.split()}
RESNET = {
    "model_type": "resnet", "embedding_size": 32, "hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1],
    "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
# What a configuration makes by itself from the numbers.
DROPPED = (
    "transformers_version", "_name_or_path", "id2label", "label2id", "torch_dtype", "dtype", "out_features",
    "out_indices", "stage_names", "qk_head_dim", "dim_bbox_sinusoid_emb_2d", "dim_bbox_sinusoid_emb_1d",
    "dim_bbox_projection", "image_embedding_size", "mamba_headdim", "_number_of_features",
)  # fmt: skip
# What stands for nothing, or for what is not small, where a model is not made without.
FILLED = {
    "head_dim": 8, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
    "top_k_experts": 2, "moe_intermediate_size": 16, "sliding_window": 5, "n_shared_experts": 1,
    "mlp_layer_types": ["dense", "sparse"],
}  # fmt: skip
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def shrunk(config: Any) -> Iterator[Any]:
    """Configurations of the same class with small numbers, and as many layers as it has kinds of them, at least 2: with
    what is None left so, then filled."""
    for filled in (False, True):
        numbers = _shrunk(config.to_dict(), _sections(type(config)), filled)
        numbers.pop("model_type", None)
        yield type(config)(**numbers)


@functools.cache
def _sections(kind: type | None) -> bool:
    """Whether a model divides its rotary frequencies among axes, by a default of its own where nothing is said."""
    if kind is None:
        return False
    module = sys.modules[kind.__module__]
    try:
        with open(inspect.getfile(module).replace("configuration_", "modeling_"), encoding="utf-8") as file:
            return "mrope_section" in file.read()
    except OSError:
        return False


def _shrunk(given: dict[str, Any], sections: bool, filled: bool) -> dict[str, Any]:
    sections = sections or _sections(_class(given.get("model_type", "")))
    found: dict[str, Any] = {}
    before = next((given[name] for name in LAYER_COUNTS if isinstance(given.get(name), int)), None)
    kinds = given.get("layer_types")
    kept = list(dict.fromkeys(kinds)) if isinstance(kinds, list) and kinds else []
    layers = max(2, len(kept))
    special = iter(range(VOCABULARY - 1, 2, -1))
    own = OWN.get(given.get("model_type", ""), {})
    for name, value in given.items():
        if name in DROPPED and not (name.startswith("out_") and "depths" in given):
            continue
        number = isinstance(value, int) and not isinstance(value, bool)
        if name in own:
            value = own[name]
        elif name == "per_layer_config":
            value = {}
        elif isinstance(value, dict) and value.get("model_type") == "timm_backbone":
            value = dict(RESNET)
        elif name == "use_timm_backbone":
            value = False
        elif isinstance(value, dict) and all(isinstance(key, str) for key in value):
            latent = "qk_rope_head_dim" in given
            value = _rope(value, latent, sections) if name.startswith("rope_") else _shrunk(value, sections, filled)
        elif (
            filled
            and name.endswith("num_key_value_heads")
            and value == given.get(name.replace("key_value", "attention"))
        ):
            value = BY_NAME["num_attention_heads"]
        elif value is None and filled and name in FILLED:
            value = FILLED[name]
        elif name == "layer_types" and kept:
            value = (kept * layers)[:layers]
        elif isinstance(value, list) and before is not None and len(value) == before and before > 4:
            value = value[:layers]
        elif name == "pad_token_id":
            value = 0
        elif name in IDS or (name.endswith(("_token_id", "_token_index")) and number):
            value = None if value is None else IDS[name] if name in IDS else next(special)
        elif name in LAYER_COUNTS and number:
            value = layers
        elif name == "num_key_value_heads" and "kv_lora_rank" in given:
            value = BY_NAME["num_attention_heads"]  # latent attention has as many
        elif name in BY_NAME and number and value > BY_NAME[name]:
            value = BY_NAME[name]
        elif name in BY_NAME and isinstance(value, list) and all(isinstance(x, int) for x in value):
            value = [2 if BY_NAME[name] == BY_NAME["num_heads"] else min(x, BY_NAME[name]) for x in value]
        elif value is None and name == "vocab_size":
            value = VOCABULARY
        elif name in ("mamba_n_heads", "mamba_num_heads", "mamba_d_head", "mamba_head_dim"):
            value = 8
        elif name == "depths":
            value = [1 for _ in value]
        found[name] = value
    for name, value in own.items():
        found.setdefault(name, value)  # what a class takes and does not say
    if sections and "hidden_size" in given and given.get("rope_parameters", 0) is None:
        found["rope_parameters"] = _rope({"rope_type": "default", "rope_theta": 1e4}, False, sections)
    return found


def _class(model_type: str) -> type | None:
    """The class of a part's configuration."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING.get(model_type, None)


def _rope(given: dict[str, Any], latent: bool, sections: bool) -> dict[str, Any]:
    """Rotary options for a head_dim of 8, all of which is turned where the head has a part of its own for that."""
    nested = any(isinstance(value, dict) for value in given.values())
    found = {n: _rope(value, latent, sections) if isinstance(value, dict) else value for n, value in given.items()}
    if "partial_rotary_factor" in found and (latent or sections):
        found["partial_rotary_factor"] = 1.0
    if isinstance(found.get("mrope_section"), list) or (sections and not nested and "rope_theta" in found):
        found["mrope_section"] = [1, 1, 2]
    return found
