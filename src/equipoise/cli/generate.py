"""`equipoise generate`: answers to a file of prompts."""

from __future__ import annotations

from typing import Annotated

import typer

from equipoise.cli._output import Config, Json, Overwrite, Set, emit_run, line, state, values_of


def run(
    model: Annotated[str | None, typer.Argument(help="asset name, model or adapter folder, hub name; or a null policy")] = None,
    prompts: Annotated[str | None, typer.Option("--prompts", help="'starter' or a prompts.jsonl file")] = None,
    output_dir: Annotated[str | None, typer.Option("--output-dir", "-o", help="stage folder")] = None,
    config: Config = None,
    overrides: Set = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Answer prompts with a model: batched, seeded, resumable. Writes completions.jsonl.

    Example: equipoise generate smollm2-135m-instruct --prompts prompts.jsonl -o runs/base --set sampling.max_new_tokens=64
    """
    from equipoise.generation import GenerateSettings, generate
    from equipoise.generation.scripted import NULL_POLICIES

    values = values_of(config, prompts=prompts, output_dir=output_dir)
    if model in NULL_POLICIES:
        values["generator"] = {"generator": "scripted", "policy": model}
    elif model is not None:
        values["generator"] = {"generator": "local", **(values.get("generator") or {}), "model_name_or_path": model}
    done = generate(GenerateSettings.make(values, overrides or (), config or ""), overwrite)
    if as_json:
        emit_run(done)
        return
    found = done.results
    line(f"{state(done)}: {found['completions']} replies, {found['tokens']} tokens, {found['cut_off']} cut off, {found['empty']} empty")
    line(f"{done.folder}/completions.jsonl")
