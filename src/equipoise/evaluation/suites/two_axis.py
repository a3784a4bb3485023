"""Helpfulness and harmlessness side by side: reads `scores.json` (docs/contracts.md), judges every model on every metric.

`--from` takes the file, or the folder it lies in. Paths inside it are relative to it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from equipoise.core.errors import DataError, UsageError, nearest
from equipoise.core.files import file_fingerprint, read_json, read_jsonl
from equipoise.core.records import MESSAGE_ROLES, Message
from equipoise.core.settings import Settings
from equipoise.data.prompts import AXES
from equipoise.evaluation.analysis import Source
from equipoise.evaluation.independence import check
from equipoise.evaluation.metrics._base import Judged
from equipoise.evaluation.scores import ModelReplies, ScoreTable
from equipoise.evaluation.settings import Contrast, EvaluateSettings
from equipoise.generation._base import Prompt

SCORES = "scores.json"
SCORERS = ("reward", "invalid", "refusal", "length", "kl_to_base")


class _Model(Settings):
    name: str = Field(description="model")
    seed: int = Field(default=0, description="training seed")
    kind: Literal["arm", "null"] = Field(default="arm", description="arm, or null policy")
    completions: str = Field(description="completions.jsonl")
    verdicts: tuple[str, ...] = Field(default=(), description="verdicts.jsonl files")


class _Judge(Settings):
    name: str = Field(default="", description="name")
    weights: str | None = Field(default=None, description="fingerprint or name of the weights")
    trained_on: str | None = Field(default=None, description="trained_on.npz")
    held_out: str | None = Field(default=None, description="held_out.json")


class _Scores(Settings):
    schema_version: Literal[1] = Field(description="format")
    prompts: str = Field(description="prompts.jsonl")
    models: tuple[_Model, ...] = Field(min_length=1, description="models, by seed")
    judge: _Judge = Field(default=_Judge(), description="what gave the rewards")
    policies_trained_on: tuple[str, ...] = Field(default=(), description="trained_on.npz of all models")
    baseline: str | None = Field(default=None, description="model the win rate is taken against")
    primary: tuple[Contrast, ...] = Field(default=(), description="contrasts named beforehand")


def inputs(settings: EvaluateSettings) -> dict[str, str]:
    """Fingerprints of scores.json and of every file it names."""
    path, scores = _scores(settings)
    names = [scores.prompts, *scores.policies_trained_on, scores.judge.trained_on, scores.judge.held_out]
    names += [name for model in scores.models for name in (model.completions, *model.verdicts)]
    files = {SCORES: path} | {name: path.parent / name for name in names if name}
    files |= {name: Path(name) for name in (settings.judge_trained_on, *settings.policies_trained_on) if name}
    for name, file in files.items():
        if not file.is_file():
            raise DataError(f"{path}: it names {name}, which does not exist ({file}).")
    return {name: file_fingerprint(file) for name, file in files.items()}


def read(settings: EvaluateSettings) -> Source:
    """Prompts, replies and verdicts of every model and seed, with what was decided beforehand."""
    path, scores = _scores(settings)
    folder = path.parent
    prompts = _prompts(folder / scores.prompts)
    models: dict[str, ModelReplies] = {}
    for entry in scores.models:
        _add(models, entry, _replies(folder, entry, prompts), path)
    policies = [*(folder / name for name in scores.policies_trained_on), *map(Path, settings.policies_trained_on)]
    given = settings.judge_trained_on
    judge = Path(given) if given else folder / scores.judge.trained_on if scores.judge.trained_on else None
    held_out = read_json(folder / scores.judge.held_out) if scores.judge.held_out else None
    return Source(
        table=ScoreTable(tuple(prompts.values()), models, settings.baseline or scores.baseline, settings.passing),
        independence=check(list(prompts.values()), policies, judge, settings.near, settings.allow_overlap),
        primary=scores.primary,
        judge={"name": scores.judge.name, "weights": scores.judge.weights, "held_out": held_out},
    )


def shape(evaluation: dict[str, Any]) -> dict[str, Any]:
    """As it is."""
    return evaluation


def _scores(settings: EvaluateSettings) -> tuple[Path, _Scores]:
    path = Path(settings.source)
    path = path / SCORES if path.is_dir() else path
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected one JSON object, found a {type(value).__name__}.")
    try:
        return path, _Scores.make(value, source=str(path))
    except UsageError as error:  # a file that is wrong is data, not bad use
        raise DataError(str(error)) from error


def _prompts(path: Path) -> dict[str, Prompt]:
    prompts: dict[str, Prompt] = {}
    for number, row in _rows(path, ("id", "prompt", "axis")):
        if row["axis"] not in AXES:
            raise DataError(f"{path}, prompt {number} ({row['id']}): unknown axis {row['axis']!r}.{nearest(str(row['axis']), AXES)}")
        if str(row["id"]) in prompts:
            raise DataError(f"{path}, prompt {number}: the id {row['id']!r} stands twice.")
        prompts[str(row["id"])] = Prompt(str(row["id"]), _messages(path, number, row["prompt"]), row["axis"], str(row.get("topic") or ""))
    if not prompts:
        raise DataError(f"{path} holds no prompts.")
    return prompts


def _messages(path: Path, number: int, turns: Any) -> tuple[Message, ...]:
    good = isinstance(turns, list) and all(
        isinstance(turn, dict) and turn.get("role") in MESSAGE_ROLES and isinstance(turn.get("content"), str) for turn in turns
    )
    if not good or not turns:
        raise DataError(f'{path}, row {number}: `prompt` must be a list of {{"role": system|user|assistant, "content": text}}.')
    return tuple(Message(turn["role"], turn["content"]) for turn in turns)


def _replies(folder: Path, entry: _Model, prompts: Mapping[str, Prompt]) -> dict[str, Judged]:
    path = folder / entry.completions
    verdicts = _verdicts(folder, entry, prompts)
    replies: dict[str, Judged] = {}
    for number, row in _rows(path, ("id", "text")):
        name = str(row["id"])
        if name not in prompts:
            raise DataError(f"{path}, row {number}: there is no prompt {name!r}. These completions belong to other prompts.")
        if name in replies:
            raise DataError(f"{path}, row {number}: the id {name!r} stands twice.")
        if "prompt" in row and _messages(path, number, row["prompt"]) != prompts[name].messages:
            raise DataError(f"{path}, row {number}: the prompt {name!r} is not the one in the prompts file.")
        if not isinstance(row["text"], str):
            raise DataError(f"{path}, row {number} ({name}): `text` must be text, found {row['text']!r}.")
        known = verdicts.get(name, {})
        if row.get("finish_reason") is not None:  # a looping reply may be cut off as well, and the rule names one reason only
            known = {**known, "cut": row["finish_reason"] == "length"}
        replies[name] = Judged(row["text"], **known)
    return replies


def _verdicts(folder: Path, entry: _Model, prompts: Mapping[str, Prompt]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for path in (folder / name for name in entry.verdicts):
        for number, row in _rows(path, ("id", "by", "value")):
            name, by, value = str(row["id"]), row["by"], row["value"]
            if name not in prompts:
                raise DataError(f"{path}, row {number}: there is no prompt {name!r}. These verdicts belong to other prompts.")
            if by not in SCORERS:
                continue
            if by in found.setdefault(name, {}):
                raise DataError(f"{path}, row {number}: {entry.name} has a second {by!r} verdict on {name!r}.")
            if value is not None and not _is_number(value):
                raise DataError(f"{path}, row {number} ({name}): `value` must be a number or null, found {value!r}.")
            if value is not None and by in ("invalid", "refusal") and value not in (0, 1):
                raise DataError(f"{path}, row {number} ({name}): {by} is 0 or 1, found {value!r}.")
            if value is not None and abs(value) > sys.float_info.max:
                raise DataError(f"{path}, row {number} ({name}): `value` must be a finite number or null, found {value!r}.")
            if value is None or math.isnan(value):
                found[name][by] = None
            else:
                found[name][by] = bool(value) if by in ("invalid", "refusal") else float(value)
            if by == "invalid" and value is not None:
                found[name]["cut"] = row.get("reason") == "cut"
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _rows(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered JSON lines that have the needed keys."""
    for number, row in enumerate(read_jsonl(path), 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: expected a JSON object, found a {type(row).__name__}.")
        for key in needed:
            if key not in row:
                raise DataError(f"{path}, row {number}: no {key!r} (found: {', '.join(row)}).{nearest(key, row)}")
        yield number, row


def _add(models: dict[str, ModelReplies], entry: _Model, replies: dict[str, Judged], path: Path) -> None:
    """Put one seed of a model into the table."""
    before = models.get(entry.name)
    if before is None:
        models[entry.name] = ModelReplies(entry.name, entry.kind, (entry.seed,), (replies,))
        return
    if before.kind != entry.kind or entry.seed in before.seeds:
        problem = "is both an arm and a null policy" if before.kind != entry.kind else f"has seed {entry.seed} twice"
        raise DataError(f"{path}: the model {entry.name!r} {problem}.")
    models[entry.name] = replace(before, seeds=(*before.seeds, entry.seed), replies=(*before.replies, replies))
