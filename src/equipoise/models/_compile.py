"""The one way this package compiles: single functions, with shapes left open."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

# A kernel for each rank, dtype, head or hidden size that a process meets. torch's own limit of 8 is soon reached by one that
# meets several models; beyond it a function runs uncompiled, and FlexAttention would materialise all scores.
COMPILED_SHAPES = 64


def with_open_shapes(function: Callable[..., Any]) -> Any:
    """The function compiled so that micro-batches of every size share its kernels."""
    config: Any = torch._dynamo.config
    compiled = torch.compile(function, dynamic=True, fullgraph=True)

    @wraps(function)
    def call(*inputs: Any, **more: Any) -> Any:
        # Each thread has its own settings, and backward passes on a GPU run in a thread of torch's.
        if config.recompile_limit < COMPILED_SHAPES:
            config.recompile_limit = COMPILED_SHAPES
        return compiled(*inputs, **more)

    return call
