"""The cases of the conformance suite, as data: what is attended, in which shape and which memory layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from efficient_attn import ALiBi, BlockMask, DecomposedBias2D, Neighborhood, RelativeBias, RelativeBias2D, SlidingWindow
from efficient_attn.backends.call import Call
from efficient_attn.biases import BiasLike
from efficient_attn.masks import Part, PartedMask

PLAIN_CALL = Call(torch.device("cpu"), torch.float32, None, 1, 1, 1, 8, 8, 8, 8, False, 0.0)


@dataclass(frozen=True)
class Case:
    """One call of `attention`. `mask` draws what is passed as mask= from the case and a generator."""

    name: str
    B: int = 2
    Hq: int = 2
    Hkv: int = 2
    Nq: int = 67
    Nk: int = 67
    D: int = 16
    Dv: int = 16
    mask: Callable[[Case, torch.Generator], BlockMask | Tensor | SlidingWindow] | None = None
    bias: tuple[int, ...] | None = None  # 1 broadcasts, 0 stands for the full size
    bias_in_float32: bool = False
    causal: str | None = None
    scale: float | None = None
    dropout_p: float = 0.0
    layout: str = "contiguous"
    grad_out: str = "random"
    grad_lse: bool = False
    spread: float = 1.0  # standard deviation of query and key
    softcap: float | None = None
    sinks: bool = False
    structured: str = ""  # "slopes" or "table": a bias by relative position; "grid" or "decomposed": of an image
    grid: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        return self.name


def random_bits(density: float, *, batch: bool = True, heads: bool = True, empty_rows: bool = True) -> Callable:
    """A random bool mask, with some rows fully masked."""

    def draw(case: Case, generator: torch.Generator) -> Tensor:
        shape = (case.B if batch else 1, case.Hq if heads else 1, case.Nq, case.Nk)
        visible = torch.rand(shape, generator=generator) < density
        if empty_rows and case.Nq > 3:
            visible[..., 3, :] = False
        return visible

    return draw


def random_blocks(block_size: tuple[int, int], density: float = 0.4, *, heads: bool = True) -> Callable:
    """Random full and partial blocks, some rows of blocks empty."""

    def draw(case: Case, generator: torch.Generator) -> BlockMask:
        bq, bk = block_size
        rows, columns = -(-case.Nq // bq), -(-case.Nk // bk)
        lists = case.Hq if heads else 1
        kind = torch.rand(case.B, lists, rows, columns, generator=generator)
        listed = kind < density
        listed[:, :, -1] = False
        partial = kind < density / 2
        bits = torch.rand(case.B, lists, rows * bq, columns * bk, generator=generator) < 0.7
        grow = lambda t: t.repeat_interleave(bq, 2).repeat_interleave(bk, 3)  # noqa: E731
        visible = (grow(listed) & (~grow(partial) | bits))[:, :, : case.Nq, : case.Nk]
        return BlockMask.from_dense(visible, block_size=block_size)

    return draw


def window(left: int, right: int) -> Callable:
    """An analytic sliding window."""
    return lambda case, generator: SlidingWindow(left=left, right=right, alignment="top_left")


def lengths(case: Case, generator: torch.Generator) -> BlockMask:
    """A different number of valid keys for each batch element, zero among them."""
    per_batch = torch.randint(0, case.Nk + 1, (case.B,), generator=generator)
    per_batch[0] = 0
    return BlockMask.from_lengths(per_batch, q_len=case.Nq, kv_len=case.Nk)


def groups(case: Case, generator: torch.Generator) -> BlockMask:
    """Full blocks of 16 that four rows of blocks in turn see alike: a band of diagonal groups."""
    row, column = (torch.arange(n)[:, None] // 64 for n in (case.Nq, case.Nk))
    return BlockMask.from_dense((row == column.T) | (row + 1 == column.T), block_size=16)


def blocks_window_lengths(case: Case, generator: torch.Generator) -> BlockMask:
    """All three parts of a mask at once."""
    blocks = random_blocks((16, 32), 0.7)(case, generator)
    near = SlidingWindow(left=40, right=9, alignment="top_left").block_mask(case.Nq, case.Nk)
    return blocks & near & lengths(case, generator)


def parts(count: int, *, lines: str = "one", density: float = 0.3, block_size: tuple[int, int] = (32, 16)) -> Callable:
    """A union of parts in random orders, in which each has some of the tokens: one order for all, or one for each of
    the "heads", or of "batch" and heads. Some queries see nothing."""

    def draw(case: Case, generator: torch.Generator) -> PartedMask:
        batch = case.B if lines == "batch" else 1
        heads, kv_heads = (1, 1) if lines == "one" else (case.Hq, case.Hkv)
        owner = torch.randint(0, count, (batch, heads, case.Nq, case.Nk), generator=generator)
        owner[torch.rand(owner.shape, generator=generator) > density] = -1
        made = []
        for part in range(count):
            rows, columns = (n - n // 3 * (part % 2) for n in (case.Nq, case.Nk))
            query, key = (
                torch.rand(batch, h, n, generator=generator).argsort(-1)[..., :some]
                for h, n, some in ((heads, case.Nq, rows), (kv_heads, case.Nk, columns))
            )
            wide = key.repeat_interleave(heads // kv_heads, 1)
            seen = (owner == part).gather(2, query[..., None].expand(-1, -1, -1, case.Nk))
            seen = seen.gather(3, wide[:, :, None].expand(-1, -1, rows, -1))
            mask = BlockMask.from_dense(seen, block_size=block_size)
            orders = (order.flatten(0, 1).int().contiguous() for order in (query, key))
            made.append(Part(mask, *orders))
        return PartedMask.of(made, q_len=case.Nq, kv_len=case.Nk)

    return draw


NEIGHBORS = Neighborhood((10, 9), (4, 5), stride=(3, 2), causal=(False, True), prefix=3, additional_keys=20)


def neighborhood(case: Case, generator: torch.Generator) -> BlockMask:
    """Windows of an image that neighbouring queries share, after three tokens that see everything, and more keys."""
    return NEIGHBORS.block_mask(case.Nq, case.Nk, block_size=(32, 16))


def neighborhood_parts(case: Case, generator: torch.Generator) -> PartedMask:
    """The same as the parts that a longer sequence has."""
    made = [each.part((16, 16), case.Nq, case.Nk) for each in NEIGHBORS._proposals(case.Nq, case.Nk)]
    return PartedMask.of(made, q_len=case.Nq, kv_len=case.Nk)


def band_and_columns(case: Case, generator: torch.Generator) -> PartedMask:
    """A window in the order of the sequence, and classes modulo 5 beyond it: a part without an order, and a window in
    an order."""
    near = BlockMask(case.Nq, case.Nk, (16, 16), window=(6, 6))
    by_class = [
        torch.arange(n).view(1, -1)[0][torch.argsort(torch.arange(n) % 5, stable=True)] for n in (case.Nq, case.Nk)
    ]
    i, j = by_class[0][:, None], by_class[1]
    classes = BlockMask.from_dense((i % 5 == j % 5) & (i - j > 6), block_size=(16, 32))
    orders = (order.int()[None] for order in by_class)
    return PartedMask.of([Part(near), Part(classes, *orders)], q_len=case.Nq, kv_len=case.Nk)


def parts_with_lengths(case: Case, generator: torch.Generator) -> BlockMask:
    """Parts, and a different number of keys for each batch element."""
    return parts(2)(case, generator) & lengths(case, generator)


HEAD_DIMS = (1, 3, 8, 40, 64, 80, 128, 200, 256)

CASES = [
    Case("dense"),
    Case("dense_long", B=1, Nq=300, Nk=530, D=64, Dv=64),
    Case("one_query", Nq=1, Nk=300, D=64, Dv=64),
    Case("one_query_grouped", Hq=8, Hkv=2, Nq=1, Nk=700, D=128, Dv=128),
    Case("four_queries_causal", Hq=8, Hkv=2, Nq=4, Nk=259, causal="bottom_right"),
    Case("few_queries_window", Hq=6, Hkv=2, Nq=9, Nk=400, mask=window(2, 330)),
    Case("few_queries_lengths_bias", B=3, Hq=4, Hkv=2, Nq=3, Nk=300, mask=lengths, bias=(1, 0, 0, 0)),
    Case("few_queries_blocks", Hq=3, Hkv=1, Nq=20, Nk=500, mask=random_blocks((16, 48), 0.6, heads=False)),
    Case("few_queries_blocks_of_each_head", Hq=4, Hkv=2, Nq=20, Nk=500, mask=random_blocks((16, 48), 0.6)),
    Case("few_queries_bits", Hq=4, Hkv=1, Nq=5, Nk=700, mask=random_bits(0.3, heads=False)),
    Case("few_queries_of_many_heads", B=1, Hq=8, Hkv=8, Nq=2, Nk=700),
    Case("few_queries_negative_scale", Hq=4, Hkv=2, Nq=2, Nk=130, scale=-0.3),
    Case("one_key", Nk=1),
    Case("one_by_one", B=1, Hq=1, Hkv=1, Nq=1, Nk=1, D=1, Dv=1),
    Case("no_keys", Nk=0),
    Case("no_queries", Nq=0),
    Case("no_batch", B=0),
    Case("no_heads", Hq=0, Hkv=0),
    *(Case(f"head_dim_{d}", B=1, Nq=50, Nk=70, D=d, Dv=d) for d in HEAD_DIMS),
    *(Case(f"long_head_dim_{d}", B=1, Hkv=1, Nq=210, Nk=270, D=d, Dv=d, causal="bottom_right") for d in (128, 256)),
    *(Case(f"value_dim_{d}", B=1, Nq=33, Nk=49, D=24, Dv=d) for d in HEAD_DIMS),
    Case("causal", causal="top_left"),
    Case("causal_long", B=1, Nq=401, Nk=401, causal="top_left"),
    Case("causal_top_left", Nq=45, Nk=80, causal="top_left"),
    Case("causal_bottom_right", Nq=45, Nk=80, causal="bottom_right"),
    Case("causal_bottom_right_empty_rows", Nq=80, Nk=45, causal="bottom_right"),
    Case("window", mask=window(9, 5)),
    Case("window_causal", B=1, Nq=333, Nk=333, mask=window(40, 0)),
    Case("window_narrow_grouped", B=1, Hq=4, Hkv=2, Nq=390, Nk=520, mask=window(30, 12)),
    Case("window_one_sided", Nq=130, Nk=90, mask=window(-1, 7)),
    Case("lengths", B=4, mask=lengths),
    Case("bits", mask=random_bits(0.5)),
    Case("bits_sparse", Nq=150, Nk=200, mask=random_bits(0.02)),
    Case("bits_shared", mask=random_bits(0.5, batch=False, heads=False)),
    Case("blocks_16", Nq=100, Nk=150, mask=random_blocks((16, 16))),
    Case("blocks_16_alike_grouped", B=1, Hq=4, Hkv=2, Nq=530, Nk=500, mask=groups),
    Case("blocks_64_32", Nq=201, Nk=150, mask=random_blocks((64, 32))),
    Case("blocks_128", B=1, Nq=390, Nk=517, mask=random_blocks((128, 128), 0.7)),
    Case("blocks_256", B=1, Nq=300, Nk=700, mask=random_blocks((256, 256), 0.8)),
    Case("blocks_causal", Nq=100, Nk=100, mask=random_blocks((32, 16), 0.8), causal="top_left"),
    Case("blocks_window_lengths", B=3, Nq=100, Nk=150, mask=blocks_window_lengths),
    Case("blocks_grouped", Hq=6, Hkv=2, Nq=100, Nk=150, mask=random_blocks((32, 32))),
    Case("parts", Nq=100, Nk=150, mask=parts(3)),
    Case("parts_of_each_head", Hq=6, Hkv=2, Nq=100, Nk=70, mask=parts(2, lines="heads")),
    Case("parts_of_each_batch", B=3, Hq=4, Hkv=2, Nq=45, Nk=80, mask=parts(2, lines="batch"), grad_lse=True),
    Case("parts_lengths", B=3, Nq=100, Nk=150, mask=parts_with_lengths),
    Case("parts_band", Nq=150, Nk=150, mask=band_and_columns),
    Case("neighborhood_stride", Hq=4, Hkv=2, Nq=93, Nk=113, mask=neighborhood, grad_lse=True),
    Case("neighborhood_parts", Hq=4, Hkv=2, Nq=93, Nk=113, mask=neighborhood_parts),
    Case("parts_bias_dropout", Nq=70, Nk=90, mask=parts(2), bias=(1, 0, 0, 0), dropout_p=0.3),
    Case("parts_few_queries", Hq=4, Hkv=2, Nq=3, Nk=300, mask=parts(2, lines="heads")),
    Case("bias_full", bias=(0, 0, 0, 0)),
    Case("bias_per_batch", bias=(0, 1, 1, 1)),
    Case("bias_per_head", bias=(0, 1, 1)),
    Case("bias_per_query", bias=(0, 1)),
    Case("bias_per_key", bias=(0,)),
    Case("bias_pairs", bias=(1, 1, 0, 0), Nq=130, Nk=140),
    Case("bias_heads_pairs", bias=(1, 0, 0, 0), causal="top_left"),
    Case("bias_scalar", bias=(1, 1, 1, 1)),
    Case("bias_float32", bias=(0, 0, 0, 0), bias_in_float32=True),
    Case("bias_blocks", bias=(1, 0, 0, 0), Nq=100, Nk=150, mask=random_blocks((16, 32))),
    Case("bias_grouped", Hq=6, Hkv=3, bias=(0, 0, 1, 0)),
    Case("grouped", Hq=6, Hkv=2),
    Case("multi_query", Hq=5, Hkv=1, causal="top_left"),
    Case("dropout", dropout_p=0.3),
    Case("dropout_blocks", Nq=100, Nk=150, mask=random_blocks((32, 32)), dropout_p=0.5),
    Case("dropout_grouped_causal_bias", Hq=4, Hkv=2, bias=(1, 0, 0, 0), causal="top_left", dropout_p=0.2),
    Case("transposed_layout", layout="transposed"),
    Case("sliced_layout", layout="sliced"),
    Case("strided_head_dim", layout="strided_head_dim"),
    Case("unaligned", layout="unaligned"),
    Case("expanded_keys", layout="expanded"),
    Case("expanded_grad_out", grad_out="sum"),
    Case("grad_lse", grad_lse=True),
    Case("grad_lse_blocks", Nq=100, Nk=150, mask=random_blocks((32, 32)), grad_lse=True),
    Case("negative_scale", scale=-0.3),
    Case("zero_scale", scale=0.0),
    Case("large_scores", spread=2.0),
    Case("softcap", softcap=1.5, spread=1.5),
    Case("softcap_saturated", softcap=0.7, spread=4.0, causal="top_left"),
    Case("softcap_loose", B=1, Nq=130, Nk=200, softcap=50.0, D=64, Dv=64),
    Case("softcap_few_queries_bias", Hq=4, Hkv=2, Nq=3, Nk=300, softcap=2.0, bias=(1, 0, 0, 0)),
    Case("softcap_grouped_lists", Hq=4, Hkv=2, Nq=100, Nk=150, mask=random_blocks((32, 32)), softcap=2.0),
    Case("sinks", sinks=True),
    Case("sinks_empty_rows", Nq=80, Nk=45, causal="bottom_right", sinks=True, grad_lse=True),
    Case("sinks_no_keys", Nk=0, sinks=True, grad_lse=True),
    Case("sinks_decode", Hq=8, Hkv=2, Nq=1, Nk=2300, sinks=True),
    Case("sinks_window_dropout", Nq=130, Nk=130, mask=window(20, 0), sinks=True, dropout_p=0.3),
    Case("alibi", structured="slopes", causal="top_left"),
    Case("alibi_long", B=1, Nq=300, Nk=530, D=64, Dv=64, structured="slopes", causal="bottom_right"),
    Case("alibi_decode", Hq=8, Hkv=2, Nq=1, Nk=1300, structured="slopes", causal="bottom_right"),
    Case("alibi_lengths", B=3, Nq=150, Nk=200, mask=lengths, structured="slopes"),
    Case("table", structured="table", Nq=201, Nk=333),
    Case("table_grouped_blocks", Hq=4, Hkv=2, Nq=100, Nk=150, mask=random_blocks((32, 16)), structured="table"),
    Case("table_and_bias", structured="table", bias=(1, 0, 0, 0), Nq=70, Nk=150),
    Case("table_bits_few_queries", Hq=4, Hkv=1, Nq=5, Nk=700, mask=random_bits(0.3, heads=False), structured="table"),
    Case("table_dropout", structured="table", dropout_p=0.2, grad_lse=True),
    Case("softcap_sinks_table", softcap=2.0, sinks=True, structured="table", causal="top_left", Hq=4, Hkv=2),
    Case("softcap_sinks_alibi_one_by_one", B=1, Hq=1, Hkv=1, Nq=1, Nk=1, softcap=1.0, sinks=True, structured="slopes"),
    Case("softcap_sinks_table_wide", B=1, Nq=70, Nk=150, D=320, Dv=272, softcap=3.0, sinks=True, structured="table"),
    Case("grid", Nq=72, Nk=72, structured="grid", grid=(8, 9)),
    Case("grid_class_token", B=1, Hq=4, Hkv=2, Nq=36, Nk=36, structured="grid", grid=(5, 7), bias=(1, 0, 0, 0)),
    Case("grid_of_one", B=1, Nq=1, Nk=1, structured="grid", grid=(1, 1)),
    Case("grid_window_dropout", Nq=70, Nk=70, structured="grid", grid=(10, 7), mask=window(20, 30), dropout_p=0.2),
    Case("decomposed", B=1, Hq=4, Hkv=2, Nq=130, Nk=130, structured="decomposed", grid=(10, 13)),
    Case("decomposed_of_each_head", Nq=72, Nk=72, structured="decomposed of heads", grid=(9, 8), scale=0.4),
    Case(
        "decomposed_lists_grid", Nq=72, Nk=72, structured="decomposed grid", grid=(8, 9), mask=random_blocks((16, 16))
    ),
    Case("head_dim_512", B=1, Hq=2, Hkv=1, Nq=70, Nk=150, D=512, Dv=512),
    Case("latent_decode", B=1, Hq=4, Hkv=1, Nq=1, Nk=150, D=576, Dv=512),
]
MODIFIED = [case for case in CASES if case.softcap or case.sinks or case.structured in ("slopes", "table")]


def bias_shape(case: Case) -> tuple[int, ...]:
    """The case's bias with 0 replaced by the full size."""
    full = (case.B, case.Hq, case.Nq, case.Nk)[4 - len(case.bias) :]
    return tuple(size if given == 0 else 1 for given, size in zip(case.bias, full, strict=True))


def draw(case: Case, dtype: torch.dtype, seed: int = 0) -> dict:
    """Draw a case's tensors: query, key, value, bias, mask (as passed), visible (bool), grad_out, grad_lse."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    lay_out = LAYOUTS[case.layout]
    tensors = {
        "query": lay_out((normal(case.B, case.Hq, case.Nq, case.D) * case.spread).to(dtype)),
        "key": lay_out((normal(case.B, case.Hkv, case.Nk, case.D) * case.spread).to(dtype)),
        "value": lay_out(normal(case.B, case.Hkv, case.Nk, case.Dv).to(dtype)),
        "bias": None,
        "mask": case.mask(case, generator) if case.mask else None,
    }
    if case.bias is not None:
        wide = torch.float32 if case.bias_in_float32 and dtype != torch.float64 else dtype
        tensors["bias"] = normal(*bias_shape(case)).to(wide)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors["sinks"] = normal(case.Hq).to(wide) if case.sinks else None
    tensors["slopes"] = (normal(case.Hq).abs() / 8).to(wide) if case.structured == "slopes" else None
    tensors["table"] = normal(case.Hq, 2 * 40 + 1).to(wide) if case.structured == "table" else None
    h, w = case.grid
    size = (2 * h - 1) * (2 * w - 1) + 3 * (case.Nq - h * w)
    tensors["grid_table"] = normal(size, case.Hq).to(wide) if "grid" in case.structured else None
    of_heads = (case.Hq,) if "heads" in case.structured else ()
    for name, size in (("rel_h", h), ("rel_w", w)):
        drawn = (normal(*of_heads, 2 * size - 1, case.D) / 2).to(dtype) if "decomposed" in case.structured else None
        tensors[name] = drawn
    out_shape = (case.B, case.Hq, case.Nq, case.Dv)
    tensors["grad_out"] = (
        torch.ones((), dtype=dtype).expand(out_shape)
        if case.grad_out == "sum"
        else lay_out(normal(*out_shape).to(dtype))
    )
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    tensors["grad_lse"] = normal(*out_shape[:3]).to(lse_dtype) if case.grad_lse else None
    tensors["visible"] = visible_pairs(case, tensors["mask"])
    return tensors


def bias_of(case: Case, drawn: dict[str, Tensor | None]) -> list[BiasLike]:
    """What is added to scores as `attention` takes it, of drawn tensors, or of leaves of theirs: None or not there."""
    alignment = None if case.causal else "top_left"
    table, slopes, grid_table, rel_h = (drawn.get(name) for name in ("table", "slopes", "grid_table", "rel_h"))
    parts: list[BiasLike] = [] if table is None else [RelativeBias(table, alignment)]
    parts += [] if slopes is None else [ALiBi(slopes, alignment)]
    if grid_table is not None:
        parts.append(RelativeBias2D(grid_table, case.grid, class_token=case.Nq > case.grid[0] * case.grid[1]))
    parts += [] if rel_h is None else [DecomposedBias2D(rel_h, drawn["rel_w"], case.grid)]
    return parts if drawn.get("bias") is None else [*parts, drawn["bias"]]


def visible_pairs(case: Case, mask: BlockMask | Tensor | SlidingWindow | None) -> Tensor:
    """The definition of the case's mask as bool, broadcastable to (B, Hq, Nq, Nk)."""
    i, j = torch.arange(case.Nq)[:, None], torch.arange(case.Nk)[None]
    visible = torch.ones(case.Nq, case.Nk, dtype=torch.bool)[None, None]
    if isinstance(mask, SlidingWindow):
        visible = ((mask.left < 0) | (j >= i - mask.left)) & ((mask.right < 0) | (j <= i + mask.right))
        visible = visible[None, None]
    elif mask is not None:
        visible = mask if isinstance(mask, Tensor) else mask.to_dense()
    if case.causal:
        visible = visible & (j <= i + (case.Nk - case.Nq if case.causal == "bottom_right" else 0))
    return visible


def _strided(tensor: Tensor) -> Tensor:
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def _sliced(tensor: Tensor) -> Tensor:
    wide = tensor.new_full([size + 3 for size in tensor.shape], torch.nan)
    inner = wide[tuple(slice(1, 1 + size) for size in tensor.shape)]
    return inner.copy_(tensor)


def _unaligned(tensor: Tensor) -> Tensor:
    return torch.cat([tensor.new_full((1,), torch.nan), tensor.flatten()])[1:].view(tensor.shape)


LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": _sliced,
    "strided_head_dim": _strided,
    "unaligned": _unaligned,
    "expanded": lambda t: t[:1, :1].expand_as(t),
}
SMALL = [case for case in CASES if max(case.Nq, case.Nk) <= 150 and case.layout != "expanded"]
