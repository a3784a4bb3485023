"""Everything here needs a CUDA device, and is skipped where there is none."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Float32 products in float32, not TF32; memory of the test before given back: a Trainer holds its model in cycles."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    gc.collect()
    torch.cuda.empty_cache()
    yield
    torch.set_float32_matmul_precision(before)
