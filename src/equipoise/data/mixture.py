"""Which records count: split by prompt cluster, and kept apart from other prompts.

Records that share their first user turn form a cluster and are never on both sides of a split, since the same
conversation, one turn further on, would tell the answer.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from equipoise.core.arrays import Seen, print64
from equipoise.core.prints import PromptPrints, conversation_text
from equipoise.core.records import Message, Record
from equipoise.data.accounting import Accounting

_EDGES = " .,;:!?…\"'“”‘’()[]*_-"
PARTS = ("train", "dev", "test")
COMPARED = 4000
"""Records compared with excluded prompts in one go."""


def cluster(first_turn: str) -> str:
    """The name of a prompt's cluster: its first user turn without case, spacing, and punctuation at its ends."""
    folded = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", first_turn).casefold()).strip()
    return folded.strip(_EDGES) or folded


def part_of(name: str, fractions: tuple[float, float, float] = (0.8, 0.1, 0.1), seed: int = 0) -> str:
    """The part a cluster belongs to: a hash of its name and the seed, whatever else is in the data."""
    digest = hashlib.sha256(f"{seed}\n{name}".encode("utf-8", "surrogatepass")).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return PARTS[0] if place < fractions[0] else PARTS[1] if place < fractions[0] + fractions[1] else PARTS[2]


def keep_part(
    records: Iterable[Record], part: str, fractions: tuple[float, float, float], seed: int, accounting: Accounting
) -> Iterator[Record]:
    """The records of one part ('all' keeps everything); the others are counted."""
    for record in records:
        own = part if part == "all" else part_of(cluster(record.first_turn), fractions, seed)
        if own == part:
            yield record
        else:
            accounting.drop(f"in another part ({own})", record.id)


def prompt_texts(prompt: Sequence[Message]) -> tuple[str, ...]:
    """What a prompt is recognised by: its first user turn, and the whole conversation where that is more."""
    first = next((message.content for message in prompt if message.role == "user"), "")
    whole = conversation_text(prompt)
    return (first,) if whole == first else (first, whole)


def prints_of(records: Iterable[Record]) -> PromptPrints:
    """Prints of the prompts of records, one per record: what is saved as `trained_on.npz`."""
    return PromptPrints.of([conversation_text(record.prompt) for record in records])


def exclude(records: Iterable[Record], others: Mapping[str, PromptPrints], near: float, accounting: Accounting) -> Iterator[Record]:
    """The records whose prompt stands in none of `others` (name → prints), exactly or nearly; the rest is counted.

    A record is recognised by its first user turn or by its whole prompt. Records are compared some thousand at a time.
    """
    if not others:
        yield from records
        return
    records = iter(records)
    while some := list(islice(records, COMPARED)):
        reasons = _standing_in(some, others, near)
        for index, record in enumerate(some):
            if index in reasons:
                accounting.drop(reasons[index], record.id)
            else:
                yield record


def _standing_in(records: Sequence[Record], others: Mapping[str, PromptPrints], near: float) -> dict[int, str]:
    """Index → reason of the records whose prompt stands in one of `others`; an exact match is named before a near one."""
    texts = [prompt_texts(record.prompt) for record in records]
    owner = [index for index, group in enumerate(texts) for _ in group]
    mine = PromptPrints.of([text for group in texts for text in group])
    reasons: dict[int, str] = {}
    for name, prints in others.items():
        for overlap in mine.shared_with(prints, near):
            how = "stands" if overlap.kind == "exact" else "stands nearly"
            index = owner[overlap.index]
            if index not in reasons or overlap.kind == "exact":
                reasons[index] = f"prompt {how} in {name}"
    return reasons


def unique_ids(records: Iterable[Record], accounting: Accounting) -> Iterator[Record]:
    """Records with doubled ids told apart by `#2`, `#3`, …: stores and rows are found by id.

    Ids are remembered by 64 bits each. Two that share them by chance (1 in 37 million for a million ids) only get a number.
    """
    times: Counter[str] = Counter()
    seen = Seen()
    for record in records:
        name = record.id
        while not seen.add(print64(name)):
            times[record.id] += 1
            name = f"{record.id}#{times[record.id] + 1}"
        if name != record.id:
            accounting.note("ids that stood twice were numbered")
            record = replace(record, id=name)
        yield record
