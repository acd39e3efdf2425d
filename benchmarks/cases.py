"""What is measured, as data. A new method, length or target is a line here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Operator suite: every method of this package, sized for sequences of some thousand tokens (causal is dense attention,
# under --causal). A method that is registered without a line here is measured too, with its default options.
OPERATOR_METHODS = (
    "dense",
    "sliding_window:left=128,right=128",
    "dilated:left=64,right=64,dilation=4",
    "strided:stride=128",
    "fixed:stride=128,summary=8",
    "longformer:window=256,global_tokens=16",
    "bigbird:block=64,window=3,global_blocks=2,random_blocks=2",
    "neighborhood:kernel=7",
    "axial",
    "documents:lengths=512",
    "prefix_lm:prefix=256",
    "deepspeed_fixed:block=32",
    "deepspeed_variable:block=32,local_window_blocks=2x4,num_random_blocks=1",
    "deepspeed_bigbird:block=32",
    "deepspeed_bslongformer:block=32",
    "deepspeed_local:block=32",
    "topk_blocks:block=64,fraction=0.1",
    "topp_blocks:block=64,mass=0.8",
    "lsh:n_buckets=16,rounds=2",
    "sorted_buckets:size=256",
    "linformer:rank=128",
    "nystrom:landmarks=64",
    "performer:features=128",
    "linear",
    "sliding_window:left=128,right=128+centroid:block=64",
)
# A plain `bench`: one well-known method of each kind, at lengths that a machine of two cores measures in three minutes.
OVERVIEW_METHODS = (
    "dense",
    "sliding_window:left=128,right=128",
    "longformer:window=256,global_tokens=16",
    "bigbird:block=64,window=3,global_blocks=2,random_blocks=2",
    "topk_blocks:block=64,fraction=0.1",
    "linformer:rank=128",
    "nystrom:landmarks=64",
    "sliding_window:left=128,right=128+centroid:block=64",
)
OVERVIEW_BUDGET_S = 0.1  # of a call; eight of them and two references are timed in one alternation
# Suite, what its steps have (mode and length of a group of all methods; else nothing), and the seconds that it takes on
# two cores of a server of 2024: the first lines matter most, and what does not fit the time is left out from the end.
OVERVIEW_STEPS: tuple[tuple[str, tuple[Any, ...], float], ...] = (
    ("ops", ("fwd", 512), 3.0),
    ("ops", ("fwd", 2048), 3.5),
    ("ops", ("fwd_bwd", 2048), 5.0),
    ("ops", ("fwd", 4096), 5.0),
    ("fidelity", (), 1.5),
    ("vit", (), 3.5),
    ("ops", ("fwd", 8192), 8.0),
    ("ops", ("fwd_bwd", 512), 4.0),
    ("ops", ("fwd_bwd", 4096), 9.0),
    ("ops", ("fwd", 1024), 3.0),
    ("ops", ("fwd_bwd", 1024), 4.0),
    ("million", (), 5.0),
    ("ops", ("fwd_bwd", 8192), 18.0),
    ("ops", ("fwd", 16384), 18.0),
    ("ops", ("fwd_bwd", 16384), 40.0),
)
QUICK_OVERVIEW_STEPS = OVERVIEW_STEPS[:4]
OVERVIEW_S, QUICK_OVERVIEW_S = 145.0, 40.0  # for measuring: the rest of three minutes is for starting and drawing
# The same eight on the 64 tokens of a digit, and as families of the suite fidelity with about a quarter of all scores.
OVERVIEW_VIT_METHODS = (
    "dense",
    "sliding_window:left=12,right=12",
    "longformer:window=16,global_tokens=2",
    "bigbird:block=16,window=1,global_blocks=1,random_blocks=1",
    "topk_blocks:block=16,blocks=2",
    "linformer:rank=16",
    "nystrom:landmarks=16",
    "sliding_window:left=4,right=4+centroid:block=16",
)
OVERVIEW_VIT_STEPS = 100
OVERVIEW_FAMILIES = (
    ("window", 31),
    ("Longformer", 32),
    ("BigBird", 2),
    ("top-k blocks", 4),
    ("Linformer", 64),
    ("Nystrom", 64),
    ("window + centroids", 31),
)
OPERATOR_SHAPE = {"batch": 1, "heads": 4, "head_dim": 64}
# decode: one query at the end of a cache of the length.
MODES = ("fwd", "fwd_bwd", "decode")
SEQLENS = (128, 512, 1024, 2048, 4096, 8192, 16384)
QUICK_SEQLENS = (128, 2048)
# The causal ones that are used to generate token by token.
DECODES = tuple(
    spec
    for spec in OPERATOR_METHODS
    if spec.partition(":")[0] in ("dense", "sliding_window", "strided", "longformer", "bigbird", "performer", "linear")
    and "+" not in spec
)

# The same methods for the 64 tokens of a digit.
VIT_METHODS = (
    "dense",
    "sliding_window:left=12,right=12",
    "bigbird:block=16,window=1,global_blocks=1,random_blocks=1",
    "neighborhood:kernel=5",
    "axial",
    "linformer:rank=16",
    "nystrom:landmarks=16",
    "performer:features=64",
    "linear",
    "sliding_window:left=4,right=4+centroid:block=16",
)
VIT_STEPS, QUICK_VIT_STEPS = 300, 120

MEMORY_METHODS = ("sliding_window:left=128,right=128", "bigbird:block=64,window=3,global_blocks=2,random_blocks=2")
MEMORY_LENGTHS = (16384, 32768, 65536)
QUICK_MEMORY_LENGTHS = (4096, 16384)
MEMORY_SHAPE = {"batch": 1, "heads": 2, "head_dim": 16, "dtype": "float32", "mode": "fwd_bwd"}
SECOND_SHAPE = {
    "batch": 1, "heads": 4, "head_dim": 64, "dtype": "float32", "mode": "second",
    "method": "sliding_window:left=64,right=64",
}  # fmt: skip
SECOND_LENGTHS = (1024, 2048, 4096)
WEIGHTS_SHAPE = {
    "batch": 1, "heads": 12, "head_dim": 64, "dtype": "float32", "method": "dense", "seqlen": 8192,
    "mode": ("weights", "module"),
}  # fmt: skip

# What no exact attention can do here: a call on so many tokens, with one head.
MILLION_METHODS = ("sliding_window:left=64,right=64", "linear")
MILLION_TOKENS, QUICK_MILLION_TOKENS = 2**20, 2**17
MILLION_SHAPE = {"batch": 1, "heads": 1, "head_dim": 64, "dtype": "float32"}

TARGET_PATIENCE = 6


@dataclass(frozen=True)
class Target:
    """One row of `make bench-cpu`: our call against a peer's on the same tensors, and the ratio to reach.

    `visible` says which pairs count: full, causal, window (256), bigbird, random:<percent> (block 64 lists), bool (a
    dense bool mask), bias (a dense additive bias; with a gradient in fwd_bwd). `peak` is the share of the measured
    FMA peak to reach, `bandwidth` that of the measured copy bandwidth. `most` marks a figure that must stay below
    the target, `note` is printed below the table.
    """

    work: str  # attention | linear_attention | method | sparse_efficiency | overhead | module
    peer: str  # sdpa | sdpa_mask | flex | formula | dense | none | torch_module
    target: float | None
    mode: str = "fwd"
    dtype: str = "float32"
    visible: str = "full"  # with method, its spec
    q_len: int = 4096
    kv_len: int = 4096
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    peak: float | None = None
    bandwidth: float | None = None
    most: bool = False
    note: str = ""


def _dense_rows() -> list[Target]:
    rows = []
    for head_dim, ratio, forward_peak in ((64, 1.3, 0.85), (128, 1.2, 0.86)):
        shape: dict[str, Any] = {"work": "attention", "peer": "sdpa", "target": ratio, "head_dim": head_dim}
        rows += [
            Target(**shape, peak=forward_peak),
            Target(**shape, visible="causal"),
            Target(**shape, mode="fwd_bwd", peak=0.78),
            Target(**shape, mode="fwd_bwd", visible="causal"),
        ]
    return rows


SPARSE = ("window", "bigbird", "random:10")
# Methods against exact attention: the least speed-up. The low-rank ones also against their formula in plain PyTorch.
SPARSE_METHODS = {
    "longformer:window=512": 5.0,
    "bigbird:block=64": 5.0,
    "topk_blocks:block=64,fraction=0.1": 4.0,  # selection included
}
LOW_RANK = ("linformer:rank=256", "nystrom:landmarks=64", "performer:features=256")
METHOD_TARGETS = (
    *((method, "dense", ratio) for method, ratio in SPARSE_METHODS.items()),
    *((method, peer, ratio) for method in LOW_RANK for peer, ratio in (("dense", 8.0), ("formula", 2.0))),
)
TARGETS: tuple[Target, ...] = (
    *_dense_rows(),
    Target("attention", "sdpa", 1.25, dtype="bfloat16"),
    Target("attention", "sdpa", 1.8, dtype="float16"),
    Target("attention", "sdpa", 1.7, mode="fwd_bwd", q_len=16384, kv_len=16384, heads=1, kv_heads=1),
    Target("attention", "sdpa_mask", 1.25, visible="bool"),
    Target("attention", "sdpa_mask", 2.0, visible="bool", mode="bwd"),
    Target("attention", "sdpa_mask", 1.25, visible="bias"),
    Target("attention", "sdpa_mask", 2.0, visible="bias", mode="bwd"),
    *(Target("attention", "flex", 2.0, visible=visible) for visible in SPARSE),
    *(Target("attention", "sdpa_mask", 5.0, visible=visible, mode="fwd_bwd") for visible in SPARSE),
    *(Target("sparse_efficiency", "dense", 1.15, visible=f"random:{d}", most=True) for d in (50, 25, 10, 5)),
    *(Target("attention", "sdpa", 1.0, batch=16, heads=12, kv_heads=12, q_len=n, kv_len=n) for n in (128, 256, 512)),
    Target("overhead", "none", 25.0, q_len=1, kv_len=16, heads=1, kv_heads=1, most=True),
    Target("attention", "sdpa", 2.0, dtype="bfloat16", q_len=1, kv_len=32768, heads=32, head_dim=128, bandwidth=0.7),
    Target("linear_attention", "formula", 3.0, mode="fwd_bwd", q_len=65536, kv_len=65536),
    Target(
        "linear_attention",
        "formula",
        3.0,
        mode="fwd_bwd",
        visible="causal",
        q_len=65536,
        kv_len=65536,
        heads=1,
        kv_heads=1,
        note="one head: the plain causal formula keeps a state a position, 1 GiB a head and more in backward",
    ),
    *(
        Target("method", peer, ratio, mode="fwd_bwd", visible=method, q_len=8192, kv_len=8192)
        for method, peer, ratio in METHOD_TARGETS
    ),
    *(
        Target("module", "torch_module", None, dtype=dtype, mode=mode, batch=4, q_len=1024, kv_len=1024)
        for dtype, mode in (("float32", "fwd"), ("bfloat16", "fwd"), ("float32", "fwd_bwd"))
    ),
)
