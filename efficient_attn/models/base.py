"""`Model`: what all reference models share: a config, `set_attention`, `save_pretrained` and `from_pretrained`."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, InputError
from . import checkpoints
from . import config as configs
from .positions import LearnedPositions, extended
from .transformer import Specs, Transformer

MODELS: dict[str, type[Model]] = {}  # by class name, which config.json names
FORMAT = 1
# What from_pretrained of transformers takes and this one says otherwise.
INSTEAD = {
    "attn_implementation": 'give attention="dense", or any other method',
    "device_map": 'give device="cpu" or "cuda"; parameters lie on one device',
    "max_position_embeddings": "give max_len",
}
M = TypeVar("M", bound="Model")


class Model(nn.Module):
    """Base of the reference models.

    A subclass is called with its config, a frozen dataclass named by `config_class`. Each `Transformer` in it is found
    in the config under the same path: `model.encoder` was made of `config.encoder`, `model.vision.encoder` of
    `config.vision.encoder`.
    """

    config_class: ClassVar[Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        MODELS[cls.__name__] = cls

    def __init__(self, config: Any) -> None:
        super().__init__()
        if type(config) is not self.config_class:
            raise InputError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, got {type(config).__name__}; "
                "from_pretrained makes a model of a checkpoint"
            )
        self._config = config

    @property
    def config(self) -> Any:
        """The config, with the attention that the model has now."""
        now = self._config
        for path, part in self.transformers().items():
            now = configs.replace_at(now, path, part.config)
        return now

    @property
    def dtype(self) -> torch.dtype:
        """That of the parameters."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def transformers(self) -> dict[str, Transformer]:
        """The model's Transformers by path, such as {"encoder": ...}."""
        return {path: part for path, part in self.named_modules() if isinstance(part, Transformer)}

    def set_attention(self, attention: Specs | Mapping[str, Specs]) -> None:
        """Attend by other methods from now on, on the same parameters.

        A method that has parameters (linformer) starts with fresh ones: make the optimiser after this.

        Args:
            attention: a spec such as "bigbird:block=64"; a list of specs, one a layer; or a mapping of the parts that
                shall change, as `transformers()` names them, to either: {"encoder": "nystrom", "decoder": "causal"}.
                "decoder.cross" is a part's cross-attention, which the other forms leave as it is.

        Raises:
            InputError: a spec that cannot be read, another number of specs than layers, an unknown part.
            UnsupportedError: a method that cannot be causal, for a causal part. After an error nothing has changed.
        """
        parts = self.transformers()
        if not isinstance(attention, Mapping):
            attention = dict.fromkeys(parts, attention)
        chosen: list[tuple[Transformer, bool, Specs]] = []
        for path, specs in attention.items():
            cross = path not in parts and path.endswith(".cross")
            name = path.removesuffix(".cross") if cross else path
            if name not in parts:
                raise InputError(f"the model has no part {path!r}; its parts: {', '.join(parts)}")
            parts[name].check_attention(specs, cross=cross)
            chosen.append((parts[name], cross, specs))
        for part, cross, specs in chosen:
            part.set_attention(specs, cross=cross)

    # --- saving and loading ---

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors, each whole or not at all; the config comes last.

        Raises:
            UnsupportedError: safetensors is not installed.
        """
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        text = {"efficient_attn": FORMAT, "model": type(self).__name__, "config": configs.to_dict(self.config)}
        weights = checkpoints.safetensors().save(_own_tensors(self), metadata={"format": "pt"})
        _write(place / checkpoints.WEIGHTS, weights)
        _write(place / checkpoints.CONFIG, json.dumps(text, indent=2).encode())

    @classmethod
    def from_pretrained(
        cls: type[M],
        path: str | os.PathLike[str],
        *,
        attention: Specs | Mapping[str, Specs] | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        extend: str = "tile",
        **changes: Any,
    ) -> M:
        """A model from a checkpoint, in eval mode: one of `save_pretrained`, or of transformers (see `checkpoints`).

        Only safetensors files are read, never pickles.

        Args:
            path: a folder, or the id of a repository on the Hugging Face hub.
            attention: for `set_attention`, after loading.
            revision, local_files_only: for the hub.
            dtype, device: of the parameters, default float32 on the CPU.
            extend: how learned positions of a text get more rows where max_len is larger than the checkpoint's: "tile"
                or "interpolate" (`positions.extended`). Those of images are interpolated, and a forecaster's larger
                context begins with the old one's part in the answer.
            changes: fields of the config to change, also in parts: encoder={"dropout": 0.2}; a field that one part
                alone has may stand for itself: image_size=384. A head that they ask for and the checkpoint lacks,
                or has in another size (num_labels=3), starts fresh; nothing else may be missing. Of transformers'
                names id2label, label2id, problem_type, ignore_mismatched_sizes and torch_dtype are understood.

        Raises:
            CheckpointError: no such checkpoint; one without safetensors; an unknown architecture, or one of another
                class than this; weights that are missing, left over or of the wrong shape.
            InputError: changes that the config does not have.
        """
        dtype = changes.pop("torch_dtype", dtype)
        for name, instead in INSTEAD.items():
            if name in changes:
                raise InputError(f"{cls.__name__}.from_pretrained has no {name}; {instead}")
        folder = checkpoints.locate(path, revision=revision, local_files_only=local_files_only)
        text = checkpoints.read_config(folder)
        family = None if "efficient_attn" in text else checkpoints.family_of(text, folder)
        found = MODELS[family.model] if family else _own_class(text, folder)
        if issubclass(cls, found):
            found = cls
        if not issubclass(found, cls):
            raise CheckpointError(f"{folder} holds a {found.__name__}; use {found.__name__}.from_pretrained")
        tensors = checkpoints.read_weights(folder)
        if family is None:
            fields = text.get("config", {})
        else:
            tensors = family.bare(tensors)
            fields = family.fields(text, tensors, folder)
            tensors = family.translate(tensors, text, folder)
        before = configs.from_dict(found.config_class, fields)
        changes = configs.nested(found.config_class, _head_changes(fields, changes))
        model: Any = found(configs.from_dict(found.config_class, configs.merge(fields, changes)))
        if changes:
            tensors = model.resized(tensors, before, extend)
        _load(model, tensors, folder, own=family is None, fresh_heads=bool(changes))
        if attention is not None:
            model.set_attention(attention)
        return model.to(device=device, dtype=dtype).eval()  # type: ignore[no-any-return]

    def resized(self, tensors: dict[str, Tensor], before: Any, extend: str) -> dict[str, Tensor]:
        """A checkpoint's tensors with as many positions as this model has, where it has learned ones.

        Args:
            before: the checkpoint's config. extend: as in `from_pretrained`.

        Raises:
            InputError: an unknown `extend`, or sizes between which there is no way.
        """
        found = dict(tensors)
        for path, part in self.named_modules():
            name = f"{path}.weight"
            if isinstance(part, LearnedPositions) and name in found:
                spare, body = found[name][: part.offset], found[name][part.offset :]
                found[name] = torch.cat([spare, extended(body, part.max_len, extend)])
        return found

    def head_prefixes(self) -> tuple[str, ...]:
        """The names that parameters of a head begin with: what fine-tuning may start fresh."""
        return ()


def _head_changes(fields: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes in which transformers' names of labels are ours; labels of another number forget the old ones' names."""
    changes = {name: value for name, value in changes.items() if name not in ("label2id", "ignore_mismatched_sizes")}
    names, kind = changes.pop("id2label", None), changes.pop("problem_type", None)
    given = changes.pop("labels", None)
    labels = dict(given or {}) if given is None or isinstance(given, Mapping) else configs.to_dict(given)
    if names is not None:
        labels["names"] = tuple(str(name) for _, name in sorted((int(number), name) for number, name in names.items()))
        changes.setdefault("num_labels", len(names))
    if kind is not None:
        labels["problem_type"] = kind
    if any(name in changes and changes[name] != fields.get(name) for name in ("num_labels", "output_dim")):
        fields.pop("labels", None)
    return changes | ({"labels": labels} if labels else {})


def _own_class(text: Mapping[str, Any], folder: Path) -> type[Model]:
    """The class of a checkpoint of `save_pretrained`."""
    if text["efficient_attn"] != FORMAT:
        raise CheckpointError(f"{folder} has format {text['efficient_attn']}, this version reads {FORMAT}; update")
    if text.get("model") not in MODELS:
        raise CheckpointError(f"{folder} holds a {text.get('model')!r}; this version has {', '.join(MODELS)}")
    return MODELS[text["model"]]


def _load(model: Model, tensors: dict[str, Tensor], folder: Path, *, own: bool, fresh_heads: bool) -> None:
    """Copy a checkpoint's tensors into a model: all of them, into all of its parameters. `own`: of save_pretrained.

    Raises:
        CheckpointError: what is missing, left over or of another shape.
    """
    state = model.state_dict(keep_vars=True)
    heads = model.head_prefixes() if fresh_heads else ()
    for name in [name for name in tensors if heads and name.startswith(heads)]:
        if name not in state or state[name].shape != tensors[name].shape:
            del tensors[name]
    loaded = {id(state[name]) for name in tensors if name in state}  # layers may share a parameter, saved once
    missing = [
        name
        for name, tensor in state.items()
        if name not in tensors and id(tensor) not in loaded and not (heads and name.startswith(heads))
    ]
    if not own:  # transformers' checkpoints know nothing of our methods' parameters
        missing = [name for name in missing if ".method_state." not in name]
    wrong = [
        f"{name} is {tuple(tensors[name].shape)} instead of {tuple(state[name].shape)}"
        for name in tensors
        if name in state and state[name].shape != tensors[name].shape
    ]
    problems = [
        f"{what}: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
        for what, names in (
            ("missing", missing),
            ("not in the model", [name for name in tensors if name not in state]),
            ("of another shape", wrong),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"the weights in {folder} do not fit {type(model).__name__}: {'; '.join(problems)}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state, each shared tensor once, under its first name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor.detach().cpu().contiguous()))
    return dict(found.values())


def _write(path: Path, data: bytes) -> None:
    """Replace a file in one step, so that a reader finds either the old one or the new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
