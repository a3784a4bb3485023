"""Scored lists: a `prompt`, its `completions`, and `scores`, one number per completion (null where one is missing).

`completions` hold texts, or mappings with `text` and optionally `score`, `safe` and `source`. A score may also be a
mapping with several by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from equipoise.core.records import Record, Reply
from equipoise.data._read import Row, kind_of
from equipoise.data.settings import DataSettings
from equipoise.data.sources import _base
from equipoise.data.sources.preference import prompt_of

COLUMNS = (frozenset({"prompt", "completions"}),)


def matches(columns: set[str], sample: Mapping[str, Any]) -> bool:
    """A prompt and a list of completions."""
    return COLUMNS[0] <= columns and isinstance(sample.get("completions"), (list, tuple))


def record(row: Row, settings: DataSettings) -> Record:
    """A record with a sample for every completion."""
    completions, scores = row.values.get("completions"), row.values.get("scores")
    if not isinstance(completions, (list, tuple)) or not completions:
        raise _base.Excluded("no 'completions'" if not completions else f"'completions' is {kind_of(completions)}, not a list")
    if scores is not None and (not isinstance(scores, (list, tuple)) or len(scores) != len(completions)):
        raise _base.Excluded("'scores' are not one per completion")
    replies = []
    for index, completion in enumerate(completions):
        entry = completion if isinstance(completion, Mapping) else {"text": completion}
        replies.append(
            Reply(
                _base.text(entry, "text"),
                "sample",
                source=_base.optional_text(entry, "source"),
                scores=_base.scores(entry if scores is None else {"score": scores[index]}, "score"),
                safe=_base.flag(entry, "safe"),
            )
        )
    return Record(_base.row_id(row), prompt_of(row.values), tuple(replies))
