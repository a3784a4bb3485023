"""Preference pairs in TRL's columns: `prompt`, `chosen`, `rejected`; each text, or a list of messages.

With messages the prompt may be left out (it is then the turns both sides share, compared turn by turn). With text it
may not: where the prompt ends cannot be told from characters. A text prompt that is itself a "\\n\\nHuman:" transcript is
parsed into its turns. Optional columns: `chosen_safe` and `rejected_safe` (true or false), `score_chosen` and
`score_rejected` (a number, or a mapping with several by name), `margin` (a number; the chosen reply's score of that name).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from equipoise.core.records import Message, Record, Reply
from equipoise.data._read import Row, kind_of
from equipoise.data.settings import DataSettings
from equipoise.data.sources import _base
from equipoise.data.transcripts import is_transcript, parse_prompt

COLUMNS = (frozenset({"prompt", "chosen", "rejected"}), frozenset({"chosen", "rejected"}))


def matches(columns: set[str], sample: Mapping[str, Any]) -> bool:
    """Messages on both sides, or text on both sides with a prompt, unless all columns of a format with more of them are there."""
    if not COLUMNS[1] <= columns or "conversations" in columns or {"prompt", "chosen_safe", "rejected_safe"} <= columns:
        return False
    chosen, rejected = sample.get("chosen"), sample.get("rejected")
    if isinstance(chosen, (list, tuple)) and isinstance(rejected, (list, tuple)):
        return not {"score_chosen", "score_rejected"} <= columns
    return isinstance(chosen, str) and isinstance(rejected, str) and "prompt" in columns and not is_transcript(chosen)


def record(row: Row, settings: DataSettings) -> Record:
    """A pair."""
    return Record(_base.row_id(row), *pair(row.values))


def pair(values: Mapping[str, Any]) -> tuple[tuple[Message, ...], tuple[Reply, Reply]]:
    """(prompt, the two replies) of a row, with their flags and scores where the columns are there."""
    chosen, rejected = (values.get(name) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) or isinstance(rejected, str):
        prompt = prompt_of(values)
        texts = (_base.text(values, "chosen"), _base.text(values, "rejected"))
    else:
        first = _side(values, "chosen")
        second = _side(values, "rejected")
        if values.get("prompt") is None:
            prompt, *rest = _base.shared_prompt(first, second)
            texts = (rest[0], rest[1])
        else:
            prompt = prompt_of(values)
            texts = (_last(first, prompt), _last(second, prompt))
    margin = _base.number(values, "margin")
    scores = _base.scores(values, "score_chosen") | ({} if margin is None else {"margin": margin})
    replies = (
        Reply(texts[0], "chosen", scores=scores, safe=_base.flag(values, "chosen_safe")),
        Reply(texts[1], "rejected", scores=_base.scores(values, "score_rejected"), safe=_base.flag(values, "rejected_safe")),
    )
    return prompt, replies


def prompt_of(values: Mapping[str, Any]) -> tuple[Message, ...]:
    """The prompt column as messages: text is one user turn (or a transcript), a list is read as it is."""
    value = values.get("prompt")
    if isinstance(value, str) or value is None:
        return parse_prompt(_base.text(values, "prompt"))
    return _base.merged(_base.messages(value, "prompt"))


def _side(values: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    value = values.get(name)
    if value is None:
        raise _base.Excluded(f"no {name!r}")
    if isinstance(value, Mapping):  # one message instead of a list of one
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise _base.Excluded(f"{name!r} is {kind_of(value)}, neither text nor messages")
    return _base.messages(value, name)


def _last(side: tuple[Message, ...], prompt: tuple[Message, ...]) -> str:
    """The reply of a side beside an explicit prompt, which some data sets repeat in front of it."""
    before, reply = _base.split_reply(side)
    if before and _base.merged(before) != prompt:
        raise _base.Excluded(_base.PROMPTS_DIFFER)
    return reply
