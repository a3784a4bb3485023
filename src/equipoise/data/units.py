"""Records as units of training: each with exactly the replies a method asks for by role.

| asked for | taken |
|---|---|
| `chosen`, `rejected` | those replies; of a scored list its best and its worst |
| `gold` | the gold reply, else the chosen one, else a sample labelled good, else the best-scored sample |
| `sample`, `mismatched` | KTO: a labelled sample, or a pair as two labelled samples; beside each, the reply to another prompt |
| `sample`, with the fact `label` | BCO: labelled samples, or a pair as two, as for KTO, without the other reply |
| `sample` alone, without it | every reply of the record, as a list; a record with one reply is none |
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from equipoise.core.errors import DataError, UsageError, nearest
from equipoise.core.records import REPLY_ROLES, Record, Reply
from equipoise.data._mismatched import with_mismatched
from equipoise.data.accounting import Accounting

KTO, LIST = ("sample", "mismatched"), ("sample",)


def units(
    records: Iterable[Record], roles: tuple[str, ...], facts: tuple[str, ...], accounting: Accounting, spool: Path | None = None
) -> Iterator[Record]:
    """Units of all records that have what is asked for, one by one; the others are counted.

    For KTO and BCO a pair becomes two units, `<id>/chosen` and `<id>/rejected`, and counts as two rows. KTO's other
    replies come from anywhere in the data, so all units are gathered first: in memory, or in the file `spool` (written afresh).
    facts: names every reply must have (`safe`, `label`, a score); a mismatched reply is exempt.
    Raises UsageError for unknown roles, DataError (at the end) where no record has them.
    """
    for role in roles:
        if role not in REPLY_ROLES:
            raise UsageError(f"There is no reply role {role!r}.{nearest(role, REPLY_ROLES)}")
    made = _made(records, roles, facts, accounting)
    if "mismatched" not in roles:
        return made
    return with_mismatched(made, spool)


def _made(records: Iterable[Record], roles: tuple[str, ...], facts: tuple[str, ...], accounting: Accounting) -> Iterator[Record]:
    labelled = set(roles) == set(KTO) or (roles == LIST and "label" in facts)
    wanted = "list of two or more replies" if roles == LIST and not labelled else _in_words(roles)
    some = False
    for record in records:
        found = _labelled(record) if labelled else _picked(record, roles)
        if not found:
            _drop(f"no {wanted}", record.id, accounting)
        for unit in found:
            missing = next((name for name in facts for reply in unit.replies if name not in facts_of(reply)), None) if facts else None
            if missing is None:
                some = True
                yield unit
            else:
                _drop(f"a reply without the fact {missing!r}", unit.id, accounting)
    if not some:
        raise DataError(f"No record has the replies {', '.join(roles)}: {accounting.in_words()}.")


def _in_words(roles: tuple[str, ...]) -> str:
    """`'chosen' and 'rejected' reply`, without the mismatched one, which is not the record's."""
    return " and ".join(repr(role) for role in roles if role != "mismatched") + " reply"


def _drop(reason: str, name: str, accounting: Accounting) -> None:
    accounting.drop(reason, name)
    accounting.rows_in += 1  # the others are counted where they are tokenised


def facts_of(reply: Reply) -> dict[str, float]:
    """What a branch carries: its scores, `safe` and `label` as 1 or 0. What is missing is left out."""
    facts = {name: float(value) for name, value in reply.scores.items() if not math.isnan(value)}
    if reply.safe is not None:
        facts["safe"] = float(reply.safe)
    if reply.label is not None:
        facts["label"] = float(reply.label)
    return facts


def _picked(record: Record, roles: tuple[str, ...]) -> list[Record]:
    """The record with exactly the replies asked for, in that order; nothing where one is missing."""
    if roles == LIST:
        replies = [replace(reply, role="sample") for reply in record.replies]
        return [replace(record, replies=tuple(replies))] if len(replies) > 1 else []
    replies = []
    for role in roles:
        reply = _pick(record, role)
        if reply is None:
            return []
        replies.append(replace(reply, role=role))  # type: ignore[arg-type]
    return [replace(record, replies=tuple(replies))]


def _pick(record: Record, role: str) -> Reply | None:
    own = record.reply(role)
    if own is not None:
        return own
    samples = [reply for reply in record.replies if reply.role == "sample"]
    scored = [reply for reply in samples if reply.scores]
    if role in ("chosen", "rejected") and len(scored) > 1:
        name = next(iter(scored[0].scores))
        ranked = sorted((reply for reply in scored if name in reply.scores), key=lambda reply: reply.scores[name])
        if len(ranked) < 2 or ranked[0].scores[name] == ranked[-1].scores[name] or ranked[0].text == ranked[-1].text:
            return None
        return ranked[-1] if role == "chosen" else ranked[0]
    if role == "gold":
        good = next((reply for reply in samples if reply.label), None)
        return record.reply("chosen") or good or (_pick(record, "chosen") if scored else None)
    return None


def _labelled(record: Record) -> list[Record]:
    """Labelled units: the record's labelled samples, or its pair as a good and a bad one."""
    samples = [reply for reply in record.replies if reply.role == "sample" and reply.label is not None]
    if len(samples) == 1:
        return [replace(record, replies=(samples[0],))]
    if samples:
        return [replace(record, id=f"{record.id}/{index}", replies=(sample,)) for index, sample in enumerate(samples)]
    made = []
    for role, label in (("chosen", True), ("rejected", False)):
        reply = _pick(record, role)
        if reply is None:
            return []
        made.append(replace(record, id=f"{record.id}/{role}", replies=(replace(reply, role="sample", label=label),)))
    return made
