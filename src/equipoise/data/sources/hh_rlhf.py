r"""HH-RLHF: two whole transcripts, `chosen` and `rejected`, with turns marked by "\n\nHuman:" and "\n\nAssistant:".

Roles are parsed, never guessed from a common prefix of characters: a reply may hold blank lines, and two replies may
begin with the same words. The last turn is the reply; where the turns before it are not the same on both sides, the
pair compares answers to different prompts, and the row is excluded and counted (Bai et al., arXiv 2204.05862).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from equipoise.core.records import Record, Reply
from equipoise.data._read import Row
from equipoise.data.settings import DataSettings
from equipoise.data.sources import _base
from equipoise.data.transcripts import is_transcript, parse

COLUMNS = (frozenset({"chosen", "rejected"}),)


def matches(columns: set[str], sample: Mapping[str, Any]) -> bool:
    """Both sides are text that begins with a role marker."""
    sides = (sample.get("chosen"), sample.get("rejected"))
    return COLUMNS[0] <= columns and all(isinstance(side, str) and is_transcript(side) for side in sides)


def record(row: Row, settings: DataSettings) -> Record:
    """A pair whose two transcripts share their prompt."""
    sides = []
    for name in ("chosen", "rejected"):
        turns = parse(_base.text(row.values, name))
        if turns is None:
            raise _base.Excluded(f"{name!r} does not begin with 'Human:' or 'Assistant:'")
        sides.append(turns)
    prompt, chosen, rejected = _base.shared_prompt(*sides)
    return Record(_base.row_id(row), prompt, (Reply(chosen, "chosen"), Reply(rejected, "rejected")))
