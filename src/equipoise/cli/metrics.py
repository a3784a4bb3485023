"""`equipoise metrics`: every metric, what it measures, and where it comes from."""

from __future__ import annotations

from typing import Annotated

import typer

from equipoise.cli._output import Json, emit_json, line, table

Markdown = Annotated[bool, typer.Option("--markdown", help="print the page docs/metrics.md")]


def run(as_json: Json = False, as_markdown: Markdown = False) -> None:
    """List the metrics of an evaluation."""
    from equipoise.evaluation.metrics._base import metrics
    from equipoise.evaluation.metrics._page import page

    if as_json:
        emit_json({"metrics": {name: metric.as_json() for name, metric in metrics().items()}})
    elif as_markdown:
        line(page().rstrip("\n"))
    else:
        rows = [(name, metric.title, metric.unit, metric.better, metric.role, metric.measures) for name, metric in metrics().items()]
        table("Metrics", ("name", "title", "unit", "better", "role", "measures"), rows)
