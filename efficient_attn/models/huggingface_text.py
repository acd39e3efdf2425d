"""What transformers call the parts of our text models: BERT, RoBERTa, MiniLM (a BERT), GPT-2, Marian and BART."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from . import labels
from .checkpoints import Family, activation, expect, register

Text = Mapping[str, Any]
Tensors = Mapping[str, Tensor]


def both(theirs: str, ours: str | tuple[str, ...]) -> dict[str, str | tuple[str, ...]]:
    """The rows of a layer's weight and bias."""
    names = (ours,) if isinstance(ours, str) else ours
    rows: dict[str, str | tuple[str, ...]] = {}
    for kind in ("weight", "bias"):
        targets = tuple(f"{name}.{kind}" for name in names)
        rows[f"{theirs}.{kind}"] = targets[0] if isinstance(ours, str) else targets
    return rows


# --- BERT and RoBERTa ---

BERT_LAYER = {
    "attention.self.query": "attention.q_proj",
    "attention.self.key": "attention.k_proj",
    "attention.self.value": "attention.v_proj",
    "attention.output.dense": "attention.out_proj",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "output.LayerNorm": "mlp_norm",
}
BERT_NAMES: dict[str, str | tuple[str, ...]] = {
    "embeddings.word_embeddings.weight": "embeddings.tokens.weight",
    "embeddings.position_embeddings.weight": "embeddings.positions.weight",
    "embeddings.token_type_embeddings.weight": "embeddings.types.weight",
    **both("embeddings.LayerNorm", "embeddings.norm"),
    **both("pooler.dense", "pooler"),
    **both("classifier", "classifier"),
    **both("classifier.dense", "pooler"),  # RoBERTa's classifier: its first layer is a pooler
    **both("classifier.out_proj", "classifier"),
}
for theirs, ours in BERT_LAYER.items():
    BERT_NAMES |= both(f"encoder.layer.{{}}.{theirs}", f"encoder.layers.{{}}.{ours}")


def bert_config(text: Text, tensors: Tensors) -> dict[str, Any]:
    """BERT: positions from 0."""
    expect(text, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    for architecture in text.get("architectures") or ():
        if architecture.endswith(("ForTokenClassification", "ForMultipleChoice", "ForQuestionAnswering")):
            raise CheckpointError(f"a {architecture} is not a TextClassifier; use transformers for it")
    head = next(
        (tensors[name] for name in ("classifier.weight", "classifier.out_proj.weight") if name in tensors), None
    )
    dropout = text.get("hidden_dropout_prob", 0.1)
    return {
        "vocab_size": text["vocab_size"],
        "max_len": text["max_position_embeddings"],
        "num_labels": None if head is None else head.shape[0],
        "labels": labels.of_checkpoint(text, None if head is None else head.shape[0]),
        "pooler": "pooler.dense.weight" in tensors or "classifier.dense.weight" in tensors,
        "types": text.get("type_vocab_size", 2),
        "pad_token_id": text.get("pad_token_id", 0),
        "dropout": dropout,
        "encoder": {
            "hidden_dim": text["hidden_size"],
            "num_layers": text["num_hidden_layers"],
            "num_heads": text["num_attention_heads"],
            "mlp_dim": text["intermediate_size"],
            "activation": activation(text, "hidden_act"),
            "norm_first": False,
            "norm_eps": text.get("layer_norm_eps", 1e-12),
            "dropout": dropout,
            "attention_dropout": text.get("attention_probs_dropout_prob", 0.1),
        },
    }


def roberta_config(text: Text, tensors: Tensors) -> dict[str, Any]:
    """RoBERTa: positions of tokens that are not padding, after those of padding."""
    found = bert_config(text, tensors)
    pad = text.get("pad_token_id", 1)
    return found | {
        "pad_token_id": pad,
        "skip_padding": True,
        "max_len": text["max_position_embeddings"] - pad - 1,
    }


BERT_IGNORED = (
    r"embeddings\.position_ids",
    r"cls\..*",  # of masked language modelling and next-sentence prediction
    r"lm_head\..*",
)
register("bert", Family("TextClassifier", bert_config, BERT_NAMES, prefixes=("bert.",), ignored=BERT_IGNORED))
for kind in ("roberta", "xlm-roberta", "camembert"):
    register(kind, Family("TextClassifier", roberta_config, BERT_NAMES, prefixes=("roberta.",), ignored=BERT_IGNORED))


# --- GPT-2 ---

QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
GPT2_LAYER = {
    "attn.c_attn": QKV,
    "attn.c_proj": "attention.out_proj",
    "ln_1": "attention_norm",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ln_2": "mlp_norm",
}
GPT2_NAMES: dict[str, str | tuple[str, ...]] = {
    "wte.weight": "embeddings.tokens.weight",
    "wpe.weight": "embeddings.positions.weight",
    **both("ln_f", "decoder.norm"),
    "lm_head.weight": "head.weight",
}
for theirs, name in GPT2_LAYER.items():
    names = (name,) if isinstance(name, str) else name
    layered = tuple(f"decoder.layers.{{}}.{each}" for each in names)
    GPT2_NAMES |= both(f"h.{{}}.{theirs}", layered[0] if len(layered) == 1 else layered)


def gpt2_config(text: Text, tensors: Tensors) -> dict[str, Any]:
    expect(text, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return {
        "vocab_size": text["vocab_size"],
        "max_len": text.get("n_positions", 1024),
        "dropout": text.get("embd_pdrop", 0.1),
        "tied": text.get("tie_word_embeddings", True),
        "eos_token_id": _only_one(_generation(text, "eos_token_id"), "eos_token_id"),
        "pad_token_id": _generation(text, "pad_token_id"),
        "decoder": {
            "hidden_dim": text["n_embd"],
            "num_layers": text["n_layer"],
            "num_heads": text["n_head"],
            "mlp_dim": text.get("n_inner"),
            "activation": activation(text, "activation_function", "gelu_new"),
            "norm_eps": text.get("layer_norm_epsilon", 1e-5),
            "dropout": text.get("resid_pdrop", 0.1),
            "attention_dropout": text.get("attn_pdrop", 0.1),
            "causal": True,
        },
    }


def gpt2_adjust(tensors: dict[str, Tensor], text: Text) -> dict[str, Tensor]:
    """A tied output layer is the embedding, however the checkpoint holds it."""
    if text.get("tie_word_embeddings", True):
        head = tensors.pop("head.weight", None)
        if head is not None:
            tensors.setdefault("embeddings.tokens.weight", head)
    return tensors


register(
    "gpt2",
    Family(
        "CausalLM",
        gpt2_config,
        GPT2_NAMES,
        prefixes=("transformer.",),
        transposed=frozenset(
            f"h.{{}}.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        ),
        ignored=(r"h\.\d+\.attn\.(bias|masked_bias)",),
        adjust=gpt2_adjust,
    ),
)


# --- Marian and BART ---

ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "out_proj"}
BART_NAMES: dict[str, str | tuple[str, ...]] = {
    "shared.weight": "source.tokens.weight",
    "encoder.embed_tokens.weight": "source.tokens.weight",
    "decoder.embed_tokens.weight": "target.tokens.weight",
    "encoder.embed_positions.weight": "source.positions.weight",
    "decoder.embed_positions.weight": "target.positions.weight",
    "final_logits_bias": "logits_bias",
    "lm_head.weight": "head.weight",
    **both("encoder.layernorm_embedding", "source.norm"),
    **both("decoder.layernorm_embedding", "target.norm"),
}
for side in ("encoder", "decoder"):
    here = f"{side}.layers.{{}}"
    BART_NAMES |= both(f"{side}.layer_norm", f"{side}.norm")  # mBART and Pegasus, which are pre-norm
    for name in ATTENTION:
        BART_NAMES |= both(f"{here}.self_attn.{name}", f"{here}.attention.{name}")
    for theirs, ours in (
        ("self_attn_layer_norm", "attention_norm"),
        ("encoder_attn_layer_norm", "cross_norm"),
        ("fc1", "mlp.fc1"),
        ("fc2", "mlp.fc2"),
        ("final_layer_norm", "mlp_norm"),
    ):
        BART_NAMES |= both(f"{here}.{theirs}", f"{here}.{ours}")
for name in ATTENTION:
    BART_NAMES |= both(f"decoder.layers.{{}}.encoder_attn.{name}", f"decoder.layers.{{}}.cross_attention.{name}")

# What generate() of transformers would do and ours does not: named in a warning when a checkpoint asks for it.
IGNORED_GENERATION = {
    "encoder_no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
    "repetition_penalty": 1.0,
    "num_beam_groups": 1,
    "do_sample": False,
}


def bart_config(text: Text, tensors: Tensors) -> dict[str, Any]:
    shared = text.get("share_encoder_decoder_embeddings", True)
    asked = {name: _generation(text, name) for name in IGNORED_GENERATION}
    odd = [f"{name}={value}" for name, value in asked.items() if value not in (None, IGNORED_GENERATION[name])]
    if odd:
        warnings.warn(f"generate() does not apply the checkpoint's {', '.join(odd)}", stacklevel=3)

    def side(name: str) -> dict[str, Any]:
        return {
            "hidden_dim": text["d_model"],
            "num_layers": text[f"{name}_layers"],
            "num_heads": text[f"{name}_attention_heads"],
            "mlp_dim": text[f"{name}_ffn_dim"],
            "activation": activation(text, "activation_function"),
            "norm_first": False,
            "dropout": text.get("dropout", 0.1),
            "attention_dropout": text.get("attention_dropout", 0.0),
            "activation_dropout": text.get("activation_dropout", 0.0),
        }

    longest = _generation(text, "max_new_tokens")
    if longest is None and _generation(text, "max_length") is not None:
        longest = _generation(text, "max_length") - 1  # theirs counts the start token
    return {
        "vocab_size": text["vocab_size"],
        "target_vocab_size": None if shared else text.get("decoder_vocab_size") or text["vocab_size"],
        "max_len": text["max_position_embeddings"],
        "shared": shared,
        "tied": text.get("tie_word_embeddings", True),
        "logits_bias": "final_logits_bias" in tensors,
        "positions": "learned",
        "position_offset": 2,
        "scaled": text.get("scale_embedding", False),
        "embedding_norm": True,
        "dropout": text.get("dropout", 0.1),
        "pad_token_id": _generation(text, "pad_token_id"),
        "eos_token_id": _only_one(_generation(text, "eos_token_id"), "eos_token_id"),
        "start_token_id": _generation(text, "decoder_start_token_id"),
        "forced_bos_token_id": _generation(text, "forced_bos_token_id"),
        "forced_eos_token_id": _only_one(_generation(text, "forced_eos_token_id"), "forced_eos_token_id"),
        "banned_token_ids": tuple(
            _only_one(words, "bad_words_ids") for words in _generation(text, "bad_words_ids") or ()
        ),
        "min_length": _generation(text, "min_length") or 0,
        "no_repeat_ngram": _generation(text, "no_repeat_ngram_size") or 0,
        "renormalize": bool(_generation(text, "renormalize_logits")),
        "num_beams": _generation(text, "num_beams") or 1,
        "length_penalty": 1.0 if _generation(text, "length_penalty") is None else _generation(text, "length_penalty"),
        "early_stopping": _generation(text, "early_stopping") or False,
        "max_new_tokens": longest,
        "encoder": side("encoder"),
        "decoder": side("decoder") | {"causal": True, "cross_attention": True},
    }


def marian_config(text: Text, tensors: Tensors) -> dict[str, Any]:
    """Marian: BART with sinusoidal positions and no norm of embeddings."""
    kinds = {"positions": "sinusoidal_halves", "position_offset": 0, "embedding_norm": False}
    return bart_config(text, tensors) | kinds


def pre_norm(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with norms before each part, and one at the end."""
    return fields | {side: fields[side] | {"norm_first": True} for side in ("encoder", "decoder")}


def mbart_config(text: Text, tensors: Tensors) -> dict[str, Any]:
    """mBART: BART with its norms before each part."""
    return pre_norm(bart_config(text, tensors))


def pegasus_config(text: Text, tensors: Tensors) -> dict[str, Any]:
    """Pegasus: Marian with its norms before each part."""
    return pre_norm(marian_config(text, tensors))


def bart_adjust(tensors: dict[str, Tensor], text: Text) -> dict[str, Tensor]:
    """One embedding and a tied output layer, under whichever of their names the checkpoint has kept them."""
    shared = text.get("share_encoder_decoder_embeddings", True)
    tied = text.get("tie_word_embeddings", True)
    if tied:
        head = tensors.pop("head.weight", None)
        if head is not None:
            tensors.setdefault("target.tokens.weight", head)
    if shared:
        table = tensors.pop("target.tokens.weight", None)
        if table is not None:
            tensors.setdefault("source.tokens.weight", table)
    if "logits_bias" in tensors:
        tensors["logits_bias"] = tensors["logits_bias"].flatten()
    return tensors


def marian_adjust(tensors: dict[str, Tensor], text: Text) -> dict[str, Tensor]:
    """Positions are computed, not loaded."""
    for name in ("source.positions.weight", "target.positions.weight"):
        tensors.pop(name, None)
    return bart_adjust(tensors, text)


for kind, settings, adjust in (
    ("marian", marian_config, marian_adjust),
    ("pegasus", pegasus_config, marian_adjust),
    ("bart", bart_config, bart_adjust),
    ("mbart", mbart_config, bart_adjust),
):
    register(kind, Family("Seq2Seq", settings, BART_NAMES, prefixes=("model.",), adjust=adjust))


def _generation(text: Text, name: str) -> Any:
    """A setting of generation_config.json, or else of config.json, where older checkpoints have it."""
    found = text.get("generation_config", {}).get(name)
    return text.get(name) if found is None else found


def _only_one(value: Any, name: str) -> Any:
    """A token id, which some checkpoints write as a list.

    Raises:
        CheckpointError: a list of several.
    """
    if isinstance(value, list):
        if len(value) != 1:
            raise CheckpointError(f"{name}={value} is not one token; our generation takes one")
        return value[0]
    return value
