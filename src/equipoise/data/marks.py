"""Marks of reply tokens that an objective may ask for beside `learn`, computed from a row's token ids when the row is scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from difflib import SequenceMatcher

import numpy as np

from equipoise.core.errors import DataError, UsageError, nearest
from equipoise.data.rows import Flags, TokenRow


def differs(row: TokenRow) -> list[Flags]:
    """Of a chosen and a rejected reply: the tokens that are not part of what the two have in common, in order (BMC's diff).

    Returns one bool [T] per branch; branches of other roles are all False. Raises DataError where the row is no pair.
    """
    pair = {branch.role: branch.ids.tolist() for branch in row.branches}
    if not {"chosen", "rejected"} <= pair.keys():
        raise DataError(f"Row {row.id}: the mark 'differs' compares a chosen and a rejected reply, found {sorted(pair)}.")
    marks = {branch.role: np.ones(len(branch.ids), dtype=bool) for branch in row.branches}
    for block in SequenceMatcher(None, pair["chosen"], pair["rejected"], autojunk=False).get_matching_blocks():
        marks["chosen"][block.a : block.a + block.size] = False
        marks["rejected"][block.b : block.b + block.size] = False
    return [
        marks[branch.role] if branch.role in ("chosen", "rejected") else np.zeros(len(branch.ids), dtype=bool) for branch in row.branches
    ]


MARKS: Mapping[str, Callable[[TokenRow], list[Flags]]] = {"differs": differs}


def with_marks(row: TokenRow, names: Iterable[str]) -> TokenRow:
    """The row with these marks on its branches; marks it carries already stay. Raises UsageError for an unknown name."""
    for name in names:
        if all(name in branch.marks for branch in row.branches):
            continue
        if name not in MARKS:
            raise UsageError(f"There is no token mark {name!r}.{nearest(name, MARKS)}")
        found = MARKS[name](row)
        branches = (replace(branch, marks={**branch.marks, name: mark}) for branch, mark in zip(row.branches, found, strict=True))
        row = replace(row, branches=tuple(branches))
    return row
