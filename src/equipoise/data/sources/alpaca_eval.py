"""Judged pairs of AlpacaEval: `instruction`, `output_1`, `output_2`, and `preference` between 1 (the first) and 2 (the second).

How sure the judge was is |2 · preference − 3|: 0 at 1.5, 1 at either end (the probability p of the winner gives 2p − 1).
`min_confidence` leaves out, and counts, what is below it; a tie has no winner and is always left out. Replies carry the
name of the model that wrote them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from equipoise.core.records import Message, Record, Reply
from equipoise.data._read import Row
from equipoise.data.settings import DataSettings
from equipoise.data.sources import _base

COLUMNS = (frozenset({"instruction", "output_1", "output_2", "preference"}),)


def matches(columns: set[str], sample: Mapping[str, Any]) -> bool:
    """Two outputs and a preference."""
    return COLUMNS[0] <= columns


def record(row: Row, settings: DataSettings) -> Record:
    """A judged pair, where the judge was sure enough."""
    values = row.values
    preference = _base.number(values, "preference")
    if preference is None:
        raise _base.Excluded("no 'preference'")
    if not 1.0 <= preference <= 2.0:
        raise _base.Excluded("'preference' is not between 1 and 2")
    confidence = abs(2 * preference - 3)
    if confidence == 0:
        raise _base.Excluded("the judge saw a tie")
    if confidence < settings.min_confidence:
        raise _base.Excluded("the judge was less sure than min_confidence")
    winner = 1 if preference < 1.5 else 2
    replies = (
        Reply(_base.text(values, f"output_{winner}"), "chosen", source=_base.optional_text(values, f"generator_{winner}")),
        Reply(_base.text(values, f"output_{3 - winner}"), "rejected", source=_base.optional_text(values, f"generator_{3 - winner}")),
    )
    prompt = (Message("user", _base.text(values, "instruction")),)
    return Record(_base.row_id(row), prompt, replies, {"confidence": confidence, "dataset": _base.optional_text(values, "dataset")})
