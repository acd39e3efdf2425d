"""The tools that read what nvcc makes of the CUDA kernels, on texts as it prints them. No nvcc, no GPU."""

from __future__ import annotations

import json

import pytest

from efficient_attn.benchmarks import machine
from efficient_attn.benchmarks.suites import Options, gpu
from efficient_attn.benchmarks.tools import cuda_carry, gpu_model
from efficient_attn.benchmarks.tools.table_rows import replace_rows

FORWARD = (
    "_ZN14efficient_attn4sm9053_GLOBAL__N__1_20_attention_forward_cu_117attention_forwardINS1_7ForwardI13__nv_bfloat16"
)
PTXAS = """[3/5] nvcc a.o
ptxas info    : Compiling entry function '{name}Li128EEEEEvNS' for 'sm_90a'
ptxas info    : Function properties for x
    {stack} bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads
ptxas info    : Used 168 registers, used 6 barriers
"""
# A consumer whose step is two products, five other instructions and a jump, or, past a mask, 50 more; then a producer
# that has 32 KiB copied in a step, in a loop over tiles for each of which it has 64 KiB copied.
SASS = """
	.section	.text.{name}Li128EEEEEvNS,"ax",@progbits
        /*0000*/                   S2R R200, SR_TID.X ;
        /*0010*/               @P0 BRA `(.L_x_9) ;
        /*0020*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8 ;
.L_x_1:
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
{mask}
.L_x_2:
        /*0400*/                   MUFU.EX2 R4, R5 ;
        /*0404*/                   FFMA R4, R5, R6, R7 ;
        /*0408*/                   IMAD.IADD R4, R5, 0x1, R7 ;
        /*0410*/                   LDS.128 R8, [R9] ;
        /*0420*/                   HGMMA.64x128x16.F32.BF16 R24, R140, gdesc[UR20], R24 ;
        /*0430*/              @!P2 BRA `(.L_x_1) ;
        /*0440*/                   EXIT ;
.L_x_9:
        /*0450*/                   USETMAXREG.DEALLOC.CTAPOOL 0x28 ;
.L_x_8:
        /*0454*/                   UMOV UR4, 0x10000 ;
        /*0458*/                   SYNCS.ARRIVE.TRANS64 RZ, [UR34+0x28180], UR4 ;
.L_x_10:
        /*0460*/                   IADD3 R37, R3, R4, RZ ;
        /*0464*/                   IMAD.MOV.U32 R25, RZ, RZ, 0x8000 ;
        /*0468*/                   SYNCS.ARRIVE.TRANS64 RZ, [R3+URZ+0x38190], R25 ;
        /*0470*/               @P3 BRA `(.L_x_10) ;
        /*0478*/               @P4 BRA `(.L_x_8) ;
        /*0480*/                   EXIT ;
"""
MMA = """
	.section	.text._ZN14efficient_attn4sm8053_GLOBAL__N__1_17attention_forwardINS1_7ForwardI13__nv_bfloat16Li64E,"ax",@progbits
.L_x_1:
        /*0030*/                   LDSM.16.MT88.4 R8, [R9] ;
        /*0040*/                   HMMA.16816.F32.BF16 R24, R8, R10, R24 ;
        /*0050*/                   FMNMX R4, R5, R6, !PT ;
        /*0060*/              @!P2 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
"""  # noqa: E501


def disassembly() -> str:
    mask = "\n".join(f"        /*{0x50 + 16 * k:04x}*/                   FSEL R{k}, R1, R2, P4 ;" for k in range(50))
    return SASS.format(name=FORWARD, mask=mask)


def test_a_step_is_the_shortest_way_around() -> None:
    (row,) = gpu_model.rows_of(disassembly(), "bfloat16")
    assert (row["kernel"], row["head_dim"]) == ("sm90::attention_forward", 128)
    assert row["instructions"] == {"HGMMA": 2, "BRA": 2, "MUFU": 1, "FFMA": 1, "IMAD": 1, "LDS": 1}
    products = 2 * 2 * 64 * 128 * 16 * 2  # two products of each of two warpgroups
    # B of both, A of the first, what is loaded, and what is copied in
    shared = 2 * (2 * 128 * 16 * 2 + 64 * 16 * 2) + 8 * 32 * 16 + 0x8000
    assert row["cycles"] == {
        "tensor": products / 4096, "special": 8 * 32 / 16, "fp32": 8 * 3 * 32 / 128, "alu": 0.0,
        "shared": shared / 128, "issue": 8 * 8 / 4,
    }  # fmt: skip
    assert row["bound"] == "shared" and row["copied_bytes"] == 0x8000
    flop_a_ns = products * 132 * 1.755
    assert row["at_most"] == round(flop_a_ns / (shared / 128) / 1e3)


def test_products_of_single_warps_are_slower() -> None:
    (row,) = gpu_model.rows_of(MMA, "bfloat16")
    assert (row["kernel"], row["registers"]) == ("sm80::attention_forward", 25)
    assert row["cycles"] == {
        "tensor": round(2 * 16 * 8 * 16 / 2576, 1), "special": 0.0, "fp32": 0.0, "alu": 0.5,
        "shared": 32 * 16 / 128, "issue": 1.0,
    }  # fmt: skip


def test_the_registers_that_producer_and_consumers_use() -> None:
    (row,) = gpu_model.rows_of(disassembly(), "bfloat16")
    assert row["producer_registers"] == 38  # not those of the consumers, nor of what comes before
    assert (row["registers"], row["register_limit"]) == (141, 0xE8)


def test_every_kernel_is_counted_and_its_registers_fit() -> None:
    rows = [json.loads(line) for line in gpu_model.RESULTS.read_text().splitlines()]
    assert {(row["kernel"], row["head_dim"]) for row in rows} >= {
        (f"{arch}::attention_{part}", d)
        for arch in ("sm80", "sm90")
        for part in ("forward", "key_gradient", "query_gradient")
        for d in (64, 128, 256)
    } | {("sm90::attention_backward", 128)} | {
        (f"sm90::attention_{part}_wide", d)
        for part, ds in (("forward", (128, 256)), ("query_gradient", (64, 128)))
        for d in ds
    }
    for row in rows:
        assert row["cycles"]["tensor"] > 0 and row["without_overlap"] <= row["predicted"] <= row["at_most"] <= 950, row
        if row["kernel"].startswith("sm90"):
            # kProducerRegisters of every kernel: what two consumers leave of the 504 that three warpgroups begin with
            assert 0 < row["producer_registers"] <= 504 - 2 * row["register_limit"], row
            assert 0 < row["registers"] <= row["register_limit"] and row["copied_bytes"] > 0, row


def test_what_cycles_become() -> None:
    spent = machine.cycles({"tensor": 4096 * 100, "special": 16 * 60, "shared": 128 * 80, "issue": 4 * 40})
    assert spent == {"tensor": 100.0, "special": 60.0, "fp32": 0.0, "alu": 0.0, "shared": 80.0, "issue": 40.0}
    peak = 132 * 1.755 * 4096 / 1e3
    found = machine.limits(spent, 4096 * 100)
    assert found == {
        "bound": "tensor", "at_most": round(peak), "without_overlap": round(peak / 1.6),
        "predicted": round(peak / (1 + 0.9 * 0.6)),
    }  # fmt: skip
    assert machine.limits({**spent, "tensor": 0.0}, 0.0) == {}


def test_a_grid_is_used_by_whole_rounds_and_visible_pairs() -> None:
    assert machine.used("full", 128 * 132, 1) == 1.0 and machine.used("full", 128 * 133, 1) == 133 / 264
    visible, visited = 512 * 513 / 2, (4 * 5 / 2) * 128**2
    assert machine.used("causal", 512, 4) == pytest.approx(visible / visited)


def counted(at_most: int, apart: int, bound: str) -> dict:
    return {"at_most": at_most, "without_overlap": apart, "predicted": (at_most + apart) // 2, "bound": bound}


def test_a_call_is_made_of_its_kernels() -> None:
    rows = {
        ("sm90::attention_forward", 128): counted(900, 600, "tensor"),
        ("sm90::attention_forward_wide", 128): counted(910, 610, "special"),
        ("sm90::attention_backward", 128): counted(700, 500, "shared"),
        ("sm90::attention_key_gradient", 64): counted(800, 400, "issue"),
        ("sm90::attention_query_gradient", 64): counted(100, 100, "alu"),
        ("sm90::attention_query_gradient_wide", 64): counted(800, 400, "tensor"),
    }
    assert machine.of_call("fwd", "CUDA", 128, "causal", rows) == counted(900, 600, "tensor")
    assert machine.of_call("fwd", "CUDA", 128, "full", rows) == counted(910, 610, "special")
    for kernels in ("CUDA", "CUDA, any order"):
        assert machine.of_call("bwd", kernels, 128, "causal", rows) == counted(700, 500, "shared")
    share = 5 / 7  # seven products, of which five count
    both = {"at_most": round(800 * share), "without_overlap": round(400 * share), "predicted": round(600 * share)}
    assert machine.of_call("bwd", "CUDA", 64, "full", rows) == both | {"bound": "issue, tensor"}
    said = " (its machine code: 600 if nothing overlaps, 900 by tensor)"
    assert machine.remark("fwd", "CUDA", 128, "causal", rows) == said
    for mode, kernels, head_dim in (("fwd", "CUDA", 64), ("fwd", "Triton", 128), ("bwd", "CUDA, any order", 64)):
        assert machine.of_call(mode, kernels, head_dim, "full", rows) == {}


def test_a_call_is_made_of_the_kernels_that_serve_it() -> None:
    """As plan.h decides: wide steps where it takes them."""
    plan = (cuda_carry.ROOT / "csrc" / "cuda" / "plan.h").read_text()
    assert "if (head == 64 || p.mask.indptr) return false;\n    if (head == 128 && (p.mask.window_left >= 0" in plan
    assert "if (head == 256) return false;" in plan and "widest > 64 && widest <= 128" in plan
    names = {
        (mode, d, visible): list(machine.parts_of(mode, "CUDA", d, visible))
        for mode in ("fwd", "bwd") for d in (64, 128, 256) for visible in ("full", "causal")
    }  # fmt: skip
    wide = {key for key, kernels in names.items() if any(name.endswith("_wide") for name in kernels)}
    assert wide == {
        ("fwd", 128, "full"), ("fwd", 256, "full"), ("fwd", 256, "causal"), ("bwd", 64, "full"), ("bwd", 64, "causal"),
    }  # fmt: skip
    assert set().union(*names.values()) <= {name for name, _ in machine.kept()}


def test_what_was_predicted_stands_beside_what_was_measured() -> None:
    cells = {(c["case"], c["mode"]): c for c in gpu.configs(Options())}
    cell = cells["dense 16k D128", "bwd"]
    times = {"cuda": 10.0, "cuda any order": 9.0}
    row = {**cell, "id": "x", "status": "ok", "ms": 10.0, "times_ms": times, "absent": {}, "only": [*times]}
    found = {r["kernels"]: r["predicted"] for r in gpu.expand(row)}
    assert found == {k: machine.prediction(cell, k) for k in ("CUDA", "CUDA, any order")} and all(found.values())
    assert any(column.key == "predicted" for column in gpu.SUITE.columns)
    assert machine.prediction(cells["decode 8k GQA 32/8", "fwd"], "CUDA") is None
    assert machine.prediction(cells["blocks 10% 16k D128", "fwd"], "CUDA") is None
    assert machine.prediction(cell, "Triton") is None
    for case, mode, _ in machine.TARGETS:  # each target is of a cell, and has its prediction
        assert cells[case, mode] and f"| {case} {mode}, " in machine.targets(list(cells.values()))


def test_the_page_is_of_the_kept_rows() -> None:
    rows = [json.loads(line) for line in gpu_model.RESULTS.read_text().splitlines()]
    page = (cuda_carry.ROOT / "docs" / "gpu.md").read_text()
    assert gpu_model.page(rows) in page, "docs/gpu.md is of other rows; run make gpu-model"


@pytest.mark.parametrize(("spill", "line"), [(0, ""), (8, ""), (0, "ptxas info : (C7510) wgmma is serialized")])
def test_what_is_carried_spills_nothing_and_stays_asynchronous(spill: int, line: str) -> None:
    said = PTXAS.format(name=FORWARD, stack=spill, spill=spill) + line
    found = cuda_carry.complaints(said)
    assert len(found) == bool(spill or line)
    (row,) = cuda_carry.table(said)
    assert (row["arch"], row["dtype"], row["registers"]) == ("sm_90a", "bfloat16", 168)


def test_the_longest_unit() -> None:
    log = "# ninja log v5\n0\t1500\t7\ta.o\tff\n100\t900\t7\tb.o\tff\n"
    assert cuda_carry.longest(log) == ("a", 1.5)


def test_rows_of_a_table_are_replaced_in_their_place(tmp_path):
    path = tmp_path / "folder" / "rows.jsonl"
    kinds = "abc"

    def replaced(*rows, ordered=True):
        place = (lambda row: kinds.find(row["kind"]) if row["kind"] in kinds else None) if ordered else None
        found = replace_rows(path, [{"kind": k, "value": v} for k, v in rows], lambda row: row["kind"], place)
        assert found == [json.loads(line) for line in path.read_text().splitlines()]
        assert [p.name for p in path.parent.iterdir()] == ["rows.jsonl"]
        return [(row["kind"], row["value"]) for row in found]

    assert replaced(("c", 1), ("a", 1)) == [("a", 1), ("c", 1)]
    assert replaced(("b", 1), ("c", 2), ("c", 3)) == [("a", 1), ("b", 1), ("c", 2), ("c", 3)]
    assert replaced(("a", 4), ordered=False) == [("b", 1), ("c", 2), ("c", 3), ("a", 4)]
    kinds = "ab"  # what is no more
    assert replaced(("b", 5)) == [("a", 4), ("b", 5)]
