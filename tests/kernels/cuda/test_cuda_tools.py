"""The tools that read what nvcc makes of the CUDA kernels, on texts as it prints them. No nvcc, no GPU."""

from __future__ import annotations

import json

import pytest

from efficient_attn.benchmarks.suites import gpu
from efficient_attn.benchmarks.tools import cuda_carry, cuda_limits

FORWARD = (
    "_ZN14efficient_attn4sm9053_GLOBAL__N__1_20_attention_forward_cu_117attention_forwardINS1_7ForwardI13__nv_bfloat16"
)
PTXAS = """[3/5] nvcc a.o
ptxas info    : Compiling entry function '{name}Li128EEEEEvNS' for 'sm_90a'
ptxas info    : Function properties for x
    {stack} bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads
ptxas info    : Used 168 registers, used 6 barriers
"""
# A consumer whose step is two products, three other instructions and a jump, or, past a mask, 50 more; then a producer.
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
        /*0410*/                   LDS.128 R8, [R9] ;
        /*0420*/                   HGMMA.64x128x16.F32.BF16 R24, R140, gdesc[UR20], R24 ;
        /*0430*/              @!P2 BRA `(.L_x_1) ;
        /*0440*/                   EXIT ;
.L_x_9:
        /*0450*/                   USETMAXREG.DEALLOC.CTAPOOL 0x28 ;
.L_x_10:
        /*0460*/                   IADD3 R37, R3, R4, RZ ;
        /*0470*/               @P3 BRA `(.L_x_10) ;
        /*0480*/                   EXIT ;
"""


def disassembly() -> str:
    mask = "\n".join(f"        /*{0x50 + 16 * k:04x}*/                   FSEL R{k}, R1, R2, P4 ;" for k in range(50))
    return SASS.format(name=FORWARD, mask=mask)


def test_a_step_is_the_shortest_way_around() -> None:
    (row,) = cuda_limits.rows_of(disassembly(), "bfloat16")
    assert (row["kernel"], row["head_dim"], row["target"]) == ("sm90::attention_forward", 128, 650)
    assert row["instructions"] == {"HGMMA": 2, "BRA": 2, "MUFU": 1, "LDS": 1}
    products = 2 * 2 * 64 * 128 * 16 * 2  # two products of each of two warpgroups
    shared = 2 * (2 * 128 * 16 * 2 + 64 * 16 * 2) + 8 * 32 * 16  # B of both, A of the first, and what is loaded
    assert row["cycles"] == {
        "tensor": products / 4096, "special": 8 * 32 / 16, "shared": shared / 128, "issue": 6 * 8 / 4,
    }  # fmt: skip
    assert (row["bound"], row["at_most"]) == ("tensor", 949) and row["without_overlap"] < 949


def test_the_registers_that_a_producer_uses() -> None:
    (row,) = cuda_limits.rows_of(disassembly(), "bfloat16")
    assert row["producer_registers"] == 38  # not those of the consumers, nor of what comes before


def test_every_kernel_has_its_limits_and_its_producers_fit() -> None:
    rows = [json.loads(line) for line in cuda_limits.RESULTS.read_text().splitlines()]
    assert {(row["kernel"], row["head_dim"]) for row in rows} >= {
        (f"sm90::attention_{part}", d) for part in ("forward", "key_gradient", "query_gradient") for d in (64, 128, 256)
    } | {("sm90::attention_backward", 128)}
    for row in rows:
        assert 0 < row["producer_registers"] <= 40, row  # kProducerRegisters of every kernel
        assert row["cycles"]["tensor"] > 0 and row["at_most"] <= 950, row


def test_a_target_is_printed_beside_what_the_machine_code_allows() -> None:
    kept = {
        ("sm90::attention_forward", 128): {"at_most": 900, "without_overlap": 600, "bound": "tensor"},
        ("sm90::attention_key_gradient", 128): {"at_most": 800, "without_overlap": 400, "bound": "issue"},
        ("sm90::attention_query_gradient", 128): {"at_most": 800, "without_overlap": 400, "bound": "tensor"},
    }
    said = gpu.allowed("dense 16k D128", "fwd", "CUDA", kept)
    assert said == " (its machine code: 600 where nothing overlaps, 900 by tensor)"
    assert gpu.allowed("dense 16k D128", "bwd", "CUDA", kept) == (
        f" (its machine code: {400 * 5 / 7:.0f} where nothing overlaps, {800 * 5 / 7:.0f} by issue)"
    )
    assert (
        gpu.allowed("dense 16k D128", "fwd", "Triton", kept)
        == gpu.allowed("decode 8k GQA 32/8", "fwd", "CUDA", kept)
        == ""
    )


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
