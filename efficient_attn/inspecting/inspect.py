"""`efficient-attn inspect`: what a model's attention does on one input, as one HTML page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..errors import InputError
from ..integrations import convert, fidelity
from ..integrations.budget.layers import skeleton
from ..measuring.run_folder import check_file
from ..measuring.terminal import Progress, console, named_errors, nothing_kept
from . import inputs

PAGE = Path(__file__).parent / "page.html"
SIDE = 128  # pixels of a picture on the page, at most


def inspect_command(
    model: Annotated[str, typer.Option(help="A checkpoint's folder, a run of train, a hub id, or file.py:function.")],
    text: Annotated[Path | None, typer.Option(help="A text file.")] = None,
    image: Annotated[Path | None, typer.Option(help="An image.")] = None,
    series: Annotated[Path | None, typer.Option(help="A .csv, for a run of train forecast.")] = None,
    data: Annotated[Path | None, typer.Option(help="Inputs by name, .npz or .safetensors.")] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a text. Default: as many as the model takes.")
    ] = None,
    attention: Annotated[str | None, typer.Option(help="A spec to show beside the model as it is.")] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan of convert to show beside it instead.")] = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("inspect.html"),
) -> None:
    """Every head of a model on one input, as a page: block maps, top keys, what each token receives, entropy."""
    with named_errors():
        given = [(kind, path) for kind, path in (("text", text), ("image", image), ("series", series)) if path]
        given += [("tensors", data)] if data else []
        if len(given) > 1 or (attention is not None and plan is not None):
            raise InputError("give one of --text, --image, --series and --data, and one of --attention and --plan")
        check_file("--out", out)
        loaded = inputs.load(model, length)
        if given:
            read = inputs.read(loaded, given[0][1], given[0][0], length, 1)
        elif loaded.sample is not None:
            read = inputs.Read(loaded.sample)
        else:
            raise InputError("give one of --text, --image, --series and --data; file.py:function brings its own sample")
        err = console(stderr=True)
        with nothing_kept(err), Progress(err, "calls of attention", transient=True) as bar:
            written = page(
                describe(loaded.model, read, attention or plan, title="/".join(Path(model).parts[-2:]), told=bar.update)
            )
        out.write_text(written, encoding="utf-8")
        err.print(f"{out}: {len(written) / 2**20:.1f} MiB")


def describe(
    model: torch.nn.Module,
    read: inputs.Read,
    attention: str | Path | None = None,
    title: str = "",
    told: Callable[[str, int, int], None] = lambda *_: None,
) -> Any:
    """What the page shows, as JSON values: the model's run, and one with another attention or a plan.

    told: called with (which run, calls of attention that are done, of how many).
    """
    from .gathered import gather  # imports torch._dynamo: a second, which no other command should take

    def seen(name: str, model: torch.nn.Module, error: float | None) -> dict[str, Any]:
        layers, unseen = gather(model, read.sample, lambda done, total: told(name, done, total), read.part)
        return {"name": name, "layers": layers, "unseen": unseen, "error": error}

    runs = [seen("as it is", model, None)]
    if attention is not None:
        other = skeleton(model)
        if isinstance(attention, Path):
            convert(other, plan=attention)
        else:
            convert(other, attention)
        before, after = (fidelity.outputs(m, read.sample) for m in (model, other))
        error = max(float((b - a).double().norm() / a.double().norm()) for a, b in zip(before, after, strict=True))
        runs.append(seen(str(attention), other, error))
    return {
        "title": title,
        "kind": read.kind,
        "labels": read.labels,
        "pixels": None if read.pixels is None else _picture(read.pixels),
        "values": None if read.values is None else [_finite(v) for v in read.values.tolist()],
        "runs": runs,
    }


def _finite(value: float) -> float | None:
    """A number of JSON; None where it is missing."""
    return round(value, 4) if math.isfinite(value) else None


def _picture(pixels: torch.Tensor) -> dict[str, Any]:
    small = pixels.permute(2, 0, 1)[None].float()
    if max(small.shape[2:]) > SIDE:
        small = torch.nn.functional.interpolate(small, (SIDE, SIDE), mode="area")
    rows = small[0].permute(1, 2, 0).round().to(torch.uint8)
    return {"height": rows.shape[0], "width": rows.shape[1], "rgb": rows.flatten().tolist()}


def page(data: Any) -> str:
    """The page with its data inside."""
    embedded = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    before, marker, after = PAGE.read_text(encoding="utf-8").partition("/*data*/")
    assert marker
    return before + embedded + after
