"""Alpaca's columns: `instruction`, `input` (may be empty), `output`. The input follows the instruction after a blank line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from equipoise.core.records import Message, Record, Reply
from equipoise.data._read import Row
from equipoise.data.settings import DataSettings
from equipoise.data.sources import _base

COLUMNS = (frozenset({"instruction", "output"}),)


def matches(columns: set[str], sample: Mapping[str, Any]) -> bool:
    """Instruction and output."""
    return COLUMNS[0] <= columns


def record(row: Row, settings: DataSettings) -> Record:
    """A record with a gold reply."""
    instruction, extra = _base.text(row.values, "instruction"), _base.optional_text(row.values, "input")
    content = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    system = _base.optional_text(row.values, "system")
    prompt = ((Message("system", system),) if system.strip() else ()) + (Message("user", content),)
    return Record(_base.row_id(row), prompt, (Reply(_base.text(row.values, "output"), "gold"),))
