"""`stream` and `load`: a source in, records and their accounting out; one by one, or as a list."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from equipoise.core.errors import DataError
from equipoise.core.files import file_fingerprint, fingerprint
from equipoise.core.prints import PromptPrints
from equipoise.core.records import Record
from equipoise.data import mixture
from equipoise.data._read import PEEKED, Row, is_local, local_path, read, read_file, stem_of
from equipoise.data.accounting import Accounting
from equipoise.data.prompts import other_prompts
from equipoise.data.settings import DataSettings
from equipoise.data.sources import starter
from equipoise.data.sources._base import records, source
from equipoise.data.verdicts import Judged

STARTER = "starter"


@dataclass(frozen=True)
class Loaded:
    """Records of a source, what happened to every row, a fingerprint of the records' content, and the format they were in."""

    records: list[Record]
    accounting: Accounting
    fingerprint: str
    format: str = ""


@dataclass(frozen=True)
class Streamed:
    """Records of a source one by one, in one pass; `accounting` is complete once they are exhausted."""

    records: Iterator[Record]
    accounting: Accounting
    format: str = ""


def load(settings: DataSettings, dataset: Any = None) -> Loaded:
    """Records of a source as a list: what `stream` gives, and a fingerprint of it. For data that fits into memory."""
    streamed = stream(settings, dataset)
    records = list(streamed.records)
    return Loaded(records, streamed.accounting, records_fingerprint(records), streamed.format)


def stream(settings: DataSettings, dataset: Any = None) -> Streamed:
    """Records of a source: read, checked, split, kept apart from excluded prompts, cut to `max_rows`; all counted.

    Memory does not grow with the rows, but for 8 bytes an id. A `.json` file that is one array is read whole.

    Args:
        settings: which source, and what of it counts.
        dataset: an in-memory `datasets.Dataset` or list of dicts; then `dataset_name` is not looked at.

    Raises:
        DataError: nothing to read, unreadable, or no row left (with the reasons; at the end). A part of the split may be empty.
        UsageError: a setting names something that is not there.
    """
    rows = _rows(settings, dataset)
    first = list(islice(rows, PEEKED))
    if not first:
        raise DataError(f"{_name(settings, dataset)} holds no rows.")
    module = source(STARTER if _is_starter(settings, dataset) else settings.format, first)
    others = {name: other_prompts(name) for name in settings.exclude_prompts}
    accounting = Accounting()
    judged = Judged(settings, accounting)
    readable = records(module, chain(first, rows), settings, accounting)
    asked = _records(readable, others, judged, settings, accounting, _name(settings, dataset))
    return Streamed(asked, accounting, str(module.__name__).rsplit(".", 1)[-1])


def _records(
    readable: Iterator[Record],
    others: Mapping[str, PromptPrints],
    judged: Judged,
    settings: DataSettings,
    accounting: Accounting,
    name: str,
) -> Iterator[Record]:
    """The readable records that are asked for; all others are counted, and at the end every row must be accounted for."""
    first = list(islice(readable, 1))
    records = mixture.unique_ids(chain(first, readable), accounting)
    records = mixture.keep_part(records, settings.part, settings.split_fractions, settings.split_seed, accounting)
    for record in mixture.exclude(records, others, settings.exclude_near, accounting):
        if settings.max_rows is not None and accounting.kept >= settings.max_rows:
            accounting.drop("beyond max_rows", record.id)
        else:
            accounting.kept += 1
            yield judged(record)
    accounting.check()
    if not accounting.kept and (settings.part == "all" or not first):
        raise DataError(f"{name}: no row is left; {accounting.in_words()}.")


def source_fingerprint(settings: DataSettings, dataset: Any = None) -> dict[str, str]:
    """Name → fingerprint of everything `load` would read, without reading records: the inputs of a stage.

    A local path counts by its bytes, a hub or in-memory data set by the content of its rows.
    """
    inputs = {}
    if _is_starter(settings, dataset):
        inputs = {path.name: file_fingerprint(path) for path in starter.files(settings)}
    elif dataset is None and is_local(settings.dataset_name):
        inputs["data"] = file_fingerprint(local_path(settings.dataset_name))
    else:
        digest = hashlib.sha256()
        for row in read(settings, dataset):
            digest.update(fingerprint(dict(row.values), foreign=True).encode())
        inputs["data"] = digest.hexdigest()[:16]
    for number, name in enumerate(settings.verdicts):
        inputs[f"verdicts {number}"] = file_fingerprint(name)
    for name in settings.exclude_prompts:
        inputs[f"excluded {name}"] = _prints_fingerprint(other_prompts(name))
    return inputs


def records_fingerprint(records: list[Record]) -> str:
    """16 hex digits of the content of records: ids, prompts, replies with their roles, scores, flags and labels."""
    digest = hashlib.sha256()
    for record in records:
        replies = [[reply.role, reply.text, dict(reply.scores), reply.safe, reply.label] for reply in record.replies]
        digest.update(fingerprint([record.id, [[turn.role, turn.content] for turn in record.prompt], replies]).encode())
    return digest.hexdigest()[:16]


def _rows(settings: DataSettings, dataset: Any) -> Iterator[Row]:
    if _is_starter(settings, dataset):
        return (row for path in starter.files(settings) for row in read_file(path, stem_of(path)))
    return read(settings, dataset)


def _is_starter(settings: DataSettings, dataset: Any) -> bool:
    return dataset is None and settings.dataset_name == STARTER


def _name(settings: DataSettings, dataset: Any) -> str:
    return settings.dataset_name if dataset is None else "The data set in memory"


def _prints_fingerprint(prints: PromptPrints) -> str:
    return hashlib.sha256(prints.exact.tobytes() + prints.gram_values.tobytes() + prints.word_values.tobytes()).hexdigest()[:16]
