"""The `held_out` stage: how often a scorer agrees with people on pairs it never saw, beside guessing by length."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from equipoise.core.files import write_json
from equipoise.core.records import Record
from equipoise.core.runs import Run, run_stage
from equipoise.data.load import load, source_fingerprint
from equipoise.data.settings import DataSettings
from equipoise.evaluation.intervals import rate
from equipoise.scorers._base import ScorerSettings
from equipoise.scorers.reward_model import pair_accuracy

HELD_OUT = "held_out.json"


def held_out(
    scorer: ScorerSettings,
    pairs: Mapping[str, DataSettings],
    output_dir: str | Path,
    training_pairs: Mapping[str, DataSettings] | None = None,
    overwrite: bool = False,
) -> Run:
    """Try a scorer on pairs and write `held_out.json`: both accuracies with their intervals, and the counts.

    Args:
        scorer: a reward model, or an implicit reward.
        pairs: name → data with a chosen and a rejected reply.
        output_dir: stage folder.
        training_pairs: what the scorer was trained on; the length rule takes its direction from them (none: longer).
        overwrite: start afresh where the folder holds other work.
    """
    blocks = {"pairs": pairs, "training pairs": training_pairs or {}}
    inputs = {
        f"{use} {name} {part}": mark
        for use in blocks
        for name in blocks[use]
        for part, mark in source_fingerprint(blocks[use][name]).items()
    }

    def work(folder: Path) -> Mapping[str, Any]:
        tried, trained = (_records(blocks[use]) for use in blocks)
        found = pair_accuracy(scorer.build(), tried, trained)
        write_json(folder / HELD_OUT, {**_rates(found), "counts": found})
        return found

    settings = {"judge": scorer.resolved(), **{use: [block.resolved() for block in blocks[use].values()] for use in blocks}}
    return run_stage(output_dir, "held_out", settings, {**inputs, **scorer.inputs()}, work, overwrite)


def _records(blocks: Mapping[str, DataSettings]) -> list[Record]:
    return [record for block in blocks.values() for record in load(block).records]


def _rates(found: Mapping[str, Any]) -> dict[str, Any]:
    """Counts of `pair_accuracy` as rates with Wilson's interval; ties count as wrong, pairs without a verdict as missing."""
    known = found["pairs"] - found["missing"]
    accuracy = [1.0] * found["correct"] + [0.0] * (known - found["correct"]) + [float("nan")] * found["missing"]
    by_length = [1.0] * found["length_correct"] + [0.0] * (found["pairs"] - found["length_correct"])
    return {"pair_accuracy": rate(accuracy).as_json(), "length_baseline": rate(by_length).as_json()}
