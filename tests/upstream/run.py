"""Run PyTorch's own tests of nn.MultiheadAttention with our class in place of its own.

    python tests/upstream/run.py /path/to/pytorch [pytest options]

The path is a checkout of PyTorch near the installed version (its test/ folder is not part of the wheel and none of it
is copied here). Before any test module is imported, `MultiheadAttention` is replaced in torch.nn and wherever the name
is looked up, so that nn.TransformerEncoderLayer and friends build ours as well. What is left out is listed below, with
the reason; `--torch` runs the same selection on PyTorch's own class, to tell our failures from those of the checkout.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from efficient_attn.multihead import MultiheadAttention

FILES = {  # file: what its test ids must contain
    "test/nn/test_multihead_attention.py": "",
    "test/test_native_mha.py": "",
    "test/test_transformers.py": "TestTransformers",  # the other classes test functionals
    "test/test_modules.py": "MultiheadAttention",
}

LEFT_OUT = {
    "two_masks_fast_path_mock": "asserts that PyTorch's fused kernel is called; ours runs its own attention instead",
    "test_mask_check_fastpath": "asserts that nn.TransformerEncoder's fused layer is called; ours must not be bypassed",
    "test_disable_fastpath": "likewise",
    "test_grad(grad)?_nn_MultiheadAttention": "asks for batched gradients (the old vmap), which our operator lacks",
    "test_transformerencoder_fastpath.*use_autocast_True": "bfloat16 tolerance, fails on PyTorch's own class too",
}


class Plugin:
    """Patch first, then select."""

    def __init__(self, own: bool) -> None:
        if own:
            for module in (torch.nn, torch.nn.modules, torch.nn.modules.activation, torch.nn.modules.transformer):
                module.MultiheadAttention = MultiheadAttention

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept, left_out = [], []
        for item in items:
            wanted = next((cls for path, cls in FILES.items() if str(item.path).endswith(path)), "")
            skip = wanted not in item.nodeid or any(re.search(pattern, item.name) for pattern in LEFT_OUT)
            (left_out if skip else kept).append(item)
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print(__doc__)
        return 2
    checkout, *options = arguments
    own = "--torch" not in options
    options = [option for option in options if option != "--torch"]
    paths = [str(Path(checkout) / file) for file in FILES if (Path(checkout) / file).exists()]
    if not paths:
        print(f"{checkout} is no checkout of PyTorch: none of {', '.join(FILES)} is there")
        return 2
    settings = f"-c /dev/null --rootdir {checkout} --noconftest -p no:cacheprovider -q -W ignore".split()
    return pytest.main([*paths, *settings, *options], plugins=[Plugin(own)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
