"""`equipoise evaluate`: what existing replies and scores show, with intervals, paired tests and three words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from equipoise.cli._output import Config, Json, Overwrite, Set, emit_json, line, table

Suite = Annotated[str | None, typer.Option("--suite", help="two-axis, opt350m-study, …")]
From = Annotated[str | None, typer.Option("--from", help="the file or folder the suite reads")]
OutputDir = Annotated[str | None, typer.Option("--output-dir", "-o", help="also keep evaluation.json and replies.jsonl there, as a stage")]


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
    if settings.output_dir is None:
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
            columns = [
                "model",
                *(_heading(metric, [estimates.get(name) for estimates in models.values()]) for name, metric in shown.items()),
            ]
            kinds = {name: " (null)" if evaluation["models"][name].get("kind") == "null" else "" for name in models}
            rows = [[name + kinds[name], *(_estimate(estimates.get(key)) for key in shown)] for name, estimates in models.items()]
            table(f"{role.capitalize()} metrics, {100 * evaluation.get('confidence', 0.95):g} % interval", columns, rows)
    _comparisons(evaluation["comparisons"])
    _judge(evaluation["judge"])
    for metric in metrics.values():
        if metric["flagged"]:
            line(f"⚑ {metric['title']}: {metric['flag_reason']}.")
    for entry in evaluation["detectable"]:
        size = f"{entry['difference']:.3g} {entry['unit']}"
        line(f"smallest detectable difference, {entry['title']}: {size} (n = {entry['n']}; {entry['assumes']})")
    if "labels" in evaluation:
        line(f"labels: {evaluation['labels']['agree']} of {evaluation['labels']['compared']} equal the released ones")
    for warning in evaluation["warnings"]:
        line(f"warning: {warning}")
    if evaluation["headline"] is None:
        line("HEADLINE WITHHELD: the judge is not independent (--set allow_overlap=true gives it, stamped).")


def _heading(metric: Mapping[str, Any], column: list[dict[str, Any] | None]) -> str:
    """`HmR, % (n = 50)`; a flag where a null policy wins; no n where models differ in it."""
    counts = {entry["n"] for entry in column if entry and entry["value"] is not None}
    n = f" (n = {counts.pop()})" if len(counts) == 1 else ""
    return f"{metric['title']}, {metric['unit']}{n}{' ⚑' if metric['flagged'] else ''}"


def _judge(judge: Mapping[str, Any]) -> None:
    """Who gave the rewards, and how well it does on pairs it never saw, beside guessing by length."""
    held_out = judge.get("held_out") or {}
    accuracy, length = (held_out.get(name) for name in ("pair_accuracy", "length_baseline"))
    known = f": held-out pair accuracy {_estimate(accuracy)}, by length alone {_estimate(length)}" if accuracy and length else ""
    line(f"judge: {judge.get('name') or 'not named'}{known or ', accuracy not known'}")


def _comparisons(rows: list[dict[str, Any]]) -> None:
    columns = ("verdict", "a − b", "metric", "difference", "p", "Holm", "P(a > b)", "n", "needs")
    for primary, title in ((True, "Primary contrasts, named beforehand"), (False, "Exploratory comparisons, p not adjusted")):
        chosen = [row for row in rows if row["primary"] is primary]
        if chosen:
            table(title, columns, [_comparison(row) for row in chosen])
            tests: dict[str, list[str]] = {}
            for row in chosen:
                named = tests.setdefault(re.sub(r" \(\d+ to \d+\)", "", row["test"]), [])
                named += [row["metric"]] if row["metric"] not in named else []
            for test, names in tests.items():
                line(f"{', '.join(names)}: {test}" if test else f"{', '.join(names)}: nothing to compare")


def _comparison(row: Mapping[str, Any]) -> list[Any]:
    """One comparison as cells; the difference of rates in percentage points."""
    chance = row["prob_a_better"]
    return [
        row["verdict"] if row["p"] is not None else "not tested",
        f"{row['a']} − {row['b']}",
        row["metric"],
        _estimate(dict(row) | {"value": row["difference"]}, signed=True) if row["difference"] is not None else row["reason"],
        *("" if row[key] is None else f"{row[key]:.2g}" for key in ("p", "p_holm")),
        "" if chance is None or chance["value"] is None else f"{chance['value']:.2f}",
        row["n"],
        row["n_needed"],
    ]


def _estimate(entry: Mapping[str, Any] | None, signed: bool = False) -> str:
    """`42.0 (29.4 to 55.8)`, with what is missing."""
    if entry is None or entry["value"] is None:
        return "–"
    digits = 1 if entry.get("unit") in ("%", "percentage points", "tokens") else 2
    sign = "+" if signed else ""
    doubt = "" if entry["low"] is None else f" ({entry['low']:{sign}.{digits}f} to {entry['high']:{sign}.{digits}f})"
    missing = f", {entry['missing']} missing" if entry.get("missing") else ""
    return f"{entry['value']:{sign}.{digits}f}{doubt}{missing}"
