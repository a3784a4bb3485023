"""The released scores of arXiv 2509.09055 (SFT, DPO and SFT+DPO on OPT-350M), judged again from the ratings.

`--from` takes a folder with `harmfulness_classification.json` and `helpfulness_classification.json`, each a list of
`{"model", "prompt", "response", "rating", "label"}`. Labels are worked out from ratings and compared with the released
ones. Rewards are taken as they are (the paper's rule), so an empty reply may count as harmless or helpful; how many do is
said. `--set passing.reproduction=false` gives the stricter reading in which they never do.

Named beforehand are the contrasts behind the paper's claim that SFT+DPO is best on all metrics: against each other model,
in HmR, HpR and CAS.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from equipoise.core.errors import DataError, nearest
from equipoise.core.files import file_fingerprint, read_json
from equipoise.core.records import Message
from equipoise.evaluation.analysis import THRESHOLD_JUDGE, Source
from equipoise.evaluation.independence import check
from equipoise.evaluation.metrics._base import Case, Judged, harmless, helpful
from equipoise.evaluation.scores import ModelReplies, ScoreTable
from equipoise.evaluation.settings import Contrast, EvaluateSettings, PassSettings
from equipoise.generation._base import Prompt

FILES = {"harmful": "harmfulness_classification.json", "helpful": "helpfulness_classification.json"}
LABELS = {"harmful": ("harmful", "harmless"), "helpful": ("unhelpful", "helpful")}
COLUMNS = ("model", "prompt", "response", "rating", "label")
METRICS = ("hmr", "hpr", "cas", "reward_harmful", "reward_helpful")
CLAIMED_BEST, BASELINE = "sft_dpo", "base"

Row = dict[str, Any]


def inputs(settings: EvaluateSettings) -> dict[str, str]:
    """Fingerprints of the two files."""
    files = {name: Path(settings.source) / name for name in FILES.values()}
    files |= {name: Path(name) for name in (settings.judge_trained_on, *settings.policies_trained_on) if name}
    wanted = " and ".join(FILES.values())
    for path in files.values():
        if not path.is_file():
            raise DataError(f"{path} does not exist. --from takes the released study's folder, which holds {wanted}.")
    return {name: file_fingerprint(path) for name, path in files.items()}


def read(settings: EvaluateSettings) -> Source:
    """Both files as one table of four models and two axes."""
    reproduction = settings.passing.reproduction is not False
    passing = settings.passing.model_copy(update={"reproduction": reproduction})
    prompts: list[Prompt] = []
    replies: dict[str, dict[str, Judged]] = {}
    labels: list[Row] = []
    empty: dict[str, dict[str, Row]] = {}
    for axis, name in FILES.items():
        path = Path(settings.source) / name
        ids: dict[tuple[str, int], str] = {}
        for model, occurrence, row in _occurrences(_rows(path, axis)):
            key = (row["prompt"], occurrence)
            if key not in ids:
                ids[key] = f"{axis}-{len(ids):03d}"
                prompts.append(Prompt(ids[key], (Message("user", row["prompt"]),), axis))
            reply = Judged(row["response"], row["rating"])
            replies.setdefault(model, {})[ids[key]] = reply
            passes = _passes(reply, axis, passing, raw=True)
            labels.append({"axis": axis, "model": model, "id": ids[key], "released": row["label"], "passes": passes})
            counts = empty.setdefault(model, {}).setdefault(axis, {"empty": 0, "pass": 0})
            if reply.is_invalid:
                counts["empty"] += 1
                counts["pass"] += int(passes or 0)
    models = {name: ModelReplies(name, "arm", (0,), (rows,)) for name, rows in replies.items()}
    baseline = settings.baseline or (BASELINE if BASELINE in models else None)
    agreement = _agreement(labels)
    policies = [Path(name) for name in settings.policies_trained_on]
    judge = Path(settings.judge_trained_on) if settings.judge_trained_on else None
    return Source(
        table=ScoreTable(tuple(prompts), models, baseline, passing),
        independence=check(prompts, policies, judge, settings.near, settings.allow_overlap),
        primary=_primary(list(models)),
        judge={"name": f"OpenAssistant/{THRESHOLD_JUDGE}", "weights": None, "held_out": None},
        warnings=(*_label_warnings(agreement), *_empty_warnings(empty, reproduction)),
        metrics=METRICS,
        extra={"labels": agreement, "empty_replies": empty},
    )


def shape(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Metrics directly under each model, as `{"models": {NAME: {"hmr": {…}, "hpr": {…}, "cas": {…}}}}`."""
    estimates = {name: entry["estimates"] for name, entry in evaluation["models"].items()}
    return evaluation | {"models": {name: {key: row[key] for key in METRICS if key in row} for name, row in estimates.items()}}


def _rows(path: Path, axis: str) -> list[Row]:
    """The rows of a file, checked."""
    value = read_json(path)
    if not isinstance(value, list) or not value:
        raise DataError(f"{path}: expected a list of scored replies, found {'an empty one' if value == [] else type(value).__name__}.")
    for number, row in enumerate(value):
        where = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object, found {json.dumps(row)[:40]}.")
        for key in COLUMNS:
            if key not in row:
                raise DataError(f"{where}: no {key!r} (found: {', '.join(row)}).{nearest(key, row)}")
        if row["label"] not in (*LABELS[axis], None):
            raise DataError(f"{where}: unknown label {row['label']!r}.{nearest(str(row['label']), LABELS[axis])}")
        rating = row["rating"]
        if rating is not None and (isinstance(rating, bool) or not isinstance(rating, (int, float))):
            raise DataError(f"{where}: `rating` must be a number or null, found {rating!r}.")
        if rating is not None and abs(rating) > sys.float_info.max:
            raise DataError(f"{where}: `rating` must be a finite number or null, found {rating!r}.")
        if rating is not None and math.isnan(rating):
            row["rating"] = None  # NaN is missing
        if not all(isinstance(row[key], str) for key in ("model", "prompt", "response")):
            raise DataError(f"{where}: `model`, `prompt` and `response` must be text.")
    return value


def _occurrences(rows: list[Row]) -> list[tuple[str, int, Row]]:
    """(model, how often this model had this prompt before, row): a prompt that stands twice is two prompts."""
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    for row in rows:
        key = (row["model"], row["prompt"])
        found.append((row["model"], seen[key], row))
        seen[key] += 1
    return found


def _passes(reply: Judged, axis: str, passing: PassSettings, raw: bool) -> float | None:
    case = Case("", passing.model_copy(update={"reproduction": raw}), None)
    return harmless(reply, case) if axis == "harmful" else helpful(reply, case)


def _agreement(labels: list[Row]) -> dict[str, Any]:
    """How the labels worked out from ratings compare with the released ones."""
    differing = []
    for row in labels:
        worked_out = None if row["passes"] is None else LABELS[row["axis"]][int(row["passes"])]
        if None not in (worked_out, row["released"]) and worked_out != row["released"]:
            differing.append({"model": row["model"], "id": row["id"], "released": row["released"], "worked_out": worked_out})
    compared = sum(row["released"] is not None and row["passes"] is not None for row in labels)
    return {"compared": compared, "agree": compared - len(differing), "differ": differing}


def _label_warnings(agreement: Mapping[str, Any]) -> list[str]:
    if agreement["differ"]:
        return [f"{len(agreement['differ'])} of {agreement['compared']} labels worked out from the ratings differ from the released ones."]
    return []


def _empty_warnings(empty: Mapping[str, Mapping[str, Row]], reproduction: bool) -> list[str]:
    found = []
    for axis, word in (("harmful", "harmless"), ("helpful", "helpful")):
        counts = {name: rows[axis] for name, rows in empty.items() if axis in rows and rows[axis]["empty"]}
        if counts:
            listed = ", ".join(f"{name} {count['empty']}" for name, count in counts.items())
            passing = sum(count["pass"] for count in counts.values())
            rule = "which the paper's rule allows" if reproduction else "which is not allowed here"
            how = (
                f"{passing} of them would pass for {word} by rating, {rule}" if passing else f"none of them passes for {word} by its rating"
            )
            found.append(f"Empty replies to {axis} prompts: {listed}; {how}.")
    return found


def _primary(models: list[str]) -> tuple[Contrast, ...]:
    if CLAIMED_BEST not in models:
        return ()
    others = [name for name in models if name != CLAIMED_BEST]
    return tuple(Contrast(a=CLAIMED_BEST, b=other, metric=metric) for metric in ("hmr", "hpr", "cas") for other in others)
