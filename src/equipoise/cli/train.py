"""`equipoise train`: one training stage from a YAML file and `--set`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from equipoise.cli._output import Config, Json, Overwrite, Set, emit_json, emit_run, line, state, table, values_of

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
        from equipoise.training.plan import planned

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


def _show(plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit_json(plan)
        return
    from equipoise.training.machine import gigabytes, readable

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
