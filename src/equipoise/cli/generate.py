"""`equipoise generate`: answers to a file of prompts."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from equipoise.cli._output import Config, Json, Overwrite, Set, emit_json, line


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
    from equipoise.core.settings import read_yaml
    from equipoise.generation import GenerateSettings, generate
    from equipoise.generation.scripted import NULL_POLICIES

    values: dict[str, Any] = read_yaml(config) if config else {}
    if model in NULL_POLICIES:
        values["generator"] = {"generator": "scripted", "policy": model}
    elif model is not None:
        values["generator"] = {"generator": "local", **(values.get("generator") or {}), "model_name_or_path": model}
    values |= {name: value for name, value in {"prompts": prompts, "output_dir": output_dir}.items() if value is not None}
    done = generate(GenerateSettings.make(values, overrides or (), config or ""), overwrite)
    if as_json:
        emit_json({"folder": str(done.folder), "skipped": done.skipped, "seconds": round(done.seconds, 1), "results": dict(done.results)})
        return
    results = done.results
    state = "was already done" if done.skipped else f"done in {done.seconds:.0f} s"
    line(f"{state}: {results['completions']} replies, {results['tokens']} tokens, {results['cut_off']} cut off, {results['empty']} empty")
    line(f"{done.folder}/completions.jsonl")
