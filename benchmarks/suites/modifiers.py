"""Suite `modifiers`: what a soft cap, sinks and structured biases cost, and what they save beside a bias of all pairs.

"cost": the same call with and without. "sdpa": beside PyTorch's scaled_dot_product_attention, which takes the bias as
a tensor (H, N, N). "t5": an encoder layer of T5-base's sizes, both ways. "paged": a step of decoding from pages beside
the same from rows, and from the rows of those pages put together first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficient_attn import ALiBi, KVCache, PagedKVCache, RelativeBias, T5Bias, attention, cached_attention
from efficient_attn.cache.reading import read_pages
from efficient_attn.measuring import clock

from . import Claim, Column, Options, Row, Suite, grid

Calls = dict[str, Callable[[], object]]
# The most that the call with a modifier may take of the one without.
COSTS = {"alibi": 1.10, "toeplitz": 1.10, "softcap": 1.25, "sinks": 1.02}
COST_SHAPE = {"batch": 1, "seqlen": 2048, "heads": 8, "head_dim": 64}
PEER_SHAPE = {"batch": 1, "seqlen": 4096, "heads": 4, "head_dim": 64}
T5_BASE = {"batch": 1, "seqlen": 4096, "heads": 12, "head_dim": 64}
DECODE = {"batch": (1, 8), "seqlen": (1024, 4096, 32768), "heads": 8, "head_dim": 64}
PAGES = (16, 256)
LEAST = {"fwd": 2.0, "fwd_bwd": 3.0}  # of SDPA's time over ours


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Times of the calls in one alternation, and the memory of each."""
    torch.manual_seed(config["seed"])
    calls = _CALLS[config["work"]](config)
    ours, other, *more = calls
    peaks = {}
    for name, call in calls.items():
        began = time.monotonic()
        for _ in range(2):  # what a first call alone allocates is not meant, but of one that takes seconds is no matter
            with clock.PeakMemory() as peak:
                call()
            peaks[name] = peak.bytes
            if time.monotonic() - began > 2:
                break
    times = clock.interleaved(calls, config["budget_s"], patience_s=2 * config["budget_s"])
    ratio = times[other]["ms"] / times[ours]["ms"]
    return {
        **times[ours], "peer": other, "peer_ms": times[other]["ms"], "peer_spread": times[other]["spread"],
        "figure": round(1 / ratio if config["most"] else ratio, 4), "peak_bytes": peaks[ours],
        "peer_bytes": peaks[other], **{f"{name}_ms": times[name]["ms"] for name in more},
    }  # fmt: skip


def _tensors(config: Mapping[str, Any]) -> list[Tensor]:
    shape = (config["batch"], config["heads"], config["seqlen"], config["head_dim"])
    return [torch.randn(shape, dtype=getattr(torch, config["dtype"])) for _ in range(3)]


def _in_mode(mode: str, function: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    if mode == "fwd":
        return torch.no_grad()(lambda: function(*leaves))
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    grad = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


def _modifier(kind: str, heads: int, length: int) -> tuple[list[Tensor], Callable[..., dict[str, Any]]]:
    """Its learned tensors, and the arguments of `attention` that they make."""
    if kind == "softcap":
        return [], lambda: {"softcap": 20.0}
    if kind == "sinks":
        return [torch.zeros(heads)], lambda sinks: {"sinks": sinks}
    if kind == "alibi":
        slopes = ALiBi.usual_slopes(heads)
        return [], lambda: {"bias": ALiBi(slopes)}
    table = torch.randn(heads, 2 * length - 1)
    return [table], lambda table: {"bias": RelativeBias(table)}


def _cost(config: Mapping[str, Any]) -> Calls:
    qkv = _tensors(config)
    learned, given = _modifier(config["what"], config["heads"], config["seqlen"])
    return {
        "with it": _in_mode(
            config["mode"], lambda q, k, v, *more: attention(q, k, v, **given(*more)), [*qkv, *learned]
        ),
        "without it": _in_mode(config["mode"], attention, qkv),
    }


def _sdpa(config: Mapping[str, Any]) -> Calls:
    """Both make their bias at each call, of the slopes, which are fixed, or of the table, which is learned."""
    qkv, H, N = _tensors(config), config["heads"], config["seqlen"]
    learned, given = _modifier(config["what"], H, N)
    apart = torch.arange(N) - torch.arange(N)[:, None]
    slopes = ALiBi.usual_slopes(H)

    def by_tensor(q: Tensor, k: Tensor, v: Tensor, *table: Tensor) -> Tensor:
        bias = table[0][:, apart + N - 1] if table else -slopes[:, None, None] * apart.abs()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].to(q.dtype))

    return {
        "ours": _in_mode(config["mode"], lambda q, k, v, *m: attention(q, k, v, **given(*m)), [*qkv, *learned]),
        "sdpa": _in_mode(config["mode"], by_tensor, [*qkv, *learned]),
    }


class T5Layer(nn.Module):
    """An encoder layer of T5 (Raffel et al., JMLR 2020): RMS norms, no biases, scores without a scale, ReLU."""

    def __init__(self, heads: int, head_dim: int, dtype: torch.dtype, structured: bool) -> None:
        super().__init__()
        E = heads * head_dim
        self.heads, self.structured = heads, structured
        self.norms = nn.ModuleList(nn.RMSNorm(E, dtype=dtype) for _ in range(2))
        self.qkv, self.out = nn.Linear(E, 3 * E, False, dtype=dtype), nn.Linear(E, E, False, dtype=dtype)
        self.wide, self.narrow = nn.Linear(E, 4 * E, False, dtype=dtype), nn.Linear(4 * E, E, False, dtype=dtype)
        self.table = nn.Parameter(torch.randn(32, heads))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = T5Bias(self.table)
        if self.structured:
            out = attention(q, k, v, bias=bias, scale=1.0)
        else:
            i = torch.arange(x.shape[1])
            pairs = self.table[bias.bucket(i - i[:, None])].permute(2, 0, 1)[None]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=pairs.to(q.dtype), scale=1.0)
        x = x + self.out(out.transpose(1, 2).flatten(2))
        y: Tensor = x + self.narrow(self.wide(self.norms[1](x)).relu())
        return y


def _t5(config: Mapping[str, Any]) -> Calls:
    dtype, heads, head_dim = getattr(torch, config["dtype"]), config["heads"], config["head_dim"]
    x = torch.randn(config["batch"], config["seqlen"], heads * head_dim, dtype=dtype)
    calls: Calls = {}
    for name in ("ours", "sdpa"):
        torch.manual_seed(0)
        layer = T5Layer(heads, head_dim, dtype, structured=name == "ours")
        if config["mode"] == "fwd":
            calls[name] = torch.no_grad()(lambda layer=layer: layer(x))
        else:
            calls[name] = lambda layer=layer: layer(x).sum().backward()
    return calls


def _paged(config: Mapping[str, Any]) -> Calls:
    """A token more for each sequence of a batch; rewound after each step, so that all steps are alike."""
    B, N, H, D = (config[name] for name in ("batch", "seqlen", "heads", "head_dim"))
    dtype, page = getattr(torch, config["dtype"]), config["page"]
    key, value = (torch.randn(B, H, N, D, dtype=dtype) for _ in range(2))
    new = [torch.randn(B, H, 1, D, dtype=dtype) for _ in range(3)]
    rows = KVCache(N + 1, growing=False)
    rows.append(key, value)
    pool = PagedKVCache(B * (N // page + 1), page, num_kv_heads=H, head_dim=D, dtype=dtype)
    names = [pool.add() for _ in range(B)]
    pool.append(names, key, value)

    def by_pages() -> Tensor:
        out: Tensor = pool.attend(names, *new)
        for name in names:
            pool.rewind(name, N)
        return out

    def by_rows() -> Tensor:
        out: Tensor = rows.attend(*new)
        rows.rewind(N)
        return out

    def by_copy() -> Tensor:
        pool.append(names, *new[1:])
        held = [read_pages(pages, pool.block_table(names), N + 1) for pages in (pool.key_pages, pool.value_pages)]
        out: Tensor = cached_attention(new[0], *held, pool.lengths(names))
        for name in names:
            pool.rewind(name, N)
        return out

    calls: Calls = {"pages": by_pages, "rows": by_rows, "copy": by_copy}
    return {name: torch.no_grad()(call) for name, call in calls.items()}


_CALLS: dict[str, Callable[[Mapping[str, Any]], Calls]] = {"cost": _cost, "sdpa": _sdpa, "t5": _t5, "paged": _paged}


def configs(options: Options) -> Iterable[dict[str, Any]]:
    for cell in _every(options):
        if options.modes is None or cell["mode"] in options.modes:
            yield cell


def _every(options: Options) -> Iterable[dict[str, Any]]:
    dtypes = options.dtypes if options.quick else tuple(dict.fromkeys((*options.dtypes, "bfloat16")))
    common, modes = options.common(), ("fwd", "fwd_bwd")
    for what, most in COSTS.items():
        yield from grid(
            work="cost", what=what, mode=modes, dtype=dtypes, most=most, least=None, page=None, **COST_SHAPE, **common
        )
    for page in PAGES:
        yield from grid(
            work="paged", what=f"pages of {page}", mode="decode", dtype=dtypes, most=None, least=0.95, page=page,
            **DECODE, **common,
        )  # fmt: skip
    for mode in modes:
        yield from grid(
            work="sdpa", what=("alibi", "toeplitz"), mode=mode, dtype=dtypes, most=None, least=LEAST[mode], page=None,
            **PEER_SHAPE, **common,
        )  # fmt: skip
        yield from grid(
            work="t5", what="layer of T5-base", mode=mode, dtype=dtypes, most=None, least=2.0, page=None, **T5_BASE,
            **common,
        )  # fmt: skip


def claims(rows: Sequence[Row]) -> list[Claim]:
    missed = [row for row in rows if (row["figure"] > row["most"] if row["most"] else row["figure"] < row["least"])]
    text = f"{len(rows) - len(missed)} of {len(rows)} figures are within their bound."
    found = [Claim(text, tuple(row["id"] for row in rows))] if rows else []
    for row in missed:
        bound = f"at most {row['most']:.2f}x" if row["most"] else f"at least {row['least']:.2f}x"
        where = f"{row['work']} of {row['what']}, {row['mode']}, {row['dtype']}, B {row['batch']}, N {row['seqlen']}"
        found.append(Claim(f"{where}: {row['figure']:.2f}x, where {bound} is asked for.", (row["id"],)))
    return found


SUITE = Suite(
    name="modifiers",
    about="cost: the time with a modifier over that without. Else the time of the other way over ours.",
    configs=configs,
    run_cell=run_cell,
    series="what",
    key=(
        Column("work", "work", "text"),
        Column("what", "what", "text"),
        Column("mode", "mode", "text"),
        Column("dtype", "dtype", "text"),
        Column("B", "batch", "integer"),
        Column("N", "seqlen", "integer"),
        Column("heads", "heads", "integer"),
        Column("D", "head_dim", "integer"),
    ),
    columns=(
        Column("ms", "ms", "ms"),
        Column("±", "spread", "percent"),
        Column("beside", "peer", "text"),
        Column("its ms", "peer_ms", "ms"),
        Column("of a copy", "copy_ms", "ms"),
        Column("figure", "figure", "times"),
        Column("at most", "most", "times"),
        Column("at least", "least", "times"),
        Column("MiB", "peak_bytes", "mib"),
        Column("its MiB", "peer_bytes", "mib"),
    ),
    claims=claims,
    default=False,
)
