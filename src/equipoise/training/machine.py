"""What this machine has to give: memory at hand, and measured speeds of matrix products and of memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

_CGROUP = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
LOAD_SECONDS = 3.0
"""Seconds to load a model and start a stage, whatever it does."""


@dataclass(frozen=True)
class Machine:
    """Measured speeds and free memory.

    device: cpu or cuda. float32, bfloat16: matrix products in that dtype, FLOPs a second. bandwidth: bytes a second read
    and written. memory: bytes that a training process may take, 0 where that is not known.
    """

    device: str
    float32: float
    bfloat16: float
    bandwidth: float = 1e10
    memory: int = 0

    def peak(self, dtype: str) -> float:
        """FLOPs a second in this dtype."""
        return self.bfloat16 if dtype == "bfloat16" else self.float32

    def rate(self, dtype: str, bf16: bool) -> float:
        """FLOPs a second of a run with these settings, which leaves bf16 out where it does not pay."""
        return self.peak("bfloat16" if bf16 and 2 * self.bfloat16 >= self.float32 else dtype)

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def measure(size: int = 512, seconds: float = 0.2) -> Machine:
    """Time a square matrix product of `size` for about `seconds` in each dtype, on the GPU where there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        size *= 16

    def best_of(once: Callable[[], Any]) -> float:
        # The fastest of several: what else runs on the machine right now is not part of its speed.
        best, count, end = float("inf"), 0, time.perf_counter() + seconds
        while count < 20 or time.perf_counter() < end:
            count += 1
            start = time.perf_counter()
            once()
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        return best

    def rate(dtype: torch.dtype) -> float:
        left = torch.ones(size, size, dtype=dtype, device=device)
        return 2.0 * size**3 / best_of(lambda: left @ left)

    # Far larger than any cache; a product reads two and writes one.
    left, right, out = (torch.ones(2**24, device=device) for _ in range(3))
    bandwidth = 3.0 * left.nbytes / best_of(lambda: torch.mul(left, right, out=out))
    return Machine(device, rate(torch.float32), rate(torch.bfloat16), bandwidth, memory_at_hand(device))


@cache
def bfloat16_pays(device: str) -> bool:
    """Whether products in bfloat16 keep up with float32's: on a CPU without instructions for them they take many times as long."""
    if device != "cpu":
        return True
    import torch

    def fastest(dtype: torch.dtype) -> float:
        left, right = torch.ones(192, 384, dtype=dtype), torch.ones(384, 384, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            torch.nn.functional.linear(left, right)
            times.append(time.perf_counter() - start)
        return min(times)

    return fastest(torch.bfloat16) <= 2 * fastest(torch.float32)


def memory_at_hand(device: str) -> int:
    """Bytes that this process may have in all: free ones and its own, under the limit of its container. A GPU's are its free ones."""
    if device == "cuda":
        import torch

        # What torch has reserved and does not use serves the run too.
        return int(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
    import psutil  # type: ignore[import-untyped]  # comes with accelerate

    own = int(psutil.Process().memory_info().rss)
    free = int(psutil.virtual_memory().available)
    return min([free, *_cgroup_free()]) + own


def _cgroup_free(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Free bytes under the memory limit of this container, where there is one."""
    free = []
    for limit, used in _CGROUP:
        try:
            top, now = (root / limit).read_text().strip(), (root / used).read_text().strip()
        except OSError:
            continue
        if top.isdigit():  # v2 says "max" for none; v1 says a number no machine has
            free.append(int(top) - int(now))
    return free


def gigabytes(size: float) -> str:
    """'3.1 GB', with 10⁹ bytes to the gigabyte."""
    return f"{size / 1e9:.1f} GB"


def readable(seconds: float | None) -> str:
    """'45 s', '7 min', '2.5 h', or 'unknown'."""
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
