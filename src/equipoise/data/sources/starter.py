"""The bundled starter set: `prompt`, `chosen`, `rejected`, `chosen_safe`, `rejected_safe`, `axis`, `topic`.

Any file in these columns is read the same way, its replies as text or as messages (as in `preference`).
`dataset_name=starter` names the bundled files: `dataset_config_name=train` (the default) for training pairs, `judge` for
the pairs a judge is trained on, which share no prompt with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from equipoise.core.errors import UsageError, nearest
from equipoise.core.records import Record
from equipoise.data._read import Row
from equipoise.data.settings import DataSettings
from equipoise.data.sources import _base
from equipoise.data.sources.preference import pair

COLUMNS = (frozenset({"prompt", "chosen", "rejected", "chosen_safe", "rejected_safe"}),)
FOLDER = Path(__file__).parent.parent / "starter"
FILES = {
    "train": ("train_helpfulness.jsonl", "train_harmlessness.jsonl"),
    "judge": ("judge_helpfulness.jsonl", "judge_harmlessness.jsonl"),
}


def files(settings: DataSettings) -> list[Path]:
    """The bundled files of a configuration. Raises UsageError for an unknown one."""
    config = settings.dataset_config_name or "train"
    if config not in FILES:
        raise UsageError(f"The starter set has no configuration {config!r}.{nearest(config, FILES)}")
    if settings.dataset_split is not None:
        raise UsageError("The starter set has no splits; use part=train, dev or test, and dataset_config_name=judge for the judge's pairs.")
    return [FOLDER / name for name in FILES[config]]


def matches(columns: set[str], sample: Mapping[str, Any]) -> bool:
    """A pair with a safe flag on each side."""
    return COLUMNS[0] <= columns


def record(row: Row, settings: DataSettings) -> Record:
    """A pair, with safe flags, axis and topic."""
    values = row.values
    facts = {name: values[name] for name in ("axis", "topic") if values.get(name) is not None}
    return Record(_base.row_id(row), *pair(values), facts)
