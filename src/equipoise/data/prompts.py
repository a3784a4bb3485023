"""Evaluation prompts: the bundled ones or a `prompts.jsonl`, and the prompts of any other source, to keep apart from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from equipoise.core.errors import DataError, UsageError, nearest
from equipoise.core.files import read_json, write_jsonl
from equipoise.core.prints import PromptPrints
from equipoise.core.records import Message
from equipoise.data._read import Row, read, read_file, stem_of
from equipoise.data.accounting import Accounting
from equipoise.data.mixture import prompt_texts
from equipoise.data.settings import DataSettings
from equipoise.data.sources import starter
from equipoise.data.sources._base import Excluded, records, source
from equipoise.data.sources.preference import prompt_of
from equipoise.data.transcripts import parse_prompt

STARTER = {"helpful": "eval_helpful.jsonl", "harmful": "eval_harmful.jsonl", "benign": "eval_benign.jsonl"}
AXES = tuple(STARTER)
STARTER_DEV = "dev_prompts.jsonl"
"""Prompts to choose settings on, so that nothing is chosen on the evaluation's."""


def load_prompts(name: str = "starter", limit: int | None = None) -> list[dict[str, Any]]:
    """Evaluation prompts as `{"id", "prompt": [{"role", "content"}…], "axis", "topic"}`, in file order.

    name: 'starter' for the bundled ones, 'starter:dev' for those to choose settings on, or the path of a data file with
    `prompt` (text or messages), `axis` and optionally `id` and `topic`. limit: at most so many of each axis, the first ones.
    Raises DataError naming the line of a prompt that cannot be used, and for doubled ids or no prompts.
    """
    rows: Iterable[dict[str, Any]]
    if name == "starter":
        rows = chain.from_iterable(_of_axis(axis, file) for axis, file in STARTER.items())
    elif name == "starter:dev":
        path = starter.FOLDER / STARTER_DEV
        rows = (_prompt(row, row.values.get("axis")) for row in read_file(path, stem_of(path)))
    else:
        rows = (_prompt(row, row.values.get("axis")) for row in read(DataSettings(dataset_name=name)))
    prompts: list[dict[str, Any]] = []
    taken: Counter[str] = Counter()
    ids: set[str] = set()
    for prompt in rows:
        if prompt["id"] in ids:
            raise DataError(f"{name}: the prompt id {prompt['id']!r} stands twice.")
        ids.add(prompt["id"])
        if limit is None or taken[prompt["axis"]] < limit:
            taken[prompt["axis"]] += 1
            prompts.append(prompt)
    if not prompts:
        raise DataError(f"{name} holds no prompts.")
    return prompts


def save(path: str | Path, prompts: Iterable[Mapping[str, Any]]) -> int:
    """Write prompts as `prompts.jsonl`; returns how many."""
    return write_jsonl(path, (dict(prompt) for prompt in prompts))


def other_prompts(name: str) -> PromptPrints:
    """Prints of the prompts of any source, by first turn and by whole conversation, to keep data apart from them.

    name: a `trained_on.npz`; a JSON array of texts; a file, folder (all its splits) or hub set with a `prompt` column or in
    a known format; 'starter' (its evaluation prompts), 'starter:dev', 'starter:train' or 'starter:judge' (its pairs).
    """
    if name.endswith(".npz"):
        return PromptPrints.load(name)
    return PromptPrints.of([text for prompt in _prompts_of(name) for text in prompt_texts(prompt)])


def _of_axis(axis: str, file: str) -> Iterable[dict[str, Any]]:
    path = starter.FOLDER / file
    return (_prompt(row, axis) for row in read_file(path, stem_of(path)))


def _prompt(row: Row, axis: Any) -> dict[str, Any]:
    if axis not in AXES:
        raise DataError(f"{row.where}: axis {axis!r} is none of {', '.join(AXES)}.{nearest(str(axis), AXES)}")
    try:
        messages = prompt_of(row.values)
    except Excluded as reason:
        raise DataError(f"{row.where}: {reason} (columns: {', '.join(map(str, row.values))}).") from reason
    if messages[-1:] == () or messages[-1].role != "user" or not messages[-1].content.strip():
        raise DataError(f"{row.where}: the prompt does not end with a user's turn that says something.")
    own = row.values.get("id")
    return {
        "id": row.id if own is None else str(own),
        "prompt": [message.as_dict() for message in messages],
        "axis": axis,
        "topic": str(row.values.get("topic") or ""),
    }


def _prompts_of(name: str) -> list[tuple[Message, ...]]:
    if name in ("starter", "starter:dev"):
        return [tuple(Message(turn["role"], turn["content"]) for turn in row["prompt"]) for row in load_prompts(name)]
    if name.startswith("starter:"):
        settings = DataSettings(dataset_name="starter", dataset_config_name=name.partition(":")[2])
        rows = chain.from_iterable(read_file(path, stem_of(path)) for path in starter.files(settings))
        return _from_rows(name, rows, settings)
    if name.endswith(".json"):
        values = read_json(name)
        if isinstance(values, list) and values and all(isinstance(value, str) for value in values):
            return [parse_prompt(value) for value in values]
    # What must not be met again may stand in any split.
    settings = DataSettings(dataset_name=name, dataset_split="all" if Path(name).expanduser().is_dir() else None)
    return _from_rows(name, read(settings), settings)


def _from_rows(name: str, rows: Iterable[Row], settings: DataSettings) -> list[tuple[Message, ...]]:
    rows = iter(rows)
    first = list(islice(rows, 20))
    if not first:
        raise DataError(f"{name} holds no rows, so no prompts to exclude.")
    if "prompt" in first[0].values:
        return [prompt for row in chain(first, rows) if (prompt := _readable(row)) is not None]
    try:
        module = source("auto", first)
    except UsageError as error:
        raise UsageError(f"exclude_prompts {name!r}: {error}") from error
    return [record.prompt for record in records(module, chain(first, rows), settings, Accounting())]


def _readable(row: Row) -> tuple[Message, ...] | None:
    """The row's prompt, or None where it has none to compare with."""
    try:
        return prompt_of(row.values)
    except Excluded:
        return None
