"""A stage: (settings, input files) → output folder, with a `done` mark written last.

Every output folder holds `settings.json` (fully resolved), `inputs.json` (fingerprints of what it read),
`environment.json`, its data, and `done.json`. A `done` with equal settings and inputs means nothing to do.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from equipoise.core.errors import StageError
from equipoise.core.files import fingerprint, is_leftover, read_json, write_json

DONE = "done.json"
HEADER = {"inputs.json", "settings.json", "environment.json"}
"""What a stage writes before its work begins."""
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Run:
    """A finished stage: its folder, its results (what `work` returned) and whether it was already done."""

    folder: Path
    results: Mapping[str, Any] = field(default_factory=dict)
    skipped: bool = False
    seconds: float = 0.0


def is_done(folder: str | Path) -> bool:
    """Whether a stage finished in this folder."""
    return (Path(folder) / DONE).is_file()


def stage_key(kind: str, settings: Mapping[str, Any], inputs: Mapping[str, str], neutral: Collection[str] = ()) -> str:
    """16 hex digits naming what a stage computes. Where it writes (`output_dir`) does not matter, nor what else is neutral."""
    relevant = {key: value for key, value in settings.items() if key != "output_dir" and key not in neutral}
    return fingerprint({"kind": kind, "settings": relevant, "inputs": dict(inputs)})


def run_stage(
    folder: str | Path,
    kind: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    work: Callable[[Path], Mapping[str, Any] | None],
    overwrite: bool = False,
    neutral: Collection[str] = (),
) -> Run:
    """Run `work(folder)` unless the folder already holds its result.

    Args:
        folder: output folder, made if absent.
        kind: what the stage does (`train`, `generate`, …).
        settings: fully resolved settings as plain data.
        inputs: name → fingerprint of everything read.
        work: does the work, writes into the folder, returns a small JSON mapping of results. It must resume by itself
            from what an interrupted earlier call with the same key left there.
        overwrite: start afresh where the folder holds something else.
        neutral: settings that change how the work is done and not what: the folder may have been begun with others.

    Raises:
        StageError: the folder holds another stage's work (other settings or inputs) and `overwrite` is off.
    """
    folder = Path(folder)
    key = stage_key(kind, settings, inputs, neutral)
    header_path = folder / "inputs.json"
    if header_path.is_file():
        header = read_json(header_path)
        if header.get("key") != key:
            if not overwrite:
                other = _difference(folder, header, kind, settings, inputs, neutral)
                raise StageError(
                    f"{folder} holds the {header.get('kind', 'other')} stage of {other}. "
                    "Choose another output folder, or pass --overwrite (in Python overwrite=True) to start afresh."
                )
            _clear(folder)
        elif is_done(folder):
            done = read_json(folder / DONE)
            return Run(folder, done["results"], skipped=True, seconds=done["seconds"])
    elif folder.is_dir() and not all(is_leftover(path) for path in folder.iterdir()) and not overwrite:
        raise StageError(f"{folder} is not empty and was not made by equipoise. Choose another output folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StageError(f"The output folder {folder} cannot be made: {error.strerror}.") from error
    # First of all: it marks the folder as ours, so that a kill right after it can be resumed.
    write_json(header_path, {"schema_version": SCHEMA_VERSION, "kind": kind, "key": key, "inputs": dict(inputs)})
    write_json(folder / "settings.json", dict(settings))
    write_json(folder / "environment.json", environment())
    start = time.monotonic()
    try:
        results = dict(work(folder) or {})
    except Exception:
        if {path.name for path in folder.iterdir()} <= HEADER:
            _clear(folder)  # it failed before it made anything, and shall not stand in the way of the same call put right
        raise
    seconds = time.monotonic() - start
    write_json(folder / DONE, {"schema_version": SCHEMA_VERSION, "key": key, "seconds": round(seconds, 3), "results": results})
    return Run(folder, results, seconds=seconds)


def _clear(folder: Path) -> None:
    """Empty a stage's folder, the done mark first and inputs.json last: killed on the way, it is neither done nor somebody else's."""
    (folder / DONE).unlink(missing_ok=True)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "inputs.json"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def environment() -> dict[str, Any]:
    """Machine and versions, without user names, paths or secrets."""
    versions: dict[str, str | None] = {}
    for name in ("equipoise", "torch", "transformers", "peft", "accelerate", "datasets", "numpy", "safetensors"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(terse=True),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions,
    }


def _difference(folder: Path, header: Mapping[str, Any], kind: str, settings: Any, inputs: Any, neutral: Collection[str]) -> str:
    """Which settings or inputs differ, in words."""
    if header.get("kind") != kind:
        return f"another kind (asked for: {kind})"
    known = (folder / "settings.json").is_file()  # a kill right after inputs.json leaves none
    before = read_json(folder / "settings.json") if known else settings
    names = [name for name in sorted({*before, *settings}) if before.get(name) != settings.get(name)]
    names += [f"input {name}" for name in sorted({*header["inputs"], *inputs}) if header["inputs"].get(name) != inputs.get(name)]
    listed = ", ".join(name for name in names if name != "output_dir" and name not in neutral)
    return f"other settings or inputs ({listed or 'which settings, is not known'})"
