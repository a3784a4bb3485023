"""`equipoise score`: verdicts on a file of completions, or how often a scorer is right about pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from equipoise.cli._output import Config, Json, Overwrite, Set, emit_run, line, state, table, values_of


def run(
    completions: Annotated[str | None, typer.Argument(help="a completions.jsonl file, or the folder it is in")] = None,
    scorers: Annotated[list[str] | None, typer.Option("--scorer", help="invalid, refusal or length (repeatable)")] = None,
    reward_model: Annotated[str | None, typer.Option("--reward-model", help="score with this sequence-classification model too")] = None,
    implicit: Annotated[
        str | None, typer.Option("--implicit", help="score with this policy's implicit reward too, its reference in --base")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="reference of the implicit reward")] = None,
    pairs: Annotated[
        str | None, typer.Option("--pairs", help="preference data: how often the one scorer given prefers the chosen reply")
    ] = None,
    output_dir: Annotated[str | None, typer.Option("--output-dir", "-o", help="stage folder")] = None,
    config: Config = None,
    overrides: Set = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Score completions: rules, reward models, implicit rewards; any other scorer by --set. Writes verdicts.jsonl.

    Example: equipoise score runs/base --reward-model runs/judge/model -o runs/base-scores

    KL to the base, judges, ensembles and token credit are settings:

    equipoise score runs/replies --set 'scorers=[{scorer: kl_to_base, model_name_or_path: POLICY, base_model_name_or_path: BASE}]'

    With --pairs, try a scorer on preference data instead. Writes held_out.json.

    Example: equipoise score --pairs held_out.jsonl --implicit runs/dpo/model --base smollm2-135m-instruct -o runs/dpo-pairs
    """
    from equipoise.core.errors import UsageError
    from equipoise.scorers import ScoreSettings, score
    from equipoise.scorers._base import RULES

    for name in scorers or ():
        if name not in RULES:
            raise UsageError(f"--scorer {name}: {_way_to(name)}")
    if completions is not None and Path(completions).is_dir():
        completions = str(Path(completions) / "completions.jsonl")
    if (implicit is None) != (base is None):
        raise UsageError("An implicit reward needs both --implicit (the policy) and --base (its reference).")
    values = values_of(config, completions=completions, output_dir=output_dir)
    asked: list[Any] = list(scorers or ())
    models: list[Any] = [{"scorer": "reward_model", "model_name_or_path": reward_model}] if reward_model else []
    models += [{"scorer": "implicit", "model_name_or_path": implicit, "base_model_name_or_path": base}] if implicit else []
    if models:
        asked = [*(asked or values.pop("scorers", None) or (() if pairs else RULES)), *models]
    if asked:
        values["scorers"] = asked
    if pairs is not None:
        values.setdefault("completions", "")
    settings = ScoreSettings.make(values, overrides or (), config or "")
    if pairs is not None:
        _try_on_pairs(settings, pairs, overwrite, as_json)
        return
    done = score(settings, overwrite)
    if as_json:
        emit_run(done)
        return
    summary = done.results["scorers"]
    rows = [(name, item["n"], item["missing"], "" if item["mean"] is None else f"{item['mean']:.4g}") for name, item in summary.items()]
    table("verdicts", ("scorer", "n", "no verdict", "mean"), rows)
    line(f"{state(done)}: {done.folder}/verdicts.jsonl")


def _way_to(name: str) -> str:
    """How a scorer that is no rule is asked for."""
    from equipoise.core.catalog import names
    from equipoise.scorers._base import RULES

    options = {"reward_model": "--reward-model MODEL", "implicit": "--implicit POLICY --base REFERENCE"}
    if name in options:
        return f"give its model, with {options[name]}."
    if name in names("scorers") and name != "rules":
        return f"it has settings of its own; give them with --set 'scorers=[{{scorer: {name}, …}}]'."
    return f"there is no such rule; there are {', '.join(RULES)}."


def _try_on_pairs(settings: Any, pairs: str, overwrite: bool, as_json: bool) -> None:
    """Pair accuracy of the one scorer asked for, beside guessing by length."""
    from equipoise.core.errors import UsageError
    from equipoise.core.files import read_json
    from equipoise.data.settings import DataSettings
    from equipoise.evaluation.held_out import HELD_OUT, held_out

    if settings.completions or len(settings.scorers) != 1:
        raise UsageError("--pairs tries one scorer on preference data: give one scorer (--reward-model or --implicit), no completions.")
    if getattr(settings.scorers[0], "rule", "") == "length":
        raise UsageError(
            "--scorer length counts the tokens a model generated, and preference data has texts. Guessing by length is shown in any case."
        )
    done = held_out(settings.scorers[0], {pairs: DataSettings(dataset_name=pairs)}, settings.output_dir, overwrite=overwrite)
    found = read_json(done.folder / HELD_OUT)
    if as_json:
        emit_run(done, found)
        return
    rows = [
        (
            name,
            item["n"],
            item["missing"],
            "" if item["value"] is None else f"{item['value']:.1f} ({item['low']:.1f} to {item['high']:.1f})",
        )
        for name, item in (("prefers the chosen reply", found["pair_accuracy"]), ("guessing by length", found["length_baseline"]))
    ]
    table(f"{found['counts']['pairs']} pairs", ("", "n", "no verdict", "%"), rows)
    if found["pair_accuracy"]["missing"] == found["counts"]["pairs"]:
        line("No pair got a verdict: this scorer reads the tokens that a model generated, and preference data has texts.")
    line(f"{state(done)}: {done.folder}/{HELD_OUT}")
