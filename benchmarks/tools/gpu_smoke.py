"""One family of the CUDA kernels against float64 on the GPU, as `make gpu-check` runs it: a process for each family.

    python benchmarks/tools/gpu_smoke.py forward-128 --out rows.jsonl

It appends a JSON object a line: {"ready": ...} once the GPU answers, {"at": ...} before a call, a row for each result
with its error, its budget and the first bad index, and {"done": true} at the end. So whoever reads the file knows where
a process hung or died.

The budget is twice the error of the same formula in the dtype of the call, and two units in the last place of the
largest element. New memory is NaN, so that what no kernel writes is found.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

LENGTH, HEADS = 777, 4
HEAD_DIMS = (64, 128, 256)
DTYPES = ("bfloat16", "float16")


class Family(NamedTuple):
    """Kernels that stand or fall together: those of a call of this kind."""

    # forward, backward, two_passes, one_pass (in any order), decode, linear, extras, sm80 (rows no tensor map takes)
    kind: str
    head_dim: int
    visible: tuple[str, ...]


def families() -> dict[str, Family]:
    """Every family, those first on which most depends."""
    every = ("dense", "causal", "list")
    found = {f"{kind}-{d}": Family(kind, d, every) for kind in ("forward", "backward") for d in (128, 64, 256)}
    found["two-passes-128"] = Family("two_passes", 128, every)
    found["one-pass-128"] = Family("one_pass", 128, every)
    found |= {f"decode-{d}": Family("decode", d, ("dense", "list")) for d in HEAD_DIMS}
    found |= {f"linear-{d}": Family("linear", d, ("dense", "causal")) for d in HEAD_DIMS}
    found |= {f"sm80-{d}": Family("sm80", d, every) for d in HEAD_DIMS}
    return found | {f"extras-{d}": Family("extras", d, ("dense", "causal")) for d in HEAD_DIMS}


def judge(found: Any, gold: Any, plain: Any) -> dict[str, Any]:
    """The error of `found` against `gold` (float64), its budget from the error of `plain`, and the first bad index."""
    import torch

    difference = (found.double() - gold).abs()
    finite = gold.isfinite()
    largest = gold[finite].abs().max().item() if finite.any() else 0.0
    eager = (plain.double() - gold)[finite].abs().nan_to_num().max().item() if finite.any() else 0.0
    budget = 2 * eager + 2 * torch.finfo(found.dtype).eps * max(largest, 2.0**-14)
    bad = torch.where(finite, ~(difference <= budget), found.double() != gold)
    count = int(bad.sum())
    error = difference[finite & difference.isfinite()]
    row: dict[str, Any] = {
        "error": float(f"{error.max().item() if error.numel() else 0.0:.3g}"),
        "budget": float(f"{budget:.3g}"),
    }
    row["bad"] = count
    if count:
        index = tuple(int(i) for i in bad.nonzero()[0])
        row |= {"of": bad.numel(), "first": list(index), "is": str(found[index].item()), "not": str(gold[index].item())}
    return row


def calls(family: Family, device: str, length: int, heads: int) -> Iterator[tuple[str, Callable[[str, bool], Any]]]:
    """The name of each call, and the call itself: (backend, in float64?) -> its results by name."""
    import torch

    from efficient_attn import attention, linear_attention
    from efficient_attn.measuring.inputs import random_blocks

    queries = 1 if family.kind == "decode" else length
    for dtype in DTYPES:
        generator = torch.Generator().manual_seed(0)
        draw = lambda n, wide=family.head_dim: torch.randn(1, heads, n, wide, generator=generator)  # noqa: E731, B023
        drawn = [tensor.to(device, getattr(torch, dtype)) for tensor in map(draw, (queries, length, length, queries))]
        if family.kind == "sm80":  # a row of 4 more elements begins where no tensor copy may
            drawn = [torch.nn.functional.pad(t, (0, 4))[..., :-4] for t in drawn]
        bias = draw(length, length).to(device, getattr(torch, dtype)) if family.kind == "extras" else None
        for visible in family.visible:

            def call(backend: str, exact: bool, visible: str = visible, drawn: Any = drawn, bias: Any = bias) -> Any:
                *qkv, grad_out = (t.double() if exact else t for t in drawn)
                if family.kind == "linear":
                    qkv[:2] = [t.abs() for t in qkv[:2]]
                given = [*qkv] if bias is None else [*qkv, bias.double() if exact else bias]
                leaves = [t.detach().requires_grad_() for t in given]
                options: dict[str, Any] = {"backend": backend}
                if family.kind == "linear":
                    out, found = linear_attention(*leaves, is_causal=visible == "causal", **options), {}
                else:
                    if bias is not None:
                        options |= {"bias": leaves[3], "dropout_p": 0.1, "dropout_seed": 7}
                    if visible == "list":
                        mask = random_blocks(qkv[0].shape[2], length, 0.4, block=128 if length > 256 else 64)
                        mask = mask.with_lengths([length - 5])
                        options["mask"] = mask.to(device)
                    options["is_causal"] = visible == "causal"
                    out, lse = attention(*leaves[:3], **options, return_lse=True)
                    found = {"lse": lse.detach()}
                found["out"] = out.detach()
                if family.kind not in ("forward", "decode"):
                    names = ("dq", "dk", "dv", "dbias")
                    found |= zip(names, torch.autograd.grad(out, leaves, grad_out), strict=False)
                return found

            yield f"{dtype} {visible}", call


def check(family: Family, write: Callable[..., None], device: str, length: int, heads: int) -> int:
    """Run the calls of a family; returns how many results are bad."""
    import torch

    if variable := {"one_pass": "ANY_ORDER", "two_passes": "TWO_PASSES"}.get(family.kind):
        os.environ[f"EFFICIENT_ATTN_CUDA_{variable}"] = "1"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    wrong = 0
    for name, call in calls(family, device, length, heads):
        write(at=name)
        started = time.perf_counter()
        ours = call("cuda", False)
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        gold, plain = call("reference", True), call("reference", False)
        for what, found in ours.items():
            row = judge(found, gold[what], plain[what])
            wrong += row["bad"] > 0
            write(call=name, result=what, **row, seconds=round(seconds, 3))
    return wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=families())
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", help="cpu: in the emulator (EFFICIENT_ATTN_CUDA_EMULATOR)")
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--heads", type=int, default=HEADS)
    options = parser.parse_args(arguments)
    with options.out.open("a", buffering=1) as file:

        def write(**row: Any) -> None:
            file.write(json.dumps(row) + "\n")

        import torch

        from efficient_attn.backends.cuda import attention as cuda

        said: Mapping[str, Any] = {"torch": torch.__version__}
        if options.device != "cpu":
            torch.zeros(1, device=options.device)
            said = {**said, "gpu": torch.cuda.get_device_name()}
        if cuda.missing() and not cuda.emulator_path():
            write(error=cuda.missing())
            return 4
        write(ready=said)
        wrong = check(families()[options.family], write, options.device, options.length, options.heads)
        write(done=True, wrong=wrong)
    return 5 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
