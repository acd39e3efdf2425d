"""What transformers' ViT, ViTMAE and CLIP checkpoints are called in `vision`, `self_supervised` and `clip`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from . import labels
from .checkpoints import Family, activation, expect, register

# --- ViT and ViTMAE: the layers have the same names ---


def _layers(theirs: str, ours: str) -> dict[str, str]:
    """Names of the layers of a ViT, in files of all versions of transformers."""
    pairs = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.out_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "layernorm_before": "attention_norm",
        "layernorm_after": "mlp_norm",
    }
    return _both({f"{theirs}.{{}}.{a}": f"{ours}.layers.{{}}.{b}" for a, b in pairs.items()})


def _both(pairs: Mapping[str, str]) -> dict[str, str]:
    return {f"{a}.{kind}": f"{b}.{kind}" for a, b in pairs.items() for kind in ("weight", "bias")}


_VIT_NAMES = {
    "embeddings.cls_token": "backbone.class_token",
    "embeddings.position_embeddings": "backbone.positions",
    **_both(
        {
            "embeddings.patch_embeddings.projection": "backbone.embedding.projection",
            "layernorm": "backbone.encoder.norm",
        }
    ),
    **_layers("encoder.layer", "backbone.encoder"),
}


def _transformer(config: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a TransformerConfig; `prefix` is "decoder_" for MAE's decoder."""

    def read(name: str) -> Any:
        return config.get(prefix + name, defaults.get(name))

    return {
        "hidden_dim": read("hidden_size"),
        "num_layers": read("num_hidden_layers"),
        "num_heads": read("num_attention_heads"),
        "mlp_dim": read("intermediate_size"),
        "activation": activation(config, "hidden_act", defaults["hidden_act"]),
        "norm_eps": config.get("layer_norm_eps", defaults["layer_norm_eps"]),
        "dropout": config.get("hidden_dropout_prob", 0.0),
        "attention_dropout": config.get("attention_probs_dropout_prob", config.get("attention_dropout", 0.0)),
    }


_VIT = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}


def _image(config: Mapping[str, Any], patch: int, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an ImageConfig."""
    return {
        "image_size": config.get("image_size", 224),
        "patch_size": config.get("patch_size", patch),
        "channels": config.get("num_channels", 3),
        "encoder": _transformer(config, defaults),
    }


def _vit(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    expect(config, qkv_bias=True)
    head = tensors.get("classifier.weight")
    count = None if head is None else head.shape[0]
    return {
        "backbone": _image(config, 16, _VIT),
        "num_labels": count,
        "labels": labels.of_checkpoint(config, count),
    }


def _without_batch(tensors: dict[str, Tensor], _: Mapping[str, Any]) -> dict[str, Tensor]:
    """Class token and positions without their leading 1."""
    leading = {"backbone.class_token": 2, "mask_token": 2, "backbone.positions": 1, "decoder_positions": 1}
    for name, count in leading.items():
        if name in tensors:
            tensors[name] = tensors[name].reshape(tensors[name].shape[count:])
    return tensors


register(
    "vit",
    Family(
        model="ViT",
        config=_vit,
        prefixes=("vit.",),
        names={**_VIT_NAMES, **_both({"classifier": "head"})},
        ignored=(r"pooler\..*", r"decoder\..*", r"embeddings\.mask_token"),
        adjust=_without_batch,
    ),
)


def _mae(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    expect(config, qkv_bias=True)
    if "decoder.mask_token" not in tensors:
        raise CheckpointError("this ViTMAE checkpoint has no decoder; save a ViTMAEForPreTraining")
    decoder = {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "intermediate_size": 2048,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    }
    return {
        "backbone": {**_image(config, 16, _VIT), "positions": "sinusoidal"},
        "decoder": _transformer(config, decoder, "decoder_"),
        "mask_ratio": config.get("mask_ratio", 0.75),
        "normalise_target": config.get("norm_pix_loss", False),
    }


register(
    "vit_mae",
    Family(
        model="MAE",
        config=_mae,
        prefixes=("vit.",),
        names={
            **_VIT_NAMES,
            "decoder.mask_token": "mask_token",
            "decoder.decoder_pos_embed": "decoder_positions",
            **_both(
                {
                    "decoder.decoder_embed": "decoder_embedding",
                    "decoder.decoder_norm": "decoder.norm",
                    "decoder.decoder_pred": "to_pixels",
                }
            ),
            **_layers("decoder.decoder_layers", "decoder"),
            **_layers("decoder.decoder_encoder.layer", "decoder"),  # as transformers 5.2x writes them
        },
        adjust=_without_batch,
    ),
)


# --- CLIP ---


def _clip_layers(theirs: str, ours: str) -> dict[str, str]:
    pairs = {
        "self_attn.q_proj": "attention.q_proj",
        "self_attn.k_proj": "attention.k_proj",
        "self_attn.v_proj": "attention.v_proj",
        "self_attn.out_proj": "attention.out_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "layer_norm1": "attention_norm",
        "layer_norm2": "mlp_norm",
    }
    return _both({f"{theirs}.encoder.layers.{{}}.{a}": f"{ours}.encoder.layers.{{}}.{b}" for a, b in pairs.items()})


def _tower(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The config of a tower; old files repeat it as text_config_dict and vision_config_dict, which then counts."""
    return {**(config.get(f"{name}_config") or {}), **(config.get(f"{name}_config_dict") or {})}


def _clip(config: Mapping[str, Any], _: Mapping[str, Tensor]) -> dict[str, Any]:
    both = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    text, image = _tower(config, "text"), _tower(config, "vision")
    small = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048}
    large = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    eos = text.get("eos_token_id", 49407)
    if not isinstance(eos, int):
        raise CheckpointError(f"CLIP's text tower ends texts with one token; the config has eos_token_id={eos!r}")
    return {
        "image": {**_image(image, 32, both | large), "patch_bias": False, "embedding_norm": True},
        "text": {
            "vocab_size": text.get("vocab_size", 49408),
            "max_len": text.get("max_position_embeddings", 77),
            # Files from before transformers 4.31 say 2, and mean the largest id of a text.
            "eos_token_id": None if eos == 2 else eos,
            "encoder": {**_transformer(text, both | small), "causal": True},
        },
        "projection_dim": config.get("projection_dim", 512),
        "logit_scale": config.get("logit_scale_init_value", 2.6592),
    }


register(
    "clip",
    Family(
        model="CLIP",
        config=_clip,
        names={
            "logit_scale": "logit_scale",
            "visual_projection.weight": "image_projection.weight",
            "text_projection.weight": "text_projection.weight",
            "vision_model.embeddings.class_embedding": "image.class_token",
            "vision_model.embeddings.patch_embedding.weight": "image.embedding.projection.weight",
            "vision_model.embeddings.position_embedding.weight": "image.positions",
            "text_model.embeddings.token_embedding.weight": "text.embedding.weight",
            "text_model.embeddings.position_embedding.weight": "text.positions.weight",
            **_both(
                {
                    "vision_model.pre_layrnorm": "image.embedding_norm",
                    "vision_model.post_layernorm": "image.encoder.norm",
                    "text_model.final_layer_norm": "text.encoder.norm",
                }
            ),
            **_clip_layers("vision_model", "image"),
            **_clip_layers("text_model", "text"),
        },
        ignored=(r"(text|vision)_model\.embeddings\.position_ids",),
    ),
)
