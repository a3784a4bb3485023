"""PKU-SafeRLHF: two responses, which is better, which is safer, and whether each is safe (Ji et al., arXiv 2406.15513).

`preferred_by` says which judgement makes the chosen reply; the safe flags travel with the replies either way. BFPO orders
by `better` (helpfulness alone) and takes safety from the flags.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from equipoise.core.records import Message, Record, Reply
from equipoise.data._read import Row
from equipoise.data.settings import DataSettings
from equipoise.data.sources import _base

COLUMNS = (
    frozenset({"prompt", "response_0", "response_1", "better_response_id"}),
    frozenset({"prompt", "response_0", "response_1", "safer_response_id"}),
)


def matches(columns: set[str], sample: Mapping[str, Any]) -> bool:
    """Two numbered responses and a judgement."""
    return any(wanted <= columns for wanted in COLUMNS)


def record(row: Row, settings: DataSettings) -> Record:
    """A pair."""
    values, column = row.values, f"{settings.preferred_by}_response_id"
    winner = _base.number(values, column)
    if winner is None:
        raise _base.Excluded(f"no {column!r}")
    if winner not in (0, 1):
        raise _base.Excluded(f"{column!r} is neither 0 nor 1")
    chosen, rejected = int(winner), 1 - int(winner)
    replies = (
        Reply(_base.text(values, f"response_{chosen}"), "chosen", safe=_base.flag(values, f"is_response_{chosen}_safe")),
        Reply(_base.text(values, f"response_{rejected}"), "rejected", safe=_base.flag(values, f"is_response_{rejected}_safe")),
    )
    return Record(_base.row_id(row), (Message("user", _base.text(values, "prompt")),), replies)
