"""`equipoise score`: verdicts on a file of completions."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from equipoise.cli._output import Config, Json, Overwrite, Set, emit_json, line, table


def run(
    completions: Annotated[str | None, typer.Argument(help="a completions.jsonl file")] = None,
    scorers: Annotated[list[str] | None, typer.Option("--scorer", help="invalid, refusal or length (repeatable)")] = None,
    reward_model: Annotated[str | None, typer.Option("--reward-model", help="score with this sequence-classification model too")] = None,
    output_dir: Annotated[str | None, typer.Option("--output-dir", "-o", help="stage folder")] = None,
    config: Config = None,
    overrides: Set = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Score completions: reward models, rules, KL to the base, judges. Writes verdicts.jsonl.

    Example: equipoise score runs/base/completions.jsonl --reward-model runs/judge/model -o runs/base-scores
    """
    from equipoise.core.settings import read_yaml
    from equipoise.scorers import ScoreSettings, score
    from equipoise.scorers._base import RULES

    values: dict[str, Any] = read_yaml(config) if config else {}
    asked: list[Any] = list(scorers or ())
    if reward_model is not None:
        asked = [*(asked or values.pop("scorers", None) or RULES), {"scorer": "reward_model", "model_name_or_path": reward_model}]
    if asked:
        values["scorers"] = asked
    values |= {name: value for name, value in {"completions": completions, "output_dir": output_dir}.items() if value is not None}
    done = score(ScoreSettings.make(values, overrides or (), config or ""), overwrite)
    if as_json:
        emit_json({"folder": str(done.folder), "skipped": done.skipped, "seconds": round(done.seconds, 1), "results": dict(done.results)})
        return
    summary = done.results["scorers"]
    rows = [(name, item["n"], item["missing"], "" if item["mean"] is None else f"{item['mean']:.4g}") for name, item in summary.items()]
    table("verdicts", ("scorer", "n", "no verdict", "mean"), rows)
    line(("was already done: " if done.skipped else f"done in {done.seconds:.0f} s: ") + f"{done.folder}/verdicts.jsonl")
