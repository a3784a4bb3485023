"""The report as Markdown: the same words and tables, foreign text escaped so that it is neither markup nor HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from equipoise.study._report.words import Stamp, Statement
from equipoise.study.tables import Cell, Column, Row, Table

_SPECIAL = re.compile(r"([\\`*_{}\[\]#|~!])")


def safe(words: str) -> str:
    """Text in one line that Markdown shows as it is."""
    escaped = words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return " ".join(_SPECIAL.sub(r"\\\1", escaped).split())


def table(content: Table) -> str:
    """A table in GitHub's Markdown; a section's heading becomes a row of its own in bold."""
    heads = [safe(content.first), *(_heading(column) for column in content.columns)]
    lines = [
        f"| {' | '.join(heads)} |",
        f"|{'|'.join([' :-- ', *(' --: ' if column.figures else ' :-- ' for column in content.columns)])}|",
    ]
    for heading, rows in content.sections:
        if heading:
            lines.append(f"| **{safe(heading)}** |{' |' * len(content.columns)}")
        lines += [f"| {' | '.join([_head(row), *(_cell(cell) for cell in row.cells)])} |" for row in rows]
    notes = [f"\n{safe(note)}" for note in content.notes]
    if notes and content.notes_title:
        notes = [f"\n<details><summary>{safe(content.notes_title)}</summary>", *notes, "\n</details>"]
    flags = [f"\n⚑ {safe(column.title)}: {safe(column.flag)}" for column in content.columns if column.flag]
    return "\n".join([*lines, *flags, *notes])


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """Named facts as a list."""
    return "\n".join(f"- **{safe(name)}:** {safe(words)}" for name, words in rows)


def verdict(statements: Sequence[Statement]) -> str:
    """The verdict paragraph."""
    return " ".join(f"**[{item.verdict}]** {safe(item.text)}" if item.verdict else safe(item.text) for item in statements)


def stamps(items: Sequence[Stamp]) -> str:
    """The stamps as quoted blocks."""
    blocks = []
    for item in items:
        sign = "⛔" if item.level == "alarm" else "⚠"
        blocks.append("\n".join([f"> {sign} **{safe(item.title)}.**", *(f"> - {safe(words)}" for words in item.items)]))
    return "\n\n".join(blocks)


def _heading(column: Column) -> str:
    title = safe(column.title) + (" ⚑" if column.flag else "")
    return f"{title}<br>{safe(column.note)}" if column.note else title


def _head(row: Row) -> str:
    name = f"*{safe(row.head)}*" if row.kind == "null" else safe(row.head)
    return f"{name}<br>{safe(row.detail)}" if row.detail else name


def _cell(cell: Cell) -> str:
    text = f"**{safe(cell.text)}**" if cell.badge else safe(cell.text)
    return "<br>".join([text, *(safe(words) for words in cell.detail)])
