"""Reads a report's page back: its tags, its words, and its tables cell by cell."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from equipoise.study.report import build_report


class Page(HTMLParser):
    """Tags, attributes and text of a page; table cells by table, row and column."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.values: dict[str, list[list[float | None]]] = {}
        self._table = ""
        self._script = False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag == "script":
            self._script = True
            self.scripts.append("")
        if tag == "table":
            self._table = str(found["id"])
            self.tables[self._table], self.values[self._table] = [], []
        if tag == "tr" and self._table:
            self.tables[self._table].append([])
            self.values[self._table].append([])
        if tag in ("td", "th") and self._table and self.tables[self._table]:
            self.tables[self._table][-1].append("")
            value = found.get("data-value")
            self.values[self._table][-1].append(float(value) if value is not None else None)

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = False
        if tag == "table":
            self._table = ""

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts[-1] += data
        else:
            self.words.append(data)
            if self._table and self.tables[self._table] and self.tables[self._table][-1]:
                self.tables[self._table][-1][-1] += f" {data}"

    def rows(self, table: str) -> dict[str, list[str]]:
        """First word of a row → its cells, white space simplified."""
        cells = [[" ".join(cell.replace("\xa0", " ").split()) for cell in row] for row in self.tables[table]]
        return {row[0].split()[0]: row for row in cells if row[0]}

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\xa0", " ").split())


def page_of(folder: Path) -> Page:
    return Page(build_report(folder).read_text(encoding="utf-8"))


def change(folder: Path, name: str, edit: Callable[[Any], None]) -> None:
    value = json.loads((folder / name).read_text(encoding="utf-8"))
    edit(value)
    (folder / name).write_text(json.dumps(value), encoding="utf-8")
