"""The one way this package compiles: single functions, with shapes left open."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# A kernel for each rank, dtype, head or hidden size that a process meets. torch's own limit of 8 is soon reached by one that
# meets several models; beyond it a function runs uncompiled, and FlexAttention would materialise all scores.
COMPILED_SHAPES = 64


def with_open_shapes(function: Callable[..., Any]) -> Any:
    """The function compiled so that micro-batches of every size share its kernels."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, COMPILED_SHAPES)
    return torch.compile(function, dynamic=True, fullgraph=True)
