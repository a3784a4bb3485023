"""`equipoise study`: plan, run and report a whole comparison; a study is named or given as a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from equipoise.cli._output import Json, Overwrite, Set, emit_json, line, table

app = typer.Typer(
    help="Plan, run and report a comparison of methods.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)

Name = Annotated[str, typer.Argument(help="a bundled study's name, or a YAML file")]
OutputDir = Annotated[str | None, typer.Option("--output-dir", "-o", help="study folder (default: runs/NAME)")]


@app.command("list")
def list_studies(as_json: Json = False) -> None:
    """The studies that come with the package."""
    from equipoise.study.settings import bundled, load_study

    rows = [{"name": name, "description": load_study(name).description} for name in bundled()]
    if as_json:
        emit_json({"studies": rows})
    else:
        table("Studies", ("name", "what it does"), [(row["name"], row["description"]) for row in rows])


@app.command("plan")
def plan(name: Name, overrides: Set = None, as_json: Json = False) -> None:
    """Print the stages with tokens and estimated time, the budget, and the smallest differences the study can see."""
    from equipoise.study.plan import plan_study
    from equipoise.study.settings import load_study

    planned = plan_study(load_study(name, overrides or ()))
    if as_json:
        emit_json(planned.as_json())
    else:
        _show(planned.as_json())


@app.command("run")
def run(name: Name, overrides: Set = None, output_dir: OutputDir = None, overwrite: Overwrite = False, as_json: Json = False) -> None:
    """Run every stage that is not done yet, evaluate, and write the report. Exit code 1 where an arm failed."""
    from equipoise.study.run import failures, run_study
    from equipoise.study.settings import load_study

    folder = run_study(load_study(name, overrides or ()), output_dir, overwrite)
    failed = failures(folder)
    report = folder / "report" / "report.html"
    if as_json:
        emit_json({"folder": str(folder), "report": str(report), "failed": failed})
    else:
        for arm, error in failed.items():
            line(f"failed: {arm}: {error}")
        line(f"report: {report}")
    if failed:
        raise typer.Exit(1)


@app.command("report")
def report(
    study: Annotated[str, typer.Argument(help="study folder, or the name of a study in runs/")],
    output_dir: Annotated[str | None, typer.Option("--output-dir", "-o", help="where to write it (default: the study's report/)")] = None,
    texts: Annotated[bool, typer.Option("--texts/--no-texts", help="show prompts and replies; without, the copy can be handed on")] = True,
    as_json: Json = False,
) -> None:
    """Rebuild the report from the files of a study folder."""
    from equipoise.study.report import build_report

    folder = Path(study) if Path(study).is_dir() else Path("runs") / study
    path = build_report(folder, Path(output_dir) if output_dir else None, texts)
    if as_json:
        emit_json({"report": str(path)})
    else:
        line(f"report: {path}")


def _show(planned: dict[str, Any]) -> None:
    """The plan as tables for people."""
    from equipoise.training.machine import gigabytes, readable

    rows = [
        (
            row["stage"].replace("_", " "),
            row["name"],
            row["seed"],
            ", ".join(row["arms"]) or "judge",
            _count(row["pairs"], True),
            _count(row["tokens"], row["counted"] or row["stage"] != "train"),
            readable(row["seconds"]),
            None if row["memory"] is None else gigabytes(row["memory"]),
        )
        for row in planned["stages"]
    ]
    table(f"Study {planned['study']}", ("stage", "name", "seed", "arms", "rows", "tokens", "time", "peak memory"), rows)
    budget = planned["budget"]
    if budget["arms"]:
        units = ("pairs", "tokens", "flops")
        spent = [(arm, *(_count(figures[unit], True) for unit in units)) for arm, figures in budget["arms"].items()]
        table(f"Budget of one seed (equal in: {budget['equal']})", ("arm", "pairs", "tokens", "FLOPs"), spent)
    if planned["detectable"]:
        seen = [
            (f"{row['a']} - {row['b']}", row["metric"], row["n"], _figure(row["difference"]), row["unit"]) for row in planned["detectable"]
        ]
        table("Smallest difference that would be seen", ("contrast", "metric", "n", "difference", "unit"), seen)
    for warning in planned["warnings"]:
        line(f"note: {warning}")
    line(f"estimated time in all: {readable(planned['seconds'])}")


def _count(value: float | None, counted: bool) -> str:
    """A count for people; '~' where it is estimated, '?' where it is not known."""
    if value is None:
        return "?"
    shown = f"{value:,.0f}" if value < 1e9 else f"{value:.3g}"
    return shown if counted else f"~{shown}"


def _figure(value: float | None) -> str:
    """Three digits, or 'none' where no difference could be seen."""
    return "none" if value is None else f"{value:.3g}"
