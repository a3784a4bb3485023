"""What verbs share: settings from a file and options, and how they speak.

Tables for people on stdout, or exactly one JSON object with `schema_version`; logs on stderr.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from equipoise.core.files import json_text
from equipoise.core.printable import printable

if TYPE_CHECKING:
    from equipoise.core.runs import Run

Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
Set = Annotated[list[str] | None, typer.Option("--set", help="override a setting: key.path=value (repeatable)")]
Config = Annotated[str | None, typer.Option("--config", help="a YAML file of settings")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="start afresh where the output folder holds other work")]


def values_of(config: str | None, **options: Any) -> dict[str, Any]:
    """The settings of a file, and over them the options that were given; `--set` comes last, when settings are made of them."""
    from equipoise.core.settings import read_yaml

    values = read_yaml(config) if config else {}
    return values | {name: value for name, value in options.items() if value is not None}


def emit_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout, `schema_version` first."""
    print(json_text({"schema_version": 1, **value}, indent=2, default=str))


def emit_run(run: Run, results: Mapping[str, Any] | None = None) -> None:
    """A finished stage as one JSON object; `results` where they are others than the stage's own."""
    shown = dict(run.results if results is None else results)
    emit_json({"folder": str(run.folder), "skipped": run.skipped, "seconds": round(run.seconds, 1), "results": shown})


def state(run: Run) -> str:
    """A finished stage in words for people."""
    return "was already done" if run.skipped else f"done in {run.seconds:.0f} s"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on stdout."""
    grid = Table(title=title, title_justify="left")
    for column in columns:
        grid.add_column(column, overflow="fold")  # on a narrow terminal a name goes on below: cut, it could not be typed
    for row in rows:
        # As text, not markup: cells hold file names and data, and a bracket in them is no instruction.
        grid.add_row(*(Text("" if cell is None else printable(str(cell))) for cell in row))
    Console().print(grid)


def line(text: str) -> None:
    """One line on stdout: no markup, and nothing that steers the terminal."""
    print(printable(text))
