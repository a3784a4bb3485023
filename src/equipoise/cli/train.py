"""`equipoise train`: one training stage from a YAML file and `--set`."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equipoise.cli._output import Config, Json, Overwrite, Set, emit_json, emit_run, line, state, table, values_of

if TYPE_CHECKING:
    from equipoise.training.settings import TrainSettings

OutputDir = Annotated[str | None, typer.Option("--output-dir", "-o", help="stage folder (default: runs/train)")]


def run(
    config: Config = None,
    overrides: Set = None,
    output_dir: OutputDir = None,
    plan: Annotated[bool, typer.Option("--plan", help="print rows, tokens, steps, estimated memory and time, and train nothing")] = False,
    objective_file: Annotated[str | None, typer.Option("--objective-file", help="a Python file with your own objective")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train a model on your data: SFT, DPO, KTO, a reward model, or your own loss.

    Example: equipoise train --set model_name_or_path=smollm2-135m-instruct --set streams.0.objective.name=sft
    """
    from equipoise.core.progress import say
    from equipoise.training.settings import StreamSettings, TrainSettings

    values = values_of(config, output_dir=output_dir)
    if "streams" not in values:
        # So that --set streams.0.… has a first stream to change.
        values["streams"] = [StreamSettings().resolved() | {"data": {}}]
    if objective_file is not None:
        _put_objective(values["streams"], objective_file)
    settings = TrainSettings.make(values, overrides or (), config or "")
    if plan:
        from equipoise.training._preflight import advice

        found = planned(settings)
        _show(found, as_json)
        for hint in advice(settings):
            say(hint)
        if found["problem"]:
            say(found["problem"])
            raise typer.Exit(1)
        return
    from equipoise.training.fit import fit

    done = fit(settings, overwrite=overwrite)
    if os.environ.get("RANK", "0") != "0":
        return  # one of several processes: the first speaks for all
    if as_json:
        emit_run(done)
        return
    line(f"{state(done)}: {done.folder}")


def _put_objective(streams: Any, file: str) -> None:
    """Name the user's own objective in the first stream; hyper-parameters the config gives the same file stay."""
    if not isinstance(streams, list) or not streams or not isinstance(streams[0], dict):
        return  # no streams as settings know them: that is said when they are made
    known = streams[0].get("objective")
    same = known if isinstance(known, dict) and known.get("file") == file else {}
    streams[0]["objective"] = {"name": Path(file).stem, **same, "file": file}


def planned(settings: TrainSettings) -> dict[str, Any]:
    """What a training stage would do: rows and tokens of every stream, steps, FLOPs, peak memory and seconds on this machine."""
    from equipoise.models.load import load_tokenizer
    from equipoise.objectives._load import build
    from equipoise.study import _cost
    from equipoise.training._preflight import check_recipe
    from equipoise.training._rows import make_streams
    from equipoise.training.estimate import Estimator, does_not_fit
    from equipoise.training.machine import measure

    check_recipe(settings)
    objectives = [build(stream.objective) for stream in settings.streams]
    train, _ = make_streams(settings, objectives, load_tokenizer(settings.model_name_or_path), None, None)
    rows = len(train[0].rows)
    units, steps = settings.total_units(rows), settings.total_steps(math.ceil(rows / settings.batch_size()))
    readout = objectives[0].needs.readout
    parameters = _cost.parameters_of(settings.model_name_or_path, head=readout == "logps") or 0
    streams, flops = [], 0.0
    for stream, given, method in zip(settings.streams, train, objectives, strict=True):
        tokens = units * sum(row.tokens for row in given.rows) / len(given.rows)
        flops += _cost.train_flops(parameters, tokens, settings.use_peft, method.needs.reference != "none")
        streams.append({"name": stream.name, "objective": dict(stream.objective), "rows": len(given.rows), "tokens": round(tokens)})
        streams[-1]["data"] = given.outcome()
    lengths = [[(len(row.prompt), tuple(len(branch.ids) for branch in row.branches)) for row in given.rows] for given in train]
    machine = measure()
    found = Estimator(settings, lengths, machine, readout, [method.needs.reference for method in objectives]).estimate()
    fits = not machine.memory or found.memory.peak <= machine.memory
    return {
        "streams": streams,
        "steps": steps,
        "flops": flops,
        **found.as_json(),
        "fits": fits,
        "problem": None if fits else does_not_fit(found.memory, machine, settings),
        "machine": machine.as_json(),
    }


def _show(plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit_json(plan)
        return
    from equipoise.study._cost import readable
    from equipoise.training.machine import gigabytes

    rows = [(stream["name"], stream["objective"].get("name"), stream["rows"], f"{stream['tokens']:,}") for stream in plan["streams"]]
    table("Streams", ("stream", "objective", "rows", "tokens"), rows)
    for stream in plan["streams"]:
        line(f"data of {stream['name']}: {stream['data']}")
    memory = plan["memory"]
    parts = [(name, gigabytes(size)) for name, size in memory["parts"].items()]
    table(f"Memory of the largest micro-batch ({plan['token_budget']} tokens, {plan['form']} rows)", ("part", "size"), parts)
    line(f"peak memory: about {gigabytes(memory['peak'])} (at its {memory['moment']}); at hand: {gigabytes(plan['machine']['memory'])}")
    split = f"reference {readable(plan['reference_seconds'])}, training {readable(plan['train_seconds'])}"
    line(f"{plan['steps']} steps, {plan['flops']:.3g} FLOPs, about {readable(plan['seconds'])} ({split})")
