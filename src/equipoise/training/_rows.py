"""From what a run names, or a caller hands over in memory, to streams of token rows."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from equipoise.core.errors import DataError, UsageError
from equipoise.core.prints import PromptPrints, conversation_text
from equipoise.core.records import Record
from equipoise.data.accounting import Accounting
from equipoise.data.load import load
from equipoise.data.rows import TokenRow, TokenRows
from equipoise.data.settings import DataSettings
from equipoise.data.tokenise import tokenise
from equipoise.objectives._base import Objective
from equipoise.training._ranks import Ranks
from equipoise.training._streams import Stream, check_stream
from equipoise.training.settings import StreamSettings, TrainSettings


@dataclass
class Rows:
    """The rows of one stream, the accounting of how they came about, and prints of their prompts (None: unknown)."""

    rows: Sequence[TokenRow]
    accounting: list[dict[str, Any]]
    prints: PromptPrints | None

    def fingerprint(self) -> str:
        """Identity of the tokens and marks."""
        return self.packed().fingerprint()

    def outcome(self) -> str:
        """What was kept, dropped and truncated, in words; empty for token rows, which came as they are."""
        return Accounting.joined(self.accounting).outcome() if self.accounting else ""

    def packed(self) -> TokenRows:
        """The rows as flat arrays."""
        return self.rows if isinstance(self.rows, TokenRows) else TokenRows.of(self.rows)


def named_data(settings: TrainSettings, name: str | Path) -> TrainSettings:
    """These settings with the data of this name in the first stream: whatever else they say of the data stays."""
    first, *others = settings.streams
    data = _sources(first)[0].model_copy(update={"dataset_name": str(name)})
    return settings.model_copy(update={"streams": (first.model_copy(update={"data": data}), *others)})


def make_streams(
    settings: TrainSettings, objectives: Sequence[Objective], tokenizer: Any, dataset: Any, eval_dataset: Any
) -> tuple[list[Rows], list[Rows | None]]:
    """Training and dev rows of every stream.

    dataset, eval_dataset: None, or what `fit` takes (of the first stream; a name for the dev rows only). Where the data names
    its `train` part, the dev rows are the `dev` part of the same source: choices look at dev only.
    """
    train: list[Rows] = []
    dev: list[Rows | None] = []
    for number, (stream, objective) in enumerate(zip(settings.streams, objectives, strict=True)):
        given, given_dev = (dataset, eval_dataset) if number == 0 else (None, None)
        if given is None and stream.data is None:
            raise UsageError(f"Stream {stream.name!r} has no data: set streams.{number}.data.dataset_name, or hand rows over in memory.")
        train.append(_rows(given, stream, settings, objective, tokenizer, dev=False))
        if given_dev is not None or (given is None and settings.eval_on_dev and _has_dev(stream)):
            rows = _rows(given_dev, stream, settings, objective, tokenizer, dev=True, may_be_empty=True)
            dev.append(rows if len(rows.rows) else None)
        else:
            dev.append(None)
    return train, dev


def shared_rows(made: tuple[list[Rows], list[Rows | None]] | None, folder: Path, ranks: Ranks) -> tuple[list[Rows], list[Rows | None]]:
    """The rows rank 0 made, on every rank: written into the folder, which all processes see, and memory-mapped by the others.

    made: what `make_streams` gave, on rank 0; None on the others.
    """
    if ranks.size == 1:
        assert made is not None
        return made

    def write() -> tuple[int, list[int]]:
        assert made is not None
        shutil.rmtree(folder, ignore_errors=True)
        train, dev = made
        for part, streams in (("train", train), ("dev", dev)):
            for number, given in enumerate(streams):
                if given is not None:
                    given.packed().save(folder / f"{part}-{number}")
        return len(train), [number for number, given in enumerate(dev) if given is not None]

    streams, held_out = ranks.first(write)
    if made is not None:
        return made

    def read(name: str) -> Rows:
        return Rows(TokenRows.load(folder / name), [], None)

    return [read(f"train-{number}") for number in range(streams)], [
        read(f"dev-{number}") if number in held_out else None for number in range(streams)
    ]


def checked_streams(settings: TrainSettings, objectives: Sequence[Objective], rows: Sequence[Rows]) -> list[Stream]:
    """Streams whose rows are what their objectives need."""
    streams = [
        Stream(stream.name, given.rows, objective, stream.weight)
        for stream, given, objective in zip(settings.streams, rows, objectives, strict=True)
    ]
    for stream in streams:
        check_stream(stream)
    return streams


def _rows(
    given: Any, stream: StreamSettings, settings: TrainSettings, objective: Objective, tokenizer: Any, dev: bool, may_be_empty: bool = False
) -> Rows:
    if isinstance(given, TokenRows) or _all(given, TokenRow):
        return Rows(given, [], None)
    records: list[Record] = []
    accounting: list[dict[str, Any]] = []
    if _all(given, Record):
        records = list(given)
    elif given is not None:
        source = _sources(stream)[0]
        if isinstance(given, (str, Path)):  # dev rows by name: all of them, whichever part is trained on
            loaded = load(source.model_copy(update={"dataset_name": str(given), "part": "all"}))
        else:
            loaded = load(source, dataset=given)
        records, accounting = loaded.records, [loaded.accounting.as_json()]
    else:
        sources = _sources(stream)
        for position, source in enumerate(sources):
            loaded = load(source.model_copy(update={"part": "dev"}) if dev else source)
            # Files of many data sets are called train, and a source may be listed twice to weigh more.
            records += loaded.records if len(sources) == 1 else [replace(item, id=f"{position}/{item.id}") for item in loaded.records]
            accounting.append(loaded.accounting.as_json())
    if not records:
        if may_be_empty:
            return Rows([], accounting, None)
        raise DataError(f"Stream {stream.name!r} has no rows left to train on: {Accounting.joined(accounting).in_words()}.")
    rows, tokens = tokenise(records, tokenizer, settings.tokenise, objective.needs.roles, objective.facts())
    accounting.append(tokens.as_json())
    if not len(rows) and not may_be_empty:
        raise DataError(f"Stream {stream.name!r} has no rows left after tokenising: {tokens.in_words()}.")
    return Rows(rows, accounting, PromptPrints.of(conversation_text(record.prompt) for record in records))


def _all(given: Any, kind: type) -> bool:
    return isinstance(given, (list, tuple)) and bool(given) and isinstance(given[0], kind)


def _sources(stream: StreamSettings) -> tuple[DataSettings, ...]:
    return stream.data if isinstance(stream.data, tuple) else (stream.data or DataSettings(),)


def _has_dev(stream: StreamSettings) -> bool:
    return all(source.part == "train" for source in _sources(stream))
