"""What the benchmarks share: facts about the machine, timing in turn, peak memory, HH-RLHF rows, one JSON object on stdout.

Standard library only at import time, so that a benchmark decides what is loaded before its clock starts.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, TypeVar

SCHEMA_VERSION = 1
PACKAGES = ("torch", "triton", "transformers", "tokenizers", "trl", "peft", "accelerate", "equipoise")
T = TypeVar("T")


def machine() -> dict[str, Any]:
    """CPU model, cores this process may use, torch threads, memory [GiB], and the GPU where there is one."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
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


def log(text: str) -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


def report(benchmark: str, settings: Mapping[str, Any], results: Mapping[str, Any], one_line: bool = False) -> None:
    """Print the benchmark's one JSON object on stdout: what was run, where, and what was found."""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    head = {"schema_version": SCHEMA_VERSION, "benchmark": benchmark, "command": command, "machine": machine(), "versions": versions()}
    print(json.dumps({**head, "settings": dict(settings), **results}, indent=None if one_line else 2))


# ---- time and memory


@dataclass(frozen=True)
class Run(Generic[T]):
    """One call: wall and process CPU seconds, the process's peak resident memory during it [MiB], and what it returned."""

    seconds: float
    cpu_seconds: float
    peak_rss_mb: float
    value: T


def timed(call: Callable[[], T]) -> Run[T]:
    """Run once and measure. The garbage of whatever ran before is collected first."""
    gc.collect()
    reset_peak_rss()
    wall, cpu = time.perf_counter(), time.process_time()
    value = call()
    return Run(time.perf_counter() - wall, time.process_time() - cpu, peak_rss_mb(), value)


def in_turn(sides: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[Run[Any]]]:
    """Each side `repeats` times, in turn, another one first each round: what slows the machine for a while slows all of them."""
    names = list(sides)
    runs: dict[str, list[Run[Any]]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            runs[name].append(timed(sides[name]))
            log(f"{name}, {repeat + 1} of {repeats}: {runs[name][-1].seconds:.2f} s, {runs[name][-1].cpu_seconds:.2f} s of CPU time")
    return runs


def summary(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": round(statistics.median(values), digits), "low": round(min(values), digits), "high": round(max(values), digits)}


def reset_peak_rss() -> None:
    """Let `peak_rss` count from now (Linux); elsewhere it stays the peak since the process began."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int:
    """Highest resident memory of this process [bytes] since `reset_peak_rss`, or since it began."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024)


def peak_rss_mb() -> float:
    """`peak_rss` in MiB."""
    return round(peak_rss() / 2**20, 1)


def memory_key(device: str) -> str:
    """What a peak of memory [MiB] is called: resident memory of the process, or device memory that torch handed out."""
    return "peak_device_mb" if device == "cuda" else "peak_rss_mb"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# ---- rows


def data_folder() -> Path:
    """Where real data is looked for: the folder EQUIPOISE_DATA, or ../shared/data beside the checkout."""
    return Path(os.environ.get("EQUIPOISE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def hh_file() -> Path | None:
    """HH-RLHF pairs (JSON lines) in the data folder; None where absent."""
    path = data_folder() / "hh-harmless-base" / "pairs.jsonl.gz"
    return path if path.is_file() else None


def preference_records(count: int) -> tuple[str, list[Any]]:
    """A name and the first `count` preference records, in file order: HH-RLHF where it is at hand, else the bundled starter set."""
    from equipoise.data.load import load
    from equipoise.data.settings import DataSettings

    path = hh_file()
    records = load(DataSettings(dataset_name=str(path or "starter"), max_rows=count)).records
    if len(records) < count:
        raise SystemExit(f"only {len(records)} records are at hand, {count} asked for")
    return ("hh-harmless-base" if path else "starter"), records
