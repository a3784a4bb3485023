"""Marks of reply tokens, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.core.errors import DataError, UsageError
from equipoise.data.marks import differs, with_marks
from equipoise.data.rows import Branch, TokenRow


def row(*branches: tuple[str, list[int]]) -> TokenRow:
    made = (Branch(role, np.array(ids, dtype=np.int32), {"learn": np.ones(len(ids), dtype=bool)}) for role, ids in branches)
    return TokenRow("r", np.array([1], dtype=np.int32), tuple(made))


@pytest.mark.parametrize(
    ("chosen", "rejected", "marks"),
    [
        # 5 6 and 9 in common; 7 was put in, 8 stands in the place of nothing.
        ([5, 6, 7, 9], [5, 6, 8, 8, 9], ["..x.", "..xx."]),
        ([5, 6], [5, 6], ["..", ".."]),
        ([5], [6, 7], ["x", "xx"]),
        # Order counts: of 5 6 against 6 5 only one token is common, the first that matches.
        ([5, 6], [6, 5], [".x", "x."]),
        ([5, 9], [5, 7, 9], ["..", ".x."]),
    ],
)
def test_tokens_outside_what_the_pair_has_in_common_differ(chosen: list[int], rejected: list[int], marks: list[str]) -> None:
    made = differs(row(("chosen", chosen), ("rejected", rejected)))
    assert ["".join("x" if flag else "." for flag in mark) for mark in made] == marks


def test_other_branches_are_not_marked_and_what_is_no_pair_raises() -> None:
    made = differs(row(("gold", [5, 7]), ("chosen", [5]), ("rejected", [6])))
    assert [mark.tolist() for mark in made] == [[False, False], [True], [True]]
    with pytest.raises(DataError, match="Row r: the mark 'differs' compares a chosen and a rejected reply, found"):
        differs(row(("chosen", [5])))


def test_marks_are_put_on_branches_once() -> None:
    plain = row(("chosen", [5, 6]), ("rejected", [5]))
    assert with_marks(plain, ()) is plain
    marked = with_marks(plain, ["differs"])
    assert [{name: mark.tolist() for name, mark in branch.marks.items()} for branch in marked.branches] == [
        {"learn": [True, True], "differs": [False, True]},
        {"learn": [True], "differs": [False]},
    ]
    assert with_marks(marked, ["differs"]) is marked
    with pytest.raises(UsageError, match=r"no token mark 'difers'\. Did you mean 'differs'"):
        with_marks(plain, ["difers"])
