"""ShareGPT's turns: `conversations` of `{"from", "value"}`; with `chosen` and `rejected` turns beside them, or ending in a reply.

Alone, the conversation ends with a gold reply; with a `label`, the reply is a labelled sample. A `system` column goes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from equipoise.core.records import Message, Record, Reply
from equipoise.data._read import Row
from equipoise.data.settings import DataSettings
from equipoise.data.sources import _base

COLUMNS = (frozenset({"conversations"}),)


def matches(columns: set[str], sample: Mapping[str, Any]) -> bool:
    """A column of conversations."""
    return COLUMNS[0] <= columns


def record(row: Row, settings: DataSettings) -> Record:
    """A conversation."""
    values = row.values
    turns = _turns(values.get("conversations"), "conversations")
    system = _base.optional_text(values, "system")
    if system.strip():
        turns = (Message("system", system), *turns)
    sides = [_base.split_reply(_turns([values[name]], name))[1] for name in ("chosen", "rejected") if values.get(name) is not None]
    if len(sides) == 2:
        return Record(_base.row_id(row), _base.merged(turns), (Reply(sides[0], "chosen"), Reply(sides[1], "rejected")))
    if sides:
        raise _base.Excluded("only one of 'chosen' and 'rejected'")
    prompt, reply = _base.split_reply(turns)
    label = _base.flag(values, "label")
    role = Reply(reply, "gold") if label is None else Reply(reply, "sample", label=label)
    return Record(_base.row_id(row), _base.merged(prompt), (role,))


def _turns(value: Any, name: str) -> tuple[Message, ...]:
    """Turns under ShareGPT's keys, or under the usual ones, which some files mix in."""
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping) and "role" in value[0]:
        return _base.messages(value, name)
    return _base.messages(value, name, "from", "value")
