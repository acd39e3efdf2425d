"""What torch.compile leaves outside of its programs: a graph breaks there, and Dynamo looks at nothing inside.

A module of its own, since PyTorch imports Dynamo, which takes a second, for the decorator: import it where a program is
being traced, or in a module that nobody imports for a plain call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable  # type: ignore[untyped-decorator]
def untraced(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What function(*arguments, **options) returns, differentiable as outside of a program."""
    return function(*arguments, **options)
