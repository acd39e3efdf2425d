"""`efficient-attn convert`: which attention each layer of a model may have, within a measured error."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..errors import EfficientAttnError, InputError
from ..integrations import Budget, convert
from ..integrations.budget import Kept, fingerprint
from ..measuring.run_folder import check_file
from ..measuring.terminal import Progress, console, interrupted, named_errors, resuming, sigterm_raises
from . import inputs


def convert_command(
    model: Annotated[str, typer.Option(help="A checkpoint's folder, a run of train, a hub id, or file.py:function.")],
    budget: Annotated[float, typer.Option(help="The error allowed, |y' - y| / |y| of the outputs.")] = 0.02,
    data: Annotated[
        Path | None,
        typer.Option(help="A text, a folder of images, a .csv of series, or .npz / .safetensors of inputs by name."),
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a text. Default: the model's, up to 512.")
    ] = None,
    batch: Annotated[
        int, typer.Option(min=2, help="Texts, images or windows; the second half measures the error.")
    ] = 8,
    candidate: Annotated[
        list[str] | None, typer.Option(help="A spec to choose from. Repeatable. Default: some thirty by length.")
    ] = None,
    per: Annotated[str, typer.Option(help="layer or head: what chooses.")] = "layer",
    probes: Annotated[int, typer.Option(min=0, help="Gradients that estimate sensitivities.")] = 4,
    seed: Annotated[int, typer.Option(help="Of these.")] = 0,
    distill: Annotated[
        int,
        typer.Option(min=0, help="Steps that fit what methods learn (Linformer) to dense attention, layer by layer."),
    ] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's.")] = None,
    out: Annotated[Path, typer.Option(help="The plan; a page with the same name in .html lies beside it.")] = Path(
        "plan.json"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the measurements of a run that was interrupted.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan instead of the report.")] = False,
) -> None:
    """Give each layer the fastest attention whose measured error is within a budget: a plan for convert(plan=...)."""
    with named_errors():
        if threads is not None:
            torch.set_num_threads(threads)
        check_file("--out", out)
        loaded = inputs.load(model, length)
        sample: Any = loaded.sample
        if data is not None:
            sample = inputs.read(loaded, data, None, length, batch).sample
        if sample is None:
            raise InputError("give --data, what the model is for; file.py:function brings its own sample")
        err = console(stderr=True)
        options: dict[str, Any] = {"candidates": candidate or None, "probes": probes, "seed": seed, "distill": distill}
        about = {"model or data": fingerprint(loaded.model, sample), "threads": torch.get_num_threads(), **options}
        kept = Kept(out.with_suffix(".measured.jsonl"), about, resume=resume)
        try:
            with sigterm_raises(), Progress(err, "steps", transient=True) as bar:
                wanted = Budget(budget, per=per, **options, progress=bar.update, kept=kept)
                report = convert(loaded.model, budget=wanted, sample=sample)
        except KeyboardInterrupt as interrupt:
            kept.begin()
            raise typer.Exit(interrupted(interrupt, err, str(kept), resuming())) from None
        except EfficientAttnError:
            kept.remove()
            raise
        assert report.plan is not None
        report.plan.save(out)
        kept.remove()
        page = out.with_suffix(".html")
        report.save_page(page)
        if as_json:
            print(report.plan.to_json(), end="")
        else:
            console().print(str(report))
        err.print(f"{out} and {page}")
