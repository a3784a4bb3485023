"""What a training stage would do, without training: `equipoise train --plan`."""

from __future__ import annotations

import math
from typing import Any

from equipoise.models.load import load_tokenizer
from equipoise.objectives._load import build
from equipoise.training._preflight import check_recipe
from equipoise.training._rows import make_streams
from equipoise.training.estimate import Estimator, does_not_fit
from equipoise.training.machine import measure
from equipoise.training.settings import TrainSettings


def planned(settings: TrainSettings) -> dict[str, Any]:
    """Rows and tokens of every stream, steps, FLOPs, peak memory (bytes) and seconds on this machine, as plain data.

    The rows are read and tokenised; of the model only its config. `problem` says what is missing where the run does not fit.
    Raises UsageError for a recipe that cannot work, DataError for data that cannot be read.
    """
    check_recipe(settings)
    objectives = [build(stream.objective) for stream in settings.streams]
    train, _ = make_streams(settings, objectives, load_tokenizer(settings.model_name_or_path), None, None)
    rows = len(train[0].rows)
    units, steps = settings.total_units(rows), settings.total_steps(math.ceil(rows / settings.batch_size()))
    streams = [
        {
            "name": stream.name,
            "objective": dict(stream.objective),
            "rows": len(given.rows),
            "tokens": round(units * sum(row.tokens for row in given.rows) / len(given.rows)),
            "data": given.outcome(),
        }
        for stream, given in zip(settings.streams, train, strict=True)
    ]
    lengths = [[(len(row.prompt), tuple(len(branch.ids) for branch in row.branches)) for row in given.rows] for given in train]
    machine = measure()
    references = [method.needs.reference for method in objectives]
    found = Estimator(settings, lengths, machine, objectives[0].needs.readout, references).estimate()
    fits = not machine.memory or found.memory.peak <= machine.memory
    return {
        "streams": streams,
        "steps": steps,
        **found.as_json(),
        "fits": fits,
        "problem": None if fits else does_not_fit(found.memory, machine, settings),
        "machine": machine.as_json(),
    }
