"""UltraFeedback-binarized: `chosen` and `rejected` conversations with `score_chosen` and `score_rejected` (1 to 10).

A score may also be a mapping with several by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from equipoise.core.records import Record, Reply
from equipoise.data._read import Row
from equipoise.data.settings import DataSettings
from equipoise.data.sources import _base

COLUMNS = (frozenset({"chosen", "rejected", "score_chosen", "score_rejected"}),)


def matches(columns: set[str], sample: Mapping[str, Any]) -> bool:
    """Two conversations and their scores."""
    return COLUMNS[0] <= columns and isinstance(sample.get("chosen"), (list, tuple))


def record(row: Row, settings: DataSettings) -> Record:
    """A pair, with the score `score` on each reply."""
    sides = [_base.messages(row.values.get(name), name) for name in ("chosen", "rejected")]
    prompt, chosen, rejected = _base.shared_prompt(*sides)
    replies = (
        Reply(chosen, "chosen", scores=_base.scores(row.values, "score_chosen")),
        Reply(rejected, "rejected", scores=_base.scores(row.values, "score_rejected")),
    )
    return Record(_base.row_id(row), prompt, replies)
