"""The `evaluate` stage: a suite's files in, `evaluation.json` and `replies.jsonl` out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from equipoise.core.errors import UsageError
from equipoise.core.files import fingerprint, write_json, write_jsonl
from equipoise.core.progress import say
from equipoise.core.runs import Run, run_stage
from equipoise.data.prompts import AXES
from equipoise.evaluation.analysis import analyse, replies_of
from equipoise.evaluation.metrics._base import metrics
from equipoise.evaluation.power import detectable_differences
from equipoise.evaluation.settings import EvaluateSettings
from equipoise.evaluation.suites._base import load

EVALUATION, REPLIES = "evaluation.json", "replies.jsonl"


def evaluate(settings: EvaluateSettings, overwrite: bool = False) -> Run:
    """Run a suite as a stage. Its results hold the headline, whether it is withheld, and the warnings.

    Raises UsageError without an `output_dir`; `compute` is for those who want no files.
    """
    if settings.output_dir is None:
        raise UsageError("output_dir is missing: where shall evaluation.json go?")
    suite = load(settings.suite)

    def work(folder: Path) -> Mapping[str, Any]:
        evaluation, replies = compute(settings)
        write_jsonl(folder / REPLIES, replies)
        write_json(folder / EVALUATION, evaluation)
        names = ("headline", "warnings")
        return {name: evaluation[name] for name in names} | {"withheld": evaluation["headline"] is None}

    # Other metrics, or a metric that says something else, is another evaluation of the same scores.
    described = fingerprint({name: metric.as_json() for name, metric in metrics().items()})
    inputs = {**suite.inputs(settings), "metrics": described}
    return run_stage(settings.output_dir, "evaluate", settings.resolved(), inputs, work, overwrite)


def compute(settings: EvaluateSettings) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result of a suite and its replies side by side, without writing anything.

    What the prompts can show at all is said on stderr before any verdict is looked at.
    """
    suite = load(settings.suite)
    suite.inputs(settings)  # a missing file is said before anything is read
    source = suite.read(settings)
    counts = {axis: source.table.count((axis,)) for axis in AXES}
    say(detectable_line(detectable_differences(counts, settings.alpha, settings.power, source.metrics), settings))
    evaluation = suite.shape(analyse(source, settings))
    name = settings.suite.replace("-", "_")
    return {"schema_version": 1, "suite": name} | evaluation, replies_of(source.table)


def detectable_line(rows: Iterable[Mapping[str, Any]], settings: EvaluateSettings) -> str:
    """What these prompts can show, in a sentence."""
    shown = [f"{row['title']} {row['difference']:.3g} {row['unit']} (n = {row['n']})" for row in rows]
    head = f"smallest detectable differences of two models ({settings.power:.0%} power, p < {settings.alpha:g})"
    return f"{head}: {'; '.join(shown) if shown else 'too few prompts for any'}"
