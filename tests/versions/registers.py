"""Compile every Triton kernel with each version that is tested, and write what they take into docs/gpu.md.

    make triton-registers                           an hour on one core; nothing is compiled twice
    make triton-registers ARGS="--versions 3.9 --only sm_90/bfloat16"

The environments are those of `make test-versions`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from run import ENVIRONMENTS, ROOT, make

TOOL = "efficient_attn.benchmarks.tools.triton_registers"
VERSIONS = ("3.6", "3.7", "3.9")  # PyTorch's wheels of today bring one of them


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--versions", nargs="*", choices=VERSIONS, default=list(VERSIONS))
    parser.add_argument("--only", default="", help="regular expression for the cases, sm_90/bfloat16/128/lists")
    options = parser.parse_args()
    for version in options.versions:
        place = make(f"triton-{version}", ENVIRONMENTS[f"triton-{version}"])
        print(f"Triton {version}", flush=True)
        subprocess.check_call([place / "bin" / "python", "-W", "ignore", "-m", TOOL, "--only", options.only], cwd=place)
    page = Path(ROOT) / "docs" / "gpu.md"
    subprocess.check_call([sys.executable, "-m", TOOL, "--only", "none", "--page", str(page)])


if __name__ == "__main__":
    main()
