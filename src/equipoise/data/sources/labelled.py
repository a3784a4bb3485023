"""Labelled rows (KTO): one reply with a thumbs-up or thumbs-down, as `prompt`, `completion`, `label` or `messages`, `label`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from equipoise.core.records import Record, Reply
from equipoise.data._read import Row
from equipoise.data.settings import DataSettings
from equipoise.data.sources import _base
from equipoise.data.sources.messages import conversation

COLUMNS = (frozenset({"prompt", "completion", "label"}), frozenset({"messages", "label"}))


def matches(columns: set[str], sample: Mapping[str, Any]) -> bool:
    """One of the two column sets."""
    return any(wanted <= columns for wanted in COLUMNS)


def record(row: Row, settings: DataSettings) -> Record:
    """A record with a labelled sample."""
    label = _base.flag(row.values, "label")
    if label is None:
        raise _base.Excluded("no 'label'")
    prompt, reply = conversation(row.values)
    return Record(_base.row_id(row), prompt, (Reply(reply, "sample", label=label),))
