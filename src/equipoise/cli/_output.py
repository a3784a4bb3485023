"""How verbs speak: tables for people on stdout, or exactly one JSON object with `schema_version`; logs on stderr."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from equipoise.core.files import json_text

Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
Set = Annotated[list[str] | None, typer.Option("--set", help="override a setting: key.path=value (repeatable)")]
Config = Annotated[str | None, typer.Option("--config", help="a YAML file of settings")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="start afresh where the output folder holds other work")]


def emit_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout, `schema_version` first."""
    print(json_text({"schema_version": 1, **value}, indent=2, default=str))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on stdout."""
    grid = Table(title=title, title_justify="left")
    for column in columns:
        grid.add_column(column)
    for row in rows:
        # As text, not markup: cells hold file names and data, and a bracket in them is no instruction.
        grid.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    Console().print(grid)


def line(text: str) -> None:
    """One line on stdout, printed as it is."""
    print(text)
