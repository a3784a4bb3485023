"""UltraFeedback-binarized: `chosen` and `rejected` conversations with `score_chosen` and `score_rejected` (1 to 10)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from equipoise.core.records import Record, Reply
from equipoise.data._read import Row
from equipoise.data.accounting import Accounting
from equipoise.data.settings import DataSettings
from equipoise.data.sources import _base

COLUMNS = (frozenset({"chosen", "rejected", "score_chosen", "score_rejected"}),)


def matches(columns: set[str], sample: Mapping[str, Any]) -> bool:
    """Two conversations and their scores."""
    return COLUMNS[0] <= columns and isinstance(sample.get("chosen"), (list, tuple))


def records(rows: Iterable[Row], settings: DataSettings, accounting: Accounting) -> Iterator[Record]:
    """One record per pair, with the score `score` on each reply."""
    return _base.build(rows, settings, accounting, _record)


def _record(row: Row, settings: DataSettings) -> Record:
    sides = [_base.messages(row.values.get(name), name) for name in ("chosen", "rejected")]
    prompt, chosen, rejected = _base.shared_prompt(*sides)
    replies = (Reply(chosen, "chosen", scores=_score(row, "chosen")), Reply(rejected, "rejected", scores=_score(row, "rejected")))
    return Record(_base.row_id(row), prompt, replies)


def _score(row: Row, side: str) -> dict[str, float]:
    value = _base.number(row.values, f"score_{side}")
    return {} if value is None else {"score": value}
