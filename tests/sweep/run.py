"""Every model type of the installed transformers, tiny, eager against efficient_attn: docs/transformers-sweep.md.

    make sweep-transformers            # all types, some 15 minutes of one core
    make sweep-transformers ARGS="--types llama bert --print"

A padded batch and one without a mask, forward, backward, and for decoders what they generate, each type in a process
that may die.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib
import json
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

OUTCOMES = {
    "agree": "forward, backward and generated tokens are eager's",
    "agree with sdpa": "forward, backward and tokens are those of sdpa, from which transformers' own eager differs",
    "agree by convert": "the same, with layers that no name reaches served by `convert`",
    "agree by convert, in part": "the same, beside layers that stay eager: `convert` names them",
    "refused": "a named error says what is missing",
    "not on the interface": "layers of their own: a named error when the name is set, and by `convert`",
    "ignored": "the name is accepted and no attention of ours is called",
    "disagree": "other numbers than eager's",
    "crash": "an error without a name of ours",
    "no attention": "nothing to serve",
    "not run": "the sweep has no tiny configuration, or no inputs, with which eager runs",
}
OTHER_SOFTMAX = ("superpoint",)  # of key points among pixels
TOLERANCE, SECONDS = 1e-4, 40


def types() -> list[str]:
    """All types of which there is a model: base models, and the parts of others."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return sorted(kind for kind in CONFIG_MAPPING_NAMES if kind in MODEL_MAPPING_NAMES or _parts_model(kind))


def _parts_model(kind: str) -> Any:
    """The class of a part's model, such as a text encoder's, which AutoModel does not know; None for none."""
    from transformers import AutoConfig, PreTrainedModel

    try:
        config = type(AutoConfig.for_model(kind))
        module = importlib.import_module(config.__module__.replace("configuration_", "modeling_"))
    except Exception:  # a type that is no model, or whose requirements are missing
        return None
    models = [x for x in vars(module).values() if isinstance(x, type) and issubclass(x, PreTrainedModel)]
    own = [x for x in models if getattr(x, "config_class", None) is config]
    own = [x for x in own if not x.__name__.endswith(("PreTrainedModel", "PretrainedModel"))]
    return min(own, key=lambda x: (not x.__name__.endswith("Model"), len(x.__name__)), default=None)


def outcome(kind: str) -> tuple[str, str]:
    """What becomes of a type, and why."""
    from transformers import AutoConfig, AutoModel

    from efficient_attn.integrations import huggingface

    from .given import inputs
    from .tiny import shrunk

    huggingface.register()
    made = _running(AutoModel, lambda: shrunk(AutoConfig.for_model(kind)), inputs)
    if isinstance(made, str):
        return "not run", made
    config, calls = made[0], list[int]()
    serve = functools.partial(_made, config=config, implementation=huggingface.NAME)
    found, why = _compared(kind, made, serve, calls)
    if found == "disagree":
        calls.clear()
        return _against_sdpa(kind, made, serve, calls) or (found, why)
    if found == "not on the interface" or (found == "refused" and not calls):
        return _by_convert(kind, made, why)
    return found, why


def _against_sdpa(kind: str, made: Any, serve: Any, calls: list[int]) -> tuple[str, str] | None:
    """The outcome beside sdpa, where transformers' two ways differ from each other; None where it is no agreement."""
    from transformers import AutoModel

    config, eager, given, expected = made
    try:
        sdpa = _made(AutoModel, config, "sdpa")
        sdpa.load_state_dict(eager.state_dict())
        other = _run(sdpa, given)
    except Exception:  # a model that has no sdpa
        return None
    apart = _difference(expected, other, given)
    found, _ = _compared(kind, (config, sdpa, given, other), serve, calls, "sdpa")
    return ("agree with sdpa", f"eager differs from sdpa by {apart:.1e} of the largest") if found == "agree" else None


def _by_convert(kind: str, made: Any, why: str) -> tuple[str, str]:
    """What becomes of a type that refuses the name, by `convert`; where nothing is served, why not."""
    from efficient_attn import convert

    left: list[str] = []

    def converted(factory: Any) -> Any:
        model = _made(factory, made[0], "eager")
        report = convert(model)
        left[:] = dict.fromkeys(f"{name.split('.')[-1]}: {reason}" for name, reason in report.skipped.items())
        return model

    found, reason = _compared(kind, made, converted, [])
    if found == "agree":
        return ("agree by convert, in part", "; ".join(left)[:300]) if left else ("agree by convert", "")
    return (found, reason) if found in ("disagree", "crash", "refused") else ("not on the interface", reason or why)


def _compared(kind: str, made: Any, serve: Any, calls: list[int], beside: str = "eager") -> tuple[str, str]:
    """The outcome of a model that is served, against eager's or sdpa's; calls of attention are appended."""
    from transformers import AutoModel

    from efficient_attn import tracing
    from efficient_attn.errors import EfficientAttnError
    from efficient_attn.integrations import huggingface

    _, eager, given, expected = made
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            ours = serve(AutoModel)
    except EfficientAttnError as error:
        return "not on the interface", _first_line(error)
    except Exception as error:
        return "crash", f"when it is made: {_first_line(error)}"
    ours.load_state_dict(eager.state_dict())
    tracing.OBSERVERS.append(lambda *_: calls.append(1))
    try:
        with _counted_softmax() as softmax:
            found = _run(ours, given)
        kept = [str(x.message) for x in warned if huggingface.STAYS_EAGER in str(x.message)]
        if not calls and kept:
            return "not on the interface", kept[0]
        if not calls:
            attends = softmax and kind not in OTHER_SOFTMAX
            return ("ignored", "eager layers ran") if attends else ("no attention", "")
        worst = _difference(found, expected, given)
        if worst > TOLERANCE:
            return "disagree", f"by {worst:.1e} of the largest"
        worst = _without_padding(eager, ours, given)
        if worst > TOLERANCE:
            return "disagree", f"without attention_mask by {worst:.1e} of the largest"
        generated = _generates(kind, made[0], serve, beside)
        return ("disagree", generated) if generated else ("agree", "")
    except EfficientAttnError as error:
        return "refused", _first_line(error)
    except TimeoutError:
        raise
    except Exception as error:
        return "crash", _first_line(error)
    finally:
        tracing.OBSERVERS.clear()


def _running(factory: Any, configs: Any, inputs: Any) -> tuple[Any, Any, dict[str, Tensor], dict[str, Tensor]] | str:
    """A configuration with which eager runs, its model, its arguments and what comes out; or why there is none."""
    why: list[str] = []
    try:
        for config in configs():
            try:
                eager = _made(factory, config, "eager")
            except Exception as error:
                why.append(_first_line(error))
                continue
            for given in inputs(eager, eager.config):
                try:
                    expected = _run(eager, given)
                    if all(x.isfinite().all() for x in expected.values()):
                        return config, eager, given, expected
                    why.append("eager's own numbers are not finite")
                except Exception as error:
                    why.append(_first_line(error))
    except Exception as error:
        why.append(_first_line(error))
    return why[0] if why else "no inputs fit"


def _made(factory: Any, config: Any, implementation: str) -> Any:
    """A model, seeded; of the part of a configuration that its class is for, where it is not for the whole."""
    from transformers import MODEL_MAPPING, AutoModel

    config = copy.deepcopy(config)  # models write the implementation into theirs
    torch.manual_seed(0)
    if factory is AutoModel and type(config) not in MODEL_MAPPING:
        model = _parts_model(config.model_type)._from_config(config, attn_implementation=implementation)
        return model.eval()
    kind = MODEL_MAPPING[type(config)] if factory is AutoModel else None
    own = getattr(kind, "config_class", None)
    if own is not None and not isinstance(config, own):
        part = next((x for x in vars(config).values() if isinstance(x, own)), None)
        if part is not None:
            return kind._from_config(part, attn_implementation=implementation).eval()
    return factory.from_config(config, attn_implementation=implementation).eval()


def _run(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first output, and the gradients of all parameters that have one."""
    model.zero_grad()
    torch.manual_seed(0)
    out = model(**given)
    out = next(x for x in tree_leaves(dict(out) if isinstance(out, dict) else out) if _differentiable(x))
    mask = given.get("attention_mask")
    if mask is not None and out.dim() == 3 and out.shape[:2] == mask.shape:
        out = out * mask[..., None]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (out * weights).sum().backward()  # squares would be the same for whatever comes out of a norm
    return {"out": out.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def _differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _without_padding(eager: Any, ours: Any, given: dict[str, Tensor]) -> float:
    """The difference where no mask is given: what layers make of None; 0 for models that do not run so."""
    given = {name: value for name, value in given.items() if name != "attention_mask"}
    try:
        expected = _run(eager, given)
    except Exception:
        return 0.0
    return _difference(_run(ours, given), expected, given)


def _difference(found: dict[str, Tensor], expected: dict[str, Tensor], given: dict[str, Tensor]) -> float:
    """The largest error of the output, and of gradients, each against the largest number of its kind."""
    if found.keys() != expected.keys() or not all(x.isfinite().all() for x in expected.values()):
        return float("nan") if found.keys() == expected.keys() else float("inf")
    out = (found["out"] - expected["out"]).abs().max() / expected["out"].abs().max()
    gradients = [n for n in expected if n != "out" and expected[n].numel()]
    largest = max((float(expected[n].abs().max()) for n in gradients), default=1.0)
    largest = max(largest, 1e-30)  # below, float32 itself is coarse
    errors = [float((found[n] - expected[n]).abs().max()) / largest for n in gradients]
    return max([float(out), *errors])


def _generates(kind: str, config: Any, serve: Any, beside: str) -> str:
    """What differs in generated tokens, "" for nothing; only for types with a causal model."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return ""
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    written = []
    for ours in (False, True):
        try:
            model = serve(AutoModelForCausalLM) if ours else _made(AutoModelForCausalLM, config, beside)
            with torch.no_grad():
                options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
                written.append(model.generate(ids, attention_mask=mask, **options))
        except Exception:
            if not ours:
                return ""  # it does not generate from text alone
            raise
    return "" if torch.equal(*written) else "generated tokens differ"


@contextlib.contextmanager
def _counted_softmax() -> Any:
    """How often PyTorch's own softmax is taken."""
    counted: list[int] = []
    functional = torch.nn.functional
    before = functional.softmax, functional.scaled_dot_product_attention

    def counting(function: Any) -> Any:
        return functools.wraps(function)(lambda *a, **k: (counted.append(1), function(*a, **k))[1])

    functional.softmax, functional.scaled_dot_product_attention = map(counting, before)
    try:
        yield counted
    finally:
        functional.softmax, functional.scaled_dot_product_attention = before


def _first_line(error: BaseException) -> str:
    text = next(iter(str(error).strip().splitlines()), "")
    text = re.sub(r"/\S*/site-packages/", "", text)  # where this machine keeps its packages
    return f"{type(error).__name__}: {text[:180]}"


# --- one process after another ---


def work(kinds: list[str]) -> None:
    """Types in this process, one line of JSON each."""
    warnings.simplefilter("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)

    def too_late(*_: Any) -> None:
        raise TimeoutError(f"longer than {SECONDS} s of a core")

    signal.signal(signal.SIGPROF, too_late)
    for kind in kinds:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            found, why = outcome(kind)
        except BaseException as error:  # a timeout may come anywhere
            found, why = "not run", _first_line(error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps([kind, found, why]), flush=True)


def sweep(kinds: list[str]) -> dict[str, tuple[str, str]]:
    """Every type's outcome; a process that dies takes one type with it."""
    results: dict[str, tuple[str, str]] = {}
    while len(results) < len(kinds):
        rest = kinds[len(results) :]
        command = [sys.executable, "-m", "sweep.run", "--work", *rest]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for line in process.stdout or ():
            if line.startswith('["'):
                kind, found, why = json.loads(line)
                results[kind] = found, why
                print(f"{len(results)}/{len(kinds)} {kind}: {found} {why}", file=sys.stderr)
        if process.wait() != 0 and len(results) < len(kinds):
            results[kinds[len(results)]] = "crash", f"the process died ({process.returncode})"
    return results


def page(results: dict[str, tuple[str, str]]) -> str:
    """docs/transformers-sweep.md."""
    import transformers

    lines = [
        "# Every model type of transformers",
        "",
        f"transformers {transformers.__version__}, tiny models with random weights: eager attention against",
        '`attn_implementation="efficient_attn"` in float32 on a CPU, a padded batch and one without a mask, forward,',
        f"backward, and generated tokens of decoders. Agreement is {TOLERANCE:g} of the largest number. Written by",
        "`make sweep-transformers`.",
        "",
        "| outcome | types | |",
        "| --- | --- | --- |",
    ]
    by = {name: sorted(kind for kind, (found, _) in results.items() if found == name) for name in OUTCOMES}
    lines += [f"| {name} | {len(by[name])} | {text} |" for name, text in OUTCOMES.items()]
    for name in OUTCOMES:
        if by[name]:
            lines += ["", f"## {name}", ""]
            if name in ("agree", "agree by convert", "no attention"):
                lines += [", ".join(f"`{kind}`" for kind in by[name])]
            else:
                lines += ["| type | |", "| --- | --- |"]
                lines += [f"| `{kind}` | {results[kind][1].replace('|', chr(92) + '|')} |" for kind in by[name]]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="*", help="some types; default all")
    parser.add_argument("--print", action="store_true", help="print the page instead of writing it")
    parser.add_argument("--work", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        return work(arguments.work)
    text = page(sweep(arguments.types or types()))
    if arguments.print:
        print(text)
    else:
        (Path(__file__).parents[2] / "docs" / "transformers-sweep.md").write_text(text, encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
