"""Supervised rows: `messages` whose last turn is the reply, or `prompt` and `completion` (text or messages)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from equipoise.core.records import Message, Record, Reply
from equipoise.data._read import Row
from equipoise.data.settings import DataSettings
from equipoise.data.sources import _base
from equipoise.data.sources.preference import prompt_of

COLUMNS = (frozenset({"messages"}), frozenset({"prompt", "completion"}))


def matches(columns: set[str], sample: Mapping[str, Any]) -> bool:
    """One of the two column sets, and no label or comparison beside it."""
    return any(wanted <= columns for wanted in COLUMNS) and not {"label", "chosen", "rejected"} & columns


def record(row: Row, settings: DataSettings) -> Record:
    """A record with a gold reply."""
    prompt, reply = conversation(row.values)
    return Record(_base.row_id(row), prompt, (Reply(reply, "gold"),))


def conversation(values: Mapping[str, Any]) -> tuple[tuple[Message, ...], str]:
    """(prompt, reply) of either column set."""
    if values.get("messages") is not None:
        prompt, reply = _base.split_reply(_base.messages(values["messages"], "messages"))
        return _base.merged(prompt), reply
    completion = values.get("completion")
    if completion is None or isinstance(completion, str):
        return prompt_of(values), _base.text(values, "completion")
    before, reply = _base.split_reply(_base.messages(completion, "completion"))
    return prompt_of(values) + before, reply
