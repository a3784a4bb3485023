"""`equipoise evaluate`: what existing replies and scores show, with intervals, paired tests and three words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from equipoise.cli._output import Config, Json, Overwrite, Set, emit_json, line, table

Suite = Annotated[str | None, typer.Option("--suite", help="two-axis, opt350m-study, …")]
From = Annotated[str | None, typer.Option("--from", help="the file or folder the suite reads")]
OutputDir = Annotated[str | None, typer.Option("--output-dir", help="also keep evaluation.json and replies.jsonl there, as a stage")]


def run(
    suite: Suite = None,
    source: From = None,
    output_dir: OutputDir = None,
    config: Config = None,
    overrides: Set = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Estimates, comparisons and verdicts from a suite's files. Nothing is generated or scored anew."""
    from equipoise.core.files import read_json
    from equipoise.evaluation.evaluate import EVALUATION, compute, evaluate

    settings = _settings(suite, source, output_dir, config, overrides or [])
    if output_dir is None:
        evaluation, _ = compute(settings)
    else:
        evaluation = read_json(evaluate(settings, overwrite).folder / EVALUATION)
    if as_json:
        emit_json(evaluation)
    else:
        show(evaluation)


def _settings(suite: str | None, source: str | None, output_dir: str | None, config: str | None, overrides: list[str]) -> Any:
    """Settings from the file, the options, then `--set`, the last one given winning."""
    from equipoise.core.errors import UsageError
    from equipoise.core.settings import read_yaml
    from equipoise.evaluation.settings import EvaluateSettings
    from equipoise.evaluation.suites._base import known

    values = read_yaml(config) if config else {}
    given = {"suite": suite, "source": source, "output_dir": output_dir}
    values |= {name: value for name, value in given.items() if value is not None}
    for name, option, example in (("suite", "--suite", ", ".join(known())), ("source", "--from", "a file or folder")):
        if name not in values and not any(item.startswith(f"{name}=") for item in overrides):
            raise UsageError(f"{option} is missing: {example}.")
    return EvaluateSettings.make(values, overrides, config or "")


def show(evaluation: Mapping[str, Any]) -> None:
    """An evaluation for people: models, comparisons, what could be seen, warnings."""
    metrics = evaluation["metrics"]
    models = {name: entry.get("estimates", entry) for name, entry in evaluation["models"].items()}
    for role in ("headline", "reproduction", "diagnostic"):
        shown = {name: metric for name, metric in metrics.items() if metric["role"] == role}
        if shown:
            columns = ["model", *(f"{metric['title']}, {metric['unit']}{' ⚑' if metric['flagged'] else ''}" for metric in shown.values())]
            kinds = {name: " (null)" if evaluation["models"][name].get("kind") == "null" else "" for name in models}
            rows = [[name + kinds[name], *(_estimate(estimates.get(key)) for key in shown)] for name, estimates in models.items()]
            table(f"{role.capitalize()} metrics, 95 % interval", columns, rows)
    _comparisons(evaluation["comparisons"], metrics)
    for metric in metrics.values():
        if metric["flagged"]:
            line(f"⚑ {metric['title']}: {metric['flag_reason']}.")
    for entry in evaluation["detectable"]:
        size = f"{entry['difference']:.3g} {entry['unit']}"
        line(f"smallest detectable difference, {entry['title']}: {size} (n = {entry['n']}; {entry['assumes']})")
    for warning in evaluation["warnings"]:
        line(f"warning: {warning}")
    if evaluation["headline"] is None:
        line("HEADLINE WITHHELD: the judge is not independent (--set allow_overlap=true gives it, stamped).")


def _comparisons(rows: list[dict[str, Any]], metrics: Mapping[str, Any]) -> None:
    columns = ("a − b", "metric", "difference", "p", "p (Holm)", "P(a better)", "verdict", "n", "n needed", "test")
    for primary, title in ((True, "Primary contrasts, named beforehand"), (False, "Exploratory comparisons, p not adjusted")):
        chosen = [
            (
                f"{row['a']} − {row['b']}",
                metrics.get(row["metric"], {}).get("title", row["metric"]),
                f"{_estimate(row | {'value': row['difference']}, signed=True)} {row['unit'].replace('percentage points', 'points')}"
                if row["difference"] is not None
                else "–",
                *("" if row[key] is None else f"{row[key]:.2g}" for key in ("p", "p_holm")),
                "" if row["prob_a_better"] is None else f"{row['prob_a_better']['value']:.2f}",
                row["verdict"],
                row["n"],
                row["n_needed"],
                row["test"] or row["reason"],
            )
            for row in rows
            if row["primary"] is primary
        ]
        if chosen:
            table(title, columns, chosen)


def _estimate(entry: Mapping[str, Any] | None, signed: bool = False) -> str:
    """`42.0 (29.4 to 55.8)`, with what is missing."""
    if entry is None or entry["value"] is None:
        return "–"
    digits = 1 if entry.get("unit") in ("%", "percentage points", "tokens") else 2
    sign = "+" if signed else ""
    doubt = "" if entry["low"] is None else f" ({entry['low']:{sign}.{digits}f} to {entry['high']:{sign}.{digits}f})"
    missing = f", {entry['missing']} missing" if entry["missing"] else ""
    return f"{entry['value']:{sign}.{digits}f}{doubt}{missing}"
