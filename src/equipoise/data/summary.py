"""What a data set looks like before anything is trained on it: roles, turns, lengths, parts, samples, accounting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from equipoise.core.errors import DataError
from equipoise.core.records import Record
from equipoise.data._encode import Encoder
from equipoise.data.load import load
from equipoise.data.mixture import PARTS, cluster, part_of
from equipoise.data.settings import PrepareSettings
from equipoise.data.tokenise import tokenise

SAMPLE_CHARACTERS = 600


def summarise(settings: PrepareSettings, tokenizer: Any = None, dataset: Any = None, samples: int = 3) -> dict[str, Any]:
    """Everything `data inspect` shows, as plain data.

    With a tokenizer also lengths in tokens (before the limit) and the accounting of tokenising for the roles found, or why it
    is not possible.
    samples: so many records, evenly spread over the data. Raises what `load` raises.
    """
    loaded = load(settings.data, dataset)
    records = loaded.records
    data = settings.data
    clusters = {cluster(record.first_turn) for record in records}
    parts = Counter(part_of(cluster(record.first_turn), data.split_fractions, data.split_seed) for record in records)
    result: dict[str, Any] = {
        "source": data.dataset_name if dataset is None else "memory",
        "format": loaded.format,
        "fingerprint": loaded.fingerprint,
        "accounting": loaded.accounting.as_json(),
        "records": len(records),
        "roles": dict(Counter(reply.role for record in records for reply in record.replies)),
        "turns": {str(turns): count for turns, count in sorted(Counter(len(record.prompt) for record in records).items())},
        "clusters": len(clusters),
        "parts": {part: parts[part] for part in PARTS},
        "safe": _flags(records, "safe"),
        "label": _flags(records, "label"),
        "facts": _facts(records),
        "lengths": {
            "words": _lengths([(_prompt_text(record), record) for record in records], lambda text: len(text.split())),
            "characters": _lengths([(_prompt_text(record), record) for record in records], len),
        },
    }
    if tokenizer is not None and records:
        roles = roles_of(records)
        result["tokenised"] = {"roles": list(roles), "max_length": settings.tokenise.max_length}
        try:
            result["lengths"]["tokens"] = _token_lengths(records, Encoder(tokenizer, settings.tokenise))
            rows, accounting = tokenise(records, tokenizer, settings.tokenise, roles, settings.facts)
            result["tokenised"] |= {"rows": len(rows), "accounting": accounting.as_json()}
        except DataError as error:  # such as one prompt only, where KTO wants replies to others: the rest is worth seeing
            result["tokenised"]["error"] = str(error)
    step = max(1, len(records) // max(1, samples))
    result["samples"] = [_sample(record) for record in records[::step][:samples]]
    return result


def roles_of(records: Sequence[Record]) -> tuple[str, ...]:
    """The roles most of these records can serve: pairs, labelled samples, lists, or gold replies."""
    pairs = sum(record.reply("chosen") is not None and record.reply("rejected") is not None for record in records)
    gold = sum(record.reply("gold") is not None for record in records)
    labelled = sum(any(reply.label is not None for reply in record.replies) for record in records)
    if pairs >= max(gold, labelled, 1):
        return ("chosen", "rejected")
    if labelled >= max(gold, 1):
        return ("sample", "mismatched")
    return ("gold",) if gold else ("sample",)


def _prompt_text(record: Record) -> str:
    return "\n\n".join(turn.content for turn in record.prompt)


def _flags(records: Sequence[Record], name: str) -> dict[str, dict[str, int]]:
    """role → how many replies say true, false, or nothing; empty where nobody says anything."""
    counts: dict[str, Counter[str]] = {}
    for record in records:
        for reply in record.replies:
            value = getattr(reply, name)
            counts.setdefault(reply.role, Counter())["missing" if value is None else str(value).lower()] += 1
    said = any(counter["true"] + counter["false"] for counter in counts.values())
    return {role: {key: counter[key] for key in ("true", "false", "missing")} for role, counter in counts.items()} if said else {}


def _facts(records: Sequence[Record]) -> dict[str, dict[str, int]]:
    """The values of short text facts (axis, topic, …) and how often each occurs, the commonest twenty."""
    counts: dict[str, Counter[str]] = {}
    for record in records:
        for name, value in record.facts.items():
            if isinstance(value, str) and value:
                counts.setdefault(name, Counter())[value] += 1
    return {name: dict(counter.most_common(20)) for name, counter in counts.items()}


def _lengths(items: Sequence[tuple[str, Record]], measure: Any) -> dict[str, dict[str, float]]:
    found: dict[str, list[int]] = {"prompt": [measure(text) for text, _ in items]}
    for _, record in items:
        for reply in record.replies:
            found.setdefault(reply.role, []).append(measure(reply.text))
    return {name: _spread(values) for name, values in found.items() if values}


def _token_lengths(records: Sequence[Record], encoder: Encoder) -> dict[str, dict[str, float]]:
    """Lengths in tokens, template and end included; records the template refuses are left out (tokenising counts them)."""
    found: dict[str, list[int]] = {}
    conversations = [encoder.renderer.with_system(record.prompt) for record in records]
    prompts = encoder.prompts(conversations)
    flat = [(index, reply) for index, record in enumerate(records) if prompts[index] is not None for reply in record.replies]
    texts = ["" if prompt is None else prompt[0] for prompt in prompts]
    found["prompt"] = [len(prompt[1]) for prompt in prompts if prompt is not None]
    replies = encoder.replies([conversations[i] for i, _ in flat], [texts[i] for i, _ in flat], [reply.text for _, reply in flat])
    for (_, reply), ids in zip(flat, replies, strict=True):
        found.setdefault(reply.role, []).append(len(ids))
    return {name: _spread(values) for name, values in found.items() if values}


def _spread(values: Sequence[int]) -> dict[str, float]:
    """Smallest, median, mean, 95th percentile and largest."""
    array = np.asarray(values)
    return {
        "min": int(array.min()),
        "median": float(np.median(array)),
        "mean": round(float(array.mean()), 1),
        "p95": round(float(np.percentile(array, 95)), 1),
        "max": int(array.max()),
    }


def _sample(record: Record) -> dict[str, Any]:
    return {
        "id": record.id,
        "prompt": [{"role": turn.role, "content": _short(turn.content)} for turn in record.prompt],
        "replies": [
            {"role": reply.role, "text": _short(reply.text), "safe": reply.safe, "label": reply.label, "scores": dict(reply.scores)}
            for reply in record.replies
        ],
    }


def _short(text: str) -> str:
    """A text cut for showing, with what was cut said."""
    return text if len(text) <= SAMPLE_CHARACTERS else f"{text[:SAMPLE_CHARACTERS]} … ({len(text) - SAMPLE_CHARACTERS} more characters)"
