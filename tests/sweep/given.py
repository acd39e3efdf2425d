"""Arguments with which a tiny model runs: text that is padded, images, sound, time series, by the names it takes."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .tiny import IMAGE

BATCH, LENGTH, FRAMES, SIDE = 2, 12, 40, 4
MOST = 120  # choices of arguments that are tried
FRAME_WIDTHS = (
    "num_mel_bins", "feature_size", "feat_size", "input_feat_per_channel", "feature_projection_input_dim", "input_dim",
    "mel_bins", "n_mels", "input_size", "input_feat_size", "audio_num_mel_bins", "spectrogram_bins", "input_channels",
)  # fmt: skip


def inputs(model: Any, config: Any) -> Iterator[dict[str, Tensor]]:
    """Arguments that a model may take, the least first."""
    yield from itertools.islice(_inputs(model, config), MOST)


def _inputs(model: Any, config: Any) -> Iterator[dict[str, Tensor]]:
    names = inspect.signature(model.forward).parameters
    named = {name: p for name, p in names.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    needed = {name for name, p in named.items() if p.default is p.empty}
    known = _known(config)
    text = {name: known[name][0] for name in ("input_ids", "attention_mask", "decoder_input_ids") if name in names}
    mains = [n for n in MAIN if n in names]
    others = {n for n in needed | {n for n in WANTED if n in names} if n in known and n not in text and n not in MAIN}
    required = {n for n in needed if n in known and n not in text}
    main = getattr(model, "main_input_name", "input_ids")
    if "input_ids" in text and (main in text or not mains):
        yield from _choices(text, required, known)
        yield from _choices(text, others, known)
        yield from _choices({n: text[n] for n in ("input_ids",)}, others, known)
    decoder = {n: text[n] for n in ("decoder_input_ids",) if n in text}
    for name in mains:
        heard = {**decoder, "attention_mask": known["frames_mask"][0]}
        bases = [decoder, text, *([heard] if name in SOUND and "attention_mask" in text else [])]
        for extra in [required] if required == others else [required, others]:
            for base in bases:
                for value in known[name]:
                    yield from _choices({**base, name: value}, extra, known)
    if not mains and "input_ids" not in text:
        yield from _choices({}, required, known)
        yield from _choices({}, others, known)
        yield from _choices(text, required, known)


def _choices(base: dict[str, Tensor], names: set[str], known: dict[str, list[Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The arguments with every combination of what is known for some names."""
    more = sorted(names - base.keys())
    for values in itertools.islice(itertools.product(*(known[name] for name in more)), 8):
        yield {**base, **dict(zip(more, values, strict=True))}


def _number(config: Any, *names: str, default: int) -> int:
    """The first of some numbers that a configuration or one of its parts has."""
    parts = [config, *(getattr(config, n) for n in PARTS if hasattr(config, n))]
    for part in parts:
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, (list, tuple)) and value:
                value = value[0]
            if isinstance(value, int) and not isinstance(value, bool) and value:
                return value
    return default


PARTS = (
    "vision_config",
    "audio_config",
    "encoder_config",
    "encoder",
    "decoder_config",
    "text_config",
    "backbone_config",
)
SOUND = ("input_features", "input_values")
# What a model is about besides text, each tried alone and with text.
MAIN = (
    "pixel_values", "pixel_values_videos", "input_features", "input_values", "past_values", "inputs", "hidden_states",
    "flattened_patches", "audio_mel", "states", "query_embeds", "noise_embeds", "input", "inputs_embeds",
)  # fmt: skip
# What is given where a model takes it and does not run without.
WANTED = (
    "bbox", "grid_thw", "image_grid_thw", "input_features_mask", "past_time_features", "past_observed_mask",
    "future_values", "future_time_features", "spatial_shapes", "pixel_attention_mask", "pixel_position_ids",
    "qformer_input_ids", "image_attention_mask", "visual_feats", "visual_pos", "target_sizes", "is_longer",
    "image_embeds_position_mask", "pixel_values", "image_sizes", "image", "audio_mel_mask", "padding_mask",
    "encoder_hidden_states", "actions", "rewards", "returns_to_go", "timesteps", "decoder_input_values", "task_inputs",
)  # fmt: skip


def _known(config: Any) -> dict[str, list[Tensor]]:
    """What is known for an argument's name, the likeliest first."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    ids = torch.randint(3, 35, (BATCH, LENGTH), generator=generator)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[0, 8:] = 0
    ids = ids.where(mask.bool(), torch.tensor(0))
    image = next(
        (getattr(config, n, None) for n in ("image_token_index", "video_token_index") if hasattr(config, n)), 0
    )
    queries = getattr(config, "num_query_tokens", None)
    if isinstance(queries, int) and queries < 8 and image:
        ids[:, :queries] = image  # places that a query transformer's tokens take
    size = _number(config, "image_size", default=IMAGE)
    channels = _number(config, "num_channels", "in_channels", "in_chans", default=3)
    patch = _number(config, "patch_size", default=8)
    temporal = _number(config, "temporal_patch_size", default=1)
    merge = _number(config, "spatial_merge_size", default=2)
    hidden = _number(config, "hidden_size", "d_model", default=32)
    pixels = randn(BATCH, channels, size, size)
    large = randn(BATCH, channels, 64, 64)
    video = randn(BATCH, 8, channels, size, size)
    packed = randn(BATCH * SIDE * SIDE, channels * temporal * patch * patch)
    flat = randn(BATCH, SIDE * SIDE, channels * patch * patch)
    square = randn(BATCH * SIDE * SIDE, channels, patch, patch)
    widths = dict.fromkeys(_number(config, name, default=16) for name in FRAME_WIDTHS)
    widths.update(dict.fromkeys((80, 128, 64)))
    frames = [randn(BATCH, width, FRAMES) for width in widths]
    frames = [x for pair in zip(frames, [x.transpose(1, 2) for x in frames], strict=True) for x in pair]
    sound = [randn(BATCH, 3200), randn(BATCH, 1, 3200)]
    grid = torch.tensor([[1, SIDE, SIDE]] * BATCH)
    boxes = torch.sort(torch.randint(0, 60, (BATCH, LENGTH, 2, 2), generator=generator), dim=2).values.flatten(2)
    series_in = _number(config, "context_length", default=16)
    lags = getattr(config, "lags_sequence", None) or [0]
    past, future = series_in + max(lags), _number(config, "prediction_length", default=4)
    features = getattr(config, "num_time_features", 1)
    visible = torch.ones(BATCH, FRAMES, dtype=torch.int64)
    visible[0, 24:] = 0
    series = [randn(BATCH, past), randn(BATCH, past, _number(config, "num_input_channels", default=1))]
    steps = torch.arange(LENGTH).expand(BATCH, -1)
    return {
        "input_ids": [ids],
        "attention_mask": [mask],
        "decoder_input_ids": [ids[:, :9]],
        "pixel_values": [
            pixels,
            video,
            packed,
            flat,
            square,
            video[:, :2],
            video[:, :1],
            pixels[:1],
            square[None],
            packed[None],
            torch.cat([packed, packed], 1),
            large,
            video.flatten(0, 1),
            randn(BATCH, 1, 4, channels, size, size),
        ],
        "pixel_values_videos": [video, packed],
        "input_features": [*frames, *[x[:, None] for x in frames]],
        "input_values": [*sound, *frames, randn(BATCH, LENGTH, hidden)],
        "decoder_input_values": [randn(BATCH, 9, hidden)],
        "frames_mask": [visible],
        "task_inputs": [randn(BATCH, 77)],
        "input_features_mask": [visible, visible.bool()],
        "audio_mel": frames[1::2],
        "audio_mel_mask": [visible == 0],
        "hidden_states": [
            packed,
            randn(BATCH, hidden, 40),
            square,
            sound[1],
            randn(BATCH, SIDE * SIDE, hidden),
            *frames[1::2],
        ],
        "context": [randn(BATCH, LENGTH, hidden)],
        "spectrogram": frames[1::2],
        "mel_spectrogram": frames[::2],
        "mask": [visible.bool()],
        "flattened_patches": [randn(BATCH, LENGTH, 2 + channels * patch * patch)],
        "aspect_ratio_ids": [torch.ones(BATCH, 1, dtype=torch.int64)],
        "aspect_ratio_mask": [torch.ones(BATCH, 1, 4, dtype=torch.int64)],
        "grid_thw": [grid],
        "image_grid_thw": [grid],
        "merge_sizes": [torch.full((BATCH,), merge), torch.ones(BATCH, dtype=torch.int64)],
        "bbox": [boxes, boxes / 100.0],
        "past_values": series,
        "past_observed_mask": [torch.ones_like(x) for x in series],
        "past_time_features": [randn(BATCH, past, features)],
        "future_values": [randn(BATCH, future)],
        "future_time_features": [randn(BATCH, future, features)],
        "past_values_padding": [torch.zeros(BATCH, past, dtype=torch.int64)],
        "freq": [torch.zeros(BATCH, 1, dtype=torch.int64)],
        "spatial_shapes": [torch.tensor([[SIDE, SIDE]] * BATCH)],
        "pixel_attention_mask": [torch.ones(BATCH, SIDE * SIDE, dtype=torch.int64)],
        "pixel_position_ids": [torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).expand(BATCH, -1, -1)],
        "image_position_ids": [torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).expand(BATCH, -1, -1)],
        "target_sizes": [torch.tensor([[SIDE, SIDE]] * BATCH)],
        "image_sizes": [torch.tensor([[size, size]] * BATCH)],
        "qformer_input_ids": [ids],
        "image_attention_mask": [torch.ones(BATCH, LENGTH, 1, dtype=torch.int64)],
        "image_embeds_position_mask": [(steps < _number(config, "latent_query_num", default=4)).long()],
        "visual_feats": [randn(BATCH, 6, _number(config, "visual_feat_dim", default=8))],
        "visual_pos": [randn(BATCH, 6, 4).sigmoid()],
        "prompt_pixel_values": [pixels],
        "prompt_masks": [pixels],
        "inputs_embeds": [randn(BATCH, LENGTH, hidden)],
        "noise_embeds": [randn(BATCH, 4, hidden)],
        "context_hidden_states": [randn(BATCH, LENGTH, hidden), randn(BATCH, LENGTH, 2 * hidden)],
        "latents": [randn(BATCH, hidden, 10)],
        "encoder_hidden_states": [randn(BATCH, 6, _number(config, "encoder_hidden_size", default=hidden))],
        "query_embeds": [randn(BATCH, 4, hidden)],
        "inputs": [randn(BATCH, LENGTH, _number(config, "d_model", default=hidden)), ids],
        "input": [ids],
        "is_longer": [torch.zeros(BATCH, 1, dtype=torch.bool)],
        "image": [pixels],
        "action_embeds": [randn(BATCH, 4, hidden)],
        "padding_mask": [torch.ones(BATCH, 3200, dtype=torch.bool)],
        "states": [randn(BATCH, LENGTH, _number(config, "state_dim", default=17))],
        "actions": [randn(BATCH, LENGTH, _number(config, "act_dim", default=4))],
        "rewards": [randn(BATCH, LENGTH, 1)],
        "returns_to_go": [randn(BATCH, LENGTH, 1)],
        "timesteps": [steps],
    }
