"""The evaluation prompts of a study, from all its sources, each with an axis and an id of its own."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.core.errors import DataError
from equipoise.core.files import fingerprint, read_json, read_jsonl
from equipoise.core.prints import fold
from equipoise.core.records import Message, messages_from
from equipoise.data.load import load
from equipoise.data.prompts import load_prompts
from equipoise.data.settings import DataSettings
from equipoise.data.transcripts import parse_prompt
from equipoise.generation._base import Prompt
from equipoise.study.settings import PromptSource, StudySettings

BUNDLED = ("starter", "starter:dev")
XSTEST_AXIS = {"safe": "benign", "unsafe": "harmful"}


def study_prompts(settings: StudySettings) -> list[Prompt]:
    """All evaluation prompts, in the order of their sources. A prompt that stands twice is asked once.

    Raises DataError where a source cannot be read or has nothing left, UsageError for a bad setting.
    """
    return _prompts(settings, "evaluation", settings.evaluation.prompts)


def search_prompts(settings: StudySettings, asked: Sequence[Prompt]) -> list[Prompt]:
    """The prompts of the search without those that the evaluation asks. Raises as `study_prompts`."""
    if settings.search is None:
        return []
    known = {_key(prompt) for prompt in asked}
    prompts = [prompt for prompt in _prompts(settings, "search", settings.search.prompts) if _key(prompt) not in known]
    if not prompts:
        raise DataError("search.prompts: every one of them is asked in the evaluation as well; choose others.")
    return prompts


def _prompts(settings: StudySettings, where: str, sources: Sequence[PromptSource]) -> list[Prompt]:
    found: dict[str, Prompt] = {}
    ids: set[str] = set()
    for number, source in enumerate(sources):
        prompts = _limited(_of_source(settings, source), source)
        if not prompts:
            raise DataError(f"{where}.prompts.{number}: no prompt is left of {source.source or source.data}.")
        for prompt in prompts:
            key = _key(prompt)
            if key not in found:
                name = _free(prompt.id, number, ids)
                ids.add(name)
                found[key] = Prompt(name, prompt.messages, prompt.axis, prompt.topic)
    return list(found.values())


def _free(name: str, source: int, taken: set[str]) -> str:
    """An id nobody has: the prompt's own, else with its source's number in front, else with a count behind as well."""
    wanted, count = name, 1
    while wanted in taken:
        wanted = f"{source}/{name}" if count == 1 else f"{source}/{name}/{count}"
        count += 1
    return wanted


def _key(prompt: Prompt) -> str:
    """Equal for prompts that differ in spelling only."""
    return " ".join(fold("\n\n".join(message.content for message in prompt.messages))) or prompt.id


def is_at_hand(source: PromptSource, blocks: Mapping[str, DataSettings]) -> bool:
    """Whether the prompts can be read without a network."""
    name = source.source if source.data is None else blocks[source.data].dataset_name
    return name in BUNDLED or Path(str(name)).expanduser().exists()


def _of_source(settings: StudySettings, source: PromptSource) -> list[Prompt]:
    if source.data is not None:
        return _of_block(settings.data[source.data], source)
    prompts = _of_file(str(source.source), source)
    for prompt in prompts:
        if not prompt.axis:
            raise DataError(f"{source.source}: prompt {prompt.id!r} has no axis; say which with `axis`: helpful, harmful or benign.")
    return [prompt for prompt in prompts if not source.axes or prompt.axis in source.axes]


def _of_block(block: DataSettings, source: PromptSource) -> list[Prompt]:
    """The prompts of a data block's records, whatever their replies."""
    prompts = []
    for record in load(block).records:
        chosen = record.reply("chosen")
        if _contains([*(message.content for message in record.prompt), chosen.text if chosen else ""], source.containing):
            topic = str(record.facts.get("topic", ""))
            prompts.append(Prompt(f"{source.data}/{record.id}", record.prompt, source.axis or "", topic))
    return prompts


def _of_file(name: str, source: PromptSource) -> list[Prompt]:
    """'starter', 'starter:dev', JSON lines of prompts, a JSON array of conversations as text, or an XSTest table."""
    if name in BUNDLED:
        rows: Iterable[Mapping[str, Any]] = load_prompts(name)
    elif name.lower().endswith(".csv"):
        rows = _xstest(Path(name).expanduser())
    elif name.lower().endswith(".json"):
        rows = _texts(Path(name).expanduser())
    elif source.axis is None:
        rows = load_prompts(name)
    else:
        rows = [{"id": f"{Path(name).stem}-{number}", **row} for number, row in enumerate(read_jsonl(Path(name).expanduser()))]
    prompts = []
    for row in rows:
        messages = _messages(row["prompt"]) if "prompt" in row else ()
        if not messages:
            raise DataError(f"{name}: row {row.get('id')} has no `prompt`.")
        if _contains([message.content for message in messages], source.containing):
            prompts.append(Prompt(str(row["id"]), messages, source.axis or str(row.get("axis") or ""), str(row.get("topic") or "")))
    return prompts


def _xstest(path: Path) -> list[dict[str, Any]]:
    """XSTest's prompts.csv: safe prompts that look unsafe are `benign`, the unsafe ones `harmful`."""
    try:
        with open(path, encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist.") from error
    if not rows or not {"id", "prompt", "label"} <= set(rows[0]):
        raise DataError(f"{path}: expected the columns id, prompt and label, found {', '.join(rows[0]) if rows else 'no rows'}.")
    return [
        {"id": f"xstest-{row['id']}", "prompt": row["prompt"], "axis": XSTEST_AXIS.get(row["label"], ""), "topic": row.get("type") or ""}
        for row in rows
    ]


def _texts(path: Path) -> list[dict[str, Any]]:
    """A JSON array of conversations as text (`Human: …`), or of rows with a `prompt`."""
    values = read_json(path)
    if not isinstance(values, list):
        raise DataError(f"{path}: expected an array of prompts.")
    rows = [{"prompt": value} if isinstance(value, str) else dict(value) for value in values]
    return [{"id": f"{path.stem}-{number}", **row} for number, row in enumerate(rows)]


def _messages(prompt: Any) -> tuple[Message, ...]:
    return parse_prompt(prompt) if isinstance(prompt, str) else messages_from(prompt)


def _contains(texts: Sequence[str], wanted: Sequence[str]) -> bool:
    return not wanted or any(word in text for word in wanted for text in texts)


def _limited(prompts: list[Prompt], source: PromptSource) -> list[Prompt]:
    """At most `limit` prompts of each axis, drawn by hash of seed and id (so the draw does not depend on the order), order kept."""
    if not source.limit:
        return prompts
    kept: set[int] = set()
    for axis in {prompt.axis for prompt in prompts}:
        places = [place for place, prompt in enumerate(prompts) if prompt.axis == axis]
        order = np.argsort([fingerprint([source.seed, prompts[place].id]) for place in places], kind="stable")
        kept |= {places[index] for index in order[: source.limit]}
    return [prompt for place, prompt in enumerate(prompts) if place in kept]
