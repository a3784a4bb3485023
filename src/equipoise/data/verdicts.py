"""Replies of a data set as completions to score, and the verdicts on them back as scores and safety flags."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from equipoise.core.errors import DataError
from equipoise.core.files import fingerprint, read_jsonl
from equipoise.core.records import Record, Reply
from equipoise.data._encode import Encoder
from equipoise.data.accounting import Accounting
from equipoise.data.settings import RULE, DataSettings

COMPARED = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
UNJUDGED = "replies without a verdict"


def reply_id(record: Record, reply: Reply) -> str:
    """What a reply is called in completions and verdicts: by its text, since its role depends on how the pairs are ordered."""
    return f"{record.id}/{fingerprint(reply.text)}"


def completions(records: Iterable[Record], encoder: Encoder | None = None) -> Iterator[dict[str, Any]]:
    """Every different reply as a line of `completions.jsonl`; with token ids where an encoder takes the prompt."""
    for record in records:
        turns = [turn.as_dict() for turn in record.prompt]
        rendered = None if encoder is None else encoder.prompts([record.prompt])[0]
        for name, reply in {reply_id(record, reply): reply for reply in record.replies}.items():
            ids = [] if encoder is None or rendered is None else encoder.replies([record.prompt], [rendered[0]], [reply.text])[0]
            yield {"id": name, "prompt": turns, "text": reply.text, "token_ids": ids}


def verdict(row: Any) -> tuple[str, str, float | None]:
    """(id, by, value) of a line of `verdicts.jsonl`. Raises DataError for one that is none."""
    try:
        value = row["value"]
        return str(row["id"]), str(row["by"]), None if value is None else float(value)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"Not a verdict: {str(row)[:120]!r}. Each line needs `id`, `by` and `value`, a number or null.") from error


class Judged:
    """Gives a record's replies the scores and safety flags that the settings say; replies without a verdict are counted."""

    def __init__(self, settings: DataSettings, accounting: Accounting) -> None:
        self._settings, self._accounting = settings, accounting
        self._values: dict[str, dict[str, float]] = {}
        for path in settings.verdicts:
            if not Path(path).is_file():
                raise DataError(f"{path} does not exist. Give a verdicts.jsonl file.")
            for name, by, value in read_jsonl(path, verdict):
                known = self._values.setdefault(name, {})
                if value is not None:
                    known[by] = value
        rule = re.match(RULE, settings.safe_when or "")
        self._rule = None if rule is None else (rule[1], COMPARED[rule[2]], float(rule[3]))

    def __call__(self, record: Record) -> Record:
        """The record with judged replies."""
        if not self._settings.verdicts and self._rule is None and self._settings.assume_safe is None:
            return record
        return replace(record, replies=tuple(self._judged(record, reply) for reply in record.replies))

    def _judged(self, record: Record, reply: Reply) -> Reply:
        scores: Mapping[str, float] = reply.scores
        if self._settings.verdicts:
            found = self._values.get(reply_id(record, reply), {})
            self._accounting.note(UNJUDGED, not found)
            scores = {**scores, **found}
        safe = reply.safe
        if self._rule is not None and self._rule[0] in scores:
            name, compare, bound = self._rule
            safe = bool(compare(scores[name], bound))
        return replace(reply, scores=scores, safe=self._settings.assume_safe if safe is None else safe)
