"""`study.lock.json`: what was decided before any result was seen, and the refusal to change it quietly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from equipoise.core.errors import StageError
from equipoise.core.files import fingerprint, read_json, write_json
from equipoise.core.progress import say
from equipoise.study._graph import objective_files
from equipoise.study.settings import StudySettings

LOCK = "study.lock.json"
_SHOWN = 12
# Binding: these may not change under results that are already there. The rest of the lock is for the reader.
_BINDING = ("study", "prompts", "objective_files", "package_version")


def write_lock(
    folder: Path, study: StudySettings, prompts: Sequence[Mapping[str, Any]], detectable: list[dict[str, Any]], overwrite: bool
) -> dict[str, Any]:
    """Write what was decided, or check it against what an earlier run decided.

    Raises StageError naming what changed, unless `overwrite`; then the new lock keeps a list of what was changed and
    how often, so that a report can say that decisions were not made once and for all.
    """
    decided: dict[str, Any] = {
        "schema_version": 1,
        "package_version": metadata.version("equipoise"),
        "study": study.resolved(),
        "prompts": {"fingerprint": fingerprint(list(prompts)), "n": len(prompts)},
        "objective_files": objective_files(study),
        "primary": [contrast.resolved() for contrast in study.primary],
        "margins": dict(study.evaluation.margins),
        "detectable": detectable,
    }
    path = folder / LOCK
    if path.is_file():
        before = read_json(path)
        changed = [line for key in _BINDING for line in differences(before.get(key, {}), decided[key], key)]
        if not changed:
            return dict(before)
        if not overwrite:
            more = f"\n  … and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
            raise StageError(
                f"{path} was decided otherwise:\n  " + "\n  ".join(changed[:_SHOWN]) + more + "\n"
                "Choose another output folder, or pass --overwrite to decide anew (finished stages that still fit are kept)."
            )
        say(f"{path}: decided anew; {len(changed)} thing{'s' if len(changed) > 1 else ''} changed")
        decided["changed"] = [*before.get("changed", []), changed]
    write_json(path, decided)
    return decided


def differences(before: Any, after: Any, where: str) -> list[str]:
    """One line per leaf that differs between two JSON values: `study.seeds.1: (absent) → 1`."""
    if before == after:
        return []
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        keys = [*before, *(key for key in after if key not in before)]
        return [line for key in keys for line in differences(before.get(key, _ABSENT), after.get(key, _ABSENT), f"{where}.{key}")]
    if isinstance(before, list) and isinstance(after, list):
        size = max(len(before), len(after))
        pairs = [(before[i] if i < len(before) else _ABSENT, after[i] if i < len(after) else _ABSENT) for i in range(size)]
        return [line for number, (old, new) in enumerate(pairs) for line in differences(old, new, f"{where}.{number}")]
    return [f"{where}: {_short(before)} → {_short(after)}"]


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


_ABSENT = _Absent()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
