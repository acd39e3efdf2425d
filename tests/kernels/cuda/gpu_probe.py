"""Every conformance case in both half dtypes on backend "cuda", one after another, for compute-sanitizer to watch.

benchmarks/tools/gpu_sanitize.py runs it. Not by pytest, whose fixture fills new memory with NaN: initcheck would see
nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # tests/, for it is a script
from contract.test_conformance import check
from support.cases import CASES

from efficient_attn.backends.cuda import attention as cuda


def main() -> int:
    if cuda.missing():
        print(cuda.missing())
        return 4
    device = torch.device("cuda", torch.cuda.current_device())
    wrong = 0
    for case in CASES:
        for dtype in (torch.bfloat16, torch.float16):
            try:
                check(case, dtype, "cuda", device)
            except AssertionError as error:
                wrong += 1
                print(f"{case} {dtype}: {error}")
    torch.cuda.synchronize()
    print(f"{2 * len(CASES)} configurations, {wrong} of them outside the error budget")
    return 5 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
