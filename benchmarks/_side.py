"""One side of a benchmark in a process of its own, and the facts about the machine that go beside its figures."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "equipoise")


def run_side(script: str, task: dict[str, Any], result: Path, timeout: float | None = None) -> dict[str, Any]:
    """Run `python script --task JSON` and read what it wrote to `result`; adds the seconds the whole process took.

    Its output goes to stderr. Raises SystemExit where it fails.
    """
    start = time.perf_counter()
    command = [sys.executable, script, "--task", json.dumps(task | {"result": str(result)})]
    done = subprocess.run(command, stdout=sys.stderr, timeout=timeout, check=False)
    if done.returncode:
        raise SystemExit(f"{task.get('side')} failed with exit code {done.returncode}; see above.")
    return json.loads(result.read_text()) | {"process_seconds": round(time.perf_counter() - start, 3)}


def peak_memory_gib() -> float:
    """Highest resident memory of this process so far [GiB]."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 2 ** (30 if sys.platform == "darwin" else 20), 3)


def machine() -> dict[str, Any]:
    """CPU, cores this process may use, torch threads, memory, and the GPU where there is one."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    facts = {"cpu": _cpu(), "cores": cores, "threads": torch.get_num_threads(), "memory_gib": round(memory, 1), "system": platform.system()}
    return facts | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def versions() -> dict[str, str]:
    """Python and the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
