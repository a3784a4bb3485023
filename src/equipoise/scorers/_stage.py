"""The `score` stage: completions in, `verdicts.jsonl` out, scorer by scorer and resumable."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny

from equipoise.core.errors import DataError, UsageError
from equipoise.core.files import JsonlAppender, file_fingerprint, write_jsonl
from equipoise.core.progress import bar
from equipoise.core.runs import Run, run_stage
from equipoise.core.settings import Settings
from equipoise.generation._base import Completion
from equipoise.generation._stage import read_completions
from equipoise.scorers._base import RULES, Scorer, ScorerSettings, chosen_scorer

VERDICTS = "verdicts.jsonl"
_PARTIAL = "partial"
_CHUNK = 256
"""Completions scored between two writes: enough to sort by length, few enough to lose little to a kill."""


class ScoreSettings(Settings):
    """One scoring stage: which completions, by whom."""

    completions: str = Field(description="a completions.jsonl file")
    scorers: tuple[Annotated[SerializeAsAny[ScorerSettings], BeforeValidator(chosen_scorer)], ...] = Field(
        default_factory=lambda: tuple(chosen_scorer(rule) for rule in RULES),
        min_length=1,
        description="who scores: {scorer: reward_model, model_name_or_path: …}, …; invalid, refusal and length by their names alone",
    )
    output_dir: str = Field(default="runs/score", description="stage folder")


def score(settings: ScoreSettings, overwrite: bool = False) -> Run:
    """Score completions with every scorer and write `verdicts.jsonl`: scorer after scorer, each in the completions' order.

    A scorer that finds more than a value (`token_credit`) has it written to a file of its own name.

    A call that was interrupted goes on after the last chunk written. Raises UsageError where two scorers sign with one name.
    """
    if not Path(settings.completions).is_file():
        raise DataError(f"{settings.completions} does not exist. Give a completions.jsonl file.")
    inputs = {"completions": file_fingerprint(settings.completions)}
    for number, scorer in enumerate(settings.scorers):
        inputs |= {f"{number} {name}": value for name, value in scorer.inputs().items()}

    def work(folder: Path) -> Mapping[str, Any]:
        completions = read_completions(settings.completions)
        return _score_all(folder, settings.scorers, completions)

    return run_stage(settings.output_dir, "score", settings.resolved(), inputs, work, overwrite)


def _score_all(folder: Path, scorers: Sequence[ScorerSettings], completions: Sequence[Completion]) -> Mapping[str, Any]:
    if not completions:
        raise DataError("There are no completions to score.")
    rows: list[Any] = []
    summary: dict[str, Any] = {}
    for settings in scorers:
        # One scorer at a time: two models need never be in memory together.
        scorer = settings.build()
        if scorer.name in summary:
            raise UsageError(f"Two scorers sign as {scorer.name!r}. Give one of them another `name`.")
        verdicts = _score_one(folder / _PARTIAL / f"{len(summary)}.jsonl", scorer, settings.asked(completions))
        details = [{"id": row["id"], **row.pop("detail")} for row in verdicts if "detail" in row]
        if details:
            write_jsonl(folder / f"{scorer.name}.jsonl", details)
        values = [row["value"] for row in verdicts if row["value"] is not None]
        summary[scorer.name] = {
            "n": len(values),
            "missing": len(verdicts) - len(values),
            "mean": round(sum(values) / len(values), 6) if values else None,
        }
        rows += verdicts
    write_jsonl(folder / VERDICTS, rows)
    shutil.rmtree(folder / _PARTIAL)
    return {"verdicts": len(rows), "scorers": summary}


def _score_one(path: Path, scorer: Scorer, completions: Sequence[Completion]) -> list[Any]:
    """All verdicts of one scorer as JSON rows, those of whole chunks already on disk taken from there."""
    with JsonlAppender(path) as partial, bar(f"scoring: {scorer.name}", len(completions)) as progress:
        done = list(partial.rows)
        for start in range(0, len(completions), _CHUNK):
            chunk = completions[start : start + _CHUNK]
            if len(done) < start + len(chunk):
                # Chunks are always the same ones; of one torn by a kill, the rows already written stay.
                fresh = [verdict.as_json() for verdict in scorer(chunk)][len(done) - start :]
                partial.add(fresh)
                done += fresh
            progress.advance(len(chunk))
    return done
