"""Attention layers of transformers past its interface, and of users, which write their attention out in PyTorch.

Projections, rotary positions, caches, position biases and output stay the layer's own code: its forward runs inside a
`ScoreMode`, where the product of queries and keys, softmax and the product with values are one call of attention, see
`scores.py`. `LAYERS` names the classes of which that is known to be right; a class of your own joins by

    register_layer(MyAttention)

so that `convert` serves it. A layer in which nothing attends after all raises in its forward.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..biases import T5Bias
from ..errors import InputTypeError, UnsupportedError
from ..masks import BlockMask
from ..methods import Method
from . import huggingface
from .huggingface_masks import MaskWithoutBias, PairMask
from .own_patterns import blocks_with_random, window_with_globals
from .score_mode import ScoreMode
from .scores import returned

# Of transformers, "package.Class": attention is a softmax over the product of queries and keys, or a call of PyTorch's.
_LAYERS = """
    big_bird.BigBirdSelfAttention blip.BlipAttention blip.BlipTextSelfAttention
    bloom.BloomAttention bros.BrosSelfAttention canine.CanineSelfAttention clap.ClapAudioSelfAttention
    clvp.ClvpSelfAttention
    codegen.CodeGenAttention convbert.ConvBertSelfAttention cpmant.CpmAntAttention dab_detr.DetrAttention
    dab_detr.DabDetrAttention data2vec.Data2VecVisionSelfAttention deberta.DisentangledSelfAttention
    deberta_v2.DisentangledSelfAttention deepseek_ocr2.DeepseekOcr2SamVisionAttention donut.DonutSwinSelfAttention
    falcon.FalconAttention fastspeech2_conformer.FastSpeech2ConformerAttention flaubert.MultiHeadAttention
    flava.FlavaSelfAttention fsmt.Attention funnel.FunnelRelMultiheadAttention git.GitSelfAttention
    glpn.GLPNEfficientSelfAttention got_ocr2.GotOcr2VisionAttention gpt_neo.GPTNeoSelfAttention
    gpt_neox_japanese.GPTNeoXJapaneseAttention gptj.GPTJAttention granite_speech.GraniteSpeechConformerAttention
    granite_speech_plus.GraniteSpeechPlusConformerAttention grounding_dino.GroundingDinoMultiheadAttention
    groupvit.GroupViTAttention hiera.HieraMaskUnitAttention ibert.IBertSelfAttention imagegpt.ImageGPTAttention
    layoutlmv3.LayoutLMv3SelfAttention led.LEDDecoderAttention levit.LevitAttention levit.LevitAttentionSubsample
    lilt.LiltSelfAttention luke.LukeSelfAttention lxmert.LxmertAttention mask2former.Mask2FormerAttention
    maskformer.MaskFormerSwinSelfAttention megatron_bert.MegatronBertSelfAttention mgp_str.MgpstrAttention
    mm_grounding_dino.MMGroundingDinoMultiheadAttention mobilevit.MobileViTSelfAttention mpnet.MPNetSelfAttention
    mpt.MptAttention mvp.MvpAttention oneformer.OneFormerAttention oneformer.OneFormerTextMapperAttention
    perceiver.PerceiverSelfAttention prophetnet.ProphetNetAttention
    prophetnet.ProphetNetNgramSelfAttention pvt.PvtEfficientSelfAttention pvt_v2.PvtV2SelfAttention
    rembert.RemBertSelfAttention roformer.RoFormerSelfAttention sam.SamVisionAttention sam_hq.SamHQVisionAttention
    slanext.SLANeXtVisionAttention speecht5.SpeechT5Attention
    squeezebert.SqueezeBertSelfAttention swinv2.Swinv2SelfAttention swin2sr.Swin2SRSelfAttention
    table_transformer.TableTransformerAttention tapas.TapasSelfAttention timesformer.TimesformerSelfAttention
    trocr.TrOCRAttention unlimited_ocr.UnlimitedOcrSamVisionAttention vilt.ViltSelfAttention
    visual_bert.VisualBertSelfAttention vitdet.VitDetAttention wavlm.WavLMAttention
    xglm.XGLMAttention xlm.MultiHeadAttention xlnet.XLNetRelativeAttention
    pp_formulanet.PPFormulaNetVisionAttention
"""
LAYERS = frozenset(_LAYERS.split())
PATTERN = "has a pattern of its own, which only its own code computes"
APPROXIMATION = "approximates attention in a way of its own"
# What is not served, and why.
LEFT = {
    "longt5.LongT5LocalAttention": PATTERN,
    "longt5.LongT5TransientGlobalAttention": PATTERN,
    "pegasus_x.PegasusXGlobalLocalAttention": PATTERN,
    "gemma3n.Gemma3nAudioAttention": PATTERN,
    "gemma4.Gemma4AudioAttention": PATTERN,
    "nystromformer.NystromformerSelfAttention": APPROXIMATION,
    "yoso.YosoSelfAttention": APPROXIMATION,
    "mra.MraSelfAttention": APPROXIMATION,
    "reformer.LSHSelfAttention": APPROXIMATION,
    "reformer.LocalSelfAttention": PATTERN,
    "autoformer.AutoformerAttention": "weighs by autocorrelation, not by products of queries and keys",
    "openai.Attention": "multiplies its scores by its mask",
    "sew_d.DisentangledSelfAttention": "has a softmax of its own",
    "vits.VitsAttention": "adds values by relative position, which its weights weigh",
    "mobilevitv2.MobileViTV2LinearSelfAttention": "is linear in its tokens and has no pairs of them",
    "swiftformer.SwiftFormerEfficientAdditiveAttention": "is linear in its tokens and has no pairs of them",
    "grounding_dino.GroundingDinoBiMultiHeadAttention": "attends in both directions by one matrix of scores",
    "mm_grounding_dino.MMGroundingDinoBiMultiHeadAttention": "attends in both directions by one matrix of scores",
    "groupvit.GroupViTAssignAttention": "assigns tokens to groups by a softmax over queries",
}
# What is served as its own pattern, by another forward.
OWN_PATTERN: dict[str, Callable[..., Any]] = {
    "longformer.LongformerSelfAttention": window_with_globals,
    "led.LEDEncoderSelfAttention": window_with_globals,
    "big_bird.BigBirdBlockSparseAttention": blocks_with_random,
    "bigbird_pegasus.BigBirdPegasusBlockSparseAttention": blocks_with_random,
}
# What gives itself another layer, `self`, by set_attention_type, as BigBird does for a short sequence.
CHANGING = ("big_bird.BigBirdAttention", "bigbird_pegasus.BigBirdPegasusEncoderAttention")
OF_USERS: set[type] = set()
CROSS = ("key_value_states", "encoder_hidden_states", "kv", "context", "inputs", "y_attention_mask")
CACHED = ("past_key_values", "past_key_value", "layer_past", "cache")


def register_layer(layer: type[nn.Module]) -> None:
    """Let `convert` serve a class of attention layers that writes its attention out, or calls PyTorch's.

    Its forward must multiply queries (..., Nq, D) with keys (torch.matmul, bmm, baddbmm or einsum), take a softmax over
    keys and multiply the weights with values; scales, added biases and masks, dropout and views may come between.
    Weights are nothing else's operands, and may be returned. Heads are its `num_heads`, or the last leading dimension.

    Raises:
        InputTypeError: no class of modules.
    """
    if not isinstance(layer, type) or not issubclass(layer, nn.Module):
        raise InputTypeError(f"register_layer takes a class of torch.nn.Modules, got {layer!r}")
    OF_USERS.add(layer)


def is_known(module: nn.Module) -> bool:
    """Whether a module is a layer that `serve` can give a method."""
    return writes_scores(module) or _own_pattern(module) is not None


def is_served(module: nn.Module) -> bool:
    """Whether `serve` has given the module a method."""
    return is_known(module) and "efficient_attn_method" in vars(module)


def writes_scores(module: nn.Module) -> bool:
    """Whether a layer adds its mask to scores of its own, so that it may be one of this package."""
    return any(cls in OF_USERS or _name(cls) in LAYERS for cls in type(module).__mro__)


def _own_pattern(module: nn.Module) -> Callable[..., Any] | None:
    return next((OWN_PATTERN[name] for name in map(_name, type(module).__mro__) if name in OWN_PATTERN), None)


def why_left(module: nn.Module, method: Method) -> str | None:
    """Why a layer cannot be served by a method, where that is known."""
    if not method.is_dense and _own_pattern(module) is not None:
        return f"has a pattern of its own, which 'dense' serves as it is; {method} would replace it"
    return next((LEFT[name] for name in map(_name, type(module).__mro__) if name in LEFT), None)


def origin(module: nn.Module) -> str:
    """What a served layer is, for a report."""
    of = "transformers" if type(module).__module__.startswith("transformers.") else type(module).__module__
    return f"{type(module).__qualname__} of {of}, its own {'scores' if writes_scores(module) else 'pattern'}"


def _name(cls: type) -> str:
    parts = cls.__module__.split(".")
    return f"{parts[2]}.{cls.__name__}" if parts[:2] == ["transformers", "models"] else ""


def serve(module: nn.Module, method: Method) -> Callable[[], None]:
    """Give a layer a method, in place. Returns what undoes it."""
    held: dict[str, Any] = vars(module)
    names = ("forward", "efficient_attn_method")
    old = {name: held[name] for name in names if name in held}
    if "efficient_attn_method" not in held:
        places = {name: i for i, name in enumerate(inspect.signature(type(module).forward).parameters)}
        other = _own_pattern(module)
        served = functools.partial(_served, module, held.get("forward"), places)
        module.forward = served if other is None else functools.partial(other, module)
    module.efficient_attn_method = method  # type: ignore[assignment]

    def undo() -> None:
        for name in names:
            held.pop(name, None)
        held.update(old)

    return undo


def _served(
    module: nn.Module, own: Callable[..., Any] | None, places: dict[str, int], /, *args: Any, **kwargs: Any
) -> Any:
    """A layer's forward, its attention served by the method that it holds."""

    def given(names: tuple[str, ...]) -> bool:
        for name in names:
            place = places.get(name, 0) - 1  # after self
            value = kwargs.get(name, args[place] if 0 <= place < len(args) else None)
            if value is not None and value is not False:
                return True
        return False

    layer: Any = module
    cross = bool(getattr(module, "is_cross_attention", False)) or given(CROSS)
    weights = given(("output_attentions",)) or huggingface.weights_wanted(kwargs)
    mode = ScoreMode(module, layer.efficient_attn_method, cross=cross, cached=given(CACHED), weights=weights)
    with mode:  # torch.compile loses its attributes behind an `as`
        result = type(module).forward(module, *args, **kwargs) if own is None else own(*args, **kwargs)
    result = returned(result, weights)
    if not mode.reached:
        raise UnsupportedError(
            f"{type(module).__qualname__} made no product of queries and keys whose softmax weighs values, so "
            f"{layer.efficient_attn_method} had no effect; leave it out with convert(predicate=...)"
        )
    return result


def follow_changes(model: nn.Module) -> Callable[[], None]:
    """Let layers that modules change to, when they run, be served as those before them. Returns what undoes it."""
    changed: list[dict[str, Any]] = []
    undone: list[Callable[[], None]] = []

    def change(parent: Any, *args: Any, **kwargs: Any) -> None:
        before = parent.self
        type(parent).set_attention_type(parent, *args, **kwargs)
        if parent.self is not before and is_served(before) and is_known(parent.self):
            method = vars(before)["efficient_attn_method"]
            reason = why_left(parent.self, method)
            if reason is not None:
                raise UnsupportedError(f"{type(parent.self).__qualname__} {reason}")
            undone.append(serve(parent.self, method))

    for module in model.modules():
        if _name(type(module)) in CHANGING and "set_attention_type" not in vars(module):
            vars(module)["set_attention_type"] = functools.partial(change, module)
            changed.append(vars(module))

    def undo() -> None:
        for held in changed:
            held.pop("set_attention_type", None)
        while undone:
            undone.pop()()

    return undo


# --- what models and layers make n x n, by a few numbers ---


def _mpnet_bias(
    encoder: Any, own: Callable[..., Any], x: Tensor, position_ids: Tensor | None = None, num_buckets: int = 32
) -> Any:
    if position_ids is not None:
        return own(x, position_ids, num_buckets)
    table = encoder.relative_attention_bias.weight
    return T5Bias(table) if num_buckets == table.shape[0] else own(x)


def _gpt_neo_attention(
    layer: Any, own: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None
) -> tuple[Any, Any]:
    """Its `_attn`. Where queries stand is what the mask says: the layer itself takes the last keys, which with a static
    cache are places that no token has yet."""
    Nq, Nk = query.shape[-2], key.shape[-2]
    placed = isinstance(attention_mask, PairMask) and attention_mask.start is not None
    start = attention_mask.start if placed else Nk - Nq
    left = layer.config.window_size - 1 if layer.attention_type == "local" else -1
    scores = torch.matmul(query.float(), key.float().transpose(-1, -2))
    if left >= 0 or not placed or not attention_mask.causal:
        window = BlockMask(Nq, Nk, window=(left, 0), window_offset=start)
        scores = scores + PairMask((1, 1, Nq, Nk), None, window, start, causal=left < 0, device=query.device)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = layer.attn_dropout(torch.softmax(scores, dim=-1).to(value.dtype))
    return torch.matmul(weights, value), weights


def _falcon_attention(layer: Any, own: Callable[..., Any], *args: Any, alibi: Any = None, **kwargs: Any) -> Any:
    """Its forward under a mask without ALiBi: as often as it was added is what it adds."""
    mask = kwargs.get("attention_mask")
    times = layer.efficient_attn_alibis if isinstance(mask, MaskWithoutBias) and alibi is not None else 1
    return own(*args, alibi=alibi if times == 1 else alibi * times, **kwargs)


def _count_alibis(layer: Any) -> int:
    """transformers' eager adds Falcon's ALiBi with the mask and to the scores, its sdpa, which is the default, once."""
    return 2 if layer.config._attn_implementation == "eager" else 1


STRUCTURED: dict[str, tuple[str, Callable[..., Any]]] = {
    "mpnet.MPNetEncoder": ("compute_position_bias", _mpnet_bias),
    "gpt_neo.GPTNeoSelfAttention": ("_attn", _gpt_neo_attention),
    "falcon.FalconAttention": ("forward", _falcon_attention),
}


def structure(model: nn.Module) -> Callable[[], None]:
    """Let layers that are served, and what holds them, say such masks and biases by a few numbers. Returns what undoes
    it."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    some = any(map(is_served, model.modules()))
    for module in model.modules():
        name, made = STRUCTURED.get(_name(type(module)), ("", None))
        held: dict[str, Any] = vars(module)
        if made is None or getattr(held.get(name), "func", None) is made:
            continue
        if made is _falcon_attention and some:  # those that are not served get the same mask
            held["efficient_attn_alibis"] = _count_alibis(module)
        elif not any(map(is_served, module.modules())):
            continue
        before.append((held, name, held.get(name)))
        held[name] = functools.partial(made, module, getattr(module, name))

    def undo() -> None:
        while before:
            held, name, own = before.pop()
            held.pop(name, None)
            held.pop("efficient_attn_alibis", None)
            if own is not None:
                held[name] = own

    return undo
